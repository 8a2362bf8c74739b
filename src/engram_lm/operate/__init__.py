"""What engineers do with tables: look into them, check, compare and convert them. Files in, reports out; no torch, no GPU.

`sources` says what a path holds and `identify` what it should hold; `measure`, `compare`, `convert` and `doctor` are
functions that return plain records; `table_commands` prints them. `simulate` needs no table, only the tokens.

How much of a table a cache must hold: `requests` reads token streams, `simulate` plays them through addresses and
caches, `picture` draws the curves and `report` is what `engram-lm table simulate` prints.
"""
