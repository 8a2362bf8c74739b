"""A segment without its deleted documents, and the numbers by which compiled code finds its arrays (docs/index.md).

    view = LiveSegment(segment, dead_documents=[3])
    view.row("documents", 1)                # int64 [ROW]: addresses and sizes, see index/kernels/search.py

What is worked out about a segment lives as long as the segment; what depends on what is deleted, as long as the view.
"""

import json
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.index.kernels import search
from engram_lm.index.kernels.counts import BLOCK_TOKENS
from engram_lm.index.segment import MAX_ORDER, Segment
from engram_lm.index.segment_file import STRIDE, tokens_before

# "tokens", "documents", "sources", or "sources:" and a name in `Document.extra` that says whose a document is
Count = str

_LARGE = 2**16  # tokens of a segment from which its counts of single tokens are kept
_FEW = 8  # runs of documents that are looked for one by one
_SMALL = 2**18  # tokens of a segment whose `before` is worked out


class LiveSegment:
    """A segment and which of its documents are deleted.

    dead_rank: uint32, ascending: the places in `segment.order` whose position belongs to a deleted document, its END
    included; worked out from `dead_documents` (numbers) where it is not given.
    """

    def __init__(
        self, segment: Segment, dead_rank: np.ndarray | None = None, dead_documents: Iterable[int] = ()
    ) -> None:
        self.segment = segment
        self.dead_documents = frozenset(int(number) for number in dead_documents)
        self.dead_rank = np.ascontiguousarray(
            dead_ranks(segment, self.dead_documents) if dead_rank is None else dead_rank, np.uint32
        )
        rank_R = self.dead_rank
        if len(rank_R) and (rank_R[-1] >= len(segment) or (rank_R[1:] <= rank_R[:-1]).any()):
            raise CheckpointError(
                f"What is deleted of a segment of {len(segment):,} tokens does not belong to it."
            )
        self._facts = _facts_of(segment)
        self._rows: dict[tuple[str, int], tuple[np.ndarray, list[np.ndarray]]] = {}

    @property
    def n_tokens(self) -> int:
        """Live tokens, ENDs included."""
        return len(self.segment) - len(self.dead_rank)

    @property
    def n_documents(self) -> int:
        """Live documents."""
        return self.segment.n_documents - len(self.dead_documents)

    def without(self, number: int) -> "LiveSegment":
        """The same segment with one more document deleted."""
        if number in self.dead_documents:
            return self
        more = dead_ranks(self.segment, [number])
        return LiveSegment(
            self.segment, np.sort(np.concatenate([self.dead_rank, more])), self.dead_documents | {number}
        )

    def number_of(self, document_id: str) -> int:
        """The number of a live document, or -1."""
        number = self.segment.number_of(document_id)
        return -1 if number in self.dead_documents else number

    def unigrams(self) -> np.ndarray:
        """How often each token occurs, int64 [V + 1], END last."""
        count_V = self._facts.unigrams()
        if not len(self.dead_rank):
            return count_V
        return count_V - _count(self.segment.next[self.dead_rank], None, self.segment.vocab_size)

    def row(self, count: Count, cap: int) -> np.ndarray:
        """Addresses and sizes for compiled code that counts in this way, int64 [ROW]. Valid while the view lives."""
        key = (count, cap if count != "tokens" else 0)
        if key not in self._rows:
            facts, kept = self._facts, [self.dead_rank]
            row = facts.row.copy()
            row[search.DEAD], row[search.N_DEAD] = _address(self.dead_rank), len(self.dead_rank)
            kept.append(np.zeros(row[search.N_NODES] + 1, np.uint8))
            if count != "tokens":
                at_H, token = facts.list_places, facts.arrays[search.NODE_TOKEN].dtype
                kept += [at_H, np.zeros(at_H[-1] + 1, token), np.zeros(at_H[-1] + 1, np.uint32)]
                row[search.NODE_AT], row[search.NODE_TOKEN] = _address(at_H), _address(kept[3])
                row[search.N_COUNTS] = at_H[-1]
            elif len(self.dead_rank):
                kept.append(np.zeros(row[search.N_COUNTS] + 1, np.uint32))
            if len(kept) > 2:
                row[search.ADJUSTED], row[search.READY] = _address(kept[-1]), _address(kept[1])
            row[search.CAP] = key[1]
            if is_by_source(count):
                row[search.GROUP] = _address(facts.groups(count))
            self._rows.setdefault(key, (row, kept))
        return self._rows[key][0]

    def sources(self, count: Count) -> tuple[list[str], np.ndarray]:
        """Names of the sources, and for each document the place of its own, int64 [D]; -1 where it stands for itself."""
        return self._facts.sources(count)


def is_by_source(count: Count) -> bool:
    """Whether documents of one source are counted together."""
    return count.partition(":")[0] == "sources"


def shared_sources(views: Sequence[LiveSegment], count: Count) -> tuple[list[np.ndarray], int] | None:
    """Each document's number among all sources of these views, uint32 [D] a view, and how many there are; None where no
    source has documents in two of them, so that each view can count alone."""
    number: dict[str, int] = {}
    shared, total, found = False, 0, []
    for view in views:
        names, source_D = view.sources(count)
        shared |= any(name in number for name in names)
        for name in names:
            if name not in number:
                number[name] = total
                total += 1
        number_D = np.append([number[name] for name in names], 0).astype(np.int64)[source_D]
        alone_D = source_D < 0
        number_D[alone_D] = total + np.arange(alone_D.sum())
        total += int(alone_D.sum())
        found.append(number_D.astype(np.uint32))
    return (found, total) if shared else None


def dead_ranks(segment: Segment, document_numbers: Iterable[int]) -> np.ndarray:
    """Places in `segment.order`, ascending, of the positions of these documents: what `LiveSegment` hides. uint32."""
    number_K = np.unique(np.fromiter(document_numbers, np.int64))
    if not len(number_K):
        return np.empty(0, np.uint32)
    if number_K[0] < 0 or number_K[-1] >= segment.n_documents:
        raise ConfigError(
            f"Documents {number_K[0]}..{number_K[-1]} are not all here; this segment has {segment.n_documents:,}."
        )
    at_D = segment.document_at.astype(np.int64)
    cut_R = np.flatnonzero(np.diff(number_K, prepend=-2) > 1)
    begin_R = at_D[number_K[cut_R]]
    end_R = at_D[number_K[np.append(cut_R[1:] - 1, len(number_K) - 1)] + 1]
    if len(begin_R) > _FEW:
        dead_N = np.repeat(np.isin(np.arange(segment.n_documents), number_K), np.diff(at_D))
        return np.flatnonzero(dead_N[segment.order]).astype(np.uint32)
    order_N = np.ascontiguousarray(segment.order, np.uint32)
    parts = []
    for begin, end in zip(begin_R, end_R, strict=True):
        rank_R = np.zeros(end - begin, np.uint32)
        found = search.ranks_between(order_N, np.uint32(begin), np.uint32(end - begin), rank_R)
        if found != len(rank_R):
            raise CheckpointError("This segment is damaged: the places of a document are not all sorted in.")
        parts.append(rank_R)
    return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))


class _Facts:
    """What is worked out about a segment once. It keeps the arrays that its row points to, not the segment."""

    def __init__(self, segment: Segment) -> None:
        four = segment.tokens.dtype.itemsize == 4
        token = np.uint32 if four else np.uint16
        end = segment.vocab_size
        types = {
            search.TOKENS: ("tokens", token), search.ORDER: ("order", np.uint32), search.NEXT: ("next", token),
            search.NODE_LOW: ("node_low", np.uint32),
            search.NODE_HIGH: ("node_high", np.uint32), search.NODE_AT: ("node_at", np.uint32),
            search.NODE_TOKEN: ("node_token", token), search.NODE_COUNT: ("node_count", np.uint32),
            search.NODE_DISTINCT: ("node_distinct", np.uint32), search.DOCUMENT_AT: ("document_at", np.uint32),
        }  # fmt: skip
        self.arrays = {
            at: np.ascontiguousarray(segment.arrays[name], dtype) for at, (name, dtype) in types.items()
        }
        self.arrays[search.FIRST] = np.ascontiguousarray(segment.first, np.uint32)
        size = {name: len(self.arrays[at]) for at, (name, _) in types.items()}
        if len(segment.first) != end + 1:
            raise CheckpointError(
                f"This segment is damaged: {len(segment.first):,} beginnings for {end:,} tokens."
            )
        N = min(size["tokens"], size["order"], size["next"])
        n_documents = max(size["document_at"] - 1, 0)
        block_B = np.searchsorted(
            self.arrays[search.DOCUMENT_AT], np.arange(0, N + BLOCK_TOKENS, BLOCK_TOKENS, np.uint32), "right"
        )
        self.arrays[search.BLOCK] = np.maximum(block_B, 1).astype(np.uint32) - np.uint32(1)
        # rank i * NODE_RANKS: nodes before it; one more for what is beyond all
        from_B = np.searchsorted(
            self.arrays[search.NODE_LOW], np.arange(0, N + search.NODE_RANKS, search.NODE_RANKS, np.uint32)
        )
        self.arrays[search.NODE_FROM] = from_B.astype(np.uint32)
        small = N <= _SMALL
        sampled = segment.arrays["before"]
        if small:
            # of all ranks, so that many small segments are searched side by side
            sampled = tokens_before(self.arrays[search.TOKENS][:N], self.arrays[search.ORDER][:N], end=end)
            self.arrays[search.BEFORE] = sampled
        if small or len(sampled) == -(-N // STRIDE):
            self.arrays[search.SAMPLED] = np.ascontiguousarray(sampled, token)
        self.row = np.zeros(search.ROW, np.int64)
        for at, array in self.arrays.items():
            self.row[at] = _address(array)
        self.row[search.N_TOKENS], self.row[search.N_DOCUMENTS] = N if n_documents else 0, n_documents
        self.row[search.N_NODES] = max(
            min(size["node_low"], size["node_high"], size["node_at"] - 1, size["node_distinct"]), 0
        )
        self.row[search.N_COUNTS] = min(size["node_token"], size["node_count"])
        self.row[search.STRIDE] = 0 if small else STRIDE.bit_length() - 1
        self.row[search.FOUR], self.row[search.OVER], self.row[search.END] = four, segment.wide, end
        self._lines, self._end = segment.arrays["documents"], end
        self._unigrams: np.ndarray | None = None
        self._sources: dict[Count, tuple[list[str], np.ndarray]] = {}
        self._groups: dict[Count, np.ndarray] = {}

    def unigrams(self) -> np.ndarray:
        if self._unigrams is not None:
            return self._unigrams
        low, high, at = (self.arrays[a] for a in (search.NODE_LOW, search.NODE_HIGH, search.NODE_AT))
        N = self.row[search.N_TOKENS]
        if (
            self.row[search.N_NODES]
            and low[0] == 0
            and high[0] == N
            and at[0] < at[1] <= self.row[search.N_COUNTS]
        ):
            part = slice(int(at[0]), int(at[1]))
            count_V = _count(
                self.arrays[search.NODE_TOKEN][part], self.arrays[search.NODE_COUNT][part], self._end
            )
        else:
            count_V = _count(self.arrays[search.NEXT][:N], None, self._end)
        if N > _LARGE:
            self._unigrams = count_V
        return count_V

    @cached_property
    def list_places(self) -> np.ndarray:
        """Where lists of all nodes would begin, uint32 [H + 1]: as many places each as tokens follow."""
        H, N = self.row[search.N_NODES], self.row[search.N_TOKENS]
        at_H = np.concatenate([[0], np.cumsum(self.arrays[search.NODE_DISTINCT][:H], dtype=np.int64)])
        # intervals of one order do not overlap, and there are nodes of MAX_ORDER + 1 orders
        if at_H[-1] > min((MAX_ORDER + 1) * N, 2**32 - 1):
            raise CheckpointError(f"This segment is damaged: {at_H[-1]:,} continuations of {N:,} tokens.")
        return at_H.astype(np.uint32)

    def sources(self, count: Count) -> tuple[list[str], np.ndarray]:
        """Names of sources, and the place of each document's own, int64 [D]; -1 where it has none."""
        if count not in self._sources:
            field = count.partition(":")[2]
            place: dict[str, int] = {}
            lines = (json.loads(line) for line in self._lines.tobytes().splitlines())
            names = [
                (facts.get("extra") or {}).get(field) if field else facts.get("source") for facts in lines
            ]
            at = [place.setdefault(name, len(place)) if name else -1 for name in names]
            self._sources[count] = list(place), np.array(at, np.int64)
        return self._sources[count]

    def groups(self, count: Count) -> np.ndarray:
        """The first document of each document's source, uint32 [D]; one without a source stands for itself."""
        if count not in self._groups:
            _, source_D = self.sources(count)
            key_D = np.where(source_D < 0, -1 - np.arange(len(source_D)), source_D)
            _, first_U, back_D = np.unique(key_D, return_index=True, return_inverse=True)
            self._groups[count] = first_U[back_D].astype(np.uint32)
        return self._groups[count]


def _count(token_I: np.ndarray, count_I: np.ndarray | None, end: int) -> np.ndarray:
    if len(token_I) and int(token_I.max()) > end:
        raise CheckpointError(f"This segment is damaged: token {int(token_I.max()):,} of {end:,} occurs.")
    return np.bincount(token_I, count_I, end + 1).astype(np.int64, copy=False)


_KNOWN: "weakref.WeakKeyDictionary[Segment, _Facts]" = weakref.WeakKeyDictionary()


def _facts_of(segment: Segment) -> _Facts:
    facts = _KNOWN.get(segment)
    if facts is None:
        facts = _KNOWN.setdefault(segment, _Facts(segment))
    return facts


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
