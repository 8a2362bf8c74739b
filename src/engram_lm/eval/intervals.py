"""Intervals of 95 % from 1,000 draws with replacement: of documents, questions, or stretches of a long text.

    interval(draws, n)                    the middle 95 %; None where they came from fewer than five
    mean_interval([1, 0, 1, 1, 0])        (0.6, (0.2, 1.0))
    ratio_draws(sums_N, counts_N)         sum / count of each draw, for perplexities and paired changes

The draws depend on the number of units alone, so two arms over the same units are drawn together.
"""

from collections.abc import Sequence

import numpy as np

DRAWS, LEAST = 1000, 5


def drawn(n: int) -> np.ndarray:
    """int64 [D, n]: which units each draw holds."""
    return np.random.default_rng(0).integers(0, n, (DRAWS, n))


def interval(draws: np.ndarray, n: int) -> tuple[float, float] | None:
    """The middle 95 % of the draws; None where they came from too few, or hold what is no number."""
    if n < LEAST or not np.isfinite(draws).all():
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """The mean of some values, one a document or question, and its interval."""
    values_N = np.asarray(values, float)
    return float(values_N.mean()), interval(values_N[drawn(len(values_N))].mean(1), len(values_N))


def ratio_draws(sums_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """float64 [D]: sum of sums over sum of counts of each draw; NaN where a draw counts nothing."""
    draw_DN = drawn(len(sums_N))
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums_N[draw_DN].sum(1) / counts_N[draw_DN].sum(1)
