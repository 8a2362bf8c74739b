"""The rows of one table inside a saved memory: which file they are in, and what puts them into a slot.

rows-NAME-BLOCK.safetensors     written whole
rows-NAME-BLOCK.engram          of a table that trained on disk, written in a few MB of memory (docs/format.md)
neither                         in a training checkpoint of such a table: memory.json names a position of its log
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engram_lm.errors import CheckpointError, IdentityError
from engram_lm.memory.layer import MemoryLayer
from engram_lm.memory.placement import Tier, put_table, store_on
from engram_lm.storage import HostStore
from engram_lm.storage.format import open_packed, read_header
from engram_lm.storage.saved import rows_layout
from engram_lm.tables import ReadOnlyTable
from engram_lm.tables.saving import packed_name


@dataclass
class SavedRows:
    """Rows found and checked. shape: (n_rows, width). put(slot, model): give the slot these rows; after all is checked."""

    shape: tuple[int, int]
    put: Callable[[MemoryLayer, nn.Module], None]


def find_rows(
    directory: Path,
    stem: str,
    entry: dict[str, Any],
    slot: MemoryLayer,
    *,
    save_id: str,
    tier: Tier,
    cache_bytes: int | None,
    row_state: bool,
) -> SavedRows:
    """The rows that memory.json's `entry` speaks of. CheckpointError when they are missing, damaged or of another save."""
    facts = entry["identity_facts"]
    if "log" in entry:
        return _in_a_log(directory, entry, slot)
    if (directory / packed_name(stem)).exists():
        path = directory / packed_name(stem)
        header = read_header(path)
        _require_save(path, header.note, save_id)
        if not header.made_by.endswith(entry.get("chain", "")):
            raise _other_run(path)
        layout = open_packed(path)
    else:
        path = directory / f"rows-{stem}.safetensors"
        if tier == "device":
            tensors = read_tensors(path, save_id, run=entry.get("run"), identity=entry["identity"])
            state = directory / f"state-{stem}.safetensors"
            if row_state and entry.get("row_state", state.exists()):
                tensors |= read_tensors(state, save_id, run=entry.get("run"))
            return SavedRows(tuple(tensors["rows"].shape), lambda slot, model: slot.table.restore(tensors))
        read_tensors(path, save_id, names=(), run=entry.get("run"), identity=entry["identity"])
        layout = rows_layout(path, identity=facts)

    def put(slot: MemoryLayer, model: nn.Module) -> None:
        if tier == "device":
            rows_NW = HostStore.load(layout).gather(torch.arange(layout.n_rows).numpy())
            slot.table.restore({"rows": torch.from_numpy(rows_NW)})
        else:
            put_table(
                slot,
                ReadOnlyTable(store_on(tier, layout, cache_bytes=cache_bytes), dtype=slot.table.dtype),
                model=model,
            )

    return SavedRows((layout.n_rows, layout.width), put)


def _in_a_log(directory: Path, entry: dict[str, Any], slot: MemoryLayer) -> SavedRows:
    log, table = entry["log"], slot.table
    if (table.where() or {}).get("log") != log["log"]:
        raise CheckpointError(
            f"The rows of {directory} are position {log['position']:,} of the log {log['log']}. Put LoggedTable.open("
            f'"{log["base"]}", "{log["log"]}") into the model with use_table, then load.'
        )
    # memories that were saved before there was a chain have none
    if log.get("chain") not in (None, table.store.chain_at(log["position"])):
        raise CheckpointError(
            f"The log {log['log']} holds other rows up to position {log['position']:,} than when {directory} was saved: it "
            "is of another training run. Put back the log that the checkpoint belongs to, or train anew."
        )
    position = torch.tensor([log["position"], entry["updates"]])
    return SavedRows(
        (table.n_rows, table.width), lambda slot, model: slot.table.restore({"log_position": position})
    )


def read_tensors(
    path: Path,
    save_id: str,
    *,
    names: tuple[str, ...] | None = None,
    run: int | dict[str, int] | None = None,
    **marks_wanted: str,
) -> dict[str, Tensor]:
    """The tensors (default all) of one file of the save `save_id`, whose other marks are as wanted.

    run: the number of the training run; of memory.safetensors one for each of its layers. None in older memories.
    """
    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    _require_save(path, marks.get("save_id"), save_id)
    for mark, wanted in marks_wanted.items():
        if marks.get(mark) != wanted:
            raise IdentityError(f"{path} was saved with {mark} {marks.get(mark)}; memory.json says {wanted}.")
    if run is not None and json.loads(marks.get("run", "null")) != run:
        raise _other_run(path)
    return tensors


def _other_run(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} comes from another training run than memory.json; copy the directory again, whole."
    )


def _require_save(path: Path, found: str | None, wanted: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{path} belongs to another save than memory.json; copy the directory again, whole."
        )
