"""Sorting the positions of a token stream by what stands before them (docs/index.md). NumPy; the twin is `plain`."""

import numpy as np


def context_order(tokens_N: np.ndarray, end: int) -> np.ndarray:
    """Positions of the stream by context, int64 [N]; equal contexts (both reach their document's start) by position.

    Prefix doubling (Manber and Myers 1993; only groups that are still tied are sorted again, as in Larsson and Sadakane
    2007): after the round with step k, positions are in order by their last 2k tokens. log2(longest repeat) rounds.
    """
    N = len(tokens_N)
    # what stands before position p, read backwards from Y[N - 1 - p] on; every END is a token of its own, below all others
    before_N = np.concatenate([[end], tokens_N[:-1]]).astype(np.int64)
    is_end_N = before_N == end
    key_N = np.where(is_end_N, np.cumsum(is_end_N) - 1, before_N + is_end_N.sum())[::-1]
    order_N = np.argsort(key_N, kind="stable")
    start_N = np.flatnonzero(np.diff(key_N[order_N], prepend=-1))
    rank_N = np.empty(N, np.int64)
    rank_N[order_N] = np.repeat(start_N, np.diff(start_N, append=N))
    step = 1
    tied_U = _tied(start_N, N)
    while len(tied_U):
        suffix_U = order_N[tied_U]
        # a context that has ended is alone in its group, so a step never runs over the end of the text
        key_U = rank_N[suffix_U] * N + rank_N[suffix_U + step]
        by_U = np.argsort(key_U, kind="stable")
        suffix_U, key_U = suffix_U[by_U], key_U[by_U]
        order_N[tied_U] = suffix_U
        begins_U = np.flatnonzero(np.diff(key_U, prepend=-1))
        length = np.diff(begins_U, append=len(key_U))
        rank_N[suffix_U] = np.repeat(tied_U[begins_U], length)
        tied_U = tied_U[np.repeat(length > 1, length)]
        step *= 2
    return N - 1 - order_N


def _tied(start_G: np.ndarray, n: int) -> np.ndarray:
    """Places of groups of more than one."""
    length_G = np.diff(start_G, append=n)
    return np.flatnonzero(np.repeat(length_G > 1, length_G))


def heavy_nodes(
    tokens_N: np.ndarray, order_N: np.ndarray, next_N: np.ndarray, *, end: int, heavy: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Intervals of more than `heavy` positions and what follows them: (low, high, at, token, count), see docs/index.md."""
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    waiting = [(0, len(order_N), 0)]
    while waiting:
        low, high, depth = waiting.pop()
        if high - low <= heavy:
            continue
        if (low, high) not in found:
            found[low, high] = np.unique(next_N[low:high], return_counts=True)
        at_I = order_N[low:high].astype(np.int64) - 1 - depth
        token_I = np.where(at_I < 0, end, tokens_N[np.maximum(at_I, 0)])
        cut_B = np.concatenate([[0], np.flatnonzero(np.diff(token_I.astype(np.int64))) + 1, [high - low]])
        wide_B = np.flatnonzero(np.diff(cut_B) > heavy)
        waiting += [
            (low + int(cut_B[b]), low + int(cut_B[b + 1]), depth + 1)
            for b in wide_B
            if token_I[cut_B[b]] != end
        ]
    keys = sorted(found, key=lambda node: (node[0], -node[1]))
    sizes = [len(found[key][0]) for key in keys]
    return (
        np.array([key[0] for key in keys], np.uint32),
        np.array([key[1] for key in keys], np.uint32),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32),
        np.concatenate([found[key][0] for key in keys] or [next_N[:0]]),
        np.concatenate([found[key][1] for key in keys] or [np.empty(0)]).astype(np.uint32),
    )
