"""The rows inside a memory's directory (memory.json and its files), as layouts: to be read where they lie. No torch."""

import json
import os
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError
from engram_lm.storage.format import SUFFIX, open_packed
from engram_lm.storage.layout import Extent, Layout
from engram_lm.storage.safetensors import file_tensors

MANIFEST = "memory.json"


def saved_tables(directory: str | os.PathLike) -> dict[int | str, Layout]:
    """Every table of a saved memory by block; by NAME-BLOCK where there are several memories.

    CheckpointError for a manifest that cannot be read, and for a training checkpoint whose rows are positions of logs.
    """
    directory = Path(directory)
    try:
        memories = json.loads((directory / MANIFEST).read_text(encoding="utf8"))["memories"]
        tables = [
            (memory["config"]["name"], table["block"], table["identity_facts"], "log" in table)
            for memory in memories
            for table in memory["tables"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} cannot be read: {error!r}.") from None
    found: dict[int | str, Layout] = {}
    for name, block, facts, in_a_log in tables:
        stem = f"{name}-{block}"
        packed = directory / f"rows-{stem}{SUFFIX}"
        if in_a_log:
            raise CheckpointError(
                f"{directory} is a training checkpoint whose rows are in a log; look at the base file that {MANIFEST} names."
            )
        key = block if len(memories) == 1 else stem
        if packed.exists():
            found[key] = open_packed(packed)
        else:
            found[key] = rows_layout(directory / f"rows-{stem}.safetensors", identity=facts)
    return found


def rows_layout(path: Path, *, identity: dict[str, Any] | None = None) -> Layout:
    """Where the rows lie in a safetensors file of one memory table. CheckpointError for rows of a dtype that is no codec."""
    rows = file_tensors(path).get("rows")
    codec = {"F32": "fp32", "BF16": "bf16"}.get(rows.dtype if rows is not None else "")
    if codec is None:
        raise CheckpointError(
            f"{path} holds {'no rows' if rows is None else f'rows of {rows.dtype}'}; float32 and bfloat16 rows are read "
            "where they lie."
        )
    n_rows, width = rows.shape
    record_bytes = rows.n_bytes // n_rows
    segment = Extent(
        path=path, offset=rows.offset, first_row=0, n_rows=n_rows, stride=record_bytes, group=n_rows,
        group_stride=rows.n_bytes, at=0, n_bytes=record_bytes,
    )  # fmt: skip
    return Layout(
        name=str(path), n_rows=n_rows, width=width, codec=codec, segments=(segment,), identity=identity
    )
