"""Walks through sorted contexts, and counts of what follows (docs/index.md). The plain twin is `index.plain`.

low_D, high_D: the interval of the last d tokens, for d = 0 .. depth, each inside the one before
"""

import numpy as np

from engram_lm.kernels.compiled import kernel


@kernel(inline="always")
def _back(tokens_N, position, depth, end):
    """The token `depth` + 1 before a position, -1 where its document has begun."""
    at = np.int64(position) - 1 - depth
    # a position comes from a file that may not have been verified
    if at < 0 or at >= tokens_N.shape[0]:
        return np.int64(-1)
    token = np.int64(tokens_N[at])
    return np.int64(-1) if token == end else token


@kernel
def narrow(tokens_N, order_N, low, high, depth, token, end):
    """The part of an interval of `depth` tokens in which `token` stands before them: (low, high), empty where none does.

    Positions of an interval share their last `depth` tokens, so what stands before those ascends.
    """
    a, b = low, high
    while a < b:
        middle = (a + b) >> 1
        if _back(tokens_N, order_N[middle], depth, end) < token:
            a = middle + 1
        else:
            b = middle
    start, b = a, high
    # most intervals end soon after they begin: gallop before halving
    step = 1
    while a + step < b and _back(tokens_N, order_N[a + step], depth, end) <= token:
        a += step
        step <<= 1
    b = min(b, a + step)
    while a < b:
        middle = (a + b) >> 1
        if _back(tokens_N, order_N[middle], depth, end) <= token:
            a = middle + 1
        else:
            b = middle
    return start, a


@kernel
def walk(tokens_N, order_N, first_V, context_K, most, end, low_D, high_D):
    """Fill the intervals of the last 0, 1, ... tokens of a context; returns the largest depth that occurs, up to `most`.

    context_K: token ids, oldest first. low_D and high_D hold most + 1 numbers.
    """
    low_D[0], high_D[0] = 0, order_N.shape[0]
    K, V = context_K.shape[0], first_V.shape[0] - 1
    for depth in range(min(K, most)):
        token = context_K[K - 1 - depth]
        if token < 0 or token >= V:
            return depth
        if depth == 0:
            low, high = np.int64(first_V[token]), np.int64(first_V[token + 1])
        else:
            low, high = narrow(tokens_N, order_N, low_D[depth], high_D[depth], depth, token, end)
        if low >= high:
            return depth
        low_D[depth + 1], high_D[depth + 1] = low, high
    return min(K, most)


@kernel
def find_node(low_H, high_H, low, high):
    """The node of an interval, or -1. Nodes are sorted by (low, -high)."""
    a, b = 0, low_H.shape[0]
    while a < b:
        middle = (a + b) >> 1
        if low_H[middle] < low or (low_H[middle] == low and high_H[middle] > high):
            a = middle + 1
        else:
            b = middle
    return a if a < low_H.shape[0] and low_H[a] == low and high_H[a] == high else -1
