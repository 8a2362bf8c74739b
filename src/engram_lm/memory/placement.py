"""Which tier a memory's rows lie on: one table in place of another, with the same rows, so that only the time changes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.memory.layer import MemoryLayer
from engram_lm.storage.cached import CachedStore
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.layout import Layout
from engram_lm.storage.store import HostStore, RowStore
from engram_lm.tables.read_only import ReadOnlyTable
from engram_lm.vocab import TokenMap

Tier = Literal["device", "host", "disk", "cached"]


def store_on(
    tier: Tier,
    layout: Layout,
    *,
    cache_bytes: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> RowStore:
    """The store that reads `layout` from a tier: "host" loads it, "disk" reads it, "cached" keeps hot rows of the disk."""
    if (cache_bytes is not None) != (tier == "cached"):
        raise ConfigError("cache_bytes belongs to the tier 'cached', and to that alone.")
    if tier == "host":
        return HostStore.load(layout, report=report)
    if tier == "disk":
        return DiskStore(layout)
    if tier == "cached":
        return CachedStore(DiskStore(layout), budget_bytes=cache_bytes)
    raise ConfigError(f"Files are read from the tiers host, disk and cached; got {tier!r}.")


def put_table(slot: MemoryLayer, table: Any, *, model: nn.Module) -> None:
    """Exchange a slot's table and handle."""
    old = slot.handle
    handle = table.gradients.handle
    handle.data = handle.data.to(device=old.device, dtype=old.dtype)
    table.gradients.belong_to(model)
    table.gradients.set_updates(table.gradients.updates)
    slot.table, slot.handle = table, handle


def open_rows(
    path: str | os.PathLike, *, tier: Tier = "disk", dtype: torch.dtype = torch.float32, **options: Any
) -> ReadOnlyTable:
    """A packed file (docs/format.md) as a table: `use_table(model, 1, open_rows("layer1.engram"))`."""
    from engram_lm.storage.format import open_packed

    return ReadOnlyTable(store_on(tier, open_packed(Path(path)), **options), dtype=dtype)


def require_fit(slot: MemoryLayer, table: Any, token_map: TokenMap) -> None:
    if (table.n_rows, table.width) != (slot.table.n_rows, slot.table.width):
        raise CheckpointError(
            f"Block {slot.block} reads {slot.table.n_rows:,} rows of {slot.table.width} numbers; the table has "
            f"{table.n_rows:,} of {table.width}."
        )
    facts = table.identity
    if facts is not None:
        from engram_lm.addressing import Identity

        try:
            Identity(facts).require_equal(
                slot.scheme.identity,
                where=f"The table for block {slot.block}",
                is_tokenizer=token_map.is_of,
            )
        except KeyError as error:
            raise IdentityError(
                f"The table for block {slot.block} has an identity without {error}."
            ) from None
