"""Memory for questions in the user's own words: it names words of the chosen sentences, the model says which one fits here.

Plain continuation fails for questions, as an answer begins otherwise than the document does. Pointing needs no match: of
the phrases that the sentences hold and the question does not, each is as likely as the model finds its beginning here,

    P_memory(x) ~ weight(x) P_model(x) ** alpha        (pointer-generator networks, See et al. 2017, choose by attention)

and P = (1 - lam) P_model + lam P_memory. Under greedy decoding the model goes its way where it is sure, and takes a word
of the document where it is not. Once such a phrase has begun, memory goes on with it and what follows, until the sentence
ends; then it has nothing to add and lambda is 0. No training; no tokens in the prompt.

    processor = PointingProcessor(focus, prompt_length=len(ids), rules=rules_of(tokenizer, model, snapshot))
    model.generate(input_ids, logits_processor=[processor])       # one prompt; focus: of `library.Chooser.focus`

Meant for questions whose documents were found: what asks about something else is better left without (`COVERAGE`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.mixing.mix import TokenRules, mix
from engram_lm.mixing.mixer import MixedRow
from engram_lm.mixing.trace import MemoryStep

# Below this part of the question's words in the best passage nothing is known of what is asked (experiments/questions).
COVERAGE = 0.2


class Sentence(Protocol):
    """`library.choosing.Sentence`."""

    tokens: np.ndarray
    weight: float
    starts: tuple[int, ...]
    inside: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Pointing:
    """lam: where memory proposes a phrase. alpha: how much the model chooses among them; 0: it does not. phrase, rest: lambda
    inside a phrase that has begun, and behind it up to the end of the sentence."""

    lam: float = 0.35
    alpha: float = 1.0
    phrase: float = 0.95
    rest: float = 0.7

    def __post_init__(self) -> None:
        for name in ("lam", "phrase", "rest"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 0 and less than 1; got {getattr(self, name)}.")
        if self.alpha < 0:
            raise ConfigError(f"alpha is 0 or more; got {self.alpha}.")


@dataclass(frozen=True)
class Pointed:
    """What memory says. tokens: int64 [n]; p: float64 [n], sums to 1. depth: last tokens of the answer it goes on with."""

    tokens: np.ndarray
    p: np.ndarray
    lam: float
    depth: int


_NOTHING = Pointed(np.empty(0, np.int64), np.empty(0), 0.0, 0)


def point(
    focus: Sequence[Sentence], said: Sequence[int], logits_V: np.ndarray, pointing: Pointing
) -> Pointed:
    """Memory's next token after the answer so far. lam 0: nothing to say."""
    said = [int(token) for token in said]
    depth, token, whole = _going_on(focus, said)
    if depth:
        if token is None:
            return _NOTHING
        return Pointed(np.array([token]), np.ones(1), pointing.rest if whole else pointing.phrase, depth)
    weight: dict[int, float] = {}
    for sentence in focus:
        for start in sentence.starts:
            token = int(sentence.tokens[start])
            if token not in said:
                weight[token] = max(weight.get(token, 0.0), float(sentence.weight))
    if not weight or _is_told(focus, said):
        return _NOTHING
    token_C, weight_C = np.array(list(weight), np.int64), np.array(list(weight.values()))
    log_C = np.log(weight_C) + pointing.alpha * logits_V[token_C].astype(np.float64)
    p_C = np.exp(log_C - log_C.max()) if np.isfinite(log_C.max()) else weight_C
    return Pointed(token_C, p_C / p_C.sum(), pointing.lam, 0)


def _going_on(focus: Sequence[Sentence], said: list[int]) -> tuple[int, int | None, bool]:
    """(how many last tokens of the answer stand in a sentence, one of them in a word worth naming; the token after them,
    None at the sentence's end; whether no phrase is left unfinished)."""
    best: tuple[int, int | None, bool] = (0, None, True)
    if not said:
        return best
    for sentence in focus:
        tokens = sentence.tokens
        for at in (np.flatnonzero(tokens == said[-1]) + 1).tolist():
            depth = 1
            while depth < min(at, len(said)) and said[-1 - depth] == tokens[at - 1 - depth]:
                depth += 1
            if depth > best[0] and sentence.inside[at - depth : at].any():
                if at == len(tokens):
                    best = depth, None, True
                else:
                    unfinished = sentence.inside[at - 1] and sentence.inside[at] and at not in sentence.starts
                    best = depth, int(tokens[at]), not unfinished
    return best


def _is_told(focus: Sequence[Sentence], said: list[int]) -> bool:
    """Whether the answer holds the end of a sentence, from a word worth naming on."""
    for sentence in focus:
        if not sentence.starts:
            continue
        rest = sentence.tokens[sentence.starts[-1] :].tolist()
        if any(said[at : at + len(rest)] == rest for at in range(len(said) - len(rest) + 1)):
            return True
    return False


class PointingProcessor:
    """Pointing as a logits processor for one call of `generate` with one prompt; greedy, sampled or beams."""

    def __init__(
        self,
        focus: Sequence[Sentence],
        *,
        prompt_length: int,
        rules: TokenRules,
        pointing: Pointing | None = None,
    ) -> None:
        self.focus, self.pointing, self.rules = tuple(focus), pointing or Pointing(), rules
        self._prompt_length = prompt_length
        self._last: tuple[int, MixedRow] | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Logits [N, V] of the next token after input_ids [N, T] -> logits of the mixture."""
        ids_NT = input_ids.detach().cpu().numpy()
        if ids_NT.shape[1] < self._prompt_length:
            raise ConfigError(
                f"This processor was built for a prompt of {self._prompt_length} tokens; got {ids_NT.shape[1]}."
            )
        logits_NV = scores.detach().float().cpu().numpy()
        out_NV = logits_NV.copy()
        for row, (ids, logits_V) in enumerate(zip(ids_NT, logits_NV, strict=True)):
            start = time.perf_counter()
            pointed = point(self.focus, ids[self._prompt_length :].tolist(), logits_V, self.pointing)
            q_M = np.zeros(self.rules.n_tokens, np.float32)
            q_M[pointed.tokens] = pointed.p
            q_M[np.array(self.rules.silent, np.int64)] = 0.0
            mixture = mix(logits_V, q_M, lam=pointed.lam, out=out_NV[row])
            if row == 0:
                spent = (time.perf_counter() - start) * 1e6
                named = len({getattr(one, "id", "") for one in self.focus})
                self._last = len(ids), MixedRow(
                    q_M, logits_V, mixture.lam, mixture.kept, mixture.lse, "linear", pointed.depth, 1, named, spent
                )  # fmt: skip
        return scores.new_tensor(out_NV)

    def step_of(self, token_id: int) -> MemoryStep | None:
        """What memory did to the first row's newest token, once it was chosen."""
        if self._last is None:
            return None
        position, row = self._last
        return row.step(token_id, position=position)
