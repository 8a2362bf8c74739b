"""Probabilities of what comes next from the counts of every order: absolute discounting (Ney, Essen and Kneser 1994).

    P_d(x) = max(c_d(x) - D, 0) / c_d + D n_d / c_d P_{d-1}(x)      c: counts, n: different continuations, D: discount

P_{-1} is uniform over the vocabulary and END. Orders are worked through from the longest to the shortest. Orders with
equally many occurrences have the same occurrences (their intervals are nested), so m of them are one step: with
b = D n / c, P = (1 - b^m) / (1 - b) max(c(x) - D, 0) / c + b^m P_below(x). Narrow intervals are read once altogether: each
contains the one of the next longer order. Wide ones are nodes; what several segments say of them together is remembered
in `memo` (a table that forgets), by the first segment's node and the order. The plain twin is `index.plain`.

facts of order 0, zero_I: total, distinct, top token, documents; zero_F: entropy
"""

import math

import numpy as np

from engram_lm.index.kernels.counts import (
    count_documents,
    count_two,
    find_in_node,
    histogram,
    list_of,
    node_range,
    scan,
)
from engram_lm.index.kernels.search import (
    ADJUSTED,
    CAP,
    NODE_COUNT,
    NODE_DISTINCT,
    NODE_TOKEN,
    find_node,
    number_at,
    token_at,
    walk,
)
from engram_lm.kernels.compiled import kernel

MOST_DOCUMENTS = 16
# memo_M7: key, serial of the snapshot, how much is known, total, distinct, top, documents
MEMO = 32768
_FEW = 32
_LOG = np.log(np.maximum(np.arange(256), 1))
_ZERO = np.int64(0)  # not 0: see `walks`
_SMALLEST = 1e-200  # weights below this change no float64


@kernel
def _sort(token_V, other_V, n, end):
    """Sort the first n tokens: by insertion where they are few, else by their bytes, lowest first."""
    if n <= _FEW:
        for i in range(1, n):
            token, k = token_V[i], i
            while k > 0 and token_V[k - 1] > token:
                token_V[k] = token_V[k - 1]
                k -= 1
            token_V[k] = token
        return
    at_B = np.empty(257, np.int64)
    shift = 0
    while end >> shift:
        for byte in range(257):
            at_B[byte] = 0
        for i in range(n):
            at_B[((token_V[i] >> shift) & 255) + 1] += 1
        for byte in range(256):
            at_B[byte + 1] += at_B[byte]
        for i in range(n):
            byte = (token_V[i] >> shift) & 255
            other_V[at_B[byte]] = token_V[i]
            at_B[byte] += 1
        for i in range(n):
            token_V[i] = other_V[i]
        shift += 8


@kernel
def longest(
    table_SF,
    context_K,
    n,
    most,
    end,
    low_SD,
    high_SD,
    live_D,
    count_V,
    touched_V,
    pairs_P4,
    state,
    token_V,
    out_V,
):
    """Tokens (ascending) and counts of the longest match, into token_V and out_V; returns its depth and how many.

    Nothing is written for depth 0.
    """
    depth = walk(table_SF, context_K, n, most, end, low_SD, high_SD, live_D)
    if depth == 0:
        return depth, np.int64(0)
    return depth, continuations(
        table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state, token_V, out_V
    )


@kernel
def continuations(table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state, token_V, out_V):
    """Tokens (ascending) and counts of what follows the last `depth` tokens; returns how many tokens."""
    n = histogram(table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state)
    if 16 * n > end:
        # so many that looking at the whole vocabulary is faster than sorting
        i = 0
        for token in range(end + 1):
            if count_V[token] != 0:
                token_V[i], out_V[i] = token, count_V[token]
                count_V[token] = 0
                i += 1
        return n
    _sort(touched_V, token_V, n, end)
    for i in range(n):
        token = touched_V[i]
        token_V[i], out_V[i] = token, count_V[token]
        count_V[token] = 0
    return n


@kernel
def _clear(count_V, touched_V, n):
    for i in range(n):
        count_V[touched_V[i]] = 0


@kernel
def _widen(table_SF, depth, low_SD, high_SD, end, read_S2, count_V, touched_V, n, pairs_P4, state):
    """Count what an order's intervals have beyond what was read of longer ones (read_S2); returns how many tokens."""
    for s in range(table_SF.shape[0]):
        low, high = low_SD[s, depth], high_SD[s, depth]
        if high <= low:
            continue
        if read_S2[s, 1] <= read_S2[s, 0]:
            n = scan(table_SF, s, low, high, end, count_V, touched_V, n, pairs_P4, state)
        else:
            n = scan(table_SF, s, low, read_S2[s, 0], end, count_V, touched_V, n, pairs_P4, state)
            n = scan(table_SF, s, read_S2[s, 1], high, end, count_V, touched_V, n, pairs_P4, state)
        read_S2[s, 0], read_S2[s, 1] = low, high
    return n


@kernel
def _sum_up(count_V, touched_V, n):
    """Total, most frequent token (of equal ones the smallest), and the entropy of the counts."""
    total, top, most = np.int64(0), np.int64(-1), np.int64(0)
    sum_log = 0.0
    for i in range(n):
        token = touched_V[i]
        count = count_V[token]
        total += count
        if count > most or (count == most and token < top):
            top, most = token, count
        sum_log += count * (_LOG[count] if count < _LOG.shape[0] else math.log(count))
    return total, top, max(math.log(total) - sum_log / total, 0.0) if total > 0 else 0.0


@kernel
def _first_node(table_SF, depth, low_SD, high_SD):
    """The first segment with a node for this order (or -1), the node, and how many segments have anything."""
    at, node, n = -1, np.int64(-1), 0
    for s in range(table_SF.shape[0]):
        low, high = low_SD[s, depth], high_SD[s, depth]
        if high > low:
            n += 1
            if at < 0:
                node = find_node(table_SF, s, low, high)
                if node >= 0:
                    at = s
    return at, node, n


@kernel
def _wide(
    table_SF,
    depth,
    low_SD,
    high_SD,
    end,
    at,
    node,
    serial,
    about,
    count_V,
    touched_V,
    pairs_P4,
    state,
    memo_M7,
    memo_M,
):
    """What is known of an order with nodes: its place in the memo. about: 0 total and distinct; 1 the rest as well."""
    # a file without the node that it should have is read, and not remembered
    key = (np.int64(at) << 48) | (node << 16) | depth if at >= 0 else np.int64(-1)
    slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(49))
    memo = memo_M7[slot]
    if at >= 0 and memo[0] == key and memo[1] == serial and memo[2] >= about:
        return slot
    n = histogram(table_SF, depth, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state)
    memo[3], memo[5], memo_M[slot] = _sum_up(count_V, touched_V, n)
    memo[4] = n
    if about:
        memo[6] = count_documents(table_SF, depth, low_SD, high_SD, MOST_DOCUMENTS)
    memo[0], memo[1], memo[2] = key, serial, about
    _clear(count_V, touched_V, n)
    return slot


@kernel
def distribution(
    table_SF, context_K, n_context, most, end, discount, only_longest, serial, low_SD, high_SD, live_D, distinct_D, read_S2,
    count_V, touched_V, part_V, pairs_P4, state, memo_M7, memo_M, zero_I, zero_F, zero_count_V, zero_p_V, out_V, fact_I,
    fact_F,
):  # fmt: skip
    """Fill out_V, live_D and distinct_D; returns the depth. fact_I: top, documents; fact_F: entropy."""
    depth = walk(table_SF, context_K, n_context, most, end, low_SD, high_SD, live_D)
    distinct_D[0] = zero_I[1]
    fact_I[0], fact_I[1], fact_F[0] = zero_I[2], zero_I[3], zero_F[0]
    if depth == 0:
        if only_longest and zero_I[0] > 0:
            for x in range(end + 1):
                out_V[x] = zero_count_V[x] / zero_I[0]
        else:
            for x in range(end + 1):
                out_V[x] = zero_p_V[x]
        return depth
    # weights first: of the orders with nodes, from `wide` down, and of all that is read, whose parts are kept
    weight = 1.0
    n = np.int64(0)
    wide = depth
    factor_D = np.zeros(depth + 1, np.float64)
    for s in range(table_SF.shape[0]):
        read_S2[s, 0] = read_S2[s, 1] = 0
    state[0] += 1
    state[1] = 0
    first = True
    while wide >= 1 and _first_node(table_SF, wide, low_SD, high_SD)[0] < 0:
        d = wide
        while d > 1 and live_D[d - 1] == live_D[wide]:
            d -= 1
        n = _widen(table_SF, wide, low_SD, high_SD, end, read_S2, count_V, touched_V, n, pairs_P4, state)
        total, top, entropy = _sum_up(count_V, touched_V, n)
        if first:
            fact_I[0], fact_F[0] = top, entropy
            fact_I[1] = count_documents(table_SF, wide, low_SD, high_SD, MOST_DOCUMENTS)
        total = max(total, 1)
        b, m = discount * n / total, wide - d + 1
        below = b if m == 1 else b**m
        factor = weight * (m if b >= 1.0 else (1.0 - below) / (1.0 - b)) / total
        if only_longest:
            factor, below = (1.0 / total if first else 0.0), 0.0
        lost = 0.0 if only_longest else discount
        if factor > _SMALLEST:
            for i in range(n):
                part_V[i] += factor * (count_V[touched_V[i]] - lost)
        weight *= below
        for k in range(d, wide + 1):
            distinct_D[k] = n
        wide = d - 1
        first = False
    token_U = touched_V[:n].copy()
    _clear(count_V, touched_V, n)
    # orders with nodes: weights now, parts when the weight of order 0 is known and out_V is filled
    d = wide
    while d >= 1:
        run = d
        while d > 1 and live_D[d - 1] == live_D[run]:
            d -= 1
        at, node, filled = _first_node(table_SF, run, low_SD, high_SD)
        if at >= 0 and filled == 1 and table_SF[at, ADJUSTED] == 0 and not first:
            total, distinct = live_D[run], number_at(table_SF, at, NODE_DISTINCT, node)
        else:
            slot = _wide(
                table_SF, run, low_SD, high_SD, end, at, node, serial, 1 if first else 0, count_V, touched_V, pairs_P4, state,
                memo_M7, memo_M,
            )  # fmt: skip
            total, distinct = memo_M7[slot, 3], memo_M7[slot, 4]
            if first:
                fact_I[0], fact_I[1], fact_F[0] = memo_M7[slot, 5], memo_M7[slot, 6], memo_M[slot]
        b, m = discount * distinct / max(total, 1), run - d + 1
        below = b if m == 1 else b**m
        factor_D[run] = weight * (m if b >= 1.0 else (1.0 - below) / (1.0 - b)) / max(total, 1)
        if only_longest:
            factor_D[run], below = (1.0 / max(total, 1) if first else 0.0), 0.0
        weight *= below
        for k in range(d, run + 1):
            distinct_D[k] = distinct
        d -= 1
        first = False
    if only_longest:
        for x in range(end + 1):
            out_V[x] = 0.0
        lost = 0.0
    else:
        lost = discount
        small = np.float32(weight)
        for x in range(end + 1):
            out_V[x] = small * zero_p_V[x]
    for d in range(wide, 0, -1):
        if factor_D[d] > _SMALLEST:
            at, node, filled = _first_node(table_SF, d, low_SD, high_SD)
            a, e = list_of(table_SF, at, low_SD[at, d], high_SD[at, d]) if at >= 0 else (0, 0)
            if a < e and filled == 1 and table_SF[at, ADJUSTED] == 0:
                for i in range(a, e):
                    x = token_at(table_SF, at, NODE_TOKEN, i)
                    if x <= end:
                        out_V[x] += np.float32(factor_D[d] * (number_at(table_SF, at, NODE_COUNT, i) - lost))
            else:
                n = histogram(table_SF, d, low_SD, high_SD, end, count_V, touched_V, pairs_P4, state)
                for i in range(n):
                    x = touched_V[i]
                    out_V[x] += np.float32(factor_D[d] * (count_V[x] - lost))
                    count_V[x] = 0
    for i in range(token_U.shape[0]):
        out_V[token_U[i]] += np.float32(part_V[i])
        part_V[i] = 0.0
    return depth


@kernel
def score(
    table_SF, id_T, next_T, most, end, discount, only_longest, serial, low_3SD, high_3SD, live_3D, read_S2,
    count_V, touched_V, pairs_P4, state, memo_M7, memo_M, zero_I, zero_F, zero_count_V, integer_7T, number_3T,
):  # fmt: skip
    """P of every id given those before it. integer_7T: depth, count, distinct, the two one order below, documents, top;
    number_3T: p, p of the top token, entropy.

    next_T: what came, the ids themselves unless everything is capped. low_3SD and the like hold most + 2 orders: of the ids
    before t and before t + 1, in turn, and of the top token. What follows the last d ids is ids[t] as often as the last d + 1
    ids occur one position on.
    """
    capped = table_SF.shape[0] > 0 and table_SF[0, CAP] > 0
    top_K = np.empty(most + 1, np.int64)
    after = walk(table_SF, id_T, _ZERO, _ZERO, end, low_3SD[0], high_3SD[0], live_3D[0])
    for t in range(id_T.shape[0]):
        low_SD, high_SD, live_D = low_3SD[t & 1], high_3SD[t & 1], live_3D[t & 1]
        x = next_T[t] if 0 <= next_T[t] <= end else np.int64(-1)
        depth = min(after, most)
        # a match is at most one token longer than the last one
        next_D = live_3D[1 - (t & 1)]
        after = walk(
            table_SF,
            id_T,
            t + 1,
            min(most, after) + 1,
            end,
            low_3SD[1 - (t & 1)],
            high_3SD[1 - (t & 1)],
            next_D,
        )
        integer_7T[0, t], integer_7T[1, t] = depth, live_D[depth]
        integer_7T[2, t], integer_7T[3, t], integer_7T[4, t] = zero_I[1], live_D[max(depth - 1, 0)], zero_I[1]
        integer_7T[5, t], integer_7T[6, t], number_3T[2, t] = zero_I[3], zero_I[2], zero_F[0]
        y, y_depth = zero_I[2], np.int64(-1)
        weight, px, py = 1.0, 0.0, 0.0
        narrow, n = True, np.int64(0)
        run = depth
        while run >= 1:
            first, d = run == depth, run
            while d > 1 and live_D[d - 1] == live_D[run]:
                d -= 1
            at, node, filled = _first_node(table_SF, run, low_SD, high_SD)
            total = live_D[run]
            if at >= 0 and narrow:
                _clear(count_V, touched_V, n)
                narrow = False
            if narrow:
                if first:
                    state[0] += 1
                    state[1] = 0
                    for s in range(table_SF.shape[0]):
                        read_S2[s, 0] = read_S2[s, 1] = 0
                n = _widen(
                    table_SF, run, low_SD, high_SD, end, read_S2, count_V, touched_V, n, pairs_P4, state
                )
                distinct = n
                if first:
                    total, y, number_3T[2, t] = _sum_up(count_V, touched_V, n)
                    integer_7T[5, t] = count_documents(table_SF, run, low_SD, high_SD, MOST_DOCUMENTS)
                elif capped:
                    total = np.int64(0)
                    for i in range(n):
                        total += count_V[touched_V[i]]
                cx, cy = count_V[x] if x >= 0 else 0, count_V[y] if y >= 0 else 0
            else:
                if at >= 0 and filled == 1 and table_SF[at, ADJUSTED] == 0 and not first:
                    distinct = number_at(table_SF, at, NODE_DISTINCT, node)
                else:
                    slot = _wide(
                        table_SF, run, low_SD, high_SD, end, at, node, serial, 1 if first else 0, count_V, touched_V,
                        pairs_P4, state, memo_M7, memo_M,
                    )  # fmt: skip
                    total, distinct = memo_M7[slot, 3], memo_M7[slot, 4]
                    if first:
                        y, integer_7T[5, t], number_3T[2, t] = (
                            memo_M7[slot, 5],
                            memo_M7[slot, 6],
                            memo_M[slot],
                        )
                if capped or x == end or y == end:
                    cx, cy = count_two(table_SF, run, low_SD, high_SD, x, y, pairs_P4, state)
                else:
                    cx = next_D[run + 1] if x >= 0 and run < after else np.int64(0)
                    cy = cx
                    a, e = np.int64(0), np.int64(0)
                    if y != x and at >= 0 and filled == 1 and table_SF[at, ADJUSTED] == 0:
                        a, e = node_range(table_SF, at, node)
                    if a < e:
                        # a list, where there is one, is nearer than the walk of another context
                        i = find_in_node(table_SF, at, a, e, y)
                        cy = number_at(table_SF, at, NODE_COUNT, i) if i >= 0 else np.int64(0)
                    elif y != x:
                        if y_depth < 0:
                            for i in range(run):
                                top_K[i] = id_T[t - run + i]
                            top_K[run] = y
                            y_depth = walk(
                                table_SF, top_K, run + 1, run + 1, end, low_3SD[2], high_3SD[2], live_3D[2]
                            )
                        cy = live_3D[2, run + 1] if run < y_depth else np.int64(0)
            if first:
                integer_7T[2, t], integer_7T[6, t] = distinct, y
            if d <= depth - 1 <= run:
                integer_7T[4, t] = distinct
            total = max(total, 1)
            b, m = discount * distinct / total, run - d + 1
            below = b if m == 1 else b**m
            factor = weight * (m if b >= 1.0 else (1.0 - below) / (1.0 - b)) / total
            lost = discount
            if only_longest:
                factor, below, lost = (1.0 / total if first else 0.0), 0.0, 0.0
            px += factor * (cx - lost) if cx > 0 else 0.0
            py += factor * (cy - lost) if cy > 0 else 0.0
            weight *= below
            run = d - 1
        if narrow:
            _clear(count_V, touched_V, n)
        if zero_I[0] > 0:
            cx, cy = zero_count_V[x] if x >= 0 else 0, zero_count_V[y] if y >= 0 else 0
            if only_longest:
                if depth == 0:
                    px, py = cx / zero_I[0], cy / zero_I[0]
            else:
                rest = discount * zero_I[1] / (end + 1)
                px += weight * (max(cx - discount, 0.0) + rest) / zero_I[0]
                py += weight * (max(cy - discount, 0.0) + rest) / zero_I[0]
        number_3T[0, t], number_3T[1, t] = (px if x >= 0 else 0.0), (py if y >= 0 else 0.0)
