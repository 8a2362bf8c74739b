"""What fired: plain records of the n-grams read, their addresses, gates and norms. No torch, no model.

One `LayerTrace` a memory layer and forward. `rows_of` turns it into one dictionary a token, for tables and JSON.
A gate alone is not the strength of a memory: it is 0.5 where the rows are zero. `share`, the size of what was added
against the size of what was there, says how much memory moved the residual stream.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """One memory layer in one forward.

    Shapes: B sequences, T tokens, M branches, C columns (orders x heads, orders ascending).

    token_ids: int64 [B, T], raw ids, -1 at padding. canonical_ids: int64 [B, T].
    ngrams: int64 [B, T, O], how many tokens back-to-back each order really saw (less than its order after a stop).
    address: int64 [B, T, C], rows of this layer's table. gate: float32 [B, T, M], in (0, 1).
    row_norm: float32 [B, T, C], L2. value_norm: float32 [B, T], L2 of the gated-in value before the gate.
    share: float32 [B, T, M], |delta| / |hidden|.
    """

    memory: str
    block: int
    orders: tuple[int, ...]
    heads: int
    token_ids: np.ndarray
    canonical_ids: np.ndarray
    ngrams: np.ndarray
    address: np.ndarray
    gate: np.ndarray
    row_norm: np.ndarray
    value_norm: np.ndarray
    share: np.ndarray

    def rows_of(self, sequence: int, decode: Callable[[list[int]], str]) -> Iterator[dict[str, Any]]:
        """One dictionary a token of sequence number `sequence`; padding is left out."""
        ids = self.token_ids[sequence]
        real = np.flatnonzero(ids >= 0)
        for rank, place in enumerate(real):
            ngrams = {}
            for o, order in enumerate(self.orders):
                seen = int(self.ngrams[sequence, place, o])
                ngrams[str(order)] = decode([int(i) for i in ids[real[max(0, rank + 1 - seen) : rank + 1]]])
            yield {
                "memory": self.memory,
                "block": self.block,
                "position": rank,
                "token_id": int(ids[place]),
                "token": decode([int(ids[place])]),
                "ngrams": ngrams,
                "addresses": self.address[sequence, place].tolist(),
                "gate": [round(float(g), 6) for g in self.gate[sequence, place]],
                "share": [round(float(s), 6) for s in self.share[sequence, place]],
                "row_norm": round(float(np.linalg.norm(self.row_norm[sequence, place])), 6),
                "value_norm": round(float(self.value_norm[sequence, place]), 6),
            }
