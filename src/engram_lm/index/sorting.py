"""Sorting the positions of a token stream by what stands before them, and finding its heavy intervals (docs/index.md).

    order_N, first_V = sort_contexts(tokens_N, vocab_size=V)           # compiled; 34 M tokens in 5 s on two cores
    order_N = context_order(tokens_N, V)                               # the plain twin
    node_H2 = wide_intervals(tokens_N, order_N, end=V, wide=256, most_order=64)
    heavy, nodes = nodes_of(node_H2, next_N, end=V, heavy=8192)

N positions, V tokens, H heavy intervals ("nodes"), C their continuations.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from engram_lm.index.kernels import heavy as heavy_kernels
from engram_lm.index.kernels import sorting

# Bits of a position that the compiled sort leaves for marks.
MOST_TOKENS = 2**31
# Fewer tokens than this are sorted before a thread has started.
_WORTH_A_THREAD = 200_000


def sort_contexts(
    tokens_N: np.ndarray, *, vocab_size: int, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions by context, uint32 [N], equal contexts by position; and where each last token begins, uint32 [V + 1].

    threads: as many as there are processors, up to 4, by default. Needs 4 bytes a token beside what it returns at worst
    and a tenth of that for ordinary text.
    """
    N = len(tokens_N)
    first_V = np.empty(vocab_size + 1, np.uint32)
    order_N = sorting.by_last_token(tokens_N, vocab_size, first_V)
    threads = threads or min(os.cpu_count() or 1, 4)
    if threads == 1 or N < _WORTH_A_THREAD:
        depth, tied = sorting.refine(tokens_N, order_N, 0, N, vocab_size, sorting.LEVELS)
    else:
        # buckets of one last token are independent: whole ones, in parts of about equal length
        wanted = np.linspace(0, N, 16 * threads + 1)
        edges = np.unique(
            np.concatenate([[0], first_V[np.searchsorted(first_V, wanted[1:-1])], [N]])
        ).tolist()
        with ThreadPoolExecutor(threads) as pool:
            parts = [
                pool.submit(sorting.refine, tokens_N, order_N, low, high, vocab_size, sorting.LEVELS)
                for low, high in pairwise(edges)
            ]
            depth, tied = parts[0].result()[0], sum(part.result()[1] for part in parts)
    while tied:
        depth, tied = sorting.double(order_N, depth, sorting.ROUNDS)
    return order_N, first_V


def wide_intervals(
    tokens_N: np.ndarray, order_N: np.ndarray, *, end: int, wide: int, most_order: int
) -> np.ndarray:
    """Intervals of up to `most_order` tokens with more than `wide` positions, by (low, -high): uint32 [H, 2]."""
    node_H2 = heavy_kernels.find_nodes(tokens_N, order_N, end, wide, most_order)
    return node_H2[np.lexsort((-node_H2[:, 1], node_H2[:, 0]))].astype(np.uint32)


def nodes_of(
    node_H2: np.ndarray, next_N: np.ndarray, *, end: int, heavy: int
) -> tuple[int, dict[str, np.ndarray]]:
    """How many different tokens follow each interval, and which and how often where it has more than `heavy` positions: the
    sections "node_..." of docs/index.md.

    `heavy` is doubled, and returned, until what follows takes no more bytes than a quarter of tokens, order and next.
    """
    low_H, high_H = (np.ascontiguousarray(node_H2[:, i]) for i in range(2))
    distinct_H = np.empty(len(low_H), np.uint32)
    heavy_kernels.count_distinct(next_N, low_H, high_H, end, distinct_H)
    itemsize = next_N.itemsize
    while True:
        listed_H = np.where(high_H - low_H > heavy, distinct_H, 0)
        n = int(listed_H.sum(dtype=np.int64))
        if n * (itemsize + 4) <= max(len(next_N) * (2 * itemsize + 4) // 4, 2**16):
            break
        heavy *= 2
    at_H = np.concatenate([[0], np.cumsum(listed_H, dtype=np.int64)]).astype(np.uint32)
    token_C, count_C = np.empty(n, next_N.dtype), np.empty(n, np.uint32)
    heavy_kernels.count_nodes(next_N, low_H, high_H, end, at_H, token_C, count_C)
    return heavy, {
        "node_low": low_H,
        "node_high": high_H,
        "node_distinct": distinct_H,
        "node_at": at_H,
        "node_token": token_C,
        "node_count": count_C,
    }


# ---- plain twins ------------------------------------------------------------------------------------------------------


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


def nodes_plain(
    tokens_N: np.ndarray,
    order_N: np.ndarray,
    next_N: np.ndarray,
    *,
    end: int,
    heavy: int,
    wide: int,
    most_order: int,
) -> dict[tuple[int, int], tuple[int, dict[int, int]]]:
    """(low, high) -> how many different tokens follow, and how often each where the interval is heavy."""
    found: dict[tuple[int, int], tuple[int, dict[int, int]]] = {}
    waiting = [(0, len(order_N), 0)]
    while waiting:
        low, high, depth = waiting.pop()
        if high - low <= wide:
            continue
        token_I, count_I = np.unique(next_N[low:high], return_counts=True)
        listed = dict(zip(token_I.tolist(), count_I.tolist(), strict=True)) if high - low > heavy else {}
        found[low, high] = len(token_I), listed
        if depth == most_order:
            continue
        at_I = order_N[low:high].astype(np.int64) - 1 - depth
        token_I = np.where(at_I < 0, end, tokens_N[np.maximum(at_I, 0)]).astype(np.int64)
        cut_B = np.concatenate([[0], np.flatnonzero(np.diff(token_I)) + 1, [high - low]])
        waiting += [(low + int(a), low + int(b), depth + 1) for a, b in pairwise(cut_B) if token_I[a] != end]
    return found
