"""A map from row to a number, open addressing with linear probing, never shrinking: int64 [C, 2], key -1 where free."""

import numpy as np

from engram_lm.kernels.compiled import kernel

_MIX = np.uint64(0x9E3779B97F4A7C15)


@kernel(inline="always")
def _home(row, mask):
    return np.int64(((np.uint64(row) * _MIX) >> np.uint64(29)) & np.uint64(mask))


@kernel
def put(pair_C2, row_U, value_U):
    """Map row u to value u; returns how many rows are new. There must be room: more slots than rows, a power of two."""
    mask, n_new = pair_C2.shape[0] - 1, 0
    for u in range(row_U.shape[0]):
        i = _home(row_U[u], mask)
        while pair_C2[i, 0] >= 0 and pair_C2[i, 0] != row_U[u]:
            i = (i + 1) & mask
        n_new += pair_C2[i, 0] < 0
        pair_C2[i, 0], pair_C2[i, 1] = row_U[u], value_U[u]
    return n_new


@kernel
def get(pair_C2, row_U, value_U):
    """value_U[u] = what row u maps to, or -1. Returns how many were found."""
    mask, n_found = pair_C2.shape[0] - 1, 0
    for u in range(row_U.shape[0]):
        i = _home(row_U[u], mask)
        while pair_C2[i, 0] >= 0 and pair_C2[i, 0] != row_U[u]:
            i = (i + 1) & mask
        value_U[u] = pair_C2[i, 1] if pair_C2[i, 0] >= 0 else -1
        n_found += pair_C2[i, 0] >= 0
    return n_found


def room_for(pair_C2: np.ndarray, n: int) -> np.ndarray:
    """The same map, or a larger one with the same entries, with at most six of ten slots taken by n rows."""
    capacity = len(pair_C2)
    while n > 0.6 * capacity:
        capacity *= 2
    if capacity == len(pair_C2):
        return pair_C2
    larger = empty(capacity)
    kept = pair_C2[pair_C2[:, 0] >= 0]
    put(larger, np.ascontiguousarray(kept[:, 0]), np.ascontiguousarray(kept[:, 1]))
    return larger


def empty(capacity: int = 1024) -> np.ndarray:
    """A map without entries; capacity a power of two."""
    pairs = np.zeros((capacity, 2), np.int64)
    pairs[:, 0] = -1
    return pairs
