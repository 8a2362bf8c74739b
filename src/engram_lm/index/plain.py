"""The plain twin of the index: what follows an N-gram, by looking at every position of every document.

Documents are lists of token ids; deleted ones are simply not given. `cap`: each document (or source, where `sources` names
one a document) counts at most so often for each token that follows, from order 1 on; 0 for no cap.
"""

import math
from collections import Counter
from collections.abc import Sequence


def continuations(
    documents: Sequence[Sequence[int]],
    gram: Sequence[int],
    *,
    end: int,
    cap: int = 0,
    sources: Sequence[object] | None = None,
) -> Counter:
    """How often each token (or `end`) follows `gram`, token ids oldest first; the empty gram precedes everything."""
    found: Counter = Counter()
    seen: Counter = Counter()
    gram, n = list(gram), len(gram)
    for number, document in enumerate(documents):
        stream = [*document, end]
        for p in range(n, len(stream)):
            if stream[p - n : p] == gram:
                pair = (sources[number] if sources else number), stream[p]
                seen[pair] += 1
                found[stream[p]] += not (cap and n) or seen[pair] <= cap
    return found


def depth(documents: Sequence[Sequence[int]], context: Sequence[int], *, end: int, most: int) -> int:
    """How many of the last tokens of `context` occur together before some position, up to `most`."""
    for n in range(min(len(context), most), 0, -1):
        if continuations(documents, context[len(context) - n :], end=end):
            return n
    return 0


def distribution(
    documents: Sequence[Sequence[int]],
    context: Sequence[int],
    *,
    end: int,
    most: int = 64,
    discount: float = 0.75,
    orders: str = "all",
    cap: int = 0,
    sources: Sequence[object] | None = None,
) -> list[float]:
    """The probability of every token and of `end` after `context`: order by order, from none up (kernels/discounting.py)."""
    size = end + 1
    p = [1 / size] * size
    longest = depth(documents, context, end=end, most=most)
    for n in range(longest + 1):
        gram = context[len(context) - n :]
        found = continuations(documents, gram, end=end, cap=cap, sources=sources)
        total = sum(found.values())
        if not total:
            return [0.0] * size
        if orders == "longest":
            p = [found[x] / total for x in range(size)]
        else:
            rest = discount * len(found) / total
            p = [max(found[x] - discount, 0) / total + rest * p[x] for x in range(size)]
    return p


def holders(documents: Sequence[Sequence[int]], gram: Sequence[int], *, end: int) -> list[int]:
    """Numbers of the documents in which `gram` occurs."""
    return [number for number, document in enumerate(documents) if continuations([document], gram, end=end)]


def entropy(found: Counter) -> float:
    """Of counts, in nats."""
    total = sum(found.values())
    return -sum(n / total * math.log(n / total) for n in found.values() if n)
