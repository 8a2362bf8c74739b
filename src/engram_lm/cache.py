"""The user's cache directory: what is built once and then only read, whole or not there at all.

A directory is built beside its place, synced, and renamed into it: a reader never sees half of one. A lock file lets
one process build while others wait; the system drops the lock of a process that dies, and the next builder clears
what it left behind.

    cache_directory()                                      # $ENGRAM_CACHE, else ~/.cache/engram-lm
    built_once(cache_directory() / "bases" / "x", build=lambda directory: …)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from engram_lm import durable
from engram_lm.errors import ConfigError


def cache_directory() -> Path:
    """`$ENGRAM_CACHE` where it is set, else `~/.cache/engram-lm`. Not created here."""
    chosen = os.environ.get("ENGRAM_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else Path.home() / ".cache" / "engram-lm"


def built_once(directory: Path, *, build: Callable[[Path], None]) -> Path:
    """`directory`, filled by `build(empty directory)` if it did not exist; once, however many processes ask."""
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = open(directory.with_name(f".{directory.name}.lock"), "a")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(
            f"{directory.parent} cannot be written ({error.strerror}). Set ENGRAM_CACHE to a directory that can."
        ) from None
    with lock:
        durable.lock(lock)
        if directory.is_dir():
            return directory
        unfinished = f".{directory.name}.partial-"
        # Only the lock's holder builds, so whatever carries this name is from a process that died.
        for left_behind in directory.parent.glob(unfinished.replace("[", "[[]") + "*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=unfinished))
        try:
            build(partial)
            for path in [*partial.rglob("*"), partial]:
                durable.sync_path(path)
            partial.chmod(0o755)
            durable.rename(partial, directory)
            durable.sync_directory(directory.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return directory
