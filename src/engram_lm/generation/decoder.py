"""Text one token at a time, for one request or for many that come and go, with what memory did at each token.

    decoder = Decoder(TransformersEngine(model, tokenizer))
    rows = [decoder.add(Request(ids=ids, max_new_tokens=40)), ...]
    while rows:
        for row, tokens in zip(rows, decoder.step(rows)):       # one forward of all
            ...
        rows = [row for row in rows if not row.finished]        # others may be added at any time

    for token in stream(engine, Request(ids=ids, max_new_tokens=40), processor): ...      # the same for one

The first step of a row reads its prompt, alone; later ones read one token of every row together. Rows of unequal length are
padded on the left, and keys, values and memory's state follow their row into the batch and out of it (`caches`). A row alone
is never padded. A batch sums in another order than a row alone: logits are equal up to rounding.

How strongly the tables acted at a token is known once the model has read it, so a watched token is handed out after the
forward that reads it, and the last one costs one more forward than generation alone would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from engram_lm.errors import ConfigError
from engram_lm.generation.engines import Engine, Forward, Gives, require
from engram_lm.generation.strengths import HeatView
from engram_lm.traces import LayerTrace

if TYPE_CHECKING:
    from engram_lm.generation.speculative import Drafter
    from engram_lm.mixing.trace import MemoryStep


class Processor(Protocol):
    """What changes the logits of one row: `mixing.MemoryProcessor` or `mixing.pointing.PointingProcessor`."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor: ...

    def step_of(self, token_id: int) -> MemoryStep | None: ...


class Token(NamedTuple):
    """One token as it was read. strength: in the view's quantity; 0 with memory off.

    With an index, strength is the part of the token's probability that the index gave, and step says how. share: what the
    tables added against the hidden state, with an index too.
    """

    id: int
    strength: float
    is_prompt: bool
    step: MemoryStep | None = None
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: of the prompt. temperature 0 is greedy. memory: "on" or "off", the model's tables. watch: hand out each token with
    what the tables did when it was read; False hands it out when it is chosen. ends: other end tokens than the engine's."""

    ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    memory: str = "on"
    view: HeatView = field(default_factory=HeatView)
    watch: bool = True
    ends: frozenset[int] | None = None


class Row:
    """One request while it is decoded. said: its ids so far. read: how many of them the cache holds."""

    def __init__(self, request: Request, processor: Processor | None, drafter: Drafter | None) -> None:
        self.request, self.processor, self.drafter = request, processor, drafter
        self.left, self.finished = request.max_new_tokens, False
        self.read, self.begun = 0, False
        self.n = len(request.ids)
        self.said_1T = torch.zeros((1, self.n + self.left), dtype=torch.int64)
        self.said_1T[0, : self.n] = torch.tensor(list(request.ids))
        self.steps: list[MemoryStep | None] = [None] * self.n
        self.end: tuple[int, MemoryStep | None] | None = None  # the end token that was chosen
        self._handed = 0
        self._random = torch.Generator().manual_seed(request.seed)
        self._batch: _Batch | None = None

    def go_on_from(self, cache: Any) -> None:
        """Begin behind what a cache holds of the prompt already."""
        if cache is not None:
            self.read, self._batch = int(cache.get_seq_length()), _Batch([self], [0], cache)

    @property
    def new_tokens(self) -> list[int]:
        """What was chosen so far, without an end token."""
        return self.said_1T[0, len(self.request.ids) : self.n].tolist()

    def choose(self, logits_V: torch.Tensor) -> tuple[int, MemoryStep | None]:
        """The token behind what was said, and what memory did to it."""
        if self.processor is not None:
            logits_V = self.processor(self.said_1T[:, : self.n], logits_V[None])[0]
        if self.request.temperature == 0:
            token = int(logits_V.argmax())
        else:
            p_V = torch.softmax(logits_V / self.request.temperature, -1)
            token = int(torch.multinomial(p_V, 1, generator=self._random))
        return token, None if self.processor is None else self.processor.step_of(token)

    def is_over(self) -> bool:
        """Whether what was said is to end here, for other reasons than an end token."""
        return False

    def ids(self, begin: int, end: int) -> list[int]:
        """Some of what was said."""
        return self.said_1T[0, begin:end].tolist()


class Decoder:
    """Steps rows forward, all that can share a forward together."""

    def __init__(self, engine: Engine) -> None:
        require(engine, Gives.LOGITS, to="choose tokens")
        self.engine = engine

    def add(
        self, request: Request, processor: Processor | None = None, drafter: Drafter | None = None
    ) -> Row:
        """A row that has read nothing yet. ConfigError where the engine cannot read so much."""
        longest = self.engine.longest
        if longest and len(request.ids) + request.max_new_tokens > longest:
            raise ConfigError(
                f"{len(request.ids)} tokens of prompt and {request.max_new_tokens} new ones exceed the model's {longest}."
            )
        return Row(request, processor, drafter)

    def step(self, rows: Sequence[Row]) -> list[list[Token]]:
        """Read what each row has not read yet, choose what follows, and say what can be handed out, row by row."""
        found: dict[int, list[Token]] = {}
        for group in self._groups([row for row in rows if not row.finished]):
            drafts = [self._draft(row) for row in group]
            forward = self._read(group, drafts)
            for place, (row, draft) in enumerate(zip(group, drafts, strict=True)):
                found[id(row)] = self._advance(row, draft, forward, place)
        return [found.get(id(row), []) for row in rows]

    # ---- who reads with whom --------------------------------------------------------------------------------------------

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows that share a forward: one token each, the same switch of memory. Prompts and drafts are read alone."""
        together: dict[tuple[str, bool], list[Row]] = {}
        alone = []
        for row in rows:
            if (
                row.read
                and row.drafter is None
                and row.n - row.read == 1
                and self.engine.can_join(row._batch.cache)
            ):
                watch = row.request.watch
                together.setdefault((row.request.memory, watch), []).append(row)
            else:
                alone.append([row])
        return [*alone, *together.values()]

    def _draft(self, row: Row) -> list[int]:
        # the prompt is read alone: only then is a cache told to keep what it may have to give back
        if row.drafter is None or not row.begun:
            return []
        return row.drafter.guess(row.said_1T[0, : row.n].numpy(), row.left - 1)

    def _read(self, group: list[Row], drafts: list[list[int]]) -> Forward:
        first, draft = group[0], drafts[0]
        batch = self._batch_of(group)
        if len(group) == 1:
            k = len(draft)
            first.said_1T[0, first.n : first.n + k] = torch.tensor(draft, dtype=torch.int64)
            ids_NT = first.said_1T[:, first.read : first.n + k]
        else:
            k = 0
            ids_NT = torch.cat([row.said_1T[:, row.read : row.n] for row in group])
        forward = self.engine.read(
            ids_NT, cache=batch.cache, mask_NL=batch.mask(ids_NT.shape[1]), last=k + 1,
            memory=first.request.memory, watch=first.request.watch,
        )  # fmt: skip
        if forward.cache is None and first.left:
            raise ConfigError(f"{self.engine.name} makes no cache to go on from.")
        batch.cache = forward.cache
        if first.drafter is not None:
            first.drafter.count(k)
            if not first.begun:
                first.drafter.begin(self.engine, forward.cache)
        return forward

    def _batch_of(self, group: list[Row]) -> _Batch:
        """A batch of these rows and no others, in their order."""
        before = group[0]._batch
        if before is not None and before.rows == group:
            return before
        if len(group) == 1 and before is None:
            made = _Batch(group, [0], None)
        else:
            made = _together([row._batch for row in group], group, self.engine)
        for row in group:
            row._batch = made
        return made

    # ---- what follows ---------------------------------------------------------------------------------------------------

    def _advance(self, row: Row, draft: list[int], forward: Forward, place: int) -> list[Token]:
        read, k, begun = row.read, len(draft), row.begun
        row.read, row.begun, accepted = row.n, True, 0
        while row.left and not row.finished:
            token, step = row.choose(forward.logits_NKV[place, accepted - k - 1])
            if row.drafter is not None:
                row.drafter.learn(accepted, token)
            if token in (self.engine.ends if row.request.ends is None else row.request.ends):
                row.finished, row.end = True, (token, step)
                break
            row.said_1T[0, row.n] = token
            row.n, row.left = row.n + 1, row.left - 1
            row.steps.append(step)
            row.finished = row.is_over()
            if accepted == k or token != draft[accepted]:
                break
            accepted += 1
            row.read += 1
        if row.drafter is not None:
            row.drafter.accepted += accepted
            if row.drafter.most and begun:
                row._batch.cache.crop(accepted - k)
        handed = self._hand_out(row, forward.records, place, read)
        row.finished = row.finished or (row._handed == row.n and not row.left)
        return handed

    def _hand_out(self, row: Row, records: Sequence[LayerTrace], place: int, read: int) -> list[Token]:
        """Tokens with what is known of them: watched ones that were read, others that were chosen."""
        request, begin = row.request, row._handed
        row._handed = end = row.read if request.watch else row.n
        shares = np.zeros(end - begin)
        strengths = shares
        if records:
            at = slice(begin - read, end - read)
            shares = replace(request.view, quantity="share").strengths(records, row=place)[at]
            strengths = shares
            if row.processor is None and request.view.quantity != "share":
                strengths = request.view.strengths(records, row=place)[at]
        if row.processor is not None:
            strengths = [(step.responsibility or 0.0) if step else 0.0 for step in row.steps[begin:end]]
        return [
            Token(token, float(strength), begin + n < len(request.ids), row.steps[begin + n], float(share))
            for n, (token, strength, share) in enumerate(
                zip(row.ids(begin, end), strengths, shares, strict=True)
            )
        ]


class _Batch:
    """Rows in one cache. pads: places before the first token of each."""

    def __init__(self, rows: list[Row], pads: list[int], cache: Any) -> None:
        self.rows, self.pads, self.cache = list(rows), list(pads), cache

    def mask(self, n_new: int) -> torch.Tensor | None:
        """bool [N, L] over the cache and `n_new` more, or None where nothing is padded."""
        if not any(self.pads):
            return None
        length = self.rows[0].read + self.pads[0] + n_new
        return torch.arange(length) >= torch.tensor(self.pads)[:, None]


def _together(batches: list[_Batch], rows: list[Row], engine: Engine) -> _Batch:
    """A batch of rows out of several, without padding that none of them needs."""
    longest = max(row.read for row in rows)
    parts, pads, order = [], [], []
    for batch in dict.fromkeys(batches):
        mine = [row for row in rows if row._batch is batch]
        places = [batch.rows.index(row) for row in mine]
        cut = min(batch.pads[place] for place in places)
        parts.append(engine.take(batch.cache, places, cut=cut))
        pads.append(longest - max(row.read for row in mine))
        order += mine
    cache = engine.join(parts, pads) if len(parts) > 1 else parts[0]
    if order != rows:
        cache = engine.take(cache, [order.index(row) for row in rows])
    return _Batch(rows, [longest - row.read for row in rows], cache)


def stream(
    engine: Engine, request: Request, processor: Processor | None = None, *, drafter: Drafter | None = None
) -> Iterator[Token]:
    """Every token of the prompt, then those generated, as they come. Ends before an end token."""
    decoder = Decoder(engine)
    row = decoder.add(request, processor, drafter)
    while not row.finished:
        (tokens,) = decoder.step([row])
        yield from tokens
