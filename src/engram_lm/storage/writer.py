"""A packed table file being written (docs/format.md): streaming, resumable, finished by a rename. NumPy alone.

with Writer(path, n_rows=n, width=256, codec="fp8_e4m3_e8m0", identity=facts) as writer:
    for records in ...:                      # uint8 [N, record_bytes], in row order, from writer.rows_done on
        writer.add(records)
    writer.finish()
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.kernels import checksums
from engram_lm.storage.codecs import codec_named
from engram_lm.storage.format import MAGIC, PAGE, PARTIAL_MAGIC, Header, whole_pages


class TableWriter:
    """A table file being written, row after row, in a few MB of memory; continues what a killed writer left.

    `rows_done` is the row to go on with: 0, or more where a `.partial` with the same header was found. Use as a context
    manager: leaving it without `finish()` keeps the `.partial`; `discard()` removes it.

    Raises: CheckpointError where another writer has the same file, the partial file is of another table, or the disk is
    full: what was written so far is then closed, and a new Writer goes on with it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        n_rows: int,
        width: int,
        codec: str,
        scale: float = 1.0,
        identity: dict[str, Any] | None = None,
        made_by: str = "engram-lm",
        note: str = "",
    ) -> None:
        self.path = Path(path)
        self.header = Header(
            n_rows=n_rows,
            width=width,
            codec=codec,
            scale=scale,
            identity=identity,
            made_by=made_by,
            note=note,
        )
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.partial_sums = self.path.with_name(self.path.name + ".partial.sums")
        self._finished = False
        with _named(self.partial):
            self._file = _locked(self.partial)
        with self._writing():
            self._sums = open(self.partial_sums, "r+b" if self.partial_sums.exists() else "w+b")  # noqa: SIM115
            pages_done = self._continue()
        self.rows_done = min(
            pages_done // self.header.pages_per_record * self.header.records_per_page, n_rows
        )
        self._tail = np.empty((0, self.header.record_bytes), np.uint8)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _continue(self) -> int:
        """Whole pages that are already right; both files are cut to them."""
        header = self.header
        start = header.to_bytes(PARTIAL_MAGIC)
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() >= len(start):
            self._file.seek(0)
            found = self._file.read(len(start))
            # killed between the final header, or a part of it, and the rename: these three differ
            begun = start[:8] + found[8:88] + start[88:96] + found[96:-8] + start[-8:]
            if begun != start or found[:8] not in (MAGIC, PARTIAL_MAGIC):
                raise CheckpointError(
                    f"{self.partial} holds part of another table. Finish that one, or remove the file to begin anew."
                )
            if found != start:
                self._file.seek(0)
                self._file.write(start)
        else:
            self._file.seek(0)
            self._file.write(start)
            self._sums.truncate(0)
        n_file = (os.fstat(self._file.fileno()).st_size - len(start)) // PAGE
        n_pages = max(0, min(n_file, os.fstat(self._sums.fileno()).st_size // 4, header.n_pages))
        n_pages -= n_pages % header.pages_per_record
        # a machine that lost power may have kept any page and lost any other: check them all
        self._sums.seek(0)
        sums = np.frombuffer(self._sums.read(4 * n_pages), "<u4")
        self._file.seek(len(start))
        for i in range(0, n_pages, 1024):
            part = sums[i : i + 1024]
            bad = checksums.first_bad_page(np.frombuffer(self._file.read(len(part) * PAGE), np.uint8), part)
            if bad >= 0:
                n_pages = i + bad
                n_pages -= n_pages % header.pages_per_record
                break
        self._file.truncate(len(start) + n_pages * PAGE)
        self._file.seek(0, os.SEEK_END)
        self._sums.truncate(4 * n_pages)
        self._sums.seek(0, os.SEEK_END)
        return n_pages

    def add(self, records_NR: np.ndarray) -> None:
        """Append records uint8 [N, record_bytes]. More rows than the table has: ConfigError."""
        self._require_open()
        header = self.header
        if records_NR.dtype != np.uint8 or records_NR.shape[1:] != (header.record_bytes,):
            raise ConfigError(
                f"{self.path} takes records of uint8 [N, {header.record_bytes}]; got {records_NR.dtype} "
                f"{list(records_NR.shape)}."
            )
        if self.rows_done + len(records_NR) > header.n_rows:
            raise ConfigError(
                f"{self.path} has {header.n_rows:,} rows; {self.rows_done + len(records_NR):,} were added."
            )
        per_page = header.records_per_page
        step = max(1, (1 << 20) // (header.pages_per_record * PAGE)) * per_page
        with self._writing():
            for start in range(0, len(records_NR), step):
                part = records_NR[start : start + step]
                waiting = np.concatenate([self._tail, part])
                whole = len(waiting) // per_page * per_page
                self._write(waiting[:whole])
                self._tail = waiting[whole:].copy()
                self.rows_done += len(part)

    def add_rows(self, rows_NW: np.ndarray) -> None:
        """Append float32 rows [N, width], encoded."""
        self.add(codec_named(self.header.codec).encode(rows_NW, scale=self.header.scale))

    def _write(self, records_NR: np.ndarray) -> None:
        if not len(records_NR):
            return
        header, N = self.header, len(records_NR)
        per_page = header.records_per_page
        groups = -(-N // per_page)
        pages = np.zeros((groups, header.pages_per_record * PAGE), np.uint8)
        filled = np.zeros((groups * per_page, header.record_bytes), np.uint8)
        filled[:N] = records_NR
        pages[:, : per_page * header.record_bytes] = filled.reshape(groups, -1)
        flat = pages.reshape(-1)
        sums = np.empty(len(flat) // PAGE, np.uint32)
        checksums.page_sums(flat, sums)
        self._file.write(flat.data)
        self._sums.write(sums.astype("<u4").tobytes())

    def finish(self) -> Header:
        """Checksums, header, sync, rename. ConfigError when rows are missing."""
        self._require_open()
        header = self.header
        if self.rows_done != header.n_rows:
            raise ConfigError(f"{self.path} wants {header.n_rows:,} rows; {self.rows_done:,} were added.")
        with self._writing():
            self._write(self._tail)
            section = self._sums_section()
            self._file.write(section.data)
            finished = replace(header, checksums_hash=int(checksums.xxh64(section)))
            self._file.flush()
            durable.sync(self._file)
            self._file.seek(0)
            self._file.write(finished.to_bytes())
            self._file.flush()
            durable.sync(self._file)
            durable.rename(self.partial, self.path)
            self._finished = True
            self.partial_sums.unlink(missing_ok=True)
            durable.sync_directory(self.path.parent)
        self.close()
        return finished

    def _sums_section(self) -> np.ndarray:
        self._sums.flush()
        self._sums.seek(0)
        n = 4 * self.header.n_pages
        return np.frombuffer(self._sums.read(n).ljust(whole_pages(n), b"\0"), np.uint8)

    def discard(self) -> None:
        """Remove what was written, unless it was finished."""
        if not self._finished:
            with _named(self.partial):
                if self._file.closed:
                    self._file = _locked(self.partial)
                # the locked file last: whoever comes next finds neither
                self.partial_sums.unlink(missing_ok=True)
                self.partial.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Keep the partial file for a later writer."""
        for file in (getattr(self, "_sums", None), self._file):
            if file is not None:
                # checksums that find no room cost the later writer those pages, no more
                with contextlib.suppress(OSError):
                    file.close()

    def _require_open(self) -> None:
        if self._file.closed:
            raise CheckpointError(
                f"{self.path}: this writer was closed, or failed before. Open a new one; it goes on with what is there."
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What failed may have left half a page: nothing is written after it."""
        try:
            with _named(self.partial):
                yield
        except BaseException:
            self.close()
            raise


def _locked(path: Path) -> BinaryIO:
    """The file, made where it is missing, with an exclusive lock that dies with this process."""
    while True:
        # made or found in one step, and never cut: it may be another writer's
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if not durable.try_lock(file):
                raise CheckpointError(f"{path} is being written by another writer, which holds its lock.")
            # the writer before us may have renamed the file after we opened it
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None
