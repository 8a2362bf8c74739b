"""XXH64, the checksum of table files (https://github.com/Cyan4973/xxHash, specification 0.1.1), and one a page."""

import numpy as np

from engram_lm.kernels.compiled import kernel
from engram_lm.kernels.pointers import load8, load32, load64

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


@kernel(inline="always")
def _rotate(x, bits):
    return np.uint64((x << np.uint64(bits)) | (x >> np.uint64(64 - bits)))


@kernel(inline="always")
def _round(lane, word):
    return _rotate(lane + word * _P2, 31) * _P1


@kernel
def _xxh64_at(at, n):
    """`xxh64` of n bytes at an address: one compiled form for arrays that may be written and for those that may not."""
    stop, words_stop = at + n, at + n // 8 * 8
    if n >= 32:
        a, b, c, d = _P1 + _P2, _P2, np.uint64(0), np.uint64(0) - _P1
        while at + 32 <= words_stop:
            a = _round(a, np.uint64(load64(at)))
            b = _round(b, np.uint64(load64(at + 8)))
            c = _round(c, np.uint64(load64(at + 16)))
            d = _round(d, np.uint64(load64(at + 24)))
            at += 32
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            total = (total ^ _round(np.uint64(0), lane)) * _P1 + _P4
    else:
        total = _P5
    total += np.uint64(n)
    while at < words_stop:
        total = _rotate(total ^ _round(np.uint64(0), np.uint64(load64(at))), 27) * _P1 + _P4
        at += 8
    if at + 4 <= stop:
        total = _rotate(total ^ (np.uint64(load32(at)) * _P1), 23) * _P2 + _P3
        at += 4
    while at < stop:
        total = _rotate(total ^ (np.uint64(load8(at)) * _P5), 11) * _P1
        at += 1
    total = (total ^ (total >> np.uint64(33))) * _P2
    total = (total ^ (total >> np.uint64(29))) * _P3
    return total ^ (total >> np.uint64(32))


@kernel
def xxh64(data_N):
    """XXH64 with seed 0 of contiguous uint8 [N]."""
    return _xxh64_at(np.int64(data_N.ctypes.data), np.int64(data_N.shape[0]))


@kernel
def page_sums(data_N, sums_P):
    """sums[p] = the low 32 bits of XXH64 of page p of contiguous uint8 [P * 4096]."""
    for p in range(sums_P.shape[0]):
        sums_P[p] = np.uint32(xxh64(data_N[p * PAGE : (p + 1) * PAGE]) & np.uint64(0xFFFFFFFF))


@kernel
def first_bad_page(data_N, sums_P):
    """The first page whose checksum is not sums[p], or -1."""
    for p in range(sums_P.shape[0]):
        if np.uint32(xxh64(data_N[p * PAGE : (p + 1) * PAGE]) & np.uint64(0xFFFFFFFF)) != sums_P[p]:
            return p
    return -1
