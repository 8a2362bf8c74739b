"""Where the bytes of a row lie: files, offsets and strides as plain data, the same for packed files and safetensors.

A row is a record of `record_bytes` (docs/format.md). A packed file holds records whole, some to a page; a checkpoint holds
codes in one tensor and scales in another, each perhaps split over files. Both are segments:

    byte b of row r, for first_row <= r < first_row + n_rows, i = r - first_row, at <= b < at + n_bytes, lies at
    offset + (i // group) * group_stride + (i % group) * stride + (b - at)      of the file `path`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError
from engram_lm.tables.codecs import CODECS, Codec


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of rows in one file, and which bytes of each record it holds.

    offset: of the first row. group, group_stride: rows that lie `stride` apart, and bytes from one group to the next.
    at, n_bytes: the part of the record.
    """

    path: Path
    offset: int
    first_row: int
    n_rows: int
    stride: int
    group: int
    group_stride: int
    at: int
    n_bytes: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        last = self.n_rows - 1
        return (
            self.offset
            + last // self.group * self.group_stride
            + last % self.group * self.stride
            + self.n_bytes
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table's rows in files.

    segments cover every byte of every row once. identity: readable facts or None. scale: of codec `fp8_e4m3`.
    checksums_at: where the packed file keeps one checksum a page, or None. note: the packed header's, or the names under
    which a checkpoint keeps the rows (see `tables.shipped`).
    """

    name: str
    n_rows: int
    width: int
    codec: str
    segments: tuple[Segment, ...]
    scale: float = 1.0
    identity: dict[str, Any] | None = None
    checksums_at: int | None = None
    pages_at: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        covered = sum(segment.n_rows * segment.n_bytes for segment in self.segments)
        if covered != self.n_rows * self.record_bytes:
            raise CheckpointError(
                f"{self.name}: {self.n_rows:,} rows of {self.record_bytes} bytes are wanted; the files hold {covered:,}."
            )

    @property
    def rule(self) -> Codec:
        return CODECS[self.codec]

    @property
    def record_bytes(self) -> int:
        return self.rule.record_bytes(self.width)
