"""Files that are there whole or as they were, whenever a process or a machine stops: the one place that syncs and renames.

    write_atomic(out / "report.md", text)             # the old file or the new one, never half of either
    with replacing(path) as beside:                   # the same for a library that writes a file by its name
        figure.savefig(beside, format="png")
    with replacing_file(path) as file: ...            # the same for an open file
    if not try_lock(file): ...                        # an exclusive lock that ends with its process

Where not said otherwise, errors are OSErrors: who calls says in a sentence what could not be written.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from engram_lm.errors import CheckpointError


class HasFile(Protocol):
    """An open file."""

    def fileno(self) -> int: ...


def sync(file: int | HasFile) -> None:
    """What was written to an open file is on disk when this returns."""
    os.fsync(file)


def sync_path(path: Path) -> None:
    """What a file or directory of this name holds is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(directory: Path) -> None:
    """Names made, changed and removed so far are on disk when this returns."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(old: str | os.PathLike, new: Path) -> None:
    """Give a file another name, in place of what has it. Lasts once the directory is synced."""
    os.replace(old, new)


def write_atomic(path: Path, data: str | bytes, *, shared: bool = False) -> None:
    """Replace a file's content. str is written as UTF-8. shared: as in `replacing`."""
    with replacing_file(path, shared=shared) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing_file(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """An open file that takes the name `path` when the block ends well; else nothing changes. shared: as in `replacing`."""
    with replacing(path, shared=shared) as beside, open(beside, "wb") as file:
        yield file


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """The name of a file to be written in the same directory: when the block ends well, it is synced and named `path`.

    shared: several processes may do this at once; the last one's file stays. Otherwise what a killed process left behind is
    written over by the next.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}" if shared else f".{path.name}")
    try:
        yield beside
        sync_path(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    # a directory that may be written but not read cannot be synced
    with contextlib.suppress(PermissionError):
        sync_directory(path.parent)


def write_new(path: Path, data: bytes | memoryview) -> int:
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


def lock(file: int | HasFile) -> None:
    """Wait for the exclusive lock of an open file. It ends when the file is closed, and with the process."""
    fcntl.flock(file, fcntl.LOCK_EX)


def try_lock(file: int | HasFile) -> bool:
    """Take the exclusive lock of an open file; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
