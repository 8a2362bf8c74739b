"""Generation with an index of documents: which model, which gate, and the line that says what the index did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.mixing.gate import Lambda
    from engram_lm.mixing.processor import MemoryProcessor
    from engram_lm.mixing.trace import MemoryStep
    from engram_lm.show.speaking import Token


class Indexed:
    """An index beside a model, for one generation."""

    def __init__(
        self,
        directory: Path,
        *,
        model: Any,
        tokenizer: Any,
        gate: Path | None,
        lam: float | None,
        tenant: str,
    ) -> None:
        from engram_lm.library import Library

        self.model, self.tokenizer = model, tokenizer
        self.library = Library.open(directory, tokenizer=tokenizer)
        self.snapshot: Snapshot = self.library.store.snapshot(tenant)
        self.gate: Lambda = chosen_gate(gate, lam, self.snapshot, model=model, tokenizer=tokenizer)
        self.ids: list[int] = []
        self.steps: list[MemoryStep] = []

    def processor(self, ids: list[int]) -> MemoryProcessor:
        """A new one for a prompt."""
        import torch

        from engram_lm.mixing import memory_processor

        return memory_processor(
            self.snapshot, self.gate, torch.tensor([ids]), tokenizer=self.tokenizer, model=self.model
        )

    def watched(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """The same tokens; what the index did is kept for `told`."""
        for token in tokens:
            self.ids.append(token.id)
            if token.step is not None:
                self.steps.append(token.step)
            yield token

    def told(self) -> list[str]:
        """What happened: one line, and the documents behind the token that the index gave most of."""
        from engram_lm.mixing.trace import summary

        lines = [summary(list(self.steps))]
        spoken = [step for step in self.steps if step.depth and (step.responsibility or 0) > 0]
        if spoken:
            best = max(spoken, key=lambda step: (round(step.responsibility or 0, 2), step.depth))
            match = self.snapshot.match(np.array(self.ids[: best.position], np.int64))
            for document, count in self.snapshot.documents_of(match, match.depth, limit=3):
                times = f"{count:,} times" if count != 1 else "once"
                facts = "".join(
                    f", {name}: {value}"
                    for name, value in document.extra.items()
                    if name in ("title", "licence", "license", "attribution")
                )
                lines.append(f"  {document.id} ({times}{facts})")
        return lines


def chosen_gate(
    path: Path | None, lam: float | None, snapshot: Snapshot, *, model: Any, tokenizer: Any
) -> Lambda:
    """The gate of a file, a fixed lambda, or the one shipped for this model."""
    from engram_lm.mixing import FixedLambda, Gate, default_gate
    from engram_lm.mixing.identity import require_identity

    if path is not None and lam is not None:
        raise ConfigError("--gate and --lam exclude each other: a gate says what lambda is.")
    if lam is not None:
        return FixedLambda(lam)
    gate = default_gate() if path is None else Gate.load(path)
    try:
        require_identity(gate, tokenizer=tokenizer, model=model)
    except ConfigError:
        raise
    except ValueError as error:
        if path is not None:
            raise
        raise ConfigError(
            f"No gate is shipped for this model ({error}) Give --lam 0.3, say, or fit one: engram-lm gate fit."
        ) from None
    return gate


def load_any(name: str) -> tuple[Any, Any]:
    """(model, tokenizer): a memory directory, a run, smollm2, a path or a hub name."""
    from engram_lm.show.command import load

    directory = Path(name)
    if directory.is_dir() and any((directory / file).exists() for file in ("memory.json", "run.json")):
        return load(directory)
    from engram_lm.train.base import load_base

    base = load_base(name, report=lambda line: None)
    return base.model, base.tokenizer
