"""P = (1 - lambda) P_model + lambda P_memory, written into the model's logits.

Logits in, logits out: the mixture is shifted so that its log-sum-exp is the model's, so lambda = 0 changes no bit and a
token without memory falls by log(1 - lambda) alone. A token whose logit is -inf (forbidden by a processor before) stays
forbidden, and special tokens never receive mass from memory: what memory gives them is shared by the others, in
proportion. END, the memory's own "here a document ended", goes to the end-of-text token or to nobody (`TokenRules`).

space="log": P ~ P_model^(1 - lambda) P_memory^lambda among the tokens memory may speak of; all others keep the
probability the model gave them. Only for a fixed lambda: gates are fitted and bounded for the linear mixture.

    rules = token_rules(tokenizer, n_logits=49_152, eos_id=2)
    q_M = rules.prepare(found.p)                          # in place
    mixture = mix(logits_V, q_M, lam=0.4, out=logits_V)   # .kept, .lse
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.identity.tokenizers import is_marker
from engram_lm.mixing import onepass

Space = Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class TokenRules:
    """Which tokens memory may speak of.

    n_tokens: ids of the tokenizer, which the index was made for; n_logits: of the model, which may have more (padding).
    silent: ascending ids that never receive mass. eos_id: the id that END becomes; None leaves END out.
    """

    n_tokens: int
    n_logits: int
    silent: tuple[int, ...] = ()
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.n_tokens <= self.n_logits:
            raise ConfigError(
                f"The index has {self.n_tokens:,} token ids, the model {self.n_logits:,} logits: this index was made "
                "for another tokenizer. Make one with the model's own."
            )
        for i in (*self.silent, *([] if self.eos_id is None else [self.eos_id])):
            if not 0 <= i < self.n_tokens:
                raise ConfigError(f"Token id {i} is outside the index's {self.n_tokens:,} ids.")
        object.__setattr__(self, "_silent", np.array(self.silent, np.int64))
        # by id; END at n_tokens, and one more for ids that no memory can mean
        muted = np.zeros(self.n_tokens + 2, bool)
        muted[self._silent] = muted[-1] = True  # type: ignore[attr-defined]
        muted[-2] = self.eos_id is None
        if self.eos_id is not None:
            muted[self.eos_id] = False
        object.__setattr__(self, "_muted", muted)

    def prepare(self, p: np.ndarray) -> np.ndarray:
        """P_memory over the tokens, q [n_tokens], out of float32 [n_tokens + 1] (END last); in place, not renormalised."""
        q = p[: self.n_tokens]
        q[self._silent] = 0.0  # type: ignore[attr-defined]
        if self.eos_id is not None:
            q[self.eos_id] = p[self.n_tokens]
        return q

    def mute(self, token: np.ndarray) -> np.ndarray:
        """bool: where memory may not speak of these ids (END is n_tokens)."""
        token = np.asarray(token, np.int64)
        known = (token >= 0) & (token <= self.n_tokens)
        return self._muted[np.where(known, token, self.n_tokens + 1)]  # type: ignore[attr-defined]


def token_rules(
    tokenizer: Any, *, n_logits: int, n_tokens: int | None = None, eos_id: int | None = None
) -> TokenRules:
    """Rules of a fast tokenizer: every special token and every chat or tool marker among its added tokens is silent.

    n_tokens: the index's vocabulary (default: as many ids as the tokenizer has).
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    added = backend.get_added_tokens_decoder()
    silent = {i for i, token in added.items() if token.special or is_marker(token.content)}
    silent |= {int(i) for i in getattr(tokenizer, "all_special_ids", ()) if i is not None}
    n_tokens = n_tokens or backend.get_vocab_size(with_added_tokens=True)
    return TokenRules(
        n_tokens=n_tokens,
        n_logits=n_logits,
        silent=tuple(sorted(i for i in silent if i < n_tokens)),
        eos_id=eos_id,
    )


class Mixture(NamedTuple):
    """kept: memory's mass on allowed tokens, by which it was divided. lse: log-sum-exp of the logits, in and out."""

    lam: float
    kept: float
    lse: float


def mix(
    logits_V: np.ndarray,
    q_M: np.ndarray,
    *,
    lam: float,
    out: np.ndarray,
    space: Space = "linear",
    lse: float | None = None,
) -> Mixture:
    """Write the mixture of float32 logits [V] and memory's q [M] to `out` (may be the logits); q sums to at most 1.

    Nothing is written but a copy where lam is 0, memory has no allowed token, or the logits or q have no finite sum.
    `lse`: where `onepass.survey` has been called already.
    """
    if not 0 <= lam < 1:
        raise ConfigError(f"lambda is at least 0 and less than 1; got {lam}.")
    if lse is None:
        lse = float(onepass.survey(logits_V)[2])
    kept = float(onepass.allowed_mass(logits_V, q_M)) if lam and np.isfinite(lse) else 0.0
    # what a damaged segment says may be no number
    if not 0 < kept < np.inf:
        if out is not logits_V:
            out[:] = logits_V
        return Mixture(0.0, kept, lse)
    if space == "log":
        _mix_log(logits_V, q_M, lam, kept, lse, out)
    else:
        onepass.mix_linear(logits_V, q_M, lam, kept, lse, out)
    return Mixture(float(lam), kept, lse)


def mix_plain(logits_V: np.ndarray, q_M: np.ndarray, *, lam: float, space: Space = "linear") -> np.ndarray:
    """The twin of `mix`: log-probabilities, float64 [V], straight from the definition."""
    with np.errstate(divide="ignore"):
        x = logits_V.astype(np.float64)
        log_p = x - np.logaddexp.reduce(x)
        q = np.zeros_like(x)
        q[: len(q_M)] = q_M
        q[np.isneginf(x)] = 0.0
        if lam == 0 or q.sum() <= 0:
            return log_p
        q /= q.sum()
        if space == "linear":
            return np.log((1 - lam) * np.exp(log_p) + lam * q)
        spoken = q > 0
        raw = (1 - lam) * log_p[spoken] + lam * np.log(q[spoken])
        log_p[spoken] = raw - np.logaddexp.reduce(raw) + np.logaddexp.reduce(log_p[spoken])
        return log_p


def _mix_log(x: np.ndarray, q: np.ndarray, lam: float, kept: float, lse: float, out: np.ndarray) -> None:
    at = np.flatnonzero((q > 0) & np.isfinite(x[: len(q)]))
    log_p = x[at].astype(np.float64) - lse
    raw = (1 - lam) * log_p + lam * np.log(q[at].astype(np.float64) / kept)
    if out is not x:
        out[:] = x
    out[at] = raw - np.logaddexp.reduce(raw) + np.logaddexp.reduce(log_p) + lse


def combine(log_p_model: np.ndarray, p_memory: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log P, responsibility) of tokens whose log P_model and P_memory are known; float64, linear."""
    with np.errstate(divide="ignore"):
        from_memory = np.log(lam) + np.log(p_memory)
    log_p = np.where(lam > 0, np.logaddexp(np.log1p(-lam) + log_p_model, from_memory), log_p_model)
    return log_p, np.exp(from_memory - log_p)


def blend(p_model: Any, p_memory: Any, lam: float) -> Any:
    """P of numbers or arrays of probabilities, straight from the definition."""
    return (1 - lam) * p_model + lam * p_memory
