"""Sorting the positions of a token stream by the tokens before them, last first (docs/index.md). The twin is `index.sorting`.

    first_V = np.empty(V + 1, np.uint32)
    order_N = by_last_token(tokens_N, end, first_V)       # buckets by the last token
    depth, tied = refine(tokens_N, order_N, 0, N, end, LEVELS)      # each bucket by the next tokens, 64 bits of them at once
    while tied: depth, tied = double(order_N, depth, ROUNDS)

A position whose bit TIED is set has, as far as was looked, the same context as the one before it: groups need no memory
of their own, and a stream has less than 2^31 tokens. Groups are merge-sorted by (next tokens as one number), so ordinary
text is done after few rounds. Groups still tied after LEVELS rounds are repeats; they are sorted by the ranks of the
positions `depth` tokens earlier, which doubles the depth (Manber and Myers 1993; only tied groups, as Larsson and Sadakane
2007). Ranks are kept only for the positions that are asked for. No input needs more than N log N a round, log N rounds.
"""

import numpy as np

from engram_lm.kernels.bits import ones
from engram_lm.kernels.compiled import kernel

TIED = np.uint32(0x80000000)
PLACE = np.uint32(0x7FFFFFFF)
LEVELS = 16
ROUNDS = 5
_RUN = 16  # so few are sorted by insertion


@kernel
def by_last_token(tokens_N, end, first_V):
    """Positions by the token before them, none first, then by position, ties marked; fills first_V [V + 1]."""
    N, V = tokens_N.shape[0], first_V.shape[0] - 1
    slot_V = np.zeros(V + 2, np.int64)
    order_N = np.empty(N, np.uint32)
    # what begins a document counts as token -1
    before = end
    for p in range(N):
        slot_V[1 if before == end else before + 2] += 1
        before = np.int64(tokens_N[p])
    # first_V[c] is where c begins; slot_V[0] = 0 is where -1 does
    total = 0
    for v in range(V + 2):
        total += slot_V[v]
        slot_V[v] = total
        if v > 0:
            first_V[v - 1] = total
    before = end
    empty = 0
    for p in range(N):
        if before == end:
            order_N[empty] = p
            empty += 1
        else:
            i = slot_V[before + 1]
            slot_V[before + 1] = i + 1
            order_N[i] = np.uint32(p) if i == first_V[before] else np.uint32(p) | TIED
        before = np.int64(tokens_N[p])
    return order_N


@kernel(inline="always")
def _key(tokens_N, position, depth, end, bits):
    """Tokens `depth` + 1, ... before a position as one number, each + 1; 0 from the document's start on."""
    key = np.uint64(0)
    at = np.int64(position) - 1 - depth
    taken = 0
    while taken < 64:
        token = np.int64(tokens_N[at]) if at >= 0 else end
        if token == end:
            return key << np.uint64(64 - bits - taken) << np.uint64(bits) if taken else key
        key = (key << np.uint64(bits)) | np.uint64(token + 1)
        at -= 1
        taken += bits
    return key


@kernel
def _merge_sort(key_I, place_I, spare_key, spare_place):
    """Sort places by key, stably. Both spares hold half as many."""
    n = key_I.shape[0]
    halvings = 0
    while (n >> halvings) >= _RUN:
        halvings += 1
    for run in range(1 << halvings):
        a, b = (n * run) >> halvings, (n * (run + 1)) >> halvings
        for i in range(a + 1, b):
            key, place = key_I[i], place_I[i]
            j = i
            while j > a and key_I[j - 1] > key:
                key_I[j], place_I[j] = key_I[j - 1], place_I[j - 1]
                j -= 1
            key_I[j], place_I[j] = key, place
    for level in range(halvings, 0, -1):
        for run in range(0, 1 << level, 2):
            a, m, b = (n * run) >> level, (n * (run + 1)) >> level, (n * (run + 2)) >> level
            if key_I[m - 1] <= key_I[m]:
                continue
            left = m - a
            # loops, not slices: these would take most of the time to compile
            for i in range(left):
                spare_key[i], spare_place[i] = key_I[a + i], place_I[a + i]
            i, j, k = 0, m, a
            while i < left and j < b:
                # without a branch, which would be mispredicted every other time
                right = key_I[j] < spare_key[i]
                key, place = (key_I[j], place_I[j]) if right else (spare_key[i], spare_place[i])
                key_I[k], place_I[k] = key, place
                j += np.int64(right)
                i += 1 - np.int64(right)
                k += 1
            while i < left:
                key_I[k], place_I[k] = spare_key[i], spare_place[i]
                i += 1
                k += 1


@kernel(inline="always")
def _group_end(order_N, i, b):
    """Where the group that begins at i ends."""
    i += 1
    while i < b and order_N[i] & TIED:
        i += 1
    return i


@kernel
def refine(tokens_N, order_N, low, high, end, levels):
    """Sort the groups in order_N[low:high], whole buckets of one last token, by up to `levels` more keys.

    Returns the depth they then share at least, and how many are still tied.
    """
    bits = 16 if tokens_N.itemsize == 2 else 32
    last = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    most = 0
    i = low
    while i < high:
        j = _group_end(order_N, i, high)
        most = max(most, j - i)
        i = j
    key_I, spare_key = np.empty(most, np.uint64), np.empty((most + 1) // 2, np.uint64)
    spare_place = np.empty((most + 1) // 2, np.uint32)
    all_tied = 0
    a = low
    while a < high:
        # one bucket at a time, so that its tokens are still in the cache at the next level
        b = _group_end(order_N, a, high)
        depth, tied = 1, b - a - 1
        for _ in range(levels):
            if tied == 0:
                break
            tied = 0
            i = a
            while i < b:
                j = _group_end(order_N, i, b)
                n = j - i
                if n > 1:
                    for k in range(n):
                        place = order_N[i + k] & PLACE
                        order_N[i + k] = place
                        key_I[k] = _key(tokens_N, place, depth, end, bits)
                    _merge_sort(key_I[:n], order_N[i:j], spare_key, spare_place)
                    for k in range(1, n):
                        # equal and ended: by position, which a stable sort has kept
                        if key_I[k] == key_I[k - 1] and key_I[k] & last:
                            order_N[i + k] |= TIED
                            tied += 1
                i = j
            depth += 64 // bits
        all_tied += tied
        a = b
    return 1 + levels * (64 // bits), all_tied


@kernel(inline="always")
def _rank_at(wanted_W, before_W, at):
    """Where the rank of a wanted position is kept, -1 for one that is not wanted."""
    word, bit = wanted_W[at >> 6], np.uint64(1) << np.uint64(at & 63)
    return before_W[at >> 6] + ones(word & (bit - np.uint64(1))) if word & bit else np.int64(-1)


@kernel
def double(order_N, depth, rounds):
    """Sort groups that share `depth` tokens by the rank of what stands before those, then with twice the depth, ...

    Returns the depth after up to `rounds` rounds, and how many are still tied.
    """
    N = order_N.shape[0]
    # positions whose rank will be asked for, one bit each, and how many come before each word
    n_words = (N >> 6) + 1
    wanted_W, before_W = np.zeros(n_words, np.uint64), np.empty(n_words, np.int64)
    most = i = 0
    while i < N:
        j = _group_end(order_N, i, N)
        if j - i > 1:
            most = max(most, j - i)
            for k in range(i, j):
                step = depth
                for _ in range(rounds):
                    # where the context has ended by then it is tied to none, and what is marked is not asked for
                    at = np.int64(order_N[k] & PLACE) - step
                    if at < 0:
                        break
                    wanted_W[at >> 6] |= np.uint64(1) << np.uint64(at & 63)
                    step *= 2
        i = j
    n_wanted = 0
    for w in range(n_words):
        before_W[w] = n_wanted
        n_wanted += ones(wanted_W[w])
    # the rank of a position is where its group begins
    rank_U = np.empty(n_wanted, np.uint32)
    rank = 0
    for i in range(N):
        if not order_N[i] & TIED:
            rank = i
        u = _rank_at(wanted_W, before_W, np.int64(order_N[i] & PLACE))
        if u >= 0:
            rank_U[u] = rank
    key_I, spare_key = np.empty(most, np.uint32), np.empty((most + 1) // 2, np.uint32)
    spare_place = np.empty((most + 1) // 2, np.uint32)
    tied = 1
    while tied and rounds:
        tied = i = 0
        while i < N:
            j = _group_end(order_N, i, N)
            n = j - i
            if n > 1:
                for k in range(n):
                    place = order_N[i + k] & PLACE
                    order_N[i + k] = place
                    key_I[k] = rank_U[_rank_at(wanted_W, before_W, np.int64(place) - depth)]
                _merge_sort(key_I[:n], order_N[i:j], spare_key, spare_place)
                rank = i
                for k in range(n):
                    place = order_N[i + k]
                    if k and key_I[k] == key_I[k - 1]:
                        order_N[i + k] |= TIED
                        tied += 1
                    else:
                        rank = i + k
                    # groups that come later in this round may use the finer rank: it is as true
                    u = _rank_at(wanted_W, before_W, np.int64(place))
                    if u >= 0:
                        rank_U[u] = rank
            i = j
        depth *= 2
        rounds -= 1
    return depth, tied


@kernel
def gather(tokens_N, order_I):
    """tokens_N[order_I], without an index of 8 bytes a position on the way."""
    next_I = np.empty(order_I.shape[0], tokens_N.dtype)
    for i in range(order_I.shape[0]):
        next_I[i] = tokens_N[order_I[i]]
    return next_I
