"""The second channel: contexts compared by canonical tokens (`vocab.TokenMap`), averaged with the exact one. Optional.

    both = Blended(snapshot, TokenMap.from_tokenizer(tokenizer), share=0.5)
    both.distribution(context).p            # (1 - share) P_exact + share P_compressed, over raw tokens

"The Office Dog" then goes on where a document has "the office dog": what is compared has no case and no accents; what
follows are raw tokens, counted as they stand. Match, counts, documents and all else that a gate looks at are of the exact
channel. What it needs lives in memory, made from each segment when first asked for and gone with it: nothing more to purge.

Hazard: in a compressed segment `tokens` are canonical and `next` is raw, so that the number of places of an interval one
token on says nothing about how often that token follows: counts come from `next` alone, as where documents are capped.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.index.kernels.sorting import gather
from engram_lm.index.live_segment import LiveSegment
from engram_lm.index.segment import MAX_ORDER, Segment, occurring
from engram_lm.index.segment_file import STRIDE, tokens_before
from engram_lm.index.snapshot import Count, Found, Scores, Snapshot
from engram_lm.index.sorting import nodes_of, sort_contexts, wide_intervals
from engram_lm.vocab import TokenMap

_ALL = 2**31 - 1  # a cap that no document reaches: every token counts
_KNOWN: "weakref.WeakKeyDictionary[Segment, dict[str, Segment]]" = weakref.WeakKeyDictionary()


def compressed(segment: Segment, tokens: TokenMap) -> Segment:
    """A segment of the same documents whose contexts are canonical; kept while the segment is."""
    made = _KNOWN.setdefault(segment, {})
    if tokens.fingerprint not in made:
        V = segment.vocab_size
        if tokens.raw_size < V:
            raise ConfigError(
                f"A token map of {tokens.raw_size:,} ids cannot compress a vocabulary of {V:,}."
            )
        canonical_V = np.append(tokens.canonical[:V], V).astype(segment.tokens.dtype)
        stream_N = canonical_V[segment.tokens]
        order_N, first_V = sort_contexts(stream_N, vocab_size=V)
        next_N = gather(np.ascontiguousarray(segment.tokens), order_N)
        node_H2 = wide_intervals(stream_N, order_N, end=V, wide=segment.wide, most_order=MAX_ORDER)
        heavy, nodes = nodes_of(node_H2, next_N, end=V, heavy=segment.heavy)
        facts = {name: segment.arrays[name] for name in _FACTS}
        arrays = {
            "tokens": stream_N,
            "order": order_N,
            "next": next_N,
            **occurring(first_V),
            **nodes,
            **facts,
            "before": tokens_before(stream_N, order_N[::STRIDE], end=V),
        }
        made[tokens.fingerprint] = Segment(arrays, vocab_size=V, heavy=heavy, wide=segment.wide)
    return made[tokens.fingerprint]


_FACTS = (
    "document_at", "document_line", "document_by_id", "document_sha256", "documents", "tokenizer",
)  # fmt: skip


def bytes_of(snapshot: Snapshot, tokens: TokenMap) -> int:
    """What the second channel of a snapshot's segments holds in memory beside them."""
    return sum(
        array.nbytes
        for view in snapshot.views
        for name, array in compressed(view.segment, tokens).arrays.items()
        if name not in _FACTS
    )


class BlendedSnapshot(Snapshot):
    """A snapshot that says (1 - share) P_exact + share P_compressed. share: more than 0, less than 1."""

    def __init__(self, snapshot: Snapshot, tokens: TokenMap, *, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"share is more than 0 and less than 1; got {share}.")
        super().__init__(snapshot.views, vocab_size=snapshot.vocab_size)
        self.tokens, self.share = tokens, share
        self.other = Snapshot(
            [_compressed_view(view, tokens) for view in self.views], vocab_size=self.vocab_size
        )

    def distribution(
        self, context: Sequence[int] | np.ndarray, out: np.ndarray | None = None, *, count: Count = "tokens",
        cap: int | None = None, **options: Any,
    ) -> Found:  # fmt: skip
        """`Snapshot.distribution`, its p averaged; everything else, the p of its top token too, is of the exact channel."""
        found = super().distribution(context, out, count=count, cap=cap, **options)
        other = self.other.distribution(self._canonical(context), **_counted(count, cap), **options)
        found.p[:] = np.float32(1 - self.share) * found.p + np.float32(self.share) * other.p
        return found

    def score(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        count: Count = "tokens",
        cap: int | None = None,
        **options: Any,
    ) -> Scores:
        """`Snapshot.score`, its p averaged; everything else is of the exact channel."""
        exact = super().score(ids, count=count, cap=cap, **options)
        other = self.other.score(self._canonical(ids), following=ids, **_counted(count, cap), **options)
        p = np.float32(1 - self.share) * exact.p + np.float32(self.share) * other.p
        return Scores(**{**vars(exact), "p": p})

    def restricted(self, document_ids: Iterable[str]) -> "BlendedSnapshot":
        return BlendedSnapshot(super().restricted(document_ids), self.tokens, share=self.share)

    def without(self, document_id: str) -> "BlendedSnapshot":
        return BlendedSnapshot(super().without(document_id), self.tokens, share=self.share)

    def with_segment(self, view: LiveSegment) -> "BlendedSnapshot":
        return BlendedSnapshot(super().with_segment(view), self.tokens, share=self.share)

    def _canonical(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        known = (ids >= 0) & (ids < self.vocab_size)
        return np.where(known, self.tokens.canonical[np.where(known, ids, 0)], ids)


def _compressed_view(view: LiveSegment, tokens: TokenMap) -> LiveSegment:
    segment, at_D = compressed(view.segment, tokens), view.segment.document_at.astype(np.int64)
    dead = np.array(sorted(view.dead_documents), np.int64)
    if (at_D[dead + 1] - at_D[dead]).sum() == len(view.dead_rank):
        return LiveSegment(segment, dead_documents=view.dead_documents)
    # single places, as a session memory's end
    places = np.flatnonzero(np.isin(segment.order, view.segment.order[view.dead_rank]))
    return LiveSegment(segment, places.astype(np.uint32), view.dead_documents)


def _counted(count: Count, cap: int | None) -> dict[str, Any]:
    return {"count": "documents", "cap": _ALL} if count == "tokens" else {"count": count, "cap": cap}
