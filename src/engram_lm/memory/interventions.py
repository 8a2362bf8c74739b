"""What a memory reads in place of its own addresses and rows: for controls and instruments, undone without a trace.

    with reading(model, OtherRows(seed=0)):
        model(ids)                                  # every n-gram reads a row that belongs to another
    model(ids)                                      # bit for bit what it was

    OneRow       every n-gram of a head reads the head's first row
    OtherRows    another row of the same head, always the same one: the table's rows exchanged
    NoiseRows    a Gaussian row as long as the true one

Addresses are exchanged before rows are fetched, so that gradients go to the rows that were read. Nothing in the tables or
the layers changes; a memory that is off reads nothing. OtherRows and NoiseRows draw numbers: for eager models, not for
torch.compile.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engram_lm.memory.layer import MemoryLayer
    from engram_lm.memory.memory import MemoryCall

# Directions that NoiseRows draws from; a prime, so that any step below it visits all.
_DIRECTIONS = 8191


class Intervention:
    """What slots read. This one changes nothing; others override one of the two."""

    def addresses(self, slot: "MemoryLayer", address_BTC: Tensor) -> Tensor:
        """int64 [B, T, C] in the place of `address_BTC`, once a slot and forward."""
        return address_BTC

    def rows(self, slot: "MemoryLayer", address_BTC: Tensor, rows_BTCW: Tensor, call: "MemoryCall") -> Tensor:
        """Rows [B, T, C, W] in the place of those at `address_BTC`, in one forward."""
        return rows_BTCW


class OneRow(Intervention):
    """Every address of a head becomes the head's row 0."""

    def addresses(self, slot: "MemoryLayer", address_BTC: Tensor) -> Tensor:
        first_C = torch.tensor(slot.scheme.offsets).to(address_BTC.device)
        return first_C.expand(address_BTC.shape).contiguous()


class OtherRows(Intervention):
    """Row x of a head of p rows (a prime) becomes row (a x + b) mod p, with a and b drawn for each head: one to one.

    At most one row of a head stays where it is.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def addresses(self, slot: "MemoryLayer", address_BTC: Tensor) -> Tensor:
        device = address_BTC.device
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * slot.block)
        size_C, first_C = (torch.tensor(x) for x in (slot.scheme.moduli, slot.scheme.offsets))
        draw_2C = torch.rand((2, len(size_C)), generator=generator, dtype=torch.float64)
        # below 2^31, so that a x stays inside int64; 1 <= a < p keeps it one to one
        factor_C = 1 + (draw_2C[0] * (size_C - 1).clamp(max=1 << 31)).long().clamp(max=size_C - 2)
        shift_C = 1 + (draw_2C[1] * (size_C - 1)).long().clamp(max=size_C - 2)
        factor_C, shift_C, size_C, first_C = (x.to(device) for x in (factor_C, shift_C, size_C, first_C))
        return first_C + ((address_BTC - first_C) * factor_C + shift_C) % size_C


class NoiseRows(Intervention):
    """A Gaussian row of the true row's norm, the same one whenever an address is read.

    Directions are drawn from 8,191 for a width, chosen by the address: two rows share one by accident that often.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self._directions: dict[Any, Tensor] = {}

    def rows(self, slot: "MemoryLayer", address_BTC: Tensor, rows_BTCW: Tensor, call: "MemoryCall") -> Tensor:
        width, device = rows_BTCW.shape[-1], rows_BTCW.device
        if (width, device) not in self._directions:
            generator = torch.Generator().manual_seed(self.seed)
            drawn_DW = torch.randn((_DIRECTIONS, width), generator=generator)
            self._directions[width, device] = (drawn_DW / drawn_DW.norm(dim=-1, keepdim=True)).to(device)
        chosen_BTC = (address_BTC.to(device) % _DIRECTIONS * 4099 + slot.block) % _DIRECTIONS
        noise_BTCW = self._directions[width, device][chosen_BTC]
        return (noise_BTCW * rows_BTCW.float().norm(dim=-1, keepdim=True)).to(rows_BTCW.dtype)


class _Both(Intervention):
    """One change after another."""

    def __init__(self, first: Intervention, second: Intervention) -> None:
        self.first, self.second = first, second

    def addresses(self, slot: "MemoryLayer", address_BTC: Tensor) -> Tensor:
        return self.second.addresses(slot, self.first.addresses(slot, address_BTC))

    def rows(self, slot: "MemoryLayer", address_BTC: Tensor, rows_BTCW: Tensor, call: "MemoryCall") -> Tensor:
        return self.second.rows(slot, address_BTC, self.first.rows(slot, address_BTC, rows_BTCW, call), call)


def stacked(first: Intervention | None, second: Intervention) -> Intervention:
    """Both, the second after the first."""
    return second if first is None else _Both(first, second)
