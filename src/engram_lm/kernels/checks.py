"""XXH64, the checksum of table files (https://github.com/Cyan4973/xxHash, specification 0.1.1), and one a page."""

import numpy as np
from numba import njit

PAGE = 4096

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)


@njit(nogil=True, cache=True, inline="always")
def _rotate(x, bits):
    return np.uint64((x << np.uint64(bits)) | (x >> np.uint64(64 - bits)))


@njit(nogil=True, cache=True, inline="always")
def _round(lane, word):
    return _rotate(lane + word * _P2, 31) * _P1


@njit(nogil=True, cache=True)
def xxh64(data_N):
    """XXH64 with seed 0 of contiguous uint8 [N]."""
    n = data_N.shape[0]
    words = data_N[: n // 8 * 8].view(np.uint64)
    n_words = words.shape[0]
    at = 0
    if n >= 32:
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while at + 4 <= n_words:
            a = _round(a, words[at])
            b = _round(b, words[at + 1])
            c = _round(c, words[at + 2])
            d = _round(d, words[at + 3])
            at += 4
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            total = (total ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        total = _P5
    total += np.uint64(n)
    while at < n_words:
        total = _rotate(total ^ _round(np.uint64(0), words[at]), 27) * _P1 + _P4
        at += 1
    at *= 8
    if at + 4 <= n:
        word = np.uint64(0)
        for i in range(4):
            word |= np.uint64(data_N[at + i]) << np.uint64(8 * i)
        total = _rotate(total ^ (word * _P1), 23) * _P2 + _P3
        at += 4
    while at < n:
        total = _rotate(total ^ (np.uint64(data_N[at]) * _P5), 11) * _P1
        at += 1
    total = (total ^ (total >> np.uint64(33))) * _P2
    total = (total ^ (total >> np.uint64(29))) * _P3
    return total ^ (total >> np.uint64(32))


@njit(nogil=True, cache=True)
def page_sums(data_N, sums_P):
    """sums[p] = the low 32 bits of XXH64 of page p of contiguous uint8 [P * 4096]."""
    for p in range(sums_P.shape[0]):
        sums_P[p] = np.uint32(xxh64(data_N[p * PAGE : (p + 1) * PAGE]) & np.uint64(0xFFFFFFFF))


@njit(nogil=True, cache=True)
def first_bad_page(data_N, sums_P):
    """The first page whose checksum is not sums[p], or -1."""
    for p in range(sums_P.shape[0]):
        if np.uint32(xxh64(data_N[p * PAGE : (p + 1) * PAGE]) & np.uint64(0xFFFFFFFF)) != sums_P[p]:
            return p
    return -1
