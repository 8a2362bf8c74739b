"""Retrieval in the prompt, the baseline of every memory: the passage that BM25 finds, put before what the model reads.

    passages = Passages(snapshot, documents, encoder)
    passages.best("Annual leave is")          # int64 [n]: the passage found, and what follows it in its document

A window is looked for with the words that stand before it. What is found is a piece of some 128 tokens and, as in RETRO
(Borgeaud et al. 2022), the 256 tokens after it, since those are what the window goes on with where it is a copy.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from engram_lm.library.choosing import Chooser

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library.encoding import TextEncoder

FOUND, AFTER = 128, 256


class Passages:
    """Of the documents of a snapshot; `documents` has their token ids (and may have more)."""

    def __init__(
        self,
        snapshot: "Snapshot",
        documents: Mapping[str, np.ndarray],
        encoder: "TextEncoder",
        *,
        found: int = FOUND,
        after: int = AFTER,
        like: "Passages | None" = None,
    ) -> None:
        """like: passages of documents among which are these, whose words need not be read again."""
        self.documents, self.after = documents, after
        words = None if like is None else like.chooser.words
        self.chooser = Chooser(snapshot, encoder, words=words, least_tokens=found)

    def best(self, query: str, *, most: int = 1) -> np.ndarray:
        """The `most` best passages one behind the other, int64; empty where nothing shares a word with the query."""
        found = []
        for at, _, _ in self.chooser.ranked(query):
            passage = self.chooser.passages[at]
            ids = np.asarray(self.documents[passage.id], np.int64)
            found.append(ids[passage.begin : passage.end + self.after])
            if len(found) == most:
                break
        return np.concatenate(found) if found else np.empty(0, np.int64)
