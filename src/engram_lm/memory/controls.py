"""Memories that something is missing from, to be compared with whole ones: `MemoryConfig(control=...)`.

    control          what it lacks                                             what stays
    "one-row"        n-grams: all of a head read the head's row 0              lookups, projection, gate, conv
    "shuffled"       a row of one's own: rows are dealt anew in every forward  lookups, how often a row comes twice
    "frozen-random"  training of rows: random, never changed                   lookups, projection, gate, conv
    "bias"           everything that looks: one learned vector a block         a place in the residual stream
    "off"            everything: never read                                    the files

The config is saved with the memory, so a control loads as the control it is. (An n-gram memory of single tokens needs no
control: `orders=(1,)`; see `engram_lm.ablation.arms`.)

    attach(model, tokenizer, MemoryConfig(layers=(1, 5), control="one-row"))
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engram_lm.memory.interventions import Intervention, OneRow

if TYPE_CHECKING:
    from engram_lm.memory.layer import MemoryLayer
    from engram_lm.memory.memory import Memory

# Standard deviation of frozen rows: what trained rows have (0.07 and 0.09 in the demo's memory).
FROZEN_STD = 0.08

_GAMMA = 0x1E3779B97F4A7C15


class DealtRows(Intervention):
    """Row x of a head of p rows becomes row (x + s) mod p, with s fresh for each sequence of each step of training.

    One to one, so that as many rows are read, and two places that share a row still do; but what a row learns in one step
    it is asked for by other n-grams in the next. s is a hash of the rows' updates and the sequence's first address: no
    position sees what comes after it, and the same forward gives the same answer. (Addresses exchanged between positions
    would let a position read the row of an n-gram that is still to come.)
    """

    def addresses(self, slot: "MemoryLayer", address_BTC: Tensor) -> Tensor:
        device = address_BTC.device
        size_C = torch.tensor(slot.scheme.moduli, device=device)
        first_C = torch.tensor(slot.scheme.offsets, device=device)
        begin_B = address_BTC[:, 0, -1] + slot.table.gradients.updates * 0x5851F42D4C957F2D % (1 << 62)
        column_C = torch.arange(len(size_C), device=device) + 1_009 * (slot.block + 1)
        shift_BC = _mixed(_mixed(begin_B)[:, None] + column_C * _GAMMA) % size_C
        return first_C + (address_BTC - first_C + shift_BC[:, None]) % size_C


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around; shifts carry the sign, which mixes as well."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def put_control(memory: "Memory") -> None:
    """Make a new memory the control that its config names; nothing for None. Uses torch's seed for random rows."""
    control = memory.config.control
    if control == "one-row":
        memory.intervention = OneRow()
    elif control == "shuffled":
        memory.intervention = DealtRows()
    elif control == "frozen-random":
        for slot in memory.slots:
            # a generator of its own: what is drawn next is what every other arm draws
            generator = torch.Generator().manual_seed(torch.initial_seed() % (1 << 62) + slot.block)
            rows = slot.table.rows_view()
            rows.copy_(FROZEN_STD * torch.randn(rows.shape, generator=generator))
            slot.handle.requires_grad_(False)
    elif control in ("bias", "off"):
        for slot in memory.slots:
            slot.requires_grad_(False)
            if control == "bias":
                slot.bias = nn.Parameter(torch.zeros_like(slot.key_norm))
        memory.enabled = control == "bias"


def bias_of(slot: "MemoryLayer", hidden: Tensor) -> Tensor:
    """The layer's vector, float [M, D], for every token of hidden [B, T, D], [B, T, M, D] or [B, T, M*D]."""
    return slot.bias.to(hidden.dtype).view(hidden.shape[2:]).expand(hidden.shape)
