"""The `engram-lm` command: one thin function a command, each importing what it needs when it is called.

Nothing here computes. `engram-lm --help` answers without importing torch, numba or numpy; tests hold it to that.

Exit codes: 0 done; 1 where `doctor` finds something wrong or `table diff` a difference; 2 refused, with one line on stderr
that starts with `engram-lm:`; 130 interrupted; 141 when the reader of a pipe has gone. Anything else is a bug of ours and
keeps its traceback.

    engram-lm addresses --profile deepseek-v4.1 --layer 1 --canonical --ids 0,5,17,-1,42 --json
"""

from engram_lm.cli import ablate, adapt, compile, eval, gates, index, model, serve, tables
from engram_lm.cli.app import INTERRUPTED, READER_GONE, REFUSED, app, main, run

# importing the modules is what makes their commands
__all__ = [
    "INTERRUPTED",
    "READER_GONE",
    "REFUSED",
    "ablate",
    "adapt",
    "app",
    "compile",
    "eval",
    "gates",
    "index",
    "main",
    "model",
    "run",
    "serve",
    "tables",
]
