"""Where the bytes of a row lie: files, offsets and strides as plain data, the same for packed files and safetensors.

A row is a record of `record_bytes` (docs/format.md). A packed file holds records whole, some to a page; a checkpoint holds
codes in one tensor and scales in another, each perhaps split over files. Both are segments:

    byte b of row r, for first_row <= r < first_row + n_rows, i = r - first_row, at <= b < at + n_bytes, lies at
    offset + (i // group) * group_stride + (i % group) * stride + (b - at)      of the file `path`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.storage.codecs import Codec, codec_named


@dataclass(frozen=True, kw_only=True)
class Extent:
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

    def __post_init__(self) -> None:
        spans = (self.group - 1) * self.stride + self.n_bytes
        if (
            min(self.offset, self.first_row, self.at) < 0
            or min(self.n_rows, self.group, self.n_bytes) < 1
            or (self.n_rows > 1 and self.group > 1 and self.stride < self.n_bytes)
            or (self.n_rows > self.group and self.group_stride < spans)
        ):
            raise CheckpointError(f"{self.path}: rows cannot lie like this, one over another: {self}.")

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
    which a checkpoint keeps the rows (see `storage.shipped`).
    """

    name: str
    n_rows: int
    width: int
    codec: str
    segments: tuple[Extent, ...]
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
        # as many bytes as wanted, none outside, none twice: then every byte once
        places = [(s.first_row, s.at, s.first_row + s.n_rows, s.at + s.n_bytes) for s in self.segments]
        from_S2, to_S2 = np.split(np.array(places, np.int64), 2, axis=1)
        if (to_S2 > (self.n_rows, self.record_bytes)).any():
            raise CheckpointError(f"{self.name}: a segment holds rows or bytes beyond the table's.")
        for k in range(1, len(places)):
            if ((from_S2[:k] < to_S2[k]) & (from_S2[k] < to_S2[:k])).all(1).any():
                raise CheckpointError(
                    f"{self.name}: bytes of row {from_S2[k, 0]:,} and on lie in two places, others nowhere."
                )

    @property
    def rule(self) -> Codec:
        return codec_named(self.codec)

    @property
    def record_bytes(self) -> int:
        return self.rule.record_bytes(self.width)
