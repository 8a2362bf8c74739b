"""Stochastic rounding to bfloat16, so that bf16 rows learn from steps smaller than half their last bit.

A float32 is cut to its upper 16 bits after a random number of 16 bits was added to it, so it becomes the bfloat16 above
with the probability of how far it lies above the one below: the mean is the number itself. Numbers that bfloat16 holds
do not change, infinities and NaN stay what they are, and what lies beyond the largest bfloat16 (3.39e38) may become
infinite, as it does when rounded to nearest.

The random number is a function of (seed, step, row, column) alone: with S(h, i) the i-th output, from 0, of SplitMix64
started at h (Steele, Lea and Flood 2014; https://prng.di.unimi.it/splitmix64.c),

    word = S(S(S(seed, step), row), column // 4)          bits 16 (column % 4) and up of it, 16 of them

so neither the order of rows, nor which others are rounded with them, nor how a table is split over machines matters.
Plain twin: `round_bf16_stochastic_plain`, equal bit for bit.
"""

import numpy as np

from engram_lm.kernels.compiled import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@kernel(inline="always")
def _output(start, i):
    """S(start, i)."""
    z = start + _GOLDEN * (i + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


@kernel
def round_bf16_stochastic(values_UW, row_U, seed, step):
    """uint16 [U, W], bfloat16's bits, from contiguous float32 [U, W]; row_U int64 and seed, step from 0 name the numbers."""
    n, width = values_UW.shape
    bits_UW = values_UW.view(np.uint32)
    out_UW = np.empty((n, width), np.uint16)
    of_step = _output(np.uint64(seed), np.uint64(step))
    for u in range(n):
        of_row = _output(of_step, np.uint64(row_U[u]))
        for q in range((width + 3) // 4):
            word = _output(of_row, np.uint64(q))
            for w in range(4 * q, min(4 * q + 4, width)):
                bits = bits_UW[u, w]
                if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):  # infinite or NaN, which stays one
                    quiet = np.uint32(0x40 if bits & np.uint32(0x7FFFFF) else 0)
                    out_UW[u, w] = np.uint16((bits >> np.uint32(16)) | quiet)
                else:
                    up = np.uint32(word & np.uint64(0xFFFF))
                    out_UW[u, w] = np.uint16((bits + up) >> np.uint32(16))
                word >>= np.uint64(16)
    return out_UW


def round_bf16_stochastic_plain(values_UW: np.ndarray, row_U: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The plain twin."""
    width = values_UW.shape[1]
    column_W = np.arange(width)
    of_step = splitmix64(np.array([seed], np.uint64), np.array([step]))
    of_row_U = splitmix64(of_step, row_U)
    word_UW = splitmix64(of_row_U[:, None], column_W // 4)
    up_UW = (word_UW >> (16 * (column_W % 4)).astype(np.uint64)) & np.uint64(0xFFFF)
    bits_UW = np.ascontiguousarray(values_UW).view(np.uint32)
    rounded_UW = (bits_UW.astype(np.uint64) + up_UW) >> np.uint64(16)
    kept_UW = bits_UW >> 16 | np.where(np.isnan(values_UW), 0x40, 0).astype(np.uint32)
    return np.where(np.isfinite(values_UW), rounded_UW, kept_UW).astype(np.uint16)


def splitmix64(start: np.ndarray, i: np.ndarray) -> np.ndarray:
    """S(start, i): the i-th output, from 0, of SplitMix64 started at uint64 `start`; arrays, broadcast."""
    z = start + _GOLDEN * (i.astype(np.uint64) + np.uint64(1))
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))
