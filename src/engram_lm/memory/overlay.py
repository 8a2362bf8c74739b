"""Changed rows over a memory's tables: for a request, or for some sequences of a batch. The tables stay as they are.

    overlay = Overlay()
    overlay.put(5, rows=[17, 940], values=values_RW)           # of the table before block 5
    with reading(model, overlay): model(ids)                    # attachment.reading: every sequence reads them
    with reading(model, BySequence([overlay, None])): ...       # the first sequence of the batch alone

An overlay is an intervention: it works over every tier, with rows fetched ahead and with cached decoding, and goes without a
trace. Values may require gradients, which come through where a changed row was read. For eager models.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.interventions import Intervention

if TYPE_CHECKING:
    from engram_lm.memory.layer import MemoryLayer
    from engram_lm.memory.memory import MemoryCall


class Overlay(Intervention):
    """Rows by block and row number that are read in place of the tables' own."""

    def __init__(self) -> None:
        # block -> (int64 [R] ascending, [R, W])
        self._changed: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, block: int, rows: Any, values: Any) -> None:
        """Change rows of the table before a block. Rows that were changed before are changed again.

        Args:
            rows: int64 [R], each row once.
            values: [R, W], in any dtype; read in the table's.
        """
        row_R, value_RW = torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(values)
        if row_R.dim() != 1 or value_RW.dim() != 2 or len(row_R) != len(value_RW):
            raise ConfigError(
                f"An overlay takes rows [R] and values [R, W]; got {list(row_R.shape)} and {list(value_RW.shape)}."
            )
        if len(row_R.unique()) != len(row_R):
            raise ConfigError("An overlay takes each row once.")
        if block in self._changed:
            before_R, old_RW = self._changed[block]
            if old_RW.shape[1] != value_RW.shape[1]:
                raise ConfigError(
                    f"Rows of block {block} have {old_RW.shape[1]} numbers here; got {value_RW.shape[1]}."
                )
            kept_R = ~torch.isin(before_R, row_R)
            row_R = torch.cat([before_R[kept_R], row_R])
            value_RW = torch.cat([old_RW[kept_R].to(value_RW.dtype), value_RW])
        order_R = row_R.argsort()
        self._changed[block] = row_R[order_R], value_RW[order_R]

    def drop(self, block: int, rows: Any) -> None:
        """Give rows of a block back to the table."""
        row_R, value_RW = self._changed.get(block, (torch.empty(0, dtype=torch.int64), torch.empty(0, 0)))
        kept_R = ~torch.isin(row_R, torch.as_tensor(rows, dtype=torch.int64))
        self._changed[block] = row_R[kept_R], value_RW[kept_R]

    def n_rows(self, block: int) -> int:
        """How many rows of a block are changed."""
        return len(self._changed[block][0]) if block in self._changed else 0

    def rows(self, slot: "MemoryLayer", address_BTC: Tensor, rows_BTCW: Tensor, call: "MemoryCall") -> Tensor:
        """See `Intervention.rows`."""
        if not self.n_rows(slot.block):
            return rows_BTCW
        row_R, value_RW = self._changed[slot.block]
        if (
            value_RW.shape[1] != rows_BTCW.shape[-1]
            or int(row_R[-1]) >= slot.table.n_rows
            or int(row_R[0]) < 0
        ):
            raise ConfigError(
                f"The overlay has rows {int(row_R[0]):,} to {int(row_R[-1]):,} of {value_RW.shape[1]} numbers for block "
                f"{slot.block}; the table has {slot.table.n_rows:,} of {rows_BTCW.shape[-1]}."
            )
        device = rows_BTCW.device
        row_R, value_RW = row_R.to(device), value_RW.to(device, rows_BTCW.dtype)
        address_BTC = address_BTC.to(device)
        at_BTC = torch.searchsorted(row_R, address_BTC).clamp(max=len(row_R) - 1)
        return torch.where((row_R[at_BTC] == address_BTC)[..., None], value_RW[at_BTC], rows_BTCW)


class BySequence(Intervention):
    """An intervention, or None, for each sequence of the batch; only rows are asked for, not addresses."""

    def __init__(self, chosen: Sequence[Intervention | None]) -> None:
        self.chosen = tuple(chosen)

    def rows(self, slot: "MemoryLayer", address_BTC: Tensor, rows_BTCW: Tensor, call: "MemoryCall") -> Tensor:
        """See `Intervention.rows`."""
        if len(self.chosen) != len(rows_BTCW):
            raise ConfigError(
                f"There are interventions for {len(self.chosen)} sequences; this forward has {len(rows_BTCW)}."
            )
        return torch.cat([
            rows_1TCW if one is None else one.rows(slot, address_1TC, rows_1TCW, call)
            for one, address_1TC, rows_1TCW in zip(
                self.chosen, address_BTC.split(1), rows_BTCW.split(1), strict=True
            )
        ])  # fmt: skip
