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

import inspect
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from engram_lm.errors import ConfigError
from engram_lm.kvcache import NAMES, cache_in, cache_of, with_cache
from engram_lm.mixing.processor import MemoryProcessor, memory_processor

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.mixing.gate import Lambda
    from engram_lm.mixing.mix import TokenRules
    from engram_lm.mixing.trace import MemoryStep

WORTH = 0.3
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
    drafts: int = 16,
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
    drafts: int = 16,
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
    room = getattr(model.config, "max_position_embeddings", None)
    if room and ids_1T.shape[1] + max_new_tokens > room:
        raise ConfigError(
            f"{ids_1T.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the model's {room}."
        )
    processor = memory_processor(
        snapshot, gate, ids_1T, tokenizer=tokenizer, model=model, rules=rules, end=end, session=session,
        most_verbatim=most_verbatim,
    )  # fmt: skip
    guesser = Guesser(processor, most=drafts, worth=worth)
    random = torch.Generator().manual_seed(seed)
    steps: list[MemoryStep | None] = []

    def choose(said_1T: torch.Tensor, logits_1V: torch.Tensor) -> int:
        scores_V = processor(said_1T, logits_1V)[0]
        if temperature == 0:
            token = int(scores_V.argmax())
        else:
            token = int(torch.multinomial(torch.softmax(scores_V / temperature, -1), 1, generator=random))
        steps.append(processor.step_of(token))
        return token

    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, list | tuple) else {ends}
    tokens: list[int] = []
    for token in _decode(
        model,
        ids_1T.cpu(),
        None,
        guesser,
        choose,
        lambda said_1T: int(said_1T[0, -1]) in ends,
        max_new_tokens,
    ):
        tokens.append(token)
        yield token, steps[-1]
    return Drafted(
        tokens=tokens,
        steps=steps,
        forwards=guesser.forwards,
        drafted=guesser.drafted,
        accepted=guesser.accepted,
    )


class Drafts:
    """Drafts inside `generate(custom_generate=...)`: its processors, sampling and stopping criteria, for one row.

    What is drawn is what `generate` without drafts draws from the same seed. A streamer is not fed (transformers does not
    pass it on). After a call: forwards, drafted, accepted.
    """

    def __init__(self, processor: MemoryProcessor, *, drafts: int = 16, worth: float = WORTH) -> None:
        self._guesser = Guesser(processor, most=drafts, worth=worth)

    @property
    def forwards(self) -> int:
        return self._guesser.forwards

    @property
    def drafted(self) -> int:
        return self._guesser.drafted

    @property
    def accepted(self) -> int:
        return self._guesser.accepted

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

        def choose(said_1T: torch.Tensor, logits_1V: torch.Tensor) -> int:
            scores_1V = logits_processor(said_1T, logits_1V)
            if not generation_config.do_sample:
                return int(scores_1V.argmax())
            return int(torch.multinomial(torch.softmax(scores_1V, -1), 1))

        tokens = list(
            _decode(
                model, input_ids, cache, self._guesser, choose, lambda said: bool(stopping_criteria(said, None).all()),
                generation_config.max_length - input_ids.shape[1],
            )
        )  # fmt: skip
        return torch.cat([input_ids, input_ids.new_tensor([tokens])], 1)


class Guesser:
    """What memory would say next, and how often it was right. most: tokens a draft; 0 for none."""

    def __init__(self, processor: MemoryProcessor, *, most: int, worth: float) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise ConfigError(f"drafts is a whole number from 0 on; got {most!r}.")
        if not 0 < worth <= 1:
            raise ConfigError(f"worth is more than 0 and at most 1; got {worth}.")
        self.processor, self.most, self.worth = processor, most, worth
        self.forwards = self.drafted = self.accepted = 0
        # [7 lengths, 3 shares of the first choice]
        self.right = _RIGHT[:, None] * np.array([0.5, 0.8, 1.0])
        self._asked: list[tuple[tuple[int, int], int]] = []

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


def _decode(
    model: Any,
    ids_1T: torch.Tensor,
    cache: Any,
    guesser: Guesser,
    choose: Callable[[torch.Tensor, torch.Tensor], int],
    done: Callable[[torch.Tensor], bool],
    left: int,
) -> Iterator[int]:
    """The tokens that are chosen. said[:n] is decided, the cache holds said[:read]."""
    n, forwards, read = ids_1T.shape[1], 0, 0 if cache is None else int(cache.get_seq_length())
    said_1T = torch.cat([ids_1T, ids_1T.new_zeros((1, left))], 1)
    plain_T = said_1T[0].cpu().numpy().astype(np.int64)
    device = next(model.parameters()).device
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    while left > 0:
        # the prompt is read alone: only then is a cache told to keep what it may have to give back
        draft = guesser.guess(plain_T[:n], left - 1) if forwards else []
        k = len(draft)
        said_1T[0, n : n + k] = torch.tensor(draft, dtype=said_1T.dtype)
        with torch.no_grad():
            output = model(
                said_1T[:, read : n + k].to(device), use_cache=True, **with_cache(model, cache),
                **({"logits_to_keep": k + 1} if keeps else {}),
            )  # fmt: skip
        logits_KV = output.logits[0, -k - 1 :].float().to(said_1T.device)
        cache, forwards = _require_crop(model, output, guesser, first=not forwards), forwards + 1
        guesser.forwards += 1
        guesser.drafted += k
        for place in range(k + 1):
            token = choose(said_1T[:, : n + place], logits_KV[place : place + 1])
            guesser.learn(place, token)
            said_1T[0, n + place] = plain_T[n + place] = token
            accepted = place < k and token == draft[place]
            guesser.accepted += accepted
            yield token
            if done(said_1T[:, : n + place + 1]):
                return
            if not accepted:
                break
        if guesser.most and forwards > 1:
            cache.crop(place - k)
        read, n, left = n + place, n + place + 1, left - place - 1


def _require_crop(model: Any, output: Any, guesser: Guesser, *, first: bool) -> Any:
    cache = cache_of(output)
    if first:
        if cache is None:
            raise ConfigError(f"{type(model).__name__} makes no cache to go on from.")
        if guesser.most:
            if not getattr(cache, "is_croppable", False):
                raise ConfigError(
                    f"The cache of {type(model).__name__} holds states that cannot be taken back when a draft is "
                    "rejected. Use drafts=0."
                )
            cache.activate_past_recording()
    return cache
