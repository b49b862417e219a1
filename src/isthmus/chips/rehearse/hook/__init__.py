"""The folder that is put on the path of a rehearsed program."""
