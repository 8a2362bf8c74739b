"""Where this package keeps what it can make again.

cache_directory()                                      # $ENGRAM_CACHE, else ~/.cache/engram-lm
"""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$ENGRAM_CACHE` where it is set, else `~/.cache/engram-lm`. Not created here."""
    chosen = os.environ.get("ENGRAM_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "engram-lm"
