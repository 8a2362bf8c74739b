"""What memory did at each generated token: plain records. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MemoryStep:
    """One generated token and the look-up before it.

    lam: lambda. p_memory, p_model, p: of the chosen token. responsibility = lam p_memory / p, the part of the
    probability that memory gave; None in a log-space mixture, which has no parts.
    depth: tokens of the match before it; count: how often that occurs; documents: in how many documents, up to 64.
    micro_seconds: look-up, gate and mixing of this row.
    """

    position: int
    token_id: int
    lam: float
    p_memory: float
    p_model: float
    p: float
    responsibility: float | None
    depth: int
    count: int
    documents: int
    micro_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For tables and JSON."""
        return asdict(self)


def summary(steps: list[MemoryStep | None]) -> str:
    """One line: "12 of 40 tokens from memory, longest match 9 tokens, in 2 documents, λ up to 0.83, 0.1 ms a token"."""
    known = [step for step in steps if step is not None]
    if not known:
        return "no token was generated"
    mean_ms = sum(step.micro_seconds for step in known) / len(known) / 1000
    best = max(known, key=lambda step: step.depth)
    from_memory = sum((step.responsibility or 0) > 0.5 for step in known)
    if best.depth == 0:
        return f"nothing found in memory, {mean_ms:.1f} ms a token"
    documents = f"{best.documents} document{'s' if best.documents != 1 else ''}"
    return (
        f"{from_memory} of {len(known)} tokens from memory, longest match {best.depth} "
        f"token{'s' if best.depth != 1 else ''} in {documents}, "
        f"λ up to {max(step.lam for step in known):.2f}, {mean_ms:.1f} ms a token"
    )
