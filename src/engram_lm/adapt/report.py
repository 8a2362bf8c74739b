"""Rows into perplexities with intervals, and those into the tables of a report.

    groups = perplexities(rows)            # one a (domain, kind, arm, index): perplexity, alone, change, intervals of 95 %
    markdown(groups)                       # the table

Intervals come from 1,000 draws of the windows with replacement (one window a document), perplexity and change from the
same draw; of fewer than five windows there are none.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engram_lm.eval.intervals import drawn, interval
from engram_lm.eval.tables import between, plain, table

Row = dict[str, Any]


def perplexities(rows: Iterable[Row]) -> list[Row]:
    """Groups of rows as `arms.Arms.score` gives them, in the order in which they first come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["domain"], row["kind"], row["arm"], row["index"]), []).append(row)
    return [_group(key, of) for key, of in found.items()]


def _group(key: tuple[str, ...], rows: list[Row]) -> Row:
    tokens_N, mixed_N, alone_N = (
        np.array([row[name] for row in rows], float) for name in ("tokens", "log_p", "log_p_alone")
    )
    draw_DN = drawn(len(rows))
    tokens_D = tokens_N[draw_DN].sum(1)
    mixed_D, alone_D = (np.exp(-log_p[draw_DN].sum(1) / tokens_D) for log_p in (mixed_N, alone_N))
    total = tokens_N.sum()
    mixed, alone = (float(np.exp(-log_p.sum() / total)) for log_p in (mixed_N, alone_N))
    means = {
        name: round(float(np.mean([row[name] for row in rows])), 5)
        for name in ("mean_lambda", "prompt_tokens", "model_seconds", "memory_seconds")
    }
    domain, kind, arm, index = key
    return {
        "domain": domain, "kind": kind, "arm": arm, "index": index, "windows": len(rows), "tokens": int(total),
        "perplexity": mixed, "interval": interval(mixed_D, len(rows)), "alone": alone,
        "change": mixed / alone - 1, "change_interval": interval(mixed_D / alone_D - 1, len(rows)), **means,
    }  # fmt: skip


NAMES = {
    "alone": "model alone",
    "fixed": "memory, fixed λ",
    "memory": "memory, gate",
    "retrieval": "retrieval in the prompt",
    "both": "both",
}


def markdown(groups: list[Row], *, kinds: Sequence[str] = ("indexed", "unseen", "general")) -> str:
    """Perplexity by arm and kind of text; index sizes a line each."""
    kinds = [kind for kind in kinds if any(group["kind"] == kind for group in groups)]
    by = {(group["arm"], group["index"], group["kind"]): group for group in groups}
    lines = []
    for arm, index in dict.fromkeys((group["arm"], group["index"]) for group in groups):
        cells = [by.get((arm, index, kind)) for kind in kinds]
        known = [cell for cell in cells if cell]
        prompt = max(cell["prompt_tokens"] for cell in known)
        spent = [1e3 * np.mean([cell[f"{part}_seconds"] for cell in known]) for part in ("model", "memory")]
        lines.append([
            NAMES.get(arm, arm), index,
            *(f"{plain(cell['perplexity'])}{between(cell['interval'])}" if cell else "" for cell in cells),
            f"{prompt:.0f}", f"{spent[0]:,.0f} + {spent[1]:,.0f}",
        ])  # fmt: skip
    head = ["arm", "documents in the index", *kinds, "prompt tokens", "ms a text: model + memory"]
    return table(head, lines)
