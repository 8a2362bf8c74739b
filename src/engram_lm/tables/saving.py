"""The rows of a table put into a save: safetensors files, as `attachment.saving` describes them."""

import json
from typing import Any

from engram_lm.storage.format import SUFFIX
from engram_lm.tables.protocol import Save, Table


def packed_name(stem: str) -> str:
    """The packed file of the table `stem` (MEMORY-BLOCK)."""
    return f"rows-{stem}{SUFFIX}"


def save_tensors(table: Table, save: Save, stem: str, *, identity: str) -> dict[str, Any]:
    """`Table.save` for a table whose checkpoint holds all its rows."""
    tensors, gradients = table.checkpoint(), table.gradients
    rows = tensors.pop("rows")
    run = str(gradients.run)
    save.tensors(
        f"rows-{stem}.safetensors",
        {"rows": rows.to(save.row_dtype or rows.dtype)},
        identity=identity,
        run=run,
    )
    if save.row_state and tensors:
        save.tensors(f"state-{stem}.safetensors", tensors, rule=json.dumps(gradients.rule.to_json()), run=run)
    return {"row_state": bool(save.row_state and tensors)}
