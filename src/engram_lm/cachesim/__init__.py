"""How much of a table a cache must hold: a token stream played through addresses and caches. Needs no table and no weights.

`requests` reads token streams, `simulate` plays them, `kernels` are its compiled loops, `plot` draws the curves, and
`report` is what `engram-lm table simulate` prints.
"""
