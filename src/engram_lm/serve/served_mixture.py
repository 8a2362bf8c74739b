"""An index in front of a loaded model: lambda and P_memory for a text, for one context, and how often n-grams stand in it.

mixed = Mixed(loaded, shelf, gate=None, lam=None)      # the gate that is shipped for the model
mixed.of_text(ids_T, logits_TV)[t]                     # {"depth": 7, "lambda": 0.83, ...}
mixed.look_up(context, logits_V)                       # P_memory of every token, for lists
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.mixing.gate import Lambda
    from engram_lm.mixing.lookups import Lookups
    from engram_lm.mixing.mix import TokenRules
    from engram_lm.serve.served_index import ServedIndex
    from engram_lm.serve.served_model import ServedModel


@dataclass(frozen=True)
class LookUp:
    """One context. p_V: P_memory over the model's logits, sums to 1 or is all 0. lam: what the gate says."""

    p_V: np.ndarray
    lam: float
    memory: Lookups


class ServedMixture:
    """gate, lam: as the server was started with; None and None is the shipped gate. ConfigError where there is none."""

    def __init__(
        self, loaded: ServedModel, shelf: ServedIndex, *, gate: Path | None, lam: float | None
    ) -> None:
        from engram_lm.generation.gates import Audit, chosen_gate

        self.loaded, self.shelf, self.gate_path, self.lam = loaded, shelf, gate, lam
        self.gate: Lambda = chosen_gate(gate, lam, model=loaded.model, tokenizer=loaded.tokenizer)
        self.audit = Audit(self.gate)
        self.gate_name = f"λ {lam:g}" if lam is not None else gate.name if gate is not None else "shipped"

    @cached_property
    def rules(self) -> TokenRules:
        from engram_lm.mixing.identity import rules_of

        return rules_of(self.loaded.tokenizer, self.loaded.model, self.shelf.snapshot())

    def prepare(self, going: Callable[[], bool]) -> None:
        """See `Snapshot.prepare`; for the newest snapshot, in the gate's way of counting."""
        reading = self.gate.reading
        self.shelf.snapshot().prepare(count=reading.count, cap=reading.cap, going=going)

    def of_text(self, ids_T: np.ndarray, logits_TV: np.ndarray) -> list[dict[str, Any] | None]:
        """What the index knew of each token before it came; None for the first, and where the index is empty."""
        from engram_lm.mixing.lookups import read_text
        from engram_lm.mixing.scoring import score_text

        snapshot, n = self.shelf.snapshot(), len(ids_T)
        if n < 2 or not snapshot.n_tokens:
            return [None] * n
        memory = read_text(snapshot, ids_T, self.rules, self.gate.reading)
        found = score_text(ids_T, logits_TV, memory, snapshot, self.gate, rules=self.rules)
        entries: list[dict[str, Any] | None] = [None]
        for t in range(1, n):
            entries.append(
                {
                    "depth": int(found["depth"][t - 1]),
                    "count": int(memory.count[t]),
                    "distinct": int(memory.distinct[t]),
                    "documents": int(found["documents"][t - 1]),
                    "lambda": _number(found["lam"][t - 1]),
                    "p_model": _number(np.exp(found["log_p_model"][t - 1])),
                    "p_memory": _number(found["p_memory"][t - 1]),
                    "p": _number(np.exp(found["log_p"][t - 1])),
                    "r": _number(found["responsibility"][t - 1]),
                    "log_p": float(found["log_p"][t - 1]),
                }
            )
        return entries

    def seen(self, ids_T: np.ndarray, orders: list[int]) -> list[dict[int, int]]:
        """How often the last n tokens up to and with each token stand in the index, by n."""
        snapshot, most = self.shelf.snapshot(), max(orders)
        found = []
        for t in range(1, len(ids_T) + 1):
            counts = snapshot.match(ids_T[max(0, t - most) : t], max_order=most).counts
            found.append({n: int(counts[n]) if n < len(counts) else 0 for n in orders})
        return found

    def look_up(self, snapshot: Snapshot, context: list[int], logits_V: np.ndarray) -> LookUp:
        """What memory says after a context, int [T], given the model's float32 logits [V] there."""
        from engram_lm.mixing.mixer import Mixer

        out = np.empty(snapshot.vocab_size + 1, np.float32)
        seen = Mixer(self.gate, self.rules).look_up(
            snapshot, np.array(context, np.int64), logits_V, generated=0, out=out
        )
        p_V = np.zeros(len(logits_V))
        allowed = np.isfinite(logits_V[: len(seen.q_M)])
        p_V[: len(seen.q_M)][allowed] = seen.q_M[allowed]
        total = p_V.sum()
        return LookUp(p_V / total if total > 0 else p_V, seen.lam, seen.memory)


def _number(value: Any) -> float | None:
    value = float(value)
    return float(f"{value:.6g}") if np.isfinite(value) else None
