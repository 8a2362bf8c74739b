"""The plain twin of the index: what follows an N-gram, by looking at every position of every document."""

from collections import Counter
from collections.abc import Sequence


def continuations(documents: Sequence[Sequence[int]], gram: Sequence[int], *, end: int) -> Counter:
    """How often each token (or `end`) follows `gram`, token ids oldest first; the empty gram precedes everything."""
    found: Counter = Counter()
    gram, n = list(gram), len(gram)
    for document in documents:
        stream = [*document, end]
        for p in range(n, len(stream)):
            if stream[p - n : p] == gram:
                found[stream[p]] += 1
    return found


def depth(documents: Sequence[Sequence[int]], context: Sequence[int], *, end: int, most: int) -> int:
    """How many of the last tokens of `context` occur together before some position, up to `most`."""
    for n in range(min(len(context), most), 0, -1):
        if continuations(documents, context[len(context) - n :], end=end):
            return n
    return 0
