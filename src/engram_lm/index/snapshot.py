"""What one request sees: several segments without their deleted documents, asked as if they were one (docs/index.md).

snapshot = Snapshot([LiveSegment(segment), LiveSegment(other, dead_documents=[3])], vocab_size=49_152)
order, tokens, counts = snapshot.longest(context)      # what followed the longest suffix of the context that occurs
found = snapshot.distribution(context)                 # found.p: float32 [V + 1], END last
scores = snapshot.score(ids)                           # P of every token of a prompt given those before it
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from engram_lm.errors import ConfigError, TokenIdError
from engram_lm.index.kernels import counts, discounting, search
from engram_lm.index.live_segment import Count, LiveSegment, dead_ranks, is_by_source, shared_sources
from engram_lm.index.segment import MAX_ORDER, Document, Segment

__all__ = ["Count", "Found", "LiveMatch", "LiveSegment", "Orders", "Scores", "Snapshot", "dead_ranks"]

DISCOUNT = 0.75
MOST_ORDER = 2**16 - 1

Orders = Literal["all", "longest"]

_MOST_PAIRS = 2**21
_RANKS_AT_ONCE = 2**17  # of intervals that are worked out before somebody may stop it
_JOINT_TOKENS = 2**20  # of lists of several segments, remembered by a thread: 8 MB
_MOST_SPACES, _MOST_WORKS, _MOST_DISCOUNTS = 16, 4, 4
_serials = itertools.count(1)


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
    follow. For the longest match: documents (sources, where these are counted), how many hold it, counted up to 16; top, the
    token that follows most often
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

    p: float32, of the token that came. depth, count, distinct, documents, top_token: int64; top_p, entropy: float32: of
    the longest match, as in `Found`. count_below, distinct_below: int64, of the match without its first token.
    """

    p: np.ndarray
    depth: np.ndarray
    count: np.ndarray
    distinct: np.ndarray
    count_below: np.ndarray
    distinct_below: np.ndarray
    documents: np.ndarray
    top_token: np.ndarray
    top_p: np.ndarray
    entropy: np.ndarray


class Snapshot:
    """Segments of one vocabulary, as they are now. Immutable; threads may share one."""

    def __init__(self, views: Sequence[LiveSegment], *, vocab_size: int) -> None:
        self.views, self.vocab_size = tuple(views), vocab_size
        for view in self.views:
            if view.segment.vocab_size != vocab_size:
                raise ConfigError(
                    f"A segment of {view.segment.vocab_size:,} tokens cannot stand beside ones of {vocab_size:,}."
                )
        self._tables: dict[tuple[Count, int], _Table] = {}
        self._plain = self._table("tokens", None)

    @property
    def end(self) -> int:
        """The id that ends a document."""
        return self.vocab_size

    @cached_property
    def n_tokens(self) -> int:
        """Live tokens, ENDs included."""
        return sum(view.n_tokens for view in self.views)

    @cached_property
    def n_documents(self) -> int:
        """Live documents."""
        return sum(view.n_documents for view in self.views)

    # ---- questions ----------------------------------------------------------------------------------------------------

    def match(self, context: Sequence[int] | np.ndarray, *, max_order: int = MAX_ORDER) -> LiveMatch:
        """The longest suffix of `context` (token ids, oldest first) that occurs, and every shorter one."""
        _, space, context_K, n = self._begin(context, max_order)
        depth = search.walk(self._plain.rows, context_K, n, max_order, self.end, *space[:3])
        return LiveMatch(
            counts=space.live_D[: depth + 1].copy(),
            low_SD=space.low_SD[:, : depth + 1].copy(),
            high_SD=space.high_SD[:, : depth + 1].copy(),
        )

    def continuations(self, match: LiveMatch, order: int) -> tuple[np.ndarray, np.ndarray]:
        """What followed the last `order` tokens: ids ascending (END: vocab_size) and how often, both int64."""
        if not 0 <= order <= match.depth:
            raise ConfigError(f"This match has the orders 0..{match.depth}; got {order}.")
        work = _work_of(self.vocab_size)
        n = discounting.continuations(
            self._plain.rows, order, match.low_SD, match.high_SD, self.end, *work.counts, *work.sparse
        )
        return work.token_V[:n].copy(), work.out_V[:n].copy()

    def longest(
        self, context: Sequence[int] | np.ndarray, *, max_order: int = MAX_ORDER
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """How many of the last tokens of `context` occur, what followed them (ids ascending) and how often."""
        work, space, context_K, n = self._begin(context, max_order)
        depth, n = discounting.longest(
            self._plain.rows, context_K, n, max_order, self.end, *space[:3], *work.counts, *work.sparse
        )
        if depth == 0:
            return 0, self._zero.token_U.copy(), self._zero.count_U.copy()
        return depth, work.token_V[:n].copy(), work.out_V[:n].copy()

    def distribution(
        self,
        context: Sequence[int] | np.ndarray,
        out: np.ndarray | None = None,
        *,
        max_order: int = MAX_ORDER,
        discount: float = DISCOUNT,
        orders: Orders = "all",
        count: Count = "tokens",
        cap: int | None = None,
    ) -> Found:
        """The probability of every token and of END after `context`; written to `out` (float32 [V + 1]) where given."""
        table = self._asked(max_order, discount, orders, count, cap)
        if out is None:
            out = np.empty(self.vocab_size + 1, np.float32)
        elif out.dtype != np.float32 or out.shape != (self.vocab_size + 1,) or not out.flags.carray:
            raise ConfigError(
                f"Probabilities are float32 [{self.vocab_size + 1:,}], one after another; got {out.dtype} {out.shape}."
            )
        work, space, context_K, n = self._begin(context, max_order)
        zero = self._zero
        depth = discounting.distribution(
            table.rows, context_K, n, max_order, self.end, discount, orders == "longest", table.serial, *space[:5],
            *work.counts[:2], work.part_V, *work.pairs_of(table), work.memo_M7, work.memo_M, zero.integers, zero.numbers,
            zero.count_V, self._p_of_order_0(discount), out, work.fact_I, work.fact_F,
        )  # fmt: skip
        top, documents = work.fact_I.tolist()
        return Found(
            p=out, depth=depth, count_D=space.live_D[: depth + 1].copy(), distinct_D=space.distinct_D[: depth + 1].copy(),
            documents=documents, top=(top, float(out[top]) if top >= 0 else 0.0), entropy=float(work.fact_F[0]),
        )  # fmt: skip

    def score(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_order: int = MAX_ORDER,
        discount: float = DISCOUNT,
        orders: Orders = "all",
        count: Count = "tokens",
        cap: int | None = None,
        following: Sequence[int] | np.ndarray | None = None,
    ) -> Scores:
        """P of ids[t] given ids[:t] for every t, and what the match before it was like. END may be among the ids.

        An id outside the vocabulary has no probability (0) and matches nothing. following: what came, where it is not the ids
        themselves (`compressed`); with count="tokens" it is.
        """
        table = self._asked(max_order, discount, orders, count, cap)
        id_T = _ids(ids).copy()
        next_T = id_T if following is None else _ids(following)
        if len(next_T) != len(id_T):
            raise ConfigError(f"following has an id for each of {len(id_T):,} ids; got {len(next_T):,}.")
        if count == "tokens" and not np.array_equal(next_T, id_T):
            raise ConfigError('With count="tokens" what follows is the ids themselves; leave following out.')
        self._begin((), max_order)
        work = _work_of(self.vocab_size)
        low_3SD, high_3SD = np.zeros((2, 3, len(self.views), max_order + 2), np.int64)
        integer_7T, number_3T = np.zeros((7, len(id_T)), np.int64), np.zeros((3, len(id_T)), np.float32)
        zero = self._zero
        discounting.score(
            table.rows, id_T, next_T, max_order, self.end, discount,
            orders == "longest", table.serial, low_3SD, high_3SD, np.zeros((3, max_order + 2), np.int64),
            np.zeros((len(self.views), 2), np.int64), *work.counts[:2], *work.pairs_of(table), work.memo_M7, work.memo_M,
            zero.integers, zero.numbers, zero.count_V, integer_7T, number_3T,
        )  # fmt: skip
        depth, n, distinct, n_below, distinct_below, documents, top_token = integer_7T
        return Scores(
            p=number_3T[0], depth=depth, count=n, distinct=distinct, count_below=n_below, distinct_below=distinct_below,
            documents=documents, top_token=top_token, top_p=number_3T[1], entropy=number_3T[2],
        )  # fmt: skip

    def documents_of(self, match: LiveMatch, order: int, *, limit: int = 10) -> list[tuple[Document, int]]:
        """Documents in which the last `order` tokens occur, each with how often, most often first."""
        found = []
        for s, view in enumerate(self.views):
            low, high = int(match.low_SD[s, order]), int(match.high_SD[s, order])
            begin, end = np.searchsorted(view.dead_rank, (low, high))
            live_I = np.delete(view.segment.order[low:high], view.dead_rank[begin:end].astype(np.int64) - low)
            number_I = np.searchsorted(view.segment.document_at, live_I, "right") - 1
            number_U, n_U = np.unique(number_I, return_counts=True)
            first = np.argsort(-n_U, kind="stable")[:limit]
            found += [(-int(n_U[i]), s, int(number_U[i])) for i in first]
        return [(self.views[s].segment.document(number), -n) for n, s, number in sorted(found)[:limit]]

    def prepare(
        self, *, count: Count = "tokens", cap: int | None = None, going: Callable[[], bool] = lambda: True
    ) -> None:
        """Work out now what a way of counting keeps of wide intervals; else that is done when one is first asked for.

        34 million tokens counted by document take five seconds of a core, which spares the first steps of a model a
        millisecond each. Threads may ask meanwhile. going: asked every few milliseconds; once it says no, the rest is left.
        """
        rows = self._table(count, cap).rows
        for s in range(len(self.views)):
            node = 0
            while node < rows[s, search.N_NODES] and going():
                node = counts.prepare(rows, s, node, _RANKS_AT_ONCE)

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
        return Snapshot([LiveSegment(segment)], vocab_size=self.vocab_size)

    def without(self, document_id: str) -> "Snapshot":
        """The same segments with this document deleted. ConfigError where it is not here."""
        s, number = self._place(document_id)
        views = [*self.views[:s], self.views[s].without(number), *self.views[s + 1 :]]
        return Snapshot(views, vocab_size=self.vocab_size)

    def with_segment(self, view: LiveSegment) -> "Snapshot":
        """The same segments and one more."""
        return Snapshot([*self.views, view], vocab_size=self.vocab_size)

    def _place(self, document_id: str) -> tuple[int, int]:
        for s, view in enumerate(self.views):
            number = view.number_of(document_id)
            if number >= 0:
                return s, number
        raise ConfigError(f"There is no document {document_id!r} here.")

    # ---- what compiled code is given ----------------------------------------------------------------------------------

    def _begin(
        self, context: Sequence[int] | np.ndarray, max_order: int
    ) -> tuple["_Work", "_Space", np.ndarray, int]:
        if not 0 <= max_order <= MOST_ORDER:
            raise ConfigError(f"max_order is 0..{MOST_ORDER}; got {max_order}.")
        work = _work_of(self.vocab_size)
        space = work.space_of(len(self.views), max_order)
        last = _ids(context[-max_order:] if max_order else ())
        space.context_K[: len(last)] = last
        return work, space, space.context_K, len(last)

    def _asked(
        self, max_order: int, discount: float, orders: Orders, count: Count, cap: int | None
    ) -> "_Table":
        if not 0 < discount < 1:
            raise ConfigError(f"A discount lies between 0 and 1; got {discount}.")
        if orders not in ("all", "longest"):
            raise ConfigError(f'orders is "all" or "longest"; got {orders!r}.')
        if count != "tokens" and max_order > MAX_ORDER:
            raise ConfigError(
                f'count="{count}" looks at {MAX_ORDER} tokens of context at most; got {max_order}.'
            )
        return self._plain if count == "tokens" and cap is None else self._table(count, cap)

    def _table(self, count: Count, cap: int | None) -> "_Table":
        key = (count, 1 if cap is None else cap)
        if key not in self._tables:
            if not isinstance(count, str) or not (
                count in ("tokens", "documents", "sources") or count.startswith("sources:")
            ):
                raise ConfigError(
                    f'count is "tokens", "documents" or "sources", or "sources:" and a name in extra; got {count!r}.'
                )
            if count == "tokens" and cap is not None:
                raise ConfigError('A cap is for count="documents" or "sources"; all tokens are counted.')
            if not 1 <= key[1] < 2**31:
                raise ConfigError(f"A cap is 1 or more; got {cap}.")
            rows = np.array([view.row(*key) for view in self.views], np.int64).reshape(-1, search.ROW)
            shared = shared_sources(self.views, count) if is_by_source(count) else None
            serial, kept = next(_serials), [] if shared is None else shared[0]
            if shared is not None:
                rows[:, search.SHARED] = [number_D.__array_interface__["data"][0] for number_D in kept]
                rows[:, search.N_SOURCES], rows[:, search.SERIAL] = shared[1], serial
            n_pairs = 0
            if count != "tokens":
                read = sum(min(len(view.segment), view.segment.wide) for view in self.views)
                n_pairs = 1 << (2 * read + 1).bit_length()
                if n_pairs > _MOST_PAIRS:
                    raise ConfigError(
                        f"{len(rows)} segments that are read up to {read:,} tokens at once are too many to count documents: "
                        "merge them, or write them with a smaller wide."
                    )
            self._tables.setdefault(key, _Table(rows, serial, n_pairs, kept))
        return self._tables[key]

    @cached_property
    def _zero(self) -> "_Zero":
        count_V = np.zeros(self.vocab_size + 1, np.int64)
        for view in self.views:
            count_V += view.unigrams()
        token_U = np.flatnonzero(count_V > 0)
        count_U = count_V[token_U]
        total, top = int(count_V.sum()), int(count_V.argmax())
        integers = [
            total,
            len(token_U),
            top if total else -1,
            min(self.n_documents, discounting.MOST_DOCUMENTS),
        ]
        entropy = np.log(total) - (count_U * np.log(count_U)).sum() / total if total else 0.0
        return _Zero(
            np.array(integers, np.int64), np.array([max(entropy, 0.0)]), count_V, token_U, count_U, {}
        )

    def _p_of_order_0(self, discount: float) -> np.ndarray:
        zero = self._zero
        p_V = zero.p_V.get(discount)
        if p_V is None:
            total, distinct = zero.integers[:2]
            rest = discount * distinct / (self.vocab_size + 1)
            p_V = ((np.maximum(zero.count_V - discount, 0) + rest) / max(total, 1)).astype(np.float32)
            if len(zero.p_V) >= _MOST_DISCOUNTS:
                zero.p_V.clear()
            zero.p_V[discount] = p_V
        return p_V


class _Table(NamedTuple):
    """rows: int64 [S, ROW]. serial: of what is remembered about it. n_pairs: room for documents and tokens. kept: arrays that
    rows point to; without any, no source reaches over two segments."""

    rows: np.ndarray
    serial: int
    n_pairs: int
    kept: list[np.ndarray]


class _Zero(NamedTuple):
    """Order 0: total, distinct, top token, documents; entropy; counts; those that are not 0; probabilities by discount."""

    integers: np.ndarray
    numbers: np.ndarray
    count_V: np.ndarray
    token_U: np.ndarray
    count_U: np.ndarray
    p_V: dict[float, np.ndarray]


class _Space(NamedTuple):
    """Room for the intervals of S segments and D orders."""

    low_SD: np.ndarray
    high_SD: np.ndarray
    live_D: np.ndarray
    distinct_D: np.ndarray
    read_S2: np.ndarray
    context_K: np.ndarray


class _Work:
    """Room to count in, one a thread and vocabulary: what is counted with is zero again after each call."""

    def __init__(self, vocab_size: int) -> None:
        self.count_V, self.touched_V = np.zeros((2, vocab_size + 1), np.int64)
        self.part_V = np.zeros(vocab_size + 1)
        self.token_V, self.out_V = np.empty((2, vocab_size + 1), np.int64)
        self.pairs_P4, self.state = np.zeros((2, 4), np.int64), np.zeros(counts.STATE, np.int64)
        self._joint: tuple[np.ndarray, ...] = ()
        self.memo_M7, self.memo_M = np.zeros((discounting.MEMO, 7), np.int64), np.zeros(discounting.MEMO)
        self.fact_I, self.fact_F = np.zeros(2, np.int64), np.zeros(1)
        self.counts = (self.count_V, self.touched_V, self.pairs_P4, self.state)
        self.sparse = (self.token_V, self.out_V)
        self._spaces: dict[tuple[int, int], _Space] = {}

    def space_of(self, n_segments: int, max_order: int) -> _Space:
        space = self._spaces.get((n_segments, max_order))
        if space is None:
            if len(self._spaces) >= _MOST_SPACES:
                self._spaces.clear()
            low_SD, high_SD = np.zeros((2, n_segments, max_order + 1), np.int64)
            live_D, distinct_D, context_K = np.zeros((3, max_order + 1), np.int64)
            space = _Space(
                low_SD, high_SD, live_D, distinct_D, np.zeros((n_segments, 2), np.int64), context_K
            )
            self._spaces[n_segments, max_order] = space
        return space

    def pairs_of(self, table: _Table) -> tuple[np.ndarray, np.ndarray]:
        if len(self.pairs_P4) < table.n_pairs:
            self.pairs_P4 = np.zeros((table.n_pairs, 4), np.int64)
        if table.kept and not self._joint:
            room = max(_JOINT_TOKENS, 2 * len(self.count_V))
            slots = np.full(counts.JOINT_SLOTS * counts.SLOT, 2**32 - 1, np.uint32)
            self._joint = (*np.zeros((2, room), np.uint32), slots)
            self.state[counts.JOINT_TOKEN : counts.JOINT_ROOM] = [
                array.__array_interface__["data"][0] for array in self._joint
            ]
            self.state[counts.JOINT_ROOM] = room
        return self.pairs_P4, self.state


_LOCAL = threading.local()


def _work_of(vocab_size: int) -> _Work:
    try:
        return _LOCAL.works[vocab_size]
    except (AttributeError, KeyError):
        if not hasattr(_LOCAL, "works") or len(_LOCAL.works) >= _MOST_WORKS:
            _LOCAL.works = {}
        return _LOCAL.works.setdefault(vocab_size, _Work(vocab_size))


def _ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    found = np.asarray(ids)
    if found.dtype.kind not in "iu" and found.size:
        raise TokenIdError(f"Token ids are whole numbers; got {found.dtype}.")
    if found.ndim != 1:
        raise TokenIdError(f"Token ids stand in one row; got an array of shape {found.shape}.")
    return found.astype(np.int64, copy=False)
