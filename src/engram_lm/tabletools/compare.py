"""Where two tables differ: which rows, how many, by how much. Formats and codecs may differ; row counts and widths may not.

With one codec (and one scale) rows are compared byte by byte, so −0 differs from 0; with two, by their numbers. NaN
equals NaN.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.storage import Layout
from engram_lm.tabletools.measure import row_norms
from engram_lm.tabletools.sources import Decoder, chosen, sample_rows, whole

_LISTED = 10


@dataclass(kw_only=True)
class Difference:
    """Of the rows compared. largest: the largest difference of two numbers, in row `largest_row`. first_rows: the first few
    that differ, each with the largest difference of its numbers and the norms on both sides."""

    n_rows: int
    by: str
    rows_compared: int = 0
    rows_differing: int = 0
    largest: float = 0.0
    largest_row: int | None = None
    broken_on_one_side: int = 0
    first_rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def compare(
    a: Layout,
    b: Layout,
    *,
    sample: int | None = None,
    report: Callable[[int], None] = lambda rows_read: None,
) -> Difference:
    """Every row, or `sample` of them. ConfigError for tables of different shape."""
    if (a.n_rows, a.width) != (b.n_rows, b.width):
        raise ConfigError(
            f"{a.name} has {a.n_rows:,} rows of {a.width} numbers, {b.name} {b.n_rows:,} of {b.width}: they cannot be "
            "compared row by row."
        )
    same_codec = (a.codec, a.scale) == (b.codec, b.scale)
    found = Difference(n_rows=a.n_rows, by="bytes" if same_codec else "numbers")
    if sample is None:
        parts = together(whole(a), whole(b))
    else:
        row_U = sample_rows(a.n_rows, sample)
        parts = together(chosen(a, row_U), chosen(b, row_U))
    decode_a, decode_b = Decoder(a), Decoder(b)
    for row_U, record_a, record_b in parts:
        if same_codec:
            differs_U = (record_a != record_b).any(1)
            row_D, record_a, record_b = row_U[differs_U], record_a[differs_U], record_b[differs_U]
        else:
            row_D = row_U
        if len(row_D):
            _add(found, row_D, decode_a.rows(record_a), decode_b.rows(record_b), same_codec)
        found.rows_compared += len(row_U)
        report(found.rows_compared)
    return found


def _add(found: Difference, row_D: np.ndarray, a_DW: np.ndarray, b_DW: np.ndarray, by_bytes: bool) -> None:
    """Count rows (all of which differ where `by_bytes`)."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap_DW = np.abs(a_DW.astype(np.float64) - b_DW)
    gap_DW[(a_DW == b_DW) | (np.isnan(a_DW) & np.isnan(b_DW))] = 0.0
    broken_D = ~np.isfinite(gap_DW).all(1)
    gap_D = np.where(np.isfinite(gap_DW), gap_DW, 0.0).max(1)
    differs_D = np.ones(len(row_D), bool) if by_bytes else broken_D | (gap_D > 0)
    found.rows_differing += int(differs_D.sum())
    found.broken_on_one_side += int(broken_D.sum())
    if gap_D.max() > found.largest:
        found.largest, found.largest_row = float(gap_D.max()), int(row_D[gap_D.argmax()])
    for d in np.flatnonzero(differs_D)[: _LISTED - len(found.first_rows)].tolist():
        norm_a, norm_b = row_norms(a_DW[d : d + 1])[0], row_norms(b_DW[d : d + 1])[0]
        found.first_rows.append(
            {
                "row": int(row_D[d]),
                "largest": None if broken_D[d] else float(gap_D[d]),
                "norms": [float(norm_a), float(norm_b)],
            }
        )


def together(
    a: Iterator[tuple[np.ndarray, np.ndarray]], b: Iterator[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, records of a, records of b) of two streams over the same rows that are cut differently."""
    none = (np.empty(0, np.int64), np.empty((0, 0), np.uint8))
    (row_a, record_a), (row_b, record_b) = none, none
    while True:
        if not len(row_a):
            row_a, record_a = next(a, none)
        if not len(row_b):
            row_b, record_b = next(b, none)
        n = min(len(row_a), len(row_b))
        if not n:
            return
        yield row_a[:n], record_a[:n], record_b[:n]
        row_a, record_a, row_b, record_b = row_a[n:], record_a[n:], row_b[n:], record_b[n:]
