"""One writer a directory: a lock that ends with its process, and an error that says who holds it (docs/store.md).

    lock = WriterLock(directory / "lock")      # CheckpointError: process 4711 on host has been writing since ...
    lock.release()

Only the kernel's lock decides; the file's text is for people.
"""

import contextlib
import json
import os
import socket
import time
import weakref
from pathlib import Path

from engram_lm import durable
from engram_lm.errors import CheckpointError

_HELD: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()
_MOST_TEXT = 4096


class WriterLock:
    """Held from when it is made to `release`, or to the end of the process.

    Args:
        wait_seconds: how long another writer is waited for.
    """

    def __init__(self, path: str | os.PathLike, *, wait_seconds: float = 0.0) -> None:
        self.path = Path(path)
        self._file = -1
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened to write: {error.strerror}.") from None
        try:
            _take(file, self.path, time.monotonic() + wait_seconds)
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 3)}
            # a full disk may lose the text, never the lock
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(facts).encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file, self._pid = file, os.getpid()
        if not _HELD:
            _forget_in_children()
        _HELD.add(self)

    def require_held(self) -> None:
        """CheckpointError in a forked child, and after `release`."""
        if self._file < 0:
            raise CheckpointError(
                f"{self.path.parent} is closed, or this is a fork of its writer: open it again."
            )

    def release(self) -> None:
        """Let others write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.release()


def _take(file: int, path: Path, until: float) -> None:
    while True:
        try:
            if durable.try_lock(file):
                return
        except OSError as error:
            raise CheckpointError(f"{path} cannot be locked: {error.strerror}.") from None
        if time.monotonic() >= until:
            raise CheckpointError(
                f"{path.parent} is being written by {_holder(file)}. Wait for it or end it; reading needs no lock."
            )
        time.sleep(0.01)


def _holder(file: int) -> str:
    try:
        facts = json.loads(os.pread(file, _MOST_TEXT, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(facts["since"])))
        return f"process {int(facts['pid'])} on {str(facts['host'])[:100]} since {since}"
    except (ValueError, KeyError, TypeError, OSError, OverflowError):
        return "another process"


_CHILDREN_FORGET: list[bool] = []


def _forget_in_children() -> None:
    """A forked child shares the open file and would hold the lock beyond its parent's end: it closes it first thing."""
    if not _CHILDREN_FORGET:
        _CHILDREN_FORGET.append(True)
        os.register_at_fork(after_in_child=lambda: [lock.release() for lock in list(_HELD)])
