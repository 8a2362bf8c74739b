"""What follows an interval, counted in all segments of a snapshot: live tokens, or live tokens of each document up to a cap.

Histograms are `count_V` (int64 [V + 1], all zero between calls) and the tokens in it, `touched_V`, in order of appearance.
Wide intervals are nodes with their counts in the file. A view with deleted documents or with a cap has counts of its own
(ADJUSTED), worked out for a node when it is first asked for; threads that do so at once write the same numbers.
Pairs of document and token are counted in `pairs_P4`: document, token, stamp, count; open addressing; what has an older
stamp is free.
"""

import numpy as np
from numba import njit

from engram_lm.kernels.raw import load16, load32, load_flag, set_flag, store32
from engram_lm.kernels.walks import (
    ADJUSTED,
    BLOCK,
    CAP,
    DEAD,
    DOCUMENT_AT,
    END,
    FOUR,
    GROUP,
    N_COUNTS,
    N_DEAD,
    N_DOCUMENTS,
    N_TOKENS,
    NEXT,
    NODE_AT,
    NODE_COUNT,
    NODE_HIGH,
    NODE_LOW,
    NODE_TOKEN,
    ORDER,
    READY,
    dead_below,
    find_node,
    number_at,
    token_at,
)

BLOCK_TOKENS = (
    256  # positions between two entries of BLOCK, the document that holds the block's first position
)
_MIX, _MIX_TOKEN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@njit(nogil=True, cache=True)
def document_of(table_SF, s, position):
    """The number of the document that holds a position."""
    last = table_SF[s, N_DOCUMENTS] - 1
    block = position // BLOCK_TOKENS
    a = min(number_at(table_SF, s, BLOCK, block), last)
    b = min(number_at(table_SF, s, BLOCK, block + 1), last)
    # the last document of a..b that begins at or before the position
    while a < b:
        middle = (a + b + 1) >> 1
        if number_at(table_SF, s, DOCUMENT_AT, middle) <= position:
            a = middle
        else:
            b = middle - 1
    return a


@njit(nogil=True, cache=True)
def group_of(table_SF, s, rank):
    """The document, or where sources are counted the first document of its source, at a rank; -1 in a damaged file."""
    position = number_at(table_SF, s, ORDER, rank)
    if position >= table_SF[s, N_TOKENS]:
        return np.int64(-1)
    number = document_of(table_SF, s, position)
    if table_SF[s, GROUP] != 0:
        number = number_at(table_SF, s, GROUP, number)
    # documents of two segments are two
    return (np.int64(s) << 32) | number


@njit(nogil=True, cache=True)
def node_range(table_SF, s, node):
    """Where a node's list lies (nowhere: it is to be read), and makes sure that its counts are worked out."""
    a, b = number_at(table_SF, s, NODE_AT, node), number_at(table_SF, s, NODE_AT, node + 1)
    b = min(b, table_SF[s, N_COUNTS])
    if a < b and table_SF[s, READY] != 0 and load_flag(table_SF[s, READY] + node) == 0:
        _adjust(table_SF, s, node, a, b)
        set_flag(table_SF[s, READY] + node)
    return a, b


@njit(nogil=True, cache=True)
def list_of(table_SF, s, low, high):
    """Where the list of an interval lies; nowhere (0, 0) if it is to be read."""
    node = find_node(table_SF, s, low, high)
    if node < 0:
        return np.int64(0), np.int64(0)
    return node_range(table_SF, s, node)


@njit(nogil=True, cache=True)
def node_count(table_SF, s, i):
    """Count i of all nodes, as this view counts."""
    return number_at(table_SF, s, NODE_COUNT if table_SF[s, ADJUSTED] == 0 else ADJUSTED, i)


@njit(nogil=True, cache=True)
def find_in_node(table_SF, s, a, b, token):
    """The place of a token among a node's, or -1."""
    top = b
    while a < b:
        middle = (a + b) >> 1
        if token_at(table_SF, s, NODE_TOKEN, middle) < token:
            a = middle + 1
        else:
            b = middle
    return a if a < top and token_at(table_SF, s, NODE_TOKEN, a) == token else np.int64(-1)


@njit(nogil=True, cache=True)
def _adjust(table_SF, s, node, a, b):
    """Counts a .. b of a node without deleted documents, and of each document (or source) at most CAP of each token."""
    low = number_at(table_SF, s, NODE_LOW, node)
    high = min(number_at(table_SF, s, NODE_HIGH, node), table_SF[s, N_TOKENS])
    cap, n_dead = table_SF[s, CAP], table_SF[s, N_DEAD]
    count_E = np.zeros(b - a, np.int64)
    if cap == 0:
        for e in range(b - a):
            count_E[e] = number_at(table_SF, s, NODE_COUNT, a + e)
        for i in range(dead_below(table_SF, s, low), dead_below(table_SF, s, high)):
            rank = number_at(table_SF, s, DEAD, i)
            if rank < table_SF[s, N_TOKENS]:
                e = find_in_node(table_SF, s, a, b, token_at(table_SF, s, NEXT, rank)) - a
                if e >= 0 and count_E[e] > 0:
                    count_E[e] -= 1
    else:
        # sorted by token, stable; then one list of documents a token
        # entry + 1; 0 for the others
        entry_V = np.zeros(table_SF[s, END] + 1, np.int64)
        for e in range(b - a):
            token = token_at(table_SF, s, NODE_TOKEN, a + e)
            if token < entry_V.shape[0]:
                entry_V[token] = e + 1
        begin_E = np.zeros(b - a + 1, np.int64)
        for rank in range(low, high):
            token = token_at(table_SF, s, NEXT, rank)
            if token < entry_V.shape[0] and entry_V[token] > 0:
                begin_E[entry_V[token]] += 1
        for e in range(b - a):
            begin_E[e + 1] += begin_E[e]
        group_I = np.empty(begin_E[b - a], np.int64)
        filled_E = np.empty(b - a, np.int64)
        for e in range(b - a):
            filled_E[e] = begin_E[e]
        i = dead_below(table_SF, s, low)
        for rank in range(low, high):
            if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
                i += 1
                continue
            token = token_at(table_SF, s, NEXT, rank)
            if token < entry_V.shape[0] and entry_V[token] > 0:
                e = entry_V[token] - 1
                group_I[filled_E[e]] = group_of(table_SF, s, rank)
                filled_E[e] += 1
        stamp_D = np.zeros(max(table_SF[s, N_DOCUMENTS], 1), np.int64)
        seen_D = np.zeros(stamp_D.shape[0], np.int64)
        for e in range(b - a):
            for i in range(begin_E[e], filled_E[e]):
                group = group_I[i] & 0xFFFFFFFF
                if group_I[i] < 0 or group >= stamp_D.shape[0]:
                    continue
                if stamp_D[group] != e + 1:
                    stamp_D[group], seen_D[group] = e + 1, 0
                if seen_D[group] < cap:
                    seen_D[group] += 1
                    count_E[e] += 1
    for e in range(b - a):
        store32(table_SF[s, ADJUSTED] + 4 * (a + e), count_E[e])


@njit(nogil=True, cache=True)
def take_pair(pairs_P4, state, group, token, cap):
    """Whether one more of this pair still counts. state: the stamp now, and how many pairs it has."""
    if group < 0:
        return False
    mask = pairs_P4.shape[0] - 1
    mixed = (np.uint64(group) * _MIX) ^ (np.uint64(token) * _MIX_TOKEN)
    i = np.int64((mixed ^ (mixed >> np.uint64(31))) & np.uint64(mask))
    while pairs_P4[i, 2] == state[0]:
        if pairs_P4[i, 0] == group and pairs_P4[i, 1] == token:
            pairs_P4[i, 3] += 1
            return pairs_P4[i, 3] <= cap
        i = (i + 1) & mask
    if 2 * state[1] > mask:
        # a damaged file: an interval that should have been a node
        return False
    state[1] += 1
    pairs_P4[i, 0], pairs_P4[i, 1], pairs_P4[i, 2], pairs_P4[i, 3] = group, token, state[0], 1
    return True


@njit(nogil=True, cache=True)
def scan(table_SF, s, low, high, end, count_V, touched_V, n, pairs_P4, state):
    """Count the live tokens at ranks low .. high; returns how many tokens are touched."""
    cap, n_dead = table_SF[s, CAP], table_SF[s, N_DEAD]
    if cap == 0 and n_dead == 0:
        address, four = table_SF[s, NEXT], table_SF[s, FOUR]
        for rank in range(low, high):
            token = load32(address + 4 * rank) if four else load16(address + 2 * rank)
            if token <= end:
                if count_V[token] == 0:
                    touched_V[n] = token
                    n += 1
                count_V[token] += 1
        return n
    i = dead_below(table_SF, s, low) if n_dead else np.int64(0)
    for rank in range(low, high):
        if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
            i += 1
            continue
        token = token_at(table_SF, s, NEXT, rank)
        if token > end:
            continue
        if cap and not take_pair(pairs_P4, state, group_of(table_SF, s, rank), token, cap):
            continue
        if count_V[token] == 0:
            touched_V[n] = token
            n += 1
        count_V[token] += 1
    return n


@njit(nogil=True, cache=True)
def histogram(table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state):
    """Count all that follows the last `depth` tokens; returns how many tokens are touched."""
    n = np.int64(0)
    state[0] += 1
    state[1] = 0
    for s in range(table_SF.shape[0]):
        low, high = low_SD[s, depth], high_SD[s, depth]
        if high <= low:
            continue
        a, b = list_of(table_SF, s, low, high)
        if a >= b:
            n = scan(table_SF, s, low, high, end, count_V, touched_V, n, pairs_P4, state)
        for e in range(a, b):
            token, count = token_at(table_SF, s, NODE_TOKEN, e), node_count(table_SF, s, e)
            if token > end or count == 0:
                continue
            if count_V[token] == 0:
                touched_V[n] = token
                n += 1
            count_V[token] += count
    return n


@njit(nogil=True, cache=True)
def count_two(table_SF, depth, low_SD, high_SD, x, y, pairs_P4, state):
    """How often tokens x and y follow the last `depth` tokens."""
    cx = cy = np.int64(0)
    state[0] += 1
    state[1] = 0
    for s in range(table_SF.shape[0]):
        low, high = low_SD[s, depth], high_SD[s, depth]
        if high <= low:
            continue
        a, b = list_of(table_SF, s, low, high)
        if a < b:
            e = find_in_node(table_SF, s, a, b, x)
            cx += 0 if e < 0 else node_count(table_SF, s, e)
            e = find_in_node(table_SF, s, a, b, y)
            cy += 0 if e < 0 else node_count(table_SF, s, e)
            continue
        cap, n_dead = table_SF[s, CAP], table_SF[s, N_DEAD]
        i = dead_below(table_SF, s, low) if n_dead else np.int64(0)
        for rank in range(low, high):
            if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
                i += 1
                continue
            token = token_at(table_SF, s, NEXT, rank)
            if token != x and token != y:
                continue
            if cap and not take_pair(pairs_P4, state, group_of(table_SF, s, rank), token, cap):
                continue
            cx += token == x
            cy += token == y
    return cx, cy


@njit(nogil=True, cache=True)
def count_documents(table_SF, depth, low_SD, high_SD, most):
    """Live documents that hold the last `depth` tokens, counted up to `most`."""
    seen_K = np.empty(most, np.int64)
    n = 0
    for s in range(table_SF.shape[0]):
        low, high = low_SD[s, depth], high_SD[s, depth]
        if high <= low:
            continue
        n_dead = table_SF[s, N_DEAD]
        i = dead_below(table_SF, s, low) if n_dead else np.int64(0)
        begin, last = n, np.int64(-1)
        for rank in range(low, high):
            if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
                i += 1
                continue
            position = number_at(table_SF, s, ORDER, rank)
            if position >= table_SF[s, N_TOKENS]:
                continue
            number = document_of(table_SF, s, position)
            if number == last:
                continue
            last = number
            new = True
            for k in range(begin, n):
                if seen_K[k] == number:
                    new = False
                    break
            if new:
                seen_K[n] = number
                n += 1
                if n >= most:
                    return n
    return n
