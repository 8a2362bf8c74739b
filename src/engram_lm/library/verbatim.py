"""How much of a text is a document's own words: the longest runs that occur in an index, token by token.

for run in verbatim_runs(snapshot, ids, shortest=16):
    run.start, run.length, run.documents       # tokens; (document, how often), most often first
"""

from dataclasses import dataclass

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.index.segment import Document
from engram_lm.index.snapshot import MOST_ORDER, Snapshot


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens start to start + length of a text, which stand like this in `documents`; no longer run holds it."""

    start: int
    length: int
    documents: tuple[tuple[Document, int], ...]


def verbatim_runs(
    snapshot: Snapshot, ids: np.ndarray, *, shortest: int = 16, limit: int = 10, start: int = 0
) -> list[Run]:
    """The longest runs of a text, int64 [T], that occur in the index: at most `limit`, longest first.

    start: the first token that counts, as where a prompt ends. Runs of fewer than `shortest` tokens are common wording.
    """
    if shortest < 1:
        raise ConfigError(f"The shortest run is at least 1 token; got {shortest}.")
    ids = np.asarray(ids, np.int64)[start:]
    depth_T = np.zeros(len(ids) + 2, np.int64)
    for end in range(1, len(ids) + 1):
        most = min(int(depth_T[end - 1]) + 1, MOST_ORDER)
        depth_T[end] = snapshot.match(ids[max(0, end - most) : end], max_order=most).depth
    # a run that the next token continues is part of a longer one
    ends = [
        end
        for end in range(1, len(ids) + 1)
        if depth_T[end] >= shortest and depth_T[end + 1] != depth_T[end] + 1
    ]
    ends.sort(key=lambda end: (-depth_T[end], end))
    runs = []
    for end in ends[:limit]:
        length = int(depth_T[end])
        match = snapshot.match(ids[end - length : end], max_order=length)
        runs.append(
            Run(
                start=start + end - length,
                length=length,
                documents=tuple(snapshot.documents_of(match, match.depth, limit=3)),
            )
        )
    return runs
