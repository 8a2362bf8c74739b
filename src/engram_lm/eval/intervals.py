"""Intervals of 95 %: Wilson's of shares, else from 1,000 draws with replacement of documents, questions or stretches of text.

    interval(draws, n)                    the middle 95 %; None where they came from fewer than five
    mean_interval([1, 0, 1, 1, 0])        (0.6, (0.2, 1.0))
    share_interval([0, 0, 0, 0, 0])       (0.0, (0.0, 0.43)): no draw of zeros says how large the share may be
    ratio_draws(sums_N, counts_N)         sum / count of each draw, for perplexities and paired changes

The draws depend on the number of units alone, so two arms over the same units are drawn together.
"""

from collections.abc import Sequence

import numpy as np

DRAWS, LEAST = 1000, 5

# of a normal distribution, 95 % lie within
_Z = 1.959963984540054


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


def share_interval(values: Sequence[float] | np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """The mean of values in [0, 1], one a question, and its interval.

    Where all are 0 or 1: the score interval of Wilson (Probable inference, 1927), which is no single point for 0 of 80.
    Else as `mean_interval`.
    """
    values_N = np.asarray(values, float)
    n, mean = len(values_N), float(values_N.mean())
    if n < LEAST or not np.isin(values_N, (0, 1)).all():
        return mean_interval(values_N)
    middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * np.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    # rounding may leave the share itself outside by a bit
    return mean, (min(mean, max(0.0, float(middle - half))), max(mean, min(1.0, float(middle + half))))


def ratio_draws(sums_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """float64 [D]: sum of sums over sum of counts of each draw; NaN where a draw counts nothing."""
    draw_DN = drawn(len(sums_N))
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums_N[draw_DN].sum(1) / counts_N[draw_DN].sum(1)
