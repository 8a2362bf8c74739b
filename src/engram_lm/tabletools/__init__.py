"""What engineers do with tables: look into them, check, compare and convert them. Files in, reports out; no torch, no GPU.

`sources` says what a path holds and `identify` what it should hold; `measure`, `compare`, `convert` and `doctor` are
functions that return plain records; `commands` prints them.
"""
