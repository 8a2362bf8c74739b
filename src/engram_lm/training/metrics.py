"""A run's measures as JSON lines: appended as they come, cut back to the checkpoint when a run goes on.

    {"step": 0, "eval_loss_off": 3.21, ...}
    {"step": 10, "loss": 3.19, "learning_rate": 0.001, "grad_norm": 0.4, "tokens": 20480, "tokens_per_second": 812}

Tokens are those trained on, in all; losses are nats a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engram_lm.durable import write_atomic


class Metrics:
    """metrics.jsonl of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def begin(self, *, step: int | None) -> None:
        """Keep what was measured up to `step`; None begins anew. What came after will be measured again."""
        kept = (
            [] if step is None else [record for record in read_metrics(self.path) if record["step"] <= step]
        )
        self.records = kept
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def add(self, **record: Any) -> None:
        self.records.append(record)
        with open(self.path, "a", encoding="utf8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut short by a kill."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records
