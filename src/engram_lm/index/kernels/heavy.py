"""Intervals too long to count at every query, and the counts of what follows them (docs/index.md).

The twin is `index.sorting.nodes_plain`.
"""

import numpy as np

from engram_lm.index.kernels.segment_search import _back
from engram_lm.kernels.bits import ones
from engram_lm.kernels.compiled import kernel


@kernel(inline="always")
def _first_with(tokens_N, order_N, low, high, depth, token, end):
    """The first place in [low, high) before which, `depth` tokens on, stands at least `token`; high where none does."""
    while low < high:
        middle = (low + high) >> 1
        if _back(tokens_N, order_N[middle], depth, end) < token:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def find_nodes(tokens_N, order_N, end, wide, most_order):
    """Intervals of up to `most_order` tokens with more than `wide` positions, each once, as int64 [H, 2], in no order.

    One that is longer than `wide` reaches across one of every `wide` places, so only those are looked at.
    """
    waiting_S3 = np.empty((1024, 3), np.int64)
    node_H2 = np.empty((1024, 2), np.int64)
    waiting_S3[0, 0], waiting_S3[0, 1], waiting_S3[0, 2] = 0, order_N.shape[0], 0
    S, H = 1 if order_N.shape[0] > wide else 0, 0
    if S:
        node_H2[0, 0], node_H2[0, 1] = 0, order_N.shape[0]
        H = 1
    while S:
        S -= 1
        low, high, depth = waiting_S3[S, 0], waiting_S3[S, 1], waiting_S3[S, 2]
        if depth == most_order:
            continue
        i = low
        while i + wide < high:
            token = _back(tokens_N, order_N[i + wide], depth, end)
            a = _first_with(tokens_N, order_N, i, i + wide, depth, token, end)
            b = _first_with(tokens_N, order_N, i + wide, high, depth, token + 1, end)
            if b - a > wide and token >= 0:
                if waiting_S3.shape[0] == S:
                    waiting_S3 = np.concatenate((waiting_S3, np.empty_like(waiting_S3)))
                waiting_S3[S, 0], waiting_S3[S, 1], waiting_S3[S, 2] = a, b, depth + 1
                S += 1
                # as long as the interval around it: the same positions, found before
                if b - a < high - low:
                    if node_H2.shape[0] == H:
                        node_H2 = np.concatenate((node_H2, np.empty_like(node_H2)))
                    node_H2[H, 0], node_H2[H, 1] = a, b
                    H += 1
            i = b
    return node_H2[:H]


@kernel
def count_distinct(next_N, low_H, high_H, end, distinct_H):
    """How many different tokens follow each interval. What next_N holds must not be above `end`."""
    seen_V = np.full(end + 1, -1, np.int64)
    for h in range(low_H.shape[0]):
        distinct_H[h] = 0
        for i in range(low_H[h], high_H[h]):
            token = next_N[i]
            if seen_V[token] != h:
                seen_V[token] = h
                distinct_H[h] += 1


@kernel
def count_nodes(next_N, low_H, high_H, end, at_H, token_C, count_C):
    """The tokens that follow interval h, ascending, and how often: from at_H[h] to at_H[h + 1], unless these are equal."""
    count_V = np.zeros(end + 1, np.uint32)
    # one bit a token, set where its count is not 0
    found_W = np.zeros((end >> 6) + 1, np.uint64)
    for h in range(low_H.shape[0]):
        c = np.int64(at_H[h])
        if at_H[h + 1] == c:
            continue
        for i in range(low_H[h], high_H[h]):
            token = np.int64(next_N[i])
            count_V[token] += np.uint32(1)
            found_W[token >> 6] |= np.uint64(1) << np.uint64(token & 63)
        for w in range(found_W.shape[0]):
            word = found_W[w]
            found_W[w] = 0
            while word:
                below = word - np.uint64(1)
                token = (w << 6) + ones(~word & below)
                word &= below
                token_C[c], count_C[c] = token, count_V[token]
                count_V[token] = 0
                c += 1
