"""A set-associative cache directory: which slot holds a row, and which row goes when a new one comes.

A row belongs to one set of WAYS slots (by a multiplicative hash), so nothing is ever deleted or moved: a look-up reads
WAYS keys, two cache lines. Two policies choose the victim in a set:

    lru         the row that was asked for longest ago
    frequency   the row asked for least often (up to 15 times; halved each time the set took in 4 * WAYS rows), the one
                asked for longest ago among equals
"""

import numpy as np

from engram_lm.kernels.compiled import kernel

WAYS = 16
LRU, FREQUENCY = 0, 1
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MOST = np.uint8(15)


@kernel(inline="always")
def _set_of(row, n_sets):
    # the upper half of the product is well mixed; multiply again for the range without a division
    return np.int64((((np.uint64(row) * _MIX) >> np.uint64(32)) * np.uint64(n_sets)) >> np.uint64(32))


@kernel
def look_up(row_U, key_SW, stamp_SW, count_SW, now, slot_U):
    """slot_U[u] = the slot of row u, or -1; what is found counts as asked for. Returns how many were found."""
    n_sets, n_found = key_SW.shape[0], 0
    for u in range(row_U.shape[0]):
        s = _set_of(row_U[u], n_sets)
        slot_U[u] = -1
        for w in range(WAYS):
            if key_SW[s, w] == row_U[u]:
                slot_U[u] = s * WAYS + w
                stamp_SW[s, w] = now
                count_SW[s, w] = min(np.uint8(count_SW[s, w] + np.uint8(1)), _MOST)
                n_found += 1
                break
    return n_found


@kernel
def admit(row_M, key_SW, stamp_SW, count_SW, taken_S, now, policy, slot_M):
    """slot_M[m] = the slot that row m takes from now on; a row that is there already (another thread's) keeps its own."""
    n_sets = key_SW.shape[0]
    for m in range(row_M.shape[0]):
        s = _set_of(row_M[m], n_sets)
        victim = -1
        for w in range(WAYS):
            if key_SW[s, w] == row_M[m]:
                victim = w
                break
        if victim < 0:
            victim = 0
            for w in range(WAYS):
                if key_SW[s, w] < 0:
                    victim = w
                    break
                older = stamp_SW[s, w] < stamp_SW[s, victim]
                if policy == FREQUENCY:
                    a, b = count_SW[s, w], count_SW[s, victim]
                    older = a < b or (a == b and older)
                if older:
                    victim = w
            taken_S[s] += 1
            if taken_S[s] >= 4 * WAYS:
                taken_S[s] = 0
                for w in range(WAYS):
                    count_SW[s, w] >>= np.uint8(1)
            key_SW[s, victim] = row_M[m]
            count_SW[s, victim] = 0
        stamp_SW[s, victim] = now
        slot_M[m] = s * WAYS + victim
