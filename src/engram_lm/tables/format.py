"""The packed table file: docs/format.md in code. Reader, streaming writer, verification. NumPy alone.

with Writer(path, n_rows=n, width=256, codec="fp8_e4m3_e8m0", identity=facts) as writer:
    for records in ...:                      # uint8 [N, record_bytes], in row order
        writer.add(records)
    writer.finish()
header = read_header(path)
verify(path)
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.kernels import checks
from engram_lm.tables.codecs import CODEC_BY_ID, codec_named
from engram_lm.tables.layout import Layout, Segment

PAGE = 4096
VERSION = 1
SUFFIX = ".engram"
MAGIC = b"\x89ENGT\r\n\x1a"
PARTIAL_MAGIC = b"\x89ENGTpar"

_FIXED = struct.Struct("<8sIIQQQIIfIIIQQQQ32sII")
_MOST_ROWS = 2**48
_MOST_JSON = 2**24


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a table file says of itself. Derived fields follow docs/format.md."""

    n_rows: int
    width: int
    codec: str
    scale: float = 1.0
    identity: dict[str, Any] | None = None
    made_by: str = ""
    note: str = ""
    checksums_hash: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n_rows <= _MOST_ROWS or not 1 <= self.width <= 2**24:
            raise ConfigError(
                f"A table has 1 to 2^48 rows of 1 to 2^24 numbers; got {self.n_rows} of {self.width}."
            )
        codec_named(self.codec)
        if not (self.scale > 0 and np.isfinite(self.scale)):
            raise ConfigError(f"scale is {self.scale}; it must be a number above 0.")

    @property
    def record_bytes(self) -> int:
        return codec_named(self.codec).record_bytes(self.width)

    @property
    def records_per_page(self) -> int:
        return max(1, PAGE // self.record_bytes)

    @property
    def pages_per_record(self) -> int:
        return -(-self.record_bytes // PAGE)

    @property
    def n_pages(self) -> int:
        return -(-self.n_rows // self.records_per_page) * self.pages_per_record

    @property
    def pages_at(self) -> int:
        return _round_up(_FIXED.size + len(self._json()) + 8)

    @property
    def checksums_at(self) -> int:
        return self.pages_at + self.n_pages * PAGE

    @property
    def file_bytes(self) -> int:
        return self.checksums_at + _round_up(4 * self.n_pages)

    @property
    def identity_hash(self) -> bytes:
        return bytes(32) if self.identity is None else identity_hash(self.identity)

    def _json(self) -> bytes:
        facts = {"identity": self.identity, "made_by": self.made_by, "note": self.note}
        return json.dumps(facts, sort_keys=True).encode()

    def to_bytes(self, magic: bytes = MAGIC) -> bytes:
        """`pages_at` bytes."""
        text = self._json()
        fixed = _FIXED.pack(
            magic,
            VERSION,
            self.pages_at,
            0,
            0,
            self.n_rows,
            self.width,
            codec_named(self.codec).id,
            self.scale,
            self.record_bytes,
            self.records_per_page,
            self.pages_per_record,
            self.n_pages,
            self.pages_at,
            self.checksums_at,
            self.checksums_hash,
            self.identity_hash,
            len(text),
            0,
        )
        body = (fixed + text).ljust(self.pages_at - 8, b"\0")
        return body + struct.pack("<Q", _hash(body))

    def layout(self, path: Path) -> Layout:
        """Where the rows lie in the file `path` that has this header."""
        whole_pages = self.pages_per_record * PAGE
        return Layout(
            name=str(path),
            n_rows=self.n_rows,
            width=self.width,
            codec=self.codec,
            scale=self.scale,
            identity=self.identity,
            pages_at=self.pages_at,
            checksums_at=self.checksums_at,
            note=self.note,
            segments=(
                Segment(
                    path=path,
                    offset=self.pages_at,
                    first_row=0,
                    n_rows=self.n_rows,
                    stride=self.record_bytes,
                    group=self.records_per_page,
                    group_stride=whole_pages,
                    at=0,
                    n_bytes=self.record_bytes,
                ),
            ),
        )


def identity_hash(facts: dict[str, Any]) -> bytes:
    """sha256 over canonical JSON, as `engram_lm.addressing.Identity.hash`."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).digest()


def read_header(path: str | os.PathLike, *, magic: bytes = MAGIC) -> Header:
    """The header of a table file, every field checked. CheckpointError says what is wrong."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _read_header(path, file, magic)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _read_header(path: Path, file: BinaryIO, magic: bytes) -> Header:
    fixed = file.read(_FIXED.size)
    if len(fixed) < _FIXED.size or fixed[:8] != magic:
        what = "a table that was never finished" if fixed[:8] == PARTIAL_MAGIC else "no table file"
        raise CheckpointError(f"{path} is {what} (it begins with {fixed[:8]!r}).")
    (_, version, header_bytes, required, _, n_rows, width, codec, scale, *derived) = _FIXED.unpack(fixed)
    *derived, checksums_hash, identity, json_bytes, _ = derived
    if version != VERSION or required:
        raise CheckpointError(
            f"{path} is of version {version} with required features {required:#x}; this build reads version {VERSION} "
            "without any."
        )
    if codec not in CODEC_BY_ID:
        raise CheckpointError(f"{path} has codec {codec}; this build knows {sorted(CODEC_BY_ID)}.")
    if json_bytes > _MOST_JSON or header_bytes != _round_up(_FIXED.size + json_bytes + 8):
        raise CheckpointError(
            f"{path} has a header of {header_bytes} bytes with {json_bytes} of JSON: damaged."
        )
    body = fixed + file.read(header_bytes - _FIXED.size)
    if len(body) < header_bytes:
        raise CheckpointError(f"{path} ends in its header.")
    if struct.unpack("<Q", body[-8:])[0] != _hash(body[:-8]):
        raise CheckpointError(f"{path} has a damaged header: its checksum is wrong.")
    try:
        facts = json.loads(body[_FIXED.size : _FIXED.size + json_bytes])
        header = Header(
            n_rows=n_rows,
            width=width,
            codec=CODEC_BY_ID[codec].name,
            scale=scale,
            identity=facts["identity"],
            made_by=str(facts["made_by"]),
            note=str(facts["note"]),
            checksums_hash=checksums_hash,
        )
        wanted = header.to_bytes(magic)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has a header that cannot be: {error}.") from None
    if identity != header.identity_hash:
        raise IdentityError(
            f"{path} is marked with identity {identity.hex()[:12]}, but its facts have {header.identity_hash.hex()[:12]}."
        )
    if wanted[: _FIXED.size] != fixed:
        raise CheckpointError(f"{path} has a header whose sizes do not follow from its rows and codec.")
    size = os.fstat(file.fileno()).st_size
    if magic == MAGIC and size != header.file_bytes:
        raise CheckpointError(
            f"{path} has {size:,} bytes; its {header.n_rows:,} rows need {header.file_bytes:,}: cut short, or appended to."
        )
    return header


def open_packed(path: str | os.PathLike) -> Layout:
    """Where the rows of a packed file lie."""
    return read_header(path).layout(Path(path))


def read_checksums(path: Path, header: Header) -> np.ndarray:
    """uint32 [n_pages], themselves checked."""
    with open(path, "rb") as file:
        file.seek(header.checksums_at)
        section = np.fromfile(file, np.uint8, _round_up(4 * header.n_pages))
    if int(checks.xxh64(section)) != header.checksums_hash:
        raise CheckpointError(f"{path} has damaged checksums; the rows cannot be trusted.")
    return section.view("<u4")[: header.n_pages]


def read_checksums_of(layout: Layout) -> np.ndarray | None:
    """The checksums of a packed file's pages; None for files that have none."""
    if layout.checksums_at is None:
        return None
    path = layout.segments[0].path
    return read_checksums(path, read_header(path))


def verify(path: str | os.PathLike, *, report: Callable[[int, int], None] | None = None) -> Header:
    """Read every page and check it. report(pages done, pages in all). CheckpointError names the first bad rows."""
    path = Path(path)
    header = read_header(path)
    sums = read_checksums(path, header)
    per_read = 4096
    with open(path, "rb", buffering=0) as file:
        file.seek(header.pages_at)
        for start in range(0, header.n_pages, per_read):
            n = min(per_read, header.n_pages - start)
            data = np.fromfile(file, np.uint8, n * PAGE)
            bad = checks.first_bad_page(data, sums[start : start + n]) if len(data) == n * PAGE else 0
            if bad >= 0:
                raise damaged(path, header, start + bad)
            if report is not None:
                report(start + n, header.n_pages)
    return header


def damaged(path: Path, header: Header, page: int) -> CheckpointError:
    """The error for a page whose checksum is wrong."""
    first = page // header.pages_per_record * header.records_per_page
    last = min(first + header.records_per_page, header.n_rows) - 1
    rows = f"row {first}" if first == last else f"rows {first} to {last}"
    return CheckpointError(
        f"{path}: page {page} ({rows}) is damaged: its checksum is wrong. Nothing of it is used."
    )


def damaged_rows(layout: Layout, page: int) -> CheckpointError:
    """`damaged`, for who holds a layout."""
    path = layout.segments[0].path
    return damaged(path, read_header(path), page)


class Writer:
    """A table file being written, row after row, in a few MB of memory; continues what a killed writer left.

    `rows_done` is the row to go on with: 0, or more where a `.partial` with the same header was found. Use as a context
    manager: leaving it without `finish()` keeps the `.partial`; `discard()` removes it.

    Raises: CheckpointError where another process writes the same file, or the partial file is of another table.
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
        with _named(self.partial):
            self._file = _locked(self.partial)
            self._sums = open(self.partial_sums, "r+b" if self.partial_sums.exists() else "w+b")  # noqa: SIM115
            try:
                pages_done = self._continue()
            except BaseException:
                self.close()
                raise
        self.rows_done = min(
            pages_done // self.header.pages_per_record * self.header.records_per_page, n_rows
        )
        self._tail = np.empty((0, self.header.record_bytes), np.uint8)

    def __enter__(self) -> "Writer":
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
            if found[:8] == MAGIC and _FIXED.unpack(found[: _FIXED.size])[15] == self._sums_hash():
                # killed between the last write and the rename
                found = start
                self._file.seek(0)
                self._file.write(start)
            if found != start:
                raise CheckpointError(
                    f"{self.partial} holds part of another table. Finish that one, or remove the file to begin anew."
                )
        else:
            self._file.seek(0)
            self._file.write(start)
            self._sums.truncate(0)
        n_file = (os.fstat(self._file.fileno()).st_size - len(start)) // PAGE
        n_pages = max(0, min(n_file, os.fstat(self._sums.fileno()).st_size // 4, header.n_pages))
        n_pages -= n_pages % header.pages_per_record
        # a kill may leave pages in the file that never reached the disk: check those of the last 64 MB
        recent = max(0, n_pages - (64 << 20) // PAGE)
        self._sums.seek(4 * recent)
        sums = np.frombuffer(self._sums.read(4 * (n_pages - recent)), "<u4")
        self._file.seek(len(start) + recent * PAGE)
        for i in range(0, n_pages - recent, 1024):
            part = sums[i : i + 1024]
            bad = checks.first_bad_page(np.frombuffer(self._file.read(len(part) * PAGE), np.uint8), part)
            if bad >= 0:
                n_pages = recent + i + bad
                n_pages -= n_pages % header.pages_per_record
                break
        self._file.truncate(len(start) + n_pages * PAGE)
        self._file.seek(0, os.SEEK_END)
        self._sums.truncate(4 * n_pages)
        self._sums.seek(0, os.SEEK_END)
        return n_pages

    def add(self, records_NR: np.ndarray) -> None:
        """Append records uint8 [N, record_bytes]. More rows than the table has: ConfigError."""
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
        self.rows_done += len(records_NR)
        per_page = header.records_per_page
        for start in range(0, len(records_NR), max(1, (1 << 20) // PAGE) * per_page):
            part = records_NR[start : start + max(1, (1 << 20) // PAGE) * per_page]
            waiting = np.concatenate([self._tail, part])
            whole = len(waiting) // per_page * per_page
            self._write(waiting[:whole])
            self._tail = waiting[whole:].copy()

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
        checks.page_sums(flat, sums)
        with _named(self.partial):
            self._file.write(flat.data)
            self._sums.write(sums.astype("<u4").tobytes())

    def finish(self) -> Header:
        """Checksums, header, sync, rename. ConfigError when rows are missing."""
        header = self.header
        if self.rows_done != header.n_rows:
            raise ConfigError(f"{self.path} wants {header.n_rows:,} rows; {self.rows_done:,} were added.")
        self._write(self._tail)
        with _named(self.partial):
            section = self._sums_section()
            self._file.write(section.data)
            finished = replace(header, checksums_hash=int(checks.xxh64(section)))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.seek(0)
            self._file.write(finished.to_bytes())
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self.partial, self.path)
            self.partial_sums.unlink()
            sync_directory(self.path.parent)
        self.close()
        return finished

    def _sums_section(self) -> np.ndarray:
        self._sums.flush()
        self._sums.seek(0)
        n = 4 * self.header.n_pages
        return np.frombuffer(self._sums.read(n).ljust(_round_up(n), b"\0"), np.uint8)

    def _sums_hash(self) -> int:
        return int(checks.xxh64(self._sums_section()))

    def discard(self) -> None:
        """Remove what was written."""
        self.partial.unlink(missing_ok=True)
        self.partial_sums.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Keep the partial file for a later writer."""
        self._file.close()
        sums = getattr(self, "_sums", None)
        if sums is not None:
            sums.close()


def _locked(path: Path) -> BinaryIO:
    """The file, made where it is missing, with an exclusive lock that dies with this process."""
    while True:
        file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the writer before us may have renamed the file after we opened it
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        except OSError:
            file.close()
            raise CheckpointError(f"{path} is being written by another process.") from None
        file.close()


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` last."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None


def _hash(data: bytes) -> int:
    return int(checks.xxh64(np.frombuffer(data, np.uint8)))


def _round_up(n: int) -> int:
    return -(-n // PAGE) * PAGE
