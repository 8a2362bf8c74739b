"""What a model with memory thinks of a text: log-probabilities of every token, alone and mixed, and who is responsible.

The look-ups run in a thread while the model runs, and the logits are read once (`onepass.survey_rows`): no log_softmax
copy of them is made. Memory sees every token's own past alone, so nothing of the text itself is in it.

    result = score(model, ids_BT, snapshot, gate, rules=rules)          # torch int64 [B, T]
    result.log_p[0], result.lam[0], result.responsibility[0]            # float64 [T], the first token is NaN

Special tokens get nothing from memory here as in decoding; what memory would have given them (below their number divided
by the vocabulary) is not shared out, so mixed probabilities are lower bounds, by less than one part in a thousand.
With `rules.eos_id` None that includes P_memory(END).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import TokenIdError
from engram_lm.mixing import onepass
from engram_lm.mixing.gate import Lambda
from engram_lm.mixing.lookups import Lookups, read_next, read_text, tail
from engram_lm.mixing.mix import TokenRules, combine, mix
from engram_lm.mixing.mixer import Mixer

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Arrays [B, T], NaN (0 for whole numbers) at each text's first token and at padding.

    log_p_model, log_p: nats. p_memory, lam, responsibility = lam P_memory / P: of the token that came.
    model_entropy: nats. depth, documents: int64, of the match before the token.
    """

    log_p_model: np.ndarray
    log_p: np.ndarray
    p_memory: np.ndarray
    lam: np.ndarray
    responsibility: np.ndarray
    model_entropy: np.ndarray
    depth: np.ndarray
    documents: np.ndarray

    def perplexity(self, *, alone: bool = False) -> float:
        """Of all scored tokens together; `alone`: of the model without memory."""
        values = self.log_p_model if alone else self.log_p
        return float(np.exp(-np.nanmean(values)))


def score(
    model: Any,
    ids_BT: Any,
    snapshot: Snapshot,
    gate: Lambda,
    *,
    rules: TokenRules,
    attention_mask: Any = None,
    given: int | None = None,
) -> Scored:
    """Score token ids (torch int64 [B, T] or [T]); padding only on the right, marked by 0 in attention_mask.

    given: how many tokens are a prompt; later ones count as generated (None: all are given).
    """
    import torch

    ids_BT = torch.as_tensor(ids_BT)
    ids_BT = ids_BT[None] if ids_BT.dim() == 1 else ids_BT
    lengths = _lengths(ids_BT, attention_mask)
    rows = ids_BT.cpu().numpy()
    with ThreadPoolExecutor(1) as pool:
        waiting = [
            pool.submit(read_text, snapshot, row[:n], rules, gate.reading)
            for row, n in zip(rows, lengths, strict=True)
        ]
        with torch.inference_mode():
            device = next(model.parameters()).device
            mask = None if attention_mask is None else torch.as_tensor(attention_mask).reshape(ids_BT.shape)
            logits_BTV = model(
                ids_BT.to(device), attention_mask=None if mask is None else mask.to(device), use_cache=False
            ).logits
        memories = [future.result() for future in waiting]
    B, T = rows.shape
    out = {name: np.full((B, T), np.nan) for name in Scored.__dataclass_fields__ if name not in _WHOLE}
    out |= {name: np.zeros((B, T), np.int64) for name in _WHOLE}
    for b, (n, memory) in enumerate(zip(lengths, memories, strict=True)):
        if n < 2:
            continue
        logits_TV = logits_BTV[b, : n - 1].float().cpu().numpy()
        found = score_text(rows[b, :n], logits_TV, memory, snapshot, gate, rules=rules, given=given)
        for name, values in found.items():
            out[name][b, 1:n] = values
    return Scored(**out)


def score_text(
    ids_T: np.ndarray,
    logits_TV: np.ndarray,
    memory: Lookups,
    snapshot: Snapshot,
    gate: Lambda,
    *,
    rules: TokenRules,
    given: int | None = None,
) -> dict[str, np.ndarray]:
    """The fields of `Scored` for tokens 1 .. T - 1 of one text. logits: float32 [T - 1 or more, V]; memory: of all T."""
    n = len(ids_T) - 1
    memory = tail(memory)
    survey_T6 = np.empty((n, 6))
    onepass.survey_rows(
        np.ascontiguousarray(logits_TV[:n], np.float32),
        np.asarray(ids_T[1:], np.int64),
        memory.top,
        survey_T6,
    )
    # row t is the context of t + 1 tokens
    generated = np.maximum(np.arange(1, n + 1) - (n + 1 if given is None else given), 0)
    lam = Mixer(gate, rules).lambdas(memory, survey_T6, tokens=snapshot.n_tokens, generated=generated)
    log_p_model, p = survey_T6[:, 0], memory.p
    if gate.space == "log":
        log_p, share = _score_log(ids_T, logits_TV, snapshot, gate, lam, survey_T6[:, 5], rules=rules)
    else:
        log_p, share = combine(log_p_model, p, lam)
    return {
        "log_p_model": log_p_model, "log_p": log_p, "p_memory": p, "lam": lam, "responsibility": share,
        "model_entropy": survey_T6[:, 2], "depth": memory.depth, "documents": memory.documents,
    }  # fmt: skip


def log_p_of(logits_TV: np.ndarray, target_T: np.ndarray) -> np.ndarray:
    """float64 [T], nats: log P of each token by float32 logits in this machine's memory, as `score_text` takes it."""
    survey_T6 = np.empty((len(target_T), 6))
    onepass.survey_rows(logits_TV, np.asarray(target_T, np.int64), np.full(len(target_T), -1), survey_T6)
    return survey_T6[:, 0]


_WHOLE = ("depth", "documents")


def _lengths(ids_BT: Any, attention_mask: Any) -> list[int]:
    if attention_mask is None:
        return [ids_BT.shape[1]] * ids_BT.shape[0]
    import torch

    mask = torch.as_tensor(attention_mask).reshape(ids_BT.shape).bool().cpu()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise TokenIdError("Texts to score are padded on the right; this attention mask has a 1 after a 0.")
    return mask.sum(1).tolist()


def _score_log(
    ids_T: np.ndarray,
    logits_TV: np.ndarray,
    snapshot: Snapshot,
    gate: Lambda,
    lam_T: np.ndarray,
    lse_T: np.ndarray,
    *,
    rules: TokenRules,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-space mixing needs every token's P_memory for its sum: one full look-up a position."""
    log_p, p = np.empty(len(lam_T)), np.empty(snapshot.vocab_size + 1, np.float32)
    for t, lam in enumerate(lam_T):
        q, _ = read_next(snapshot, ids_T[: t + 1], rules, gate.reading, out=p)
        row = np.array(logits_TV[t], np.float32)
        mixture = mix(row, q, lam=float(lam), out=row, space="log", lse=float(lse_T[t]))
        log_p[t] = row[ids_T[t + 1]] - mixture.lse
    # a geometric mean has no parts that add up
    return log_p, np.full(len(lam_T), np.nan)
