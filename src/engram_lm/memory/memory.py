"""One memory: its token map, address schemes, tables, and the layers that read them. It knows token ids, no hooks.

window = Window.begin(ids_BT, None, state=state, keep=memory.keep)     # state: None, or of the tokens before
call = MemoryCall(memory, window)
hidden = hidden + memory.slots[0](hidden, call).delta                    # before the block of that layer
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.addressing import AddressScheme
from engram_lm.config import MemoryConfig
from engram_lm.memory.interventions import Intervention
from engram_lm.memory.layer import MemoryLayer
from engram_lm.nn import Window
from engram_lm.tables.protocol import Ticket
from engram_lm.traces import LayerTrace
from engram_lm.vocab import TokenMap


class Memory:
    """A memory: made by `build_memory`, put into a model by `attach` or by whoever owns the decoder."""

    def __init__(
        self,
        config: MemoryConfig,
        token_map: TokenMap,
        schemes: tuple[AddressScheme, ...],
        slots: nn.ModuleList,
    ):
        self.config, self.token_map, self.schemes, self.slots = config, token_map, schemes, slots
        self.enabled = True
        # what is read in place of its own addresses and rows
        self.intervention: Intervention | None = None
        self._dead = np.array(config.dead_token_ids, dtype=np.int64)

    def __deepcopy__(self, memo: dict) -> "Memory":
        """Rows and parameters are copied; the token map and the schemes cannot change and are shared."""
        twin = Memory(self.config, self.token_map, self.schemes, copy.deepcopy(self.slots, memo))
        memo[id(self)] = twin
        twin.enabled, twin.intervention = self.enabled, self.intervention
        return twin

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tables(self) -> list[Any]:
        return [slot.table for slot in self.slots]

    @property
    def keep(self) -> int:
        """Past tokens that a forward needs: the look-back of the hash, and of the conv."""
        return max(max(slot.scheme.max_order - 1, slot.past_length) for slot in self.slots)

    def canonical(self, ids_BS: Tensor) -> np.ndarray:
        """Raw ids (-1: no token) to canonical ids on the CPU; TokenIdError for an id outside the vocabulary."""
        ids = ids_BS.detach().to("cpu", torch.int64).numpy()
        canonical = self.token_map.canonical_of(ids)
        if len(self._dead):
            canonical[np.isin(ids, self._dead)] = -1
        return canonical

    def addresses(self, window: Window) -> list[Tensor]:
        """int64 [B, T, C] for every slot, for the window's chunk.

        On the CPU where the rows lie there, from one copy of the ids for all such slots: a copy of addresses would be
        columns times as long, and one a slot. Otherwise on the device of the ids.
        """
        found = self._own_addresses(window)
        if self.intervention is None:
            return found
        return [self.intervention.addresses(slot, one) for slot, one in zip(self.slots, found, strict=True)]

    def _own_addresses(self, window: Window) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return [self._address_on_device(slot, window) for slot in self.slots]
        near = [_ids_on_cpu(window) or _rows_on_cpu(slot.table) for slot in self.slots]
        if not any(near):
            return [self._address_on_device(slot, window) for slot in self.slots]
        on_cpu = _window_on_cpu(window)
        canonical_BS = self.canonical(on_cpu.ids_BS)
        return [
            self._address_on_cpu(slot, on_cpu, canonical_BS)
            if here
            else self._address_on_device(slot, window)
            for slot, here in zip(self.slots, near, strict=True)
        ]

    def _address_on_cpu(self, slot: MemoryLayer, window: Window, canonical_BS: np.ndarray) -> Tensor:
        scheme = slot.scheme
        if window.take_BT is not None:
            return window.chunk_of(torch.from_numpy(scheme.addresses(canonical_BS)))
        n_past = canonical_BS.shape[1] - window.n_chunk
        return torch.from_numpy(
            scheme.addresses(
                canonical_BS[:, n_past:],
                previous_BP=canonical_BS[:, max(0, n_past - scheme.max_order + 1) : n_past],
                starts_BT=None if window.starts_BT is None else window.starts_BT.numpy(),
            )
        )

    def _address_on_device(self, slot: MemoryLayer, window: Window) -> Tensor:
        # documents are packed without a cache alone, so starts and window have one length
        address_BSC = slot.on_device(slot.canonical_of_raw[window.ids_BS], starts_BT=window.starts_BT)
        return window.chunk_of(address_BSC)


def _ids_on_cpu(window: Window) -> bool:
    return window.ids_BS.device.type == "cpu"


def _rows_on_cpu(table: Any) -> bool:
    """Whether a table is read on the CPU."""
    return torch.device(table.device).type == "cpu"


def _window_on_cpu(window: Window) -> Window:
    """What addresses need of a window, on the CPU. Waits for the device; copies nothing that is there already."""
    on_cpu = Window(window.ids_BS.cpu(), window.n_chunk, state=None)
    on_cpu.take_BT = None if window.take_BT is None else window.take_BT.cpu()
    on_cpu.starts_BT = None if window.starts_BT is None else window.starts_BT.cpu()
    return on_cpu


class MemoryCall:
    """What one forward needs at the layers of a memory: addresses and reads that are on their way, by block.

    sink: where layers put what they did, or None.
    """

    def __init__(self, memory: Memory, window: Window, *, sink: list[LayerTrace] | None = None) -> None:
        self.memory, self.window, self.sink = memory, window, sink
        self.addresses: dict[int, Tensor] = {}
        self.tickets: dict[int, Ticket | None] = {}
        for slot, address_BTC in zip(memory.slots, memory.addresses(window), strict=True):
            self.addresses[slot.block] = address_BTC
            # ids are all it takes: rows that lie far away are on their way before the first block runs
            ahead = slot.table.fetches_ahead and not torch.compiler.is_compiling()
            self.tickets[slot.block] = slot.table.prefetch(address_BTC) if ahead else None
