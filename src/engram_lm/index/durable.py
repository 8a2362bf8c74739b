"""Files that are there or not at all: written, synced, renamed (docs/store.md).

write_synced(directory / "000000000009.mask", data)       # a new name: nobody knows of it yet
replace_synced(directory / "manifest", data)              # the old file or the new one, whatever happens
"""

import contextlib
import os
from pathlib import Path

from engram_lm.errors import CheckpointError


def write_synced(path: Path, data: bytes | memoryview) -> int:
    """A new file with its content on disk; returns it open to read. CheckpointError, and no file, where that fails.

    One that is there already is left as it is: somebody may have it mapped.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    except BaseException as error:
        os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
        raise
    return file


def sync_directory(directory: Path) -> None:
    """Names made, changed and removed so far are on disk when this returns."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def same_file(path: Path, file: int) -> bool:
    """Whether `path` is the open file. An inode is not given to another file while it is open, so this is exact."""
    try:
        found, wanted = os.stat(path), os.fstat(file)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
