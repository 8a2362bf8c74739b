"""Looking for many byte strings of one length at every place of a file, in one pass (Karp and Rabin 1987).

A place whose hash is wanted is a candidate; the caller compares the bytes. Hashes are polynomials modulo 2^64.
"""

import numpy as np

from engram_lm.kernels.compiled import kernel

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


@kernel(inline="always")
def _bit(value, bits):
    value = np.uint64(value)
    return np.int64(((value ^ (value >> np.uint64(29))) * _MIX) >> np.uint64(64 - bits))


@kernel
def hash_of(data_W):
    """The hash of a whole byte string."""
    value = np.uint64(0)
    for i in range(data_W.shape[0]):
        value = value * _BASE + np.uint64(data_W[i])
    return value


@kernel
def mark(hash_H, seen_B, bits):
    """Set the byte of each hash in a table of 2^bits."""
    for i in range(hash_H.shape[0]):
        seen_B[_bit(hash_H[i], bits)] = 1


@kernel
def candidates(data_N, width, hash_H, seen_B, bits, start, out_C):
    """Fill out_C with places from `start` on where `width` bytes have a wanted hash; (how many, where to go on).

    hash_H: ascending. Where to go on is past the last place when all were looked at.
    """
    n, found = data_N.shape[0], 0
    if start + width > n:
        return 0, n
    high = np.uint64(1)
    for _ in range(width):
        high *= _BASE
    value = np.uint64(0)
    for i in range(start, start + width):
        value = value * _BASE + np.uint64(data_N[i])
    at = start
    while True:
        if seen_B[_bit(value, bits)]:
            a, b = 0, hash_H.shape[0]
            while a < b:
                middle = (a + b) >> 1
                if hash_H[middle] < value:
                    a = middle + 1
                else:
                    b = middle
            if a < hash_H.shape[0] and hash_H[a] == value:
                if found == out_C.shape[0]:
                    return found, at
                out_C[found] = at
                found += 1
        if at + width >= n:
            return found, n
        value = value * _BASE + np.uint64(data_N[at + width]) - high * np.uint64(data_N[at])
        at += 1
