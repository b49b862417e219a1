"""The folder that is put on the path of a program that is watched from within."""
