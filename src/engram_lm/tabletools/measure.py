"""What a table's numbers look like: norms of rows, zero rows, numbers that are none, scales. One pass, a few MB at a time.

A norm is sqrt(sum of squares) of a decoded row. Minimum, maximum and mean are exact; the median and the histogram come
from bins of 1/64 octave, so the median is right within 0.6 %.

    stats = measure(layout, whole(layout))
    stats.median_norm, stats.zero_rows, stats.scale_counts
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_lm.storage import Layout
from engram_lm.tabletools.sources import Decoder

_PER_OCTAVE = 64
_LOWEST, _HIGHEST = -160, 160  # octaves: beyond any float32 row
_LISTED = 5


@dataclass(kw_only=True)
class Stats:
    """Of the rows that were read. Norms are of rows that are neither zero nor broken; None where there is none.

    zero_rows: every number 0. broken_rows: with a NaN or an infinity. The first few of each are listed.
    longest_zero_run: (first row, rows), where the rows were read without gaps. largest: of the absolute numbers in rows that
    are not broken.
    norm_octaves: rows by floor(log2(norm)). scale_counts: blocks by scale, for codecs with block scales: 2^key.
    """

    n_rows: int
    rows_read: int = 0
    min_norm: float | None = None
    median_norm: float | None = None
    mean_norm: float | None = None
    max_norm: float | None = None
    zero_rows: int = 0
    first_zero_rows: list[int] = field(default_factory=list)
    longest_zero_run: tuple[int, int] | None = None
    broken_rows: int = 0
    first_broken_rows: list[int] = field(default_factory=list)
    largest: float = 0.0
    norm_octaves: dict[int, int] = field(default_factory=dict)
    scale_counts: dict[int, int] = field(default_factory=dict)
    nan_scales: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def measure(
    layout: Layout,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    report: Callable[[int], None] = lambda rows_read: None,
) -> Stats:
    """Stats of the (rows, records) that `sources.whole`, `sampled` or `chosen` yield."""
    decoder, stats = Decoder(layout), Stats(n_rows=layout.n_rows)
    bins = np.zeros((_HIGHEST - _LOWEST) * _PER_OCTAVE, np.int64)
    scale_bins = np.zeros(256, np.int64)
    total, run, next_row = 0.0, (0, 0), 0
    for row_U, record_UR in parts:
        rows_UW = decoder.rows(record_UR)
        norm_U = row_norms(rows_UW)
        broken_U, zero_U = ~np.isfinite(norm_U), norm_U == 0
        stats.rows_read += len(row_U)
        stats.broken_rows += int(broken_U.sum())
        stats.zero_rows += int(zero_U.sum())
        _list(stats.first_broken_rows, row_U[broken_U])
        _list(stats.first_zero_rows, row_U[zero_U])
        run = _longest_run(stats, row_U, zero_U, run if next_row == row_U[0] else (0, 0))
        next_row = int(row_U[-1]) + 1
        good_U = norm_U[~(broken_U | zero_U)]
        if len(good_U):
            stats.min_norm = min(float(good_U.min()), stats.min_norm or np.inf)
            stats.max_norm = max(float(good_U.max()), stats.max_norm or 0.0)
            total += float(good_U.sum())
            place_U = np.clip((np.log2(good_U) - _LOWEST) * _PER_OCTAVE, 0, len(bins) - 1)
            bins += np.bincount(place_U.astype(np.int64), minlength=len(bins))
        whole_UW = rows_UW[~broken_U] if broken_U.any() else rows_UW
        if whole_UW.size:
            stats.largest = max(stats.largest, float(whole_UW.max()), -float(whole_UW.min()))
        if layout.codec == "fp8_e4m3_e8m0":
            scale_bins += np.bincount(record_UR[:, layout.width :].reshape(-1), minlength=256)
        report(stats.rows_read)
    _summarise(stats, bins, scale_bins, total)
    if stats.rows_read < stats.n_rows:
        stats.longest_zero_run = None
    return stats


def row_norms(rows_UW: np.ndarray) -> np.ndarray:
    """float64 [U]; inf or NaN for rows that hold one; 0 for rows of zeros alone, however small others are."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared_U = np.einsum("uw,uw->u", rows_UW, rows_UW)
        doubtful_U = ~np.isfinite(squared_U) | (squared_U < 1e-30)
        squared_U = squared_U.astype(np.float64)
        again_UW = rows_UW[doubtful_U].astype(np.float64)
        squared_U[doubtful_U] = np.einsum("uw,uw->u", again_UW, again_UW)
    return np.sqrt(squared_U)


def _list(found: list[int], row_X: np.ndarray) -> None:
    found.extend(row_X[: _LISTED - len(found)].tolist())


def _longest_run(
    stats: Stats, row_U: np.ndarray, zero_U: np.ndarray, run: tuple[int, int]
) -> tuple[int, int]:
    """Keep the longest run of zero rows; returns the run (first, length) that reaches the end of this part."""
    if not zero_U.any():
        return 0, 0
    edge = np.flatnonzero(np.diff(np.concatenate([[False], zero_U, [False]]).astype(np.int8)))
    for start, end in edge.reshape(-1, 2).tolist():
        first, length = int(row_U[start]), end - start
        if start == 0 and run[1]:
            first, length = run[0], run[1] + length
        if length > (stats.longest_zero_run or (0, 0))[1]:
            stats.longest_zero_run = (first, length)
        run = (first, length)
    return run if zero_U[-1] else (0, 0)


def _summarise(stats: Stats, bins: np.ndarray, scale_bins: np.ndarray, total: float) -> None:
    counted = int(bins.sum())
    if counted:
        stats.mean_norm = total / counted
        middle = int(np.searchsorted(np.cumsum(bins), (counted + 1) // 2))
        median = float(2.0 ** (_LOWEST + (middle + 0.5) / _PER_OCTAVE))
        stats.median_norm = min(max(median, stats.min_norm), stats.max_norm)
    octaves = bins.reshape(-1, _PER_OCTAVE).sum(1)
    stats.norm_octaves = {int(k) + _LOWEST: int(octaves[k]) for k in np.flatnonzero(octaves)}
    stats.scale_counts = {int(k) - 127: int(scale_bins[k]) for k in np.flatnonzero(scale_bins[:255])}
    stats.nan_scales = int(scale_bins[255])
