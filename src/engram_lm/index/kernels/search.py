"""Walks through sorted contexts (docs/index.md), in one segment or in all of a snapshot. The plain twin is `index.plain`.

A segment is a row of numbers: the addresses of its arrays, then their sizes. Whatever is read out of a segment is compared
with the size of what it points into before it is used: a damaged file gives wrong answers, never a read outside.

low, high: the interval of the last d tokens, for d = 0 .. depth, each inside the one before
"""

import numpy as np

from engram_lm.kernels.compiled import kernel
from engram_lm.kernels.pointers import load16, load32

# NumPy integers, as numba compiles a kernel anew for every plain constant that it is called with
# addresses
(
    TOKENS,
    ORDER,
    NEXT,
    FIRST,
    NODE_LOW,
    NODE_HIGH,
    NODE_AT,
    NODE_TOKEN,
    NODE_COUNT,
    NODE_DISTINCT,
    DOCUMENT_AT,
    DEAD,
) = map(np.int64, range(12))
# worked out by a reader: the first node of every NODE_RANKS ranks, the document of every BLOCK_TOKENS positions
NODE_FROM, BLOCK = map(np.int64, (12, 13))
# counts of nodes as a view counts, worked out when they are first asked for: see index/kernels/counts.py
ADJUSTED, READY, GROUP = map(np.int64, (14, 15, 16))
# sizes: positions, nodes, numbers in all lists of nodes, documents, dead ranks
N_TOKENS, N_NODES, N_COUNTS, N_DOCUMENTS, N_DEAD = map(np.int64, (17, 18, 19, 20, 21))
# whether tokens have four bytes, intervals of more than OVER positions are nodes, at most CAP of a document count, END
FOUR, OVER, CAP, END = map(np.int64, (22, 23, 24, 25))
# where sources reach over several segments: the address of each document's number among all of the snapshot's sources, how
# many there are, and what tells this snapshot's way of counting from others
SHARED, N_SOURCES, SERIAL = map(np.int64, (26, 27, 28))
# the token two before the position of every rank, of a small segment alone, for `walk_two`; and of every 2**STRIDE-th rank
BEFORE, SAMPLED, STRIDE = map(np.int64, (29, 30, 31))
ROW = 32
_ONE = np.int64(1)
NODE_RANKS = 4096
_RANKS_AT_ONCE = 1024
_SIDE_BY_SIDE = 4  # segments that are searched side by side


@kernel
def number_at(table_SF, s, section, i):
    """Number i of an array of u32."""
    return load32(table_SF[s, section] + 4 * i)


@kernel
def token_at(table_SF, s, section, i):
    """Token i of an array of tokens."""
    if table_SF[s, FOUR]:
        return load32(table_SF[s, section] + 4 * i)
    return load16(table_SF[s, section] + 2 * i)


@kernel
def _back(table_SF, s, rank, depth, end):
    """The token `depth` + 1 before the position of a rank, -1 where its document has begun."""
    at = number_at(table_SF, s, ORDER, rank) - 1 - depth
    if at < 0 or at >= table_SF[s, N_TOKENS]:
        return np.int64(-1)
    token = token_at(table_SF, s, TOKENS, at)
    return np.int64(-1) if token >= end else token


@kernel
def _bound(table_SF, s, a, b, depth, least, end):
    """The first rank of [a, b) with a token of `least` or more before it, or b."""
    while a < b:
        middle = (a + b) >> 1
        if _back(table_SF, s, middle, depth, end) < least:
            a = middle + 1
        else:
            b = middle
    return a


@kernel
def narrow(table_SF, s, low, high, depth, token, end):
    """The part of an interval of `depth` tokens in which `token` stands before them: (low, high), empty where none does.

    Positions of an interval share their last `depth` tokens, so what stands before those ascends.
    """
    a, b = low, high
    while a < b:
        middle = (a + b) >> 1
        here = _back(table_SF, s, middle, depth, end)
        if here < token:
            a = middle + 1
        elif here > token:
            b = middle
        else:
            # one of them: its beginning lies in [a, middle], its end in (middle, b]
            start = _bound(table_SF, s, a, middle, depth, token, end)
            return start, _bound(table_SF, s, middle + 1, b, depth, token + 1, end)
    return a, a


@kernel
def _sample_bound(table_SF, s, a, b, least, end):
    """`_bound` among the sampled ranks."""
    while a < b:
        middle = (a + b) >> 1
        here = token_at(table_SF, s, SAMPLED, middle)
        less = (here < least) | (here >= end)
        a, b = middle + 1 if less else a, b if less else middle
    return a


@kernel
def narrow_two(table_SF, s, low, high, token, end):
    """`narrow` of the interval of one token: the sampled ranks, which are near, say between which ranks to look."""
    if table_SF[s, SAMPLED] == 0 or high - low <= 1 << table_SF[s, STRIDE]:
        return narrow(table_SF, s, low, high, _ONE, token, end)
    k = table_SF[s, STRIDE]
    # samples i of the interval: low <= i << k < high
    first, last = (low + (1 << k) - 1) >> k, ((high - 1) >> k) + 1
    begin = _sample_bound(table_SF, s, first, last, token, end)
    stop = _sample_bound(table_SF, s, begin, last, token + 1, end)
    below = ((begin - 1) << k) + 1 if begin > first else low
    above = stop << k if stop < last else high
    if begin == stop:
        return narrow(table_SF, s, below, above, _ONE, token, end)
    start = _bound(table_SF, s, below, begin << k, _ONE, token, end)
    return start, _bound(table_SF, s, ((stop - 1) << k) + 1, above, _ONE, token + 1, end)


@kernel
def walk_one(table_SF, s, context_K, n, most, end, low_D, high_D, known):
    """Fill the intervals of the last 0, 1, ... of the first n tokens of context_K; returns the largest depth that occurs.

    known: of so many tokens the intervals are there already.
    """
    N = table_SF[s, N_TOKENS]
    low_D[0], high_D[0] = 0, N
    for depth in range(min(n, most)):
        token = context_K[n - 1 - depth]
        if token < 0 or token >= end:
            return depth
        if depth < known:
            low, high = low_D[depth + 1], high_D[depth + 1]
        elif depth == 0:
            low, high = number_at(table_SF, s, FIRST, token), number_at(table_SF, s, FIRST, token + 1)
            high = min(high, N)
        elif depth == 1:
            low, high = narrow_two(table_SF, s, low_D[1], high_D[1], token, end)
        else:
            low, high = narrow(table_SF, s, low_D[depth], high_D[depth], depth, token, end)
        if low >= high:
            return depth
        low_D[depth + 1], high_D[depth + 1] = low, high
    return min(n, most)


@kernel
def dead_below(table_SF, s, rank):
    """How many dead ranks are smaller."""
    a, b = np.int64(0), table_SF[s, N_DEAD]
    while a < b:
        middle = (a + b) >> 1
        if number_at(table_SF, s, DEAD, middle) < rank:
            a = middle + 1
        else:
            b = middle
    return a


@kernel
def live_in(table_SF, s, low, high):
    """Positions of an interval that belong to live documents."""
    if high <= low or table_SF[s, N_DEAD] == 0:
        return max(high - low, 0)
    return high - low - (dead_below(table_SF, s, high) - dead_below(table_SF, s, low))


@kernel
def walk_two(table_SF, context_K, n, most, end, low_SD, high_SD):
    """Fill the intervals of the last token and the last two in every segment; returns how many of the two it filled.

    A search in one segment is a chain of reads, each of which waits for the one before; in many segments side by side they
    wait together.
    """
    if min(n, most) < 1 or context_K[n - 1] < 0 or context_K[n - 1] >= end:
        return 0
    last = context_K[n - 1]
    for s in range(table_SF.shape[0]):
        low_SD[s, 1] = number_at(table_SF, s, FIRST, last)
        high_SD[s, 1] = min(number_at(table_SF, s, FIRST, last + 1), table_SF[s, N_TOKENS])
    if min(n, most) < 2 or context_K[n - 2] < 0 or context_K[n - 2] >= end:
        return 1
    token, going = context_K[n - 2], True
    for s in range(table_SF.shape[0]):
        low_SD[s, 2], high_SD[s, 2] = low_SD[s, 1], max(high_SD[s, 1], low_SD[s, 1])
    while going:
        going = False
        for s in range(table_SF.shape[0]):
            a, b = low_SD[s, 2], high_SD[s, 2]
            if a < b and table_SF[s, BEFORE] != 0:
                middle = (a + b) >> 1
                here = token_at(table_SF, s, BEFORE, middle)
                less = (here < token) | (here >= end)
                low_SD[s, 2] = middle + 1 if less else a
                high_SD[s, 2] = b if less else middle
                going = True
    for s in range(table_SF.shape[0]):
        a, high = low_SD[s, 2], high_SD[s, 1]
        if a < high and table_SF[s, BEFORE] == 0:
            low_SD[s, 2], high_SD[s, 2] = narrow_two(table_SF, s, a, high, token, end)
        elif a < high and token_at(table_SF, s, BEFORE, a) == token:
            low_SD[s, 2], high_SD[s, 2] = narrow(table_SF, s, a, high, _ONE, token, end)
    return 2


@kernel
def walk(table_SF, context_K, n, most, end, low_SD, high_SD, live_D):
    """The intervals of every segment (0, 0 where nothing is live) and the live positions of all; returns the largest depth.

    context_K: token ids, oldest first, n of them. low_SD, high_SD, live_D hold most + 1 numbers a segment.
    """
    for d in range(most + 1):
        live_D[d] = 0
    known = np.int64(0)
    if table_SF.shape[0] >= _SIDE_BY_SIDE:
        known = walk_two(table_SF, context_K, n, most, end, low_SD, high_SD)
    depth = 0
    for s in range(table_SF.shape[0]):
        reached = walk_one(table_SF, s, context_K, n, most, end, low_SD[s], high_SD[s], known)
        d = 0
        while d <= reached:
            live = live_in(table_SF, s, low_SD[s, d], high_SD[s, d])
            if live <= 0:
                break
            live_D[d] += live
            d += 1
        for before in range(s):
            # what was not reached by the segments before
            for k in range(depth + 1, d):
                low_SD[before, k] = high_SD[before, k] = 0
        for k in range(d, depth + 1):
            low_SD[s, k] = high_SD[s, k] = 0
        depth = max(depth, d - 1)
    return depth


@kernel
def find_node(table_SF, s, low, high):
    """The node of an interval of a segment, or -1 where it is narrow. Nodes are sorted by (low, -high)."""
    if high - low <= table_SF[s, OVER]:
        return np.int64(-1)
    n = table_SF[s, N_NODES]
    part = low // NODE_RANKS
    a, b = number_at(table_SF, s, NODE_FROM, part), min(number_at(table_SF, s, NODE_FROM, part + 1), n)
    while a < b:
        middle = (a + b) >> 1
        here = number_at(table_SF, s, NODE_LOW, middle)
        if here < low or (here == low and number_at(table_SF, s, NODE_HIGH, middle) > high):
            a = middle + 1
        else:
            b = middle
    if a < n and number_at(table_SF, s, NODE_LOW, a) == low and number_at(table_SF, s, NODE_HIGH, a) == high:
        return a
    return np.int64(-1)


@kernel
def ranks_between(order_N, begin, size, rank_R):
    """Ranks, ascending, of the positions begin .. begin + size (uint32 both); returns how many, `size` but for damage."""
    found = 0
    for block in range(0, order_N.shape[0], _RANKS_AT_ONCE):
        part = order_N[block : block + _RANKS_AT_ONCE]
        # 32 bits that wrap around and no branch: the compiler compares many at once
        hit = np.int32(0)
        for i in range(part.shape[0]):
            hit |= np.int32(np.uint32(part[i] - begin) < size)
        if hit:
            for i in range(part.shape[0]):
                if np.uint32(part[i] - begin) < size and found < rank_R.shape[0]:
                    rank_R[found] = block + i
                    found += 1
    return found
