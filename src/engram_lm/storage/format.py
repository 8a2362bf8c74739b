"""The packed table file: docs/format.md in code. Header, layout, verification; `storage.writer` writes it. NumPy alone.

header = read_header(path)
layout = open_packed(path)          # for HostStore.load, DiskStore
verify(path)
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.kernels import checksums
from engram_lm.storage.codecs import CODEC_BY_ID, codec_named
from engram_lm.storage.layout import Extent, Layout

PAGE = 4096
VERSION = 1
SUFFIX = ".engram"
MAGIC = b"\x89ENGT\r\n\x1a"
PARTIAL_MAGIC = b"\x89ENGTpar"

_FIXED = struct.Struct("<8sIIQQQIIfIIIQQQQ32sII")
_MOST_ROWS = 2**48
_MOST_JSON = 2**24
_MOST_PAGES = 2**50


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
    # as read: another writer may space it differently, or say more
    json_text: bytes = field(default=b"", repr=False, compare=False)

    def __post_init__(self) -> None:
        # the file keeps a float32
        with np.errstate(over="ignore"):
            object.__setattr__(self, "scale", float(np.float32(self.scale)))
        if not 1 <= self.n_rows <= _MOST_ROWS or not 1 <= self.width <= 2**24:
            raise ConfigError(
                f"A table has 1 to 2^48 rows of 1 to 2^24 numbers; got {self.n_rows} of {self.width}."
            )
        if self.n_pages > _MOST_PAGES:
            raise ConfigError(
                f"{self.n_rows:,} rows of {self.record_bytes:,} bytes are more than a file holds."
            )
        if not (self.scale > 0 and np.isfinite(self.scale)):
            raise ConfigError(f"scale is {self.scale}; it must be a float32 above 0.")
        if self.scale != 1 and self.codec != "fp8_e4m3":
            raise ConfigError(
                f"scale is {self.scale} without effect: {self.codec} has none. Only fp8_e4m3 has one."
            )
        if self.identity is not None and not isinstance(self.identity, dict):
            raise ConfigError(f"identity is {self.identity!r}; it must be a dict of facts or None.")
        if len(self._json()) > _MOST_JSON:
            raise ConfigError(
                f"identity, made_by and note have {len(self._json()):,} bytes; at most {_MOST_JSON:,}."
            )

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
        return whole_pages(_FIXED.size + len(self._json()) + 8)

    @property
    def checksums_at(self) -> int:
        return self.pages_at + self.n_pages * PAGE

    @property
    def file_bytes(self) -> int:
        return self.checksums_at + whole_pages(4 * self.n_pages)

    @property
    def identity_hash(self) -> bytes:
        return bytes(32) if self.identity is None else identity_hash(self.identity)

    def _json(self) -> bytes:
        facts = {"identity": self.identity, "made_by": self.made_by, "note": self.note}
        if self.json_text:
            said = json.loads(self.json_text)
            if facts == {name: said.get(name) for name in facts}:
                return self.json_text
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
                Extent(
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
            "without any. Upgrade engram-lm."
        )
    if codec not in CODEC_BY_ID:
        raise CheckpointError(f"{path} has codec {codec}; this build knows {sorted(CODEC_BY_ID)}.")
    if json_bytes > _MOST_JSON or header_bytes != whole_pages(_FIXED.size + json_bytes + 8):
        raise CheckpointError(
            f"{path} has a header of {header_bytes} bytes with {json_bytes} of JSON: damaged."
        )
    body = fixed + file.read(header_bytes - _FIXED.size)
    if len(body) < header_bytes:
        raise CheckpointError(f"{path} ends in its header.")
    if struct.unpack("<Q", body[-8:])[0] != _hash(body[:-8]):
        raise CheckpointError(f"{path} has a damaged header: its checksum is wrong.")
    try:
        text = body[_FIXED.size : _FIXED.size + json_bytes]
        facts = json.loads(text.decode("utf-8"))
        if not all(isinstance(facts[name], str) for name in ("made_by", "note")):
            raise ValueError("made_by and note must be texts")
        header = Header(
            n_rows=n_rows,
            width=width,
            codec=CODEC_BY_ID[codec].name,
            scale=scale,
            identity=facts["identity"],
            made_by=facts["made_by"],
            note=facts["note"],
            checksums_hash=checksums_hash,
            json_text=text,
        )
        wanted = header.to_bytes(magic)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that cannot be: {error}.") from None
    if identity != header.identity_hash:
        raise IdentityError(
            f"{path} is marked with identity {identity.hex()[:12]}, but its facts have {header.identity_hash.hex()[:12]}."
        )
    # but for the features a reader may ignore
    if wanted[:24] != fixed[:24] or wanted[32 : _FIXED.size] != fixed[32:]:
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
    try:
        with open(path, "rb") as file:
            file.seek(header.checksums_at)
            section = np.fromfile(file, np.uint8, whole_pages(4 * header.n_pages))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if int(checksums.xxh64(section)) != header.checksums_hash:
        raise CheckpointError(f"{path} has damaged checksums; the rows cannot be trusted.")
    return section.view("<u4")[: header.n_pages]


def read_checksums_of(layout: Layout) -> np.ndarray | None:
    """The checksums of a packed file's pages; None for files that have none. CheckpointError where it is another file now."""
    if layout.checksums_at is None:
        return None
    path = layout.segments[0].path
    header = read_header(path)
    if replace(header.layout(path), name=layout.name) != layout:
        raise CheckpointError(f"{path} was replaced by another table since it was opened. Open it again.")
    return read_checksums(path, header)


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
            bad = checksums.first_bad_page(data, sums[start : start + n]) if len(data) == n * PAGE else 0
            if bad >= 0:
                raise damaged(path, header, start + bad)
            if report is not None:
                report(start + n, header.n_pages)
    return header


def damaged(path: Path, header: Header, page: int) -> CheckpointError:
    """The error for a page whose checksum is wrong."""
    return damaged_rows(header.layout(path), page)


def damaged_rows(layout: Layout, page: int) -> CheckpointError:
    """`damaged`, for who holds a layout: the file itself may be gone by now."""
    segment = layout.segments[0]
    first = page // (segment.group_stride // PAGE) * segment.group
    last = min(first + segment.group, layout.n_rows) - 1
    rows = f"row {first}" if first == last else f"rows {first} to {last}"
    return CheckpointError(
        f"{segment.path}: page {page} ({rows}) is damaged: its checksum is wrong. Nothing of it is used."
    )


def _hash(data: bytes) -> int:
    return int(checksums.xxh64(np.frombuffer(data, np.uint8)))


def whole_pages(n: int) -> int:
    """n rounded up to bytes of whole pages."""
    return -(-n // PAGE) * PAGE
