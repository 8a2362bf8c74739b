"""Drafts from memory: what followed the longest match is read ahead and checked in one forward. Lossless.

    drafted = speculate(model, ids, snapshot, gate, tokenizer=tokenizer, max_new_tokens=200)
    drafted.tokens, drafted.forwards, drafted.accepted           # 200 tokens in perhaps 40 forwards

    drafts = Drafts(processor)                                   # all of generate's options, one row
    model.generate(ids, logits_processor=[processor], custom_generate=drafts)

Each forward reads the newest token and a draft of up to `drafts` more. Then tokens are chosen one after another from the
mixed distribution, exactly as without drafts, up to the first that is not the draft's; the cache is cropped behind it.
Sampling from P and accepting where the draft was met is speculative sampling (Leviathan et al. 2023) for a draft that is
certain: it is accepted with P(draft), and what comes otherwise is distributed as P without it. One draw a token, so that
one seed gives one text with drafts or without. "Exactly" holds up to rounding: a forward of several tokens sums in
another order than a forward of one, and may break a near tie otherwise (as transformers' assisted decoding may).

How far to draft is learned for nothing: at every step memory says what it would draft, and what is chosen tells how often
matches of this length and clarity are right. A draft is read while the chance that all of it is accepted is at least
`worth`: about what one more token costs in a forward, in forwards. Where memory knows nothing a step costs one look-up
more (10-50 µs). Caches that cannot be cropped (recurrent states) are refused; drafts=0 runs plainly.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from engram_lm.errors import ConfigError
from engram_lm.generation.decoder import Decoder, Request, Row
from engram_lm.generation.engines import TransformersEngine, end_ids
from engram_lm.kvcache import NAMES, cache_in
from engram_lm.mixing.processor import MemoryProcessor, memory_processor

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.mixing.gate import Lambda
    from engram_lm.mixing.mix import TokenRules
    from engram_lm.mixing.trace import MemoryStep

WORTH = 0.3
MOST = 16
# matches of 1, 2, 3, 4-5, 6-8, 9-15, 16 and more tokens: how often their first choice comes, before anything is known
_DEPTHS = np.array([2, 3, 4, 6, 9, 16])
_RIGHT = np.array([0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.85])
_SHARES = np.array([0.5, 0.95])
_STEP = 0.1


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """tokens: the new ones, an end token included. steps: what memory did to each, None where the index is empty.

    forwards: of the model, the prompt's included. drafted: tokens read ahead; accepted: of those, kept.
    """

    tokens: list[int]
    steps: list[MemoryStep | None]
    forwards: int
    drafted: int
    accepted: int


def speculate(
    model: Any,
    ids: Any,
    snapshot: Snapshot,
    gate: Lambda,
    *,
    tokenizer: Any = None,
    rules: TokenRules | None = None,
    max_new_tokens: int,
    drafts: int = MOST,
    temperature: float = 0.0,
    seed: int = 0,
    end: Literal["eos", "nothing"] = "eos",
    session: int | Literal["off"] = "off",
    most_verbatim: int | None = None,
    worth: float = WORTH,
) -> Drafted:
    """Generate after `ids` (int [T] or [1, T]) with memory; greedy at temperature 0. Ends behind an end token of the model.

    drafts: tokens read ahead at most. tokenizer, rules, end, session, most_verbatim: as in `memory_processor`.
    """
    said = speculating(
        model, ids, snapshot, gate, tokenizer=tokenizer, rules=rules, max_new_tokens=max_new_tokens, drafts=drafts,
        temperature=temperature, seed=seed, end=end, session=session, most_verbatim=most_verbatim, worth=worth,
    )  # fmt: skip
    while True:
        try:
            next(said)
        except StopIteration as over:
            return over.value


def speculating(
    model: Any,
    ids: Any,
    snapshot: Snapshot,
    gate: Lambda,
    *,
    tokenizer: Any = None,
    rules: TokenRules | None = None,
    max_new_tokens: int,
    drafts: int = MOST,
    temperature: float = 0.0,
    seed: int = 0,
    end: Literal["eos", "nothing"] = "eos",
    session: int | Literal["off"] = "off",
    most_verbatim: int | None = None,
    worth: float = WORTH,
) -> Generator[tuple[int, MemoryStep | None], None, Drafted]:
    """`speculate` as an iterator of tokens and what memory did to each, as soon as they are chosen; returns its result."""
    ids_1T = torch.as_tensor(ids)
    ids_1T = ids_1T[None] if ids_1T.dim() == 1 else ids_1T
    if ids_1T.dim() != 2 or ids_1T.shape[0] != 1 or not ids_1T.shape[1]:
        raise ConfigError(
            f"Drafts continue one prompt of at least one token; got ids of shape {tuple(ids_1T.shape)}."
        )
    if max_new_tokens < 1 or not temperature >= 0:
        raise ConfigError(
            f"max_new_tokens is at least 1 and temperature at least 0; got {max_new_tokens} and {temperature}."
        )
    processor = memory_processor(
        snapshot, gate, ids_1T, tokenizer=tokenizer, model=model, rules=rules, end=end, session=session,
        most_verbatim=most_verbatim,
    )  # fmt: skip
    request = Request(
        ids=ids_1T[0].tolist(), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, watch=False,
        ends=frozenset(end_ids(model, None)),
    )  # fmt: skip
    drafter = Drafter(processor, most=drafts, worth=worth)
    decoder = Decoder(TransformersEngine(model))
    row = decoder.add(request, processor, drafter)
    while not row.finished:
        for token in decoder.step([row])[0]:
            if not token.is_prompt:
                yield token.id, token.step
    end_token = [] if row.end is None else [row.end]
    yield from end_token
    return Drafted(
        tokens=[*row.new_tokens, *(token for token, _ in end_token)],
        steps=[*row.steps[len(request.ids) :], *(step for _, step in end_token)],
        forwards=drafter.forwards,
        drafted=drafter.drafted,
        accepted=drafter.accepted,
    )


class Drafts:
    """Drafts inside `generate(custom_generate=...)`: its processors, sampling and stopping criteria, for one row.

    What is drawn is what `generate` without drafts draws from the same seed. A streamer is not fed (transformers does not
    pass it on). After a call: forwards, drafted, accepted.
    """

    def __init__(self, processor: MemoryProcessor, *, drafts: int = MOST, worth: float = WORTH) -> None:
        self._drafter = Drafter(processor, most=drafts, worth=worth)

    @property
    def forwards(self) -> int:
        return self._drafter.forwards

    @property
    def drafted(self) -> int:
        return self._drafter.drafted

    @property
    def accepted(self) -> int:
        return self._drafter.accepted

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        if input_ids.shape[0] != 1 or model_kwargs.pop("attention_mask", None) is not None:
            raise ConfigError("Drafts continue one row without padding, and no beams.")
        if generation_config.return_dict_in_generate:
            raise ConfigError("Drafts return tokens alone; leave return_dict_in_generate out.")
        cache = cache_in(model_kwargs)
        # what generate itself works out for every call; anything else would have to reach the model
        unknown = set(model_kwargs) - {
            "position_ids",
            "use_cache",
            "logits_to_keep",
            "cache_position",
            *NAMES,
        }
        if unknown:
            raise ConfigError(f"Drafts know nothing of generate's {', '.join(sorted(unknown))}.")

        sample, n_new = generation_config.do_sample, generation_config.max_length - input_ids.shape[1]

        class Generated(Row):
            def choose(self, logits_V: torch.Tensor) -> tuple[int, None]:
                scores_V = logits_processor(self.said_1T[:, : self.n], logits_V[None])[0]
                token = torch.multinomial(torch.softmax(scores_V, -1), 1) if sample else scores_V.argmax()
                return int(token), None

            def is_over(self) -> bool:
                return bool(stopping_criteria(self.said_1T[:, : self.n], None).all())

        request = Request(ids=input_ids[0].tolist(), max_new_tokens=n_new, watch=False, ends=frozenset())
        row = Generated(request, None, self._drafter)
        row.go_on_from(cache)
        decoder = Decoder(TransformersEngine(model))
        while not row.finished:
            decoder.step([row])
        return torch.cat([input_ids, input_ids.new_tensor([row.new_tokens])], 1)


class Drafter:
    """What memory would say next, and how often it was right. most: tokens a draft; 0 for none."""

    def __init__(self, processor: MemoryProcessor, *, most: int = MOST, worth: float = WORTH) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise ConfigError(f"drafts is a whole number from 0 on; got {most!r}.")
        if not 0 < worth <= 1:
            raise ConfigError(f"worth is more than 0 and at most 1; got {worth}.")
        self.processor, self.most, self.worth = processor, most, worth
        self.forwards = self.drafted = self.accepted = 0
        # [7 lengths, 3 shares of the first choice]
        self.right = _RIGHT[:, None] * np.array([0.5, 0.8, 1.0])
        self._asked: list[tuple[tuple[int, int], int]] = []

    def begin(self, engine: TransformersEngine, cache: Any) -> None:
        """Once the prompt was read. ConfigError where drafts cannot be taken back from such a cache."""
        if self.most:
            engine.begin_drafts(cache)

    def count(self, n: int) -> None:
        """One forward with a draft of `n` tokens."""
        self.forwards, self.drafted = self.forwards + 1, self.drafted + n

    def guess(self, said_T: np.ndarray, left: int) -> list[int]:
        """A draft of at most `left` tokens after int64 [T]. One look-up at least, to learn from."""
        self._asked, draft, chance = [], [], 1.0
        if not self.most:
            return draft
        rules, most_order = self.processor.rules, self.processor.gate.reading.max_order
        snapshot = self.processor.seen_by(said_T)
        recent = said_T[-most_order:]
        if rules.eos_id is not None:
            recent = np.where(recent == rules.eos_id, snapshot.end, recent)
        context = recent.tolist()
        while True:
            depth, token_N, count_N = snapshot.longest(
                np.array(context[-most_order:], np.int64), max_order=most_order
            )
            if not depth:
                return draft
            first = int(count_N.argmax())
            token = int(token_N[first])
            # nothing is to be read behind an end; what memory may not say will rarely be said
            if token >= snapshot.end or rules.mute(np.array([token]))[0]:
                return draft
            bucket = (
                int(np.searchsorted(_DEPTHS, depth, "right")),
                int(np.searchsorted(_SHARES, count_N[first] / count_N.sum(), "right")),
            )
            self._asked.append((bucket, token))
            chance *= self.right[bucket]
            if chance < self.worth or len(draft) >= min(self.most, left):
                return draft
            draft.append(token)
            context.append(token)

    def learn(self, place: int, token: int) -> None:
        """The token that was chosen at a place of the newest draft, or behind its end."""
        if place < len(self._asked):
            bucket, guessed = self._asked[place]
            self.right[bucket] += _STEP * ((token == guessed) - self.right[bucket])
