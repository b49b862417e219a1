"""What a probe does on a rank. Each file here needs torch and the standard library alone, so that it can be given away.

A function takes a rank (`rank`, `world`, `device`, `beat(section, step)`) and arguments that JSON can hold, makes its
inputs from a seed, and returns a dict that JSON can hold. Where an answer can be wrong, the dict has the key `failed`.
A file imports no other of this folder and nothing of Isthmus: `isthmus case` packs it as it is.
"""
