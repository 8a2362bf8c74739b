"""A window read by the model once, and scored by every arm from what it said.

    alone       the model
    fixed       P = (1 - lambda) P_model + lambda P_memory with one lambda everywhere
    memory      the same with a gate
    retrieval   the passage that BM25 finds, before the window
    both        memory beside that passage

    arms = Arms(TimedReader(model, tokenizer), encoder, rules, gate)
    rows = arms.score(window, {"10": snapshot_of_10, "all": snapshot}, {"all": passages})

A row: arm, index (its size), window, kind, domain, tokens (scored), log_p and log_p_alone (sums, nats), mean_lambda,
prompt_tokens (read for the passage alone), model_seconds and memory_seconds (CPU).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engram_lm.adapt.texts import Window
from engram_lm.mixing.gate import FixedLambda, Lambda
from engram_lm.mixing.lookups import Lookups, read_text
from engram_lm.mixing.mix import TokenRules
from engram_lm.mixing.scoring import log_p_of, score_text

if TYPE_CHECKING:
    from engram_lm.adapt.passages import Passages
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library.encoding import TextEncoder

FIXED = 0.3
ARMS = ("alone", "fixed", "memory", "retrieval", "both")

Row = dict[str, Any]


class Reader(Protocol):
    """What the model makes of token ids."""

    def __call__(self, ids: np.ndarray, last: int) -> tuple[np.ndarray, float]:
        """(logits float32 [last, V] before the last `last` tokens of ids [T], CPU seconds)."""
        ...


class TimedReader:
    """A transformers model as a Reader."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from engram_lm.reader import ModelReader

        self.reader = ModelReader(model, tokenizer)

    def __call__(self, ids: np.ndarray, last: int) -> tuple[np.ndarray, float]:
        import torch

        begun = time.process_time()
        with torch.inference_mode():
            logits_TV = self.reader.logits(ids, last=last).float().cpu().numpy()
        return np.ascontiguousarray(logits_TV), time.process_time() - begun


class Arms:
    """See the module. gate: of the arms memory and both."""

    def __init__(
        self, read: Reader, encoder: TextEncoder, rules: TokenRules, gate: Lambda, *, fixed: float = FIXED
    ) -> None:
        self.read, self.encoder, self.rules = read, encoder, rules
        self.gate, self.fixed = gate, FixedLambda(fixed, reading=gate.reading)
        self.between = encoder.encode("\n\n")

    def score(
        self, window: Window, indexes: Mapping[str, Snapshot], passages: Mapping[str, Passages]
    ) -> list[Row]:
        """Rows of all arms: memory with each index, retrieval from each of the passages."""
        logits_TV, seconds = self.read(window.ids, window.scored)
        alone = log_p_of(logits_TV, window.ids[window.given :]).sum()

        def row(
            arm: str, index: str, log_p: float, lam: float, prompt: int, model: float, memory: float
        ) -> Row:
            return {
                "arm": arm, "index": index, "window": window.key, "kind": window.kind, "domain": window.domain,
                "tokens": window.scored, "log_p": float(log_p), "log_p_alone": float(alone), "mean_lambda": float(lam),
                "prompt_tokens": prompt, "model_seconds": round(model, 4), "memory_seconds": round(memory, 5),
            }  # fmt: skip

        rows = [row("alone", "", alone, 0.0, 0, seconds, 0.0)]
        for size, snapshot in indexes.items():
            for arm, gate in (("memory", self.gate), ("fixed", self.fixed)):
                log_p, lam, spent = self.mixed(window.ids, logits_TV, snapshot, gate)
                rows.append(row(arm, size, log_p.sum(), lam.mean(), 0, seconds, spent))
        for size, found in passages.items():
            begun = time.process_time()
            passage = found.best(self.encoder.decode(window.ids[: window.given]))
            spent = time.process_time() - begun
            before = np.concatenate([passage, self.between]) if len(passage) else passage
            ids = np.concatenate([before, window.ids])
            with_TV, took = self.read(ids, window.scored) if len(passage) else (logits_TV, seconds)
            log_p = log_p_of(with_TV, window.ids[window.given :])
            rows.append(row("retrieval", size, log_p.sum(), 0.0, len(before), took, spent))
            if size in indexes:
                log_p, lam, more = self.mixed(ids, with_TV, indexes[size], self.gate)
                rows.append(row("both", size, log_p.sum(), lam.mean(), len(before), took, spent + more))
        return rows

    def mixed(
        self, ids: np.ndarray, logits_TV: np.ndarray, snapshot: Snapshot, gate: Lambda
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """(log P, lambda, CPU seconds) of the last tokens of ids, as many as there are logits."""
        begun, n = time.process_time(), len(logits_TV) + 1
        memory = read_text(snapshot, ids, self.rules, gate.reading)
        memory = Lookups(**{name: getattr(memory, name)[-n:] for name in Lookups.__dataclass_fields__})
        found = score_text(ids[-n:], logits_TV, memory, snapshot, gate, rules=self.rules)
        return found["log_p"], found["lam"], time.process_time() - begun
