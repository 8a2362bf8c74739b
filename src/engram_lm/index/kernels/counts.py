"""What follows an interval, counted in all segments of a snapshot: live tokens, or live tokens of each document up to a cap.

Histograms are `count_V` (int64 [V + 1], all zero between calls) and the tokens in it, `touched_V`, in order of appearance.
Wide intervals are nodes with their counts in the file. A view with deleted documents has counts of its own (ADJUSTED), one
with a cap has lists of its own for all nodes. They are worked out for a node when first asked for; threads that do so at once
write the same numbers, and `set_flag` comes after them.
Pairs of document and token are counted in `pairs_P4`: document, token, stamp, count; open addressing; what has an older
stamp is free.
Where sources reach over several segments (SHARED), an interval that is a node in one and occurs in others has one list of all
of them, worked out when first asked for and remembered by the thread until there is no more room: see `joint_list`.
state_I: int64 [STATE], the stamp now, how many pairs it has, and the room for joint lists.
"""

import numpy as np

from engram_lm.index.kernels.search import (
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
    N_NODES,
    N_SOURCES,
    N_TOKENS,
    NEXT,
    NODE_AT,
    NODE_COUNT,
    NODE_HIGH,
    NODE_LOW,
    NODE_TOKEN,
    ORDER,
    OVER,
    READY,
    SERIAL,
    SHARED,
    dead_below,
    find_node,
    number_at,
    token_at,
)
from engram_lm.kernels.compiled import kernel
from engram_lm.kernels.pointers import load16, load32, load_flag, set_flag, store16, store32

BLOCK_TOKENS = (
    256  # positions between two entries of BLOCK, the document that holds the block's first position
)
_MIX, _MIX_TOKEN = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
# state: the stamp now, pairs that have it; of joint lists the addresses of their tokens, counts and slots, room and used room
STAMP, PAIRS, JOINT_TOKEN, JOINT_COUNT, JOINT_SLOT, JOINT_ROOM, JOINT_USED, STATE = range(8)
# a slot: segment and order, first place in it, serial, and where its list begins and ends; all u32
JOINT_SLOTS, SLOT = 4096, 5


@kernel
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


@kernel
def group_here(table_SF, s, rank):
    """The document, or where sources are counted the first document of its source, at a rank; -1 in a damaged file."""
    position = number_at(table_SF, s, ORDER, rank)
    if position >= table_SF[s, N_TOKENS]:
        return np.int64(-1)
    number = document_of(table_SF, s, position)
    return number if table_SF[s, GROUP] == 0 else number_at(table_SF, s, GROUP, number)


@kernel
def group_of(table_SF, s, rank):
    """What is counted together, of all segments: a source where these are shared, else one segment's document or source."""
    if table_SF[s, SHARED] == 0:
        number = group_here(table_SF, s, rank)
        return number if number < 0 else (np.int64(s) << 32) | number
    position = number_at(table_SF, s, ORDER, rank)
    if position >= table_SF[s, N_TOKENS]:
        return np.int64(-1)
    return number_at(table_SF, s, SHARED, document_of(table_SF, s, position))


@kernel
def node_range(table_SF, s, node):
    """Where a node's list lies (nowhere: it is to be read), and makes sure that its counts are worked out."""
    a, b = number_at(table_SF, s, NODE_AT, node), number_at(table_SF, s, NODE_AT, node + 1)
    b = min(b, table_SF[s, N_COUNTS])
    if a < b and table_SF[s, READY] != 0 and load_flag(table_SF[s, READY] + node) == 0:
        _adjust(table_SF, s, node, a, b)
        set_flag(table_SF[s, READY] + node)
    return a, b


@kernel
def prepare(table_SF, s, node, ranks):
    """Work out the lists of nodes from `node` on, of about so many ranks in all; returns the next node."""
    while node < table_SF[s, N_NODES] and ranks > 0:
        ranks -= number_at(table_SF, s, NODE_HIGH, node) - number_at(table_SF, s, NODE_LOW, node)
        node_range(table_SF, s, node)
        node += 1
    return node


@kernel
def list_of(table_SF, s, low, high):
    """Where the list of an interval lies; nowhere (0, 0) if it is to be read."""
    node = find_node(table_SF, s, low, high)
    if node < 0:
        return np.int64(0), np.int64(0)
    return node_range(table_SF, s, node)


@kernel
def node_count(table_SF, s, i):
    """Count i of all nodes, as this view counts."""
    return number_at(table_SF, s, NODE_COUNT if table_SF[s, ADJUSTED] == 0 else ADJUSTED, i)


@kernel
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


@kernel
def _adjust(table_SF, s, node, a, b):
    """Work out the list a .. b of a node: its counts in the file without deleted documents, or all of it with a cap."""
    low = number_at(table_SF, s, NODE_LOW, node)
    high = min(number_at(table_SF, s, NODE_HIGH, node), table_SF[s, N_TOKENS])
    if table_SF[s, CAP]:
        _list_capped(table_SF, s, low, high, a, b)
        return
    count_E = np.empty(b - a, np.int64)
    for e in range(b - a):
        count_E[e] = number_at(table_SF, s, NODE_COUNT, a + e)
    for i in range(dead_below(table_SF, s, low), dead_below(table_SF, s, high)):
        rank = number_at(table_SF, s, DEAD, i)
        if rank < table_SF[s, N_TOKENS]:
            e = find_in_node(table_SF, s, a, b, token_at(table_SF, s, NEXT, rank)) - a
            if e >= 0 and count_E[e] > 0:
                count_E[e] -= 1
    for e in range(b - a):
        store32(table_SF[s, ADJUSTED] + 4 * (a + e), count_E[e])


@kernel
def _sorted_pairs(pair_I, n, groups, end):
    """The first n of pair_I, each token * 2**32 + group, ascending; byte after byte from the lowest. pair_I is used up."""
    from_I, to_I = pair_I, np.empty(n, np.int64)
    at_B = np.empty(257, np.int64)
    shift, last = 0, 32
    while end >> (last - 32):
        last += 8
    while shift < last:
        if shift < 32 and groups >> shift == 0:
            shift = 32
            continue
        for byte in range(257):
            at_B[byte] = 0
        for i in range(n):
            at_B[((from_I[i] >> shift) & 255) + 1] += 1
        for byte in range(256):
            at_B[byte + 1] += at_B[byte]
        for i in range(n):
            pair = from_I[i]
            byte = (pair >> shift) & 255
            to_I[at_B[byte]] = pair
            at_B[byte] += 1
        from_I, to_I = to_I, from_I
        shift += 8
    return from_I


@kernel
def _list_capped(table_SF, s, low, high, a, b):
    """Write the list a .. b of an interval with counts of at most CAP a document; what is left of it is END, 0 times."""
    end, n_dead, cap = table_SF[s, END], table_SF[s, N_DEAD], table_SF[s, CAP]
    pair_I = np.empty(max(high - low, 0), np.int64)
    n, i = np.int64(0), dead_below(table_SF, s, low)
    for rank in range(low, high):
        if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
            i += 1
            continue
        token, group = token_at(table_SF, s, NEXT, rank), group_here(table_SF, s, rank)
        if token <= end and group >= 0:
            pair_I[n] = (token << 32) | group
            n += 1
    pair_I = _sorted_pairs(pair_I, n, table_SF[s, N_DOCUMENTS], end)
    e, count, alike = a, np.int64(0), np.int64(0)
    for i in range(n):
        token = pair_I[i] >> 32
        alike = alike + 1 if i > 0 and pair_I[i - 1] == pair_I[i] else 1
        count += alike <= cap
        # each number once: another thread may be reading what it wrote itself
        if (i + 1 == n or pair_I[i + 1] >> 32 != token) and e < b:
            _write_entry(table_SF, s, e, token, count)
            e += 1
            count = 0
    for rest in range(e, b):
        _write_entry(table_SF, s, rest, end, np.int64(0))


@kernel
def _write_entry(table_SF, s, e, token, count):
    if table_SF[s, FOUR]:
        store32(table_SF[s, NODE_TOKEN] + 4 * e, token)
    else:
        store16(table_SF[s, NODE_TOKEN] + 2 * e, token)
    store32(table_SF[s, ADJUSTED] + 4 * e, count)


@kernel
def is_joint(table_SF, depth, low_SD, high_SD):
    """Whether an order is counted in one list of several segments: sources are shared, and one of the intervals is a node."""
    n, wide = 0, False
    if table_SF.shape[0] < 2 or table_SF[0, SHARED] == 0:
        return False
    for s in range(table_SF.shape[0]):
        size = high_SD[s, depth] - low_SD[s, depth]
        n += size > 0
        wide |= size > table_SF[s, OVER]
    return wide and n > 1


@kernel
def joint_list(table_SF, depth, low_SD, high_SD, end, state):
    """Where the list of an order lies in the room for joint lists: tokens ascending, a source counted up to CAP times."""
    first = 0
    while high_SD[first, depth] <= low_SD[first, depth]:
        first += 1
    where, low = (np.int64(first) << 16) | depth, low_SD[first, depth]
    serial = table_SF[first, SERIAL] & 0xFFFFFFFF
    mixed = (np.uint64(where) * _MIX) ^ (np.uint64(low) * _MIX_TOKEN)
    slot = state[JOINT_SLOT] + 4 * SLOT * np.int64(mixed >> np.uint64(52))
    if load32(slot) == where and load32(slot + 4) == low and load32(slot + 8) == serial:
        return load32(slot + 12), load32(slot + 16)
    size = np.int64(0)
    for s in range(table_SF.shape[0]):
        size += max(high_SD[s, depth] - low_SD[s, depth], 0)
    pair_I, n = np.empty(size, np.int64), np.int64(0)
    for s in range(table_SF.shape[0]):
        n_dead = table_SF[s, N_DEAD]
        i = dead_below(table_SF, s, low_SD[s, depth]) if n_dead else np.int64(0)
        for rank in range(low_SD[s, depth], high_SD[s, depth]):
            if i < n_dead and number_at(table_SF, s, DEAD, i) == rank:
                i += 1
                continue
            token, group = token_at(table_SF, s, NEXT, rank), group_of(table_SF, s, rank)
            if token <= end and 0 <= group < table_SF[s, N_SOURCES]:
                pair_I[n] = (token << 32) | group
                n += 1
    pair_I = _sorted_pairs(pair_I, n, table_SF[first, N_SOURCES], end)
    distinct = np.int64(0)
    for i in range(n):
        distinct += i == 0 or pair_I[i] >> 32 != pair_I[i - 1] >> 32
    if state[JOINT_USED] + distinct > state[JOINT_ROOM]:
        state[JOINT_USED] = 0
        for i in range(JOINT_SLOTS):
            # no list is of segment 65535, order 65535
            store32(state[JOINT_SLOT] + 4 * SLOT * i, 0xFFFFFFFF)
    a = state[JOINT_USED]
    b = min(a + distinct, state[JOINT_ROOM])
    cap, e, count, alike = table_SF[first, CAP], a, np.int64(0), np.int64(0)
    for i in range(n):
        token = pair_I[i] >> 32
        alike = alike + 1 if i > 0 and pair_I[i - 1] == pair_I[i] else 1
        count += alike <= cap
        if (i + 1 == n or pair_I[i + 1] >> 32 != token) and e < b:
            store32(state[JOINT_TOKEN] + 4 * e, token)
            store32(state[JOINT_COUNT] + 4 * e, count)
            e += 1
            count = 0
    state[JOINT_USED] = b
    store32(slot, where)
    store32(slot + 4, low)
    store32(slot + 8, serial)
    store32(slot + 12, a)
    store32(slot + 16, b)
    return a, b


@kernel
def _joint_count(a, b, token, state):
    """The count of a token in a joint list, 0 where it is not there."""
    top = b
    while a < b:
        middle = (a + b) >> 1
        if load32(state[JOINT_TOKEN] + 4 * middle) < token:
            a = middle + 1
        else:
            b = middle
    if a < top and load32(state[JOINT_TOKEN] + 4 * a) == token:
        return load32(state[JOINT_COUNT] + 4 * a)
    return np.int64(0)


@kernel
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


@kernel
def scan(table_SF, s, low, high, end, count_V, touched_V, n, pairs_P4, state):
    """Count the live tokens at ranks low .. high; returns how many tokens are touched."""
    cap, n_dead = table_SF[s, CAP], table_SF[s, N_DEAD]
    if cap == 0 and n_dead == 0:
        address, four = table_SF[s, NEXT], table_SF[s, FOUR]
        for rank in range(low, high):
            token = load32(address + 4 * rank) if four else load16(address + 2 * rank)
            if token <= end:
                # whether a token is new is anybody's guess: no branch
                if n < touched_V.shape[0]:
                    touched_V[n] = token
                n += count_V[token] == 0
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


@kernel
def histogram(table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state):
    """Count all that follows the last `depth` tokens; returns how many tokens are touched."""
    n = np.int64(0)
    if is_joint(table_SF, depth, low_SD, high_SD):
        a, b = joint_list(table_SF, depth, low_SD, high_SD, end, state)
        for e in range(a, b):
            token = load32(state[JOINT_TOKEN] + 4 * e)
            touched_V[n] = token
            count_V[token] = load32(state[JOINT_COUNT] + 4 * e)
            n += 1
        return n
    state[0] += 1
    state[1] = 0
    # far from each other: read side by side before the first scan's branches stop that
    for s in range(table_SF.shape[0]):
        if high_SD[s, depth] > low_SD[s, depth]:
            touched_V[0] += token_at(table_SF, s, NEXT, low_SD[s, depth])
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


@kernel
def count_two(table_SF, depth, low_SD, high_SD, x, y, pairs_P4, state):
    """How often tokens x and y follow the last `depth` tokens."""
    cx = cy = np.int64(0)
    if is_joint(table_SF, depth, low_SD, high_SD):
        a, b = joint_list(table_SF, depth, low_SD, high_SD, table_SF[0, END], state)
        return _joint_count(a, b, x, state), _joint_count(a, b, y, state)
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


@kernel
def count_documents(table_SF, depth, low_SD, high_SD, most):
    """Live documents, or where sources are counted sources, that hold the last `depth` tokens, counted up to `most`."""
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
            if table_SF[s, SHARED] != 0:
                number, begin = number_at(table_SF, s, SHARED, number), 0
            elif table_SF[s, GROUP] != 0:
                number = number_at(table_SF, s, GROUP, number)
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
