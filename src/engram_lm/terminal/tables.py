"""What fired, as a table for people or as JSON: one line a token and memory layer (see `engram_lm.traces`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engram_lm.generation.strengths import HeatView
from engram_lm.traces import LayerTrace

# Addresses that fit into a table; JSON has all.
_SHOWN_ADDRESSES = 4


def trace_json(records: Sequence[LayerTrace], tokenizer: Any, *, view: HeatView, limit: int | None) -> str:
    """A JSON list of `LayerTrace.rows_of`, layer by layer."""
    rows = [row for record in view.of(records) for row in _rows(record, tokenizer, view, limit)]
    return json.dumps(rows, ensure_ascii=False)


def print_trace(
    records: Sequence[LayerTrace],
    tokenizer: Any,
    *,
    view: HeatView,
    limit: int | None,
    console: Any,
    only: int | None = None,
) -> None:
    """One table a memory layer on a rich console; `only` shows the token at that place alone."""
    from rich.table import Table
    from rich.text import Text

    for record in view.of(records):
        columns = len(record.orders) * record.heads
        table = Table(
            title=f"{record.memory} before block {record.block}: {columns} rows a token",
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column("", justify="right", style="dim")
        table.add_column("token", no_wrap=True)
        for order in record.orders:
            table.add_column(f"{order}-gram", no_wrap=True, overflow="ellipsis")
        for name in ("gate", "share", "|rows|"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(
            f"addresses, {min(columns, _SHOWN_ADDRESSES)} of {columns}", style="dim", no_wrap=True
        )
        rows = _rows(record, tokenizer, view, limit)
        for row in rows if only is None else [rows[only]]:
            table.add_row(
                str(row["position"]),
                Text(_quoted(row["token"])),
                *(Text(_quoted(row["ngrams"][str(order)])) for order in record.orders),
                " ".join(f"{gate:.3f}" for gate in row["gate"]),
                " ".join(f"{share:.3f}" for share in row["share"]),
                f"{row['row_norm']:.3f}",
                " ".join(str(address) for address in row["addresses"][:_SHOWN_ADDRESSES]),
            )
        console.print(table)
        left = int((record.token_ids[0] >= 0).sum()) - len(rows)
        if left > 0 and only is None:
            console.print(f"{left} more tokens; --limit 0 shows all", style="dim")
        console.print()


def _rows(record: LayerTrace, tokenizer: Any, view: HeatView, limit: int | None) -> list[dict[str, Any]]:
    rows = list(record.rows_of(0, lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    for row in rows:
        if view.branch is not None:
            row["branch"] = view.branch
            row["gate"], row["share"] = [row["gate"][view.branch]], [row["share"][view.branch]]
    return rows[:limit] if limit else rows


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
