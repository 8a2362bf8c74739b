"""The one place where lambda is found and memory is mixed in: for a token being decoded, a batch of them, a text scored.

    mixer = Mixer(gate, rules)
    mixed = mixer.row(snapshot, context_T, logits_V, generated=3, out=out_V, buffer=buffer)
    mixed.step(token, position=17)                               # what memory did, once the token is chosen
    mixer.lambdas(memory, survey_N6, tokens=snapshot.n_tokens, generated=generated_N)

Processors, the vLLM plugin, scoring and the page hand their rows to it. The arithmetic is `mix.mix`. No torch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engram_lm.mixing import onepass
from engram_lm.mixing.features import features
from engram_lm.mixing.gate import Lambda
from engram_lm.mixing.lookups import Lookups, evidence, read_next
from engram_lm.mixing.mix import TokenRules, blend, mix
from engram_lm.mixing.trace import MemoryStep

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot


class LookUp(NamedTuple):
    """q_M: P_memory over the tokens it may speak of, not renormalised. lam: the gate's. lse: log-sum-exp of the logits."""

    q_M: np.ndarray
    memory: Lookups
    lam: float
    lse: float


@dataclass(frozen=True)
class MixedRow:
    """One row of logits and what was mixed into it; kept until its token is chosen. logits_V: the model's.

    kept: memory's mass on tokens that are allowed, by which q_M is divided.
    """

    q_M: np.ndarray
    logits_V: np.ndarray
    lam: float
    kept: float
    lse: float
    space: str
    depth: int
    count: int
    documents: int
    micro_seconds: float

    def step(self, token: int, *, position: int) -> MemoryStep:
        """What memory did to the token that was chosen."""
        p_memory = float(self.q_M[token]) / self.kept if token < len(self.q_M) and self.kept > 0 else 0.0
        log_p_model = float(self.logits_V[token]) - self.lse
        if self.space == "linear" or not self.lam:
            p, share = mixed_p(float(np.exp(log_p_model)), p_memory, self.lam)
        else:
            out = np.empty(len(self.logits_V), np.float32)
            mix(self.logits_V, self.q_M, lam=self.lam, out=out, space="log", lse=self.lse)
            p, share = float(np.exp(float(out[token]) - self.lse)), None
        return MemoryStep(
            position=position, token_id=token, lam=self.lam, p_memory=p_memory, p_model=float(np.exp(log_p_model)), p=p,
            responsibility=share if self.space == "linear" else None, depth=self.depth, count=self.count,
            documents=self.documents, micro_seconds=self.micro_seconds,
        )  # fmt: skip


def mixed_p(p_model: float, p_memory: float, lam: float) -> tuple[float, float]:
    """(P, the part of it that memory gave) of one token."""
    p = blend(p_model, p_memory, lam)
    return p, lam * p_memory / p if p else 0.0


class Mixer:
    """A gate with the rules of a model. most_verbatim: where this many generated tokens in a row are a document's own, memory
    is silent for the next one."""

    def __init__(self, gate: Lambda, rules: TokenRules, *, most_verbatim: int | None = None) -> None:
        self.gate, self.rules, self.most_verbatim = gate, rules, most_verbatim

    def lambdas(
        self, memory: Lookups, survey_N6: np.ndarray, *, tokens: int, generated: np.ndarray | int = 0
    ) -> np.ndarray:
        """float64 [N]: 0 where nothing was found, or the logits have no finite sum.

        survey_N6: of `onepass.survey_rows`, with `memory.top` as the other token. tokens: of the index. generated: how many
        of the last tokens of each context are not of the prompt.
        """
        usable_N = (memory.count > 0) & np.isfinite(survey_N6[:, 5])
        if self.most_verbatim is not None:
            usable_N &= np.minimum(memory.depth, generated) < self.most_verbatim
        if not usable_N.any():
            return np.zeros(len(usable_N))
        seen_NF = features(evidence(memory, survey_N6, generated=generated), tokens=tokens)
        # rows that are not usable may hold what is no number
        with np.errstate(invalid="ignore"):
            return np.where(usable_N, self.gate.lambdas(seen_NF), 0.0)

    def look_up(
        self,
        snapshot: Snapshot,
        context: np.ndarray,
        logits_V: np.ndarray,
        *,
        generated: int,
        out: np.ndarray,
    ) -> LookUp:
        """What memory says after one context, int [T]. logits_V: the model's there, float32; out: float32 [index's
        vocabulary + 1], which q_M stays inside."""
        q_M, memory = read_next(snapshot, context, self.rules, self.gate.reading, out=out)
        survey_16 = survey_of(logits_V, int(memory.top[0]))
        lam = self.lambdas(memory, survey_16, tokens=snapshot.n_tokens, generated=generated)
        return LookUp(q_M, memory, float(lam[0]), float(survey_16[0, 5]))

    def row(
        self,
        snapshot: Snapshot,
        context: np.ndarray,
        logits_V: np.ndarray,
        *,
        generated: int,
        out: np.ndarray,
        buffer: np.ndarray,
    ) -> MixedRow:
        """Write the mixture of one row to `out`; lam is 0 where that is the model's own distribution, bit for bit."""
        begun = time.perf_counter()
        found = self.look_up(snapshot, context, logits_V, generated=generated, out=buffer)
        mixture = mix(logits_V, found.q_M, lam=found.lam, out=out, space=self.gate.space, lse=found.lse)
        memory = found.memory
        return MixedRow(
            found.q_M, logits_V, mixture.lam, mixture.kept, found.lse, self.gate.space, int(memory.depth[0]),
            int(memory.count[0]), int(memory.documents[0]), (time.perf_counter() - begun) * 1e6,
        )  # fmt: skip


def survey_of(logits_V: np.ndarray, top: int) -> np.ndarray:
    """float64 [1, 6]: a row as `onepass.survey_rows` gives it where no token is asked for. top: memory's choice, or -1."""
    at, most, lse, entropy = onepass.survey(logits_V)
    of_top = float(logits_V[top]) - lse if top >= 0 else -np.inf
    return np.array([[0.0, of_top, entropy, most - lse, at, lse]])
