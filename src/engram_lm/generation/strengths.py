"""How strongly memory acted at a token, as one number: what is painted red in a terminal and on the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.traces import LayerTrace


@dataclass(frozen=True, kw_only=True)
class HeatView:
    """Which memory layers and branches are looked at, None for all, and which of their quantities. The largest counts.

    quantity: "share" or "gate" of the tables, or "index": the part of a token's probability that an index gave.
    """

    quantity: str = "share"
    block: int | None = None
    branch: int | None = None

    def strengths(self, records: Sequence[LayerTrace], *, row: int = 0) -> np.ndarray:
        """float [T] of one sequence of the batch; ConfigError for a block or branch that has no memory."""
        chosen = self.of(records)
        columns = [getattr(record, self.quantity)[row] for record in chosen]
        if self.branch is not None:
            branches = columns[0].shape[-1]
            if not 0 <= self.branch < branches:
                raise ConfigError(f"There are branches 0 to {branches - 1}; got --branch {self.branch}.")
            columns = [column[:, self.branch : self.branch + 1] for column in columns]
        return np.max([column.max(-1) for column in columns], axis=0)

    def of(self, records: Sequence[LayerTrace]) -> list[LayerTrace]:
        """The records of the chosen block."""
        chosen = [record for record in records if self.block in (None, record.block)]
        if not chosen:
            blocks = sorted({record.block for record in records})
            raise ConfigError(
                f"Memory is before blocks {', '.join(map(str, blocks))}; got --block {self.block}."
            )
        return chosen

    def describe(self) -> str:
        """ "block 3, branch 0", for a legend."""
        where = "strongest block" if self.block is None else f"block {self.block}"
        return where if self.branch is None else f"{where}, branch {self.branch}"


def full_share(
    directory: Path, strengths: Sequence[float], *, of: str = "of the prompt"
) -> tuple[float, str]:
    """(the share that is painted full red, why): what the memory's run measured, else the strongest token `of` some text."""
    measured = measured_share(directory)
    if measured:
        return measured, "1 held-out token in 100 has more"
    strongest = max(strengths)
    return strongest or 1.0, f"the strongest token {of}" if strongest else "memory adds nothing here"


def measured_share(directory: Path) -> float | None:
    """The share that one held-out token in a hundred exceeds, where the training run beside the memory measured it."""
    for place in (directory, directory.parent.parent):
        try:
            run = json.loads((place / "run.json").read_text(encoding="utf8"))
            return float(run["results"]["share"]["p99"]) or None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
