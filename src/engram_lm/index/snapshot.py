"""What one request sees: several segments without their deleted documents, asked as if they were one (docs/index.md).

snapshot = Snapshot([View(segment), View(other, dead_documents=[3])], vocab_size=49_152)
order, tokens, counts = snapshot.longest(context)      # what followed the longest suffix of the context that occurs
found = snapshot.distribution(context)                 # found.p: float32 [V + 1], END last
scores = snapshot.score(ids)                           # P of every token of a prompt given those before it
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engram_lm.errors import ConfigError, TokenIdError
from engram_lm.index.segment import MAX_ORDER, Document, Segment

DISCOUNT = 0.75
MOST_DOCUMENTS = 64  # documents of a match are counted up to here

Orders = Literal["all", "longest"]
Count = Literal["tokens", "documents", "sources"]


class View:
    """A segment and which of its documents are deleted.

    dead_rank: uint32, ascending: the places in `segment.order` whose position belongs to a deleted document, its END
    included; worked out from `dead_documents` (numbers) where it is not given.
    """

    def __init__(
        self, segment: Segment, dead_rank: np.ndarray | None = None, dead_documents: Iterable[int] = ()
    ) -> None:
        self.segment = segment
        self.dead_documents = frozenset(int(number) for number in dead_documents)
        if dead_rank is None:
            dead_rank = dead_ranks(segment, self.dead_documents)
        self.dead_rank = np.ascontiguousarray(dead_rank, np.uint32)

    def without(self, number: int) -> "View":
        """The same segment with one more document deleted."""
        if number in self.dead_documents:
            return self
        more = dead_ranks(self.segment, [number])
        return View(
            self.segment, np.sort(np.concatenate([self.dead_rank, more])), self.dead_documents | {number}
        )


def dead_ranks(segment: Segment, document_numbers: Iterable[int]) -> np.ndarray:
    """Places in `segment.order`, ascending, of the positions of these documents: what `View` hides. uint32."""
    dead_D = np.zeros(segment.n_documents, bool)
    for number in document_numbers:
        if not 0 <= number < segment.n_documents:
            raise ConfigError(f"There is no document {number}; this segment has {segment.n_documents}.")
        dead_D[number] = True
    dead_N = np.repeat(dead_D, np.diff(segment.document_at.astype(np.int64)))
    return np.flatnonzero(dead_N[segment.order]).astype(np.uint32)


@dataclass(frozen=True, kw_only=True)
class LiveMatch:
    """Where the last 0 .. depth tokens of a context occur. counts: int64 [depth + 1], deleted documents left out.

    low_SD, high_SD: int64, the intervals in every segment, deleted documents included; empty where nothing is live.
    """

    counts: np.ndarray
    low_SD: np.ndarray
    high_SD: np.ndarray

    @property
    def depth(self) -> int:
        """How many of the last tokens occur together in a document that is not deleted."""
        return len(self.counts) - 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """What memory says comes next.

    p: float32 [V + 1], END last; sums to 1, or is all 0 where the index is empty. depth: tokens of the longest match.
    count_D, distinct_D: int64 [depth + 1], how often the last 0 .. depth tokens occur and how many different tokens
    follow. For the longest match: documents, how many hold it (counted up to 64); top, the token that follows most often
    (of equal ones the smallest; -1 without any) and its p; entropy, of what follows, in nats.
    """

    p: np.ndarray
    depth: int
    count_D: np.ndarray
    distinct_D: np.ndarray
    documents: int
    top: tuple[int, float]
    entropy: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """For every token of a prompt, what memory said before it came; all [T], row t given ids[:t] alone.

    p: float32, of the token that came. depth, count, distinct, documents, top: int64; top_p, entropy: float32: of the
    longest match, as in `Found`.
    """

    p: np.ndarray
    depth: np.ndarray
    count: np.ndarray
    distinct: np.ndarray
    documents: np.ndarray
    top: np.ndarray
    top_p: np.ndarray
    entropy: np.ndarray


class Snapshot:
    """Segments of one vocabulary, as they are now. Immutable; threads may share one."""

    def __init__(self, views: Sequence[View], *, vocab_size: int) -> None:
        self.views, self.vocab_size = tuple(views), vocab_size
        for view in self.views:
            if view.segment.vocab_size != vocab_size:
                raise ConfigError(
                    f"A segment of {view.segment.vocab_size:,} tokens cannot stand beside ones of {vocab_size:,}."
                )

    @property
    def end(self) -> int:
        """The id that ends a document."""
        return self.vocab_size

    def __len__(self) -> int:
        """Live tokens, ENDs included."""
        return sum(len(view.segment) - len(view.dead_rank) for view in self.views)

    @property
    def n_documents(self) -> int:
        """Live documents."""
        return sum(view.segment.n_documents - len(view.dead_documents) for view in self.views)

    # ---- questions ----------------------------------------------------------------------------------------------------

    def match(self, context: Sequence[int] | np.ndarray, *, max_order: int = MAX_ORDER) -> LiveMatch:
        """The longest suffix of `context` (token ids, oldest first) that occurs, and every shorter one."""
        context = _ids(context)
        low_SD = np.zeros((len(self.views), max_order + 1), np.int64)
        high_SD = np.zeros_like(low_SD)
        counts = np.zeros(max_order + 1, np.int64)
        for s, view in enumerate(self.views):
            found = view.segment.match(context, max_order=max_order)
            dead = np.searchsorted(view.dead_rank, found.high) - np.searchsorted(view.dead_rank, found.low)
            live = found.high - found.low - dead
            n = int(np.count_nonzero(live))
            low_SD[s, :n], high_SD[s, :n] = found.low[:n], found.high[:n]
            counts[:n] += live[:n]
        depth = max(int(np.count_nonzero(counts)) - 1, 0)
        return LiveMatch(
            counts=counts[: depth + 1], low_SD=low_SD[:, : depth + 1], high_SD=high_SD[:, : depth + 1]
        )

    def continuations(self, match: LiveMatch, order: int) -> tuple[np.ndarray, np.ndarray]:
        """What followed the last `order` tokens: ids ascending (END: vocab_size) and how often, both int64."""
        count_V = self._histogram(match, order)
        token_I = np.flatnonzero(count_V)
        return token_I, count_V[token_I]

    def longest(
        self, context: Sequence[int] | np.ndarray, *, max_order: int = MAX_ORDER
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """How many of the last tokens of `context` occur, what followed them (ids ascending) and how often."""
        match = self.match(context, max_order=max_order)
        return match.depth, *self.continuations(match, match.depth)

    def distribution(
        self,
        context: Sequence[int] | np.ndarray,
        out: np.ndarray | None = None,
        *,
        max_order: int = MAX_ORDER,
        discount: float = DISCOUNT,
        orders: Orders = "all",
        count: Count = "tokens",
        cap: int = 1,
    ) -> Found:
        """The probability of every token and of END after `context`; written to `out` (float32 [V + 1]) where given."""
        match = self.match(context, max_order=max_order)
        p = np.full(self.vocab_size + 1, 1 / (self.vocab_size + 1))
        distinct_D = np.zeros(match.depth + 1, np.int64)
        for d in range(match.depth + 1):
            raw_V = self._histogram(match, d)
            count_V = self._histogram(match, d, count, cap) if d else raw_V
            distinct_D[d] = np.count_nonzero(raw_V)
            total = count_V.sum()
            if not total:
                p[:] = 0
            elif orders == "longest":
                p = count_V / total
            else:
                p = np.maximum(count_V - discount, 0) / total + discount * distinct_D[d] / total * p
        out = np.empty(self.vocab_size + 1, np.float32) if out is None else out
        out[:] = p
        share_I = count_V[count_V > 0] / max(count_V.sum(), 1)
        top = int(count_V.argmax()) if len(share_I) else -1
        holders = sum(len(numbers) for numbers, _ in self._numbers_of(match, match.depth))
        return Found(
            p=out, depth=match.depth, count_D=match.counts, distinct_D=distinct_D,
            documents=min(holders, MOST_DOCUMENTS), top=(top, float(out[top]) if top >= 0 else 0.0),
            entropy=float(-(share_I * np.log(share_I)).sum()),
        )  # fmt: skip

    def score(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_order: int = MAX_ORDER,
        discount: float = DISCOUNT,
        orders: Orders = "all",
        count: Count = "tokens",
        cap: int = 1,
    ) -> Scores:
        """P of ids[t] given ids[:t] for every t, and what the match before it was like."""
        ids = _ids(ids)
        T = len(ids)
        scores = Scores(
            p=np.zeros(T, np.float32), depth=np.zeros(T, np.int64), count=np.zeros(T, np.int64),
            distinct=np.zeros(T, np.int64), documents=np.zeros(T, np.int64), top=np.zeros(T, np.int64),
            top_p=np.zeros(T, np.float32), entropy=np.zeros(T, np.float32),
        )  # fmt: skip
        for t in range(T):
            found = self.distribution(
                ids[max(0, t - max_order) : t],
                max_order=max_order,
                discount=discount,
                orders=orders,
                count=count,
                cap=cap,
            )
            scores.p[t] = found.p[ids[t]] if 0 <= ids[t] <= self.vocab_size else 0
            scores.depth[t], scores.count[t] = found.depth, found.count_D[-1]
            scores.distinct[t], scores.documents[t] = found.distinct_D[-1], found.documents
            (scores.top[t], scores.top_p[t]), scores.entropy[t] = found.top, found.entropy
        return scores

    def documents_of(self, match: LiveMatch, order: int, *, limit: int = 10) -> list[tuple[Document, int]]:
        """Documents in which the last `order` tokens occur, each with how often, most often first."""
        found = [
            (-int(n), s, int(number))
            for s, (number_I, count_I) in enumerate(self._numbers_of(match, order))
            for number, n in zip(number_I, count_I, strict=True)
        ]
        return [(self.views[s].segment.document(number), -n) for n, s, number in sorted(found)[:limit]]

    # ---- other snapshots ----------------------------------------------------------------------------------------------

    def restricted(self, document_ids: Iterable[str]) -> "Snapshot":
        """A memory of these documents alone, sorted anew in memory. ConfigError names an id that is not here."""
        places = [self._place(document_id) for document_id in dict.fromkeys(document_ids)]
        segments = [self.views[s].segment for s, _ in places]
        segment = Segment.build(
            [seg.document_tokens(number) for seg, (_, number) in zip(segments, places, strict=True)],
            vocab_size=self.vocab_size,
            tokenizer=segments[0].tokenizer if segments else "",
            documents=[seg.document(number) for seg, (_, number) in zip(segments, places, strict=True)],
        )
        return Snapshot([View(segment)], vocab_size=self.vocab_size)

    def without(self, document_id: str) -> "Snapshot":
        """The same segments with this document deleted. ConfigError where it is not here."""
        s, number = self._place(document_id)
        views = [*self.views[:s], self.views[s].without(number), *self.views[s + 1 :]]
        return Snapshot(views, vocab_size=self.vocab_size)

    def _place(self, document_id: str) -> tuple[int, int]:
        for s, view in enumerate(self.views):
            for number in range(view.segment.n_documents):
                if number not in view.dead_documents and view.segment.document(number).id == document_id:
                    return s, number
        raise ConfigError(f"There is no document {document_id!r} here.")

    # ---- counting -----------------------------------------------------------------------------------------------------

    def _live(self, s: int, match: LiveMatch, order: int) -> np.ndarray:
        low, high = match.low_SD[s, order], match.high_SD[s, order]
        return np.setdiff1d(np.arange(low, high), self.views[s].dead_rank, assume_unique=True)

    def _numbers_of(self, match: LiveMatch, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
        found = []
        for s, view in enumerate(self.views):
            position_I = view.segment.order[self._live(s, match, order)]
            number_I = np.searchsorted(view.segment.document_at, position_I, "right") - 1
            found.append(np.unique(number_I, return_counts=True))
        return found

    def _histogram(self, match: LiveMatch, order: int, count: Count = "tokens", cap: int = 1) -> np.ndarray:
        count_V = np.zeros(self.vocab_size + 1, np.int64)
        for s, view in enumerate(self.views):
            segment, rank_I = view.segment, self._live(s, match, order)
            token_I = segment.next[rank_I].astype(np.int64)
            if count == "tokens":
                count_V += np.bincount(token_I, minlength=len(count_V))
                continue
            number_I = np.searchsorted(segment.document_at, segment.order[rank_I], "right") - 1
            if count == "sources":
                number_I = _groups(segment)[number_I]
            pair_U, n_U = np.unique(number_I * len(count_V) + token_I, return_counts=True)
            np.add.at(count_V, pair_U % len(count_V), np.minimum(n_U, cap))
        return count_V


def _groups(segment: Segment) -> np.ndarray:
    """Documents of one source have one number; a document without a source is its own."""
    first: dict[str, int] = {}
    facts = [segment.document(number) for number in range(segment.n_documents)]
    return np.array([first.setdefault(d.source, n) if d.source else n for n, d in enumerate(facts)], np.int64)


def _ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    found = np.asarray(ids)
    if found.size and found.dtype.kind not in "iu":
        raise TokenIdError(f"Token ids are whole numbers; got {found.dtype}.")
    return np.ascontiguousarray(found, np.int64).reshape(-1)
