"""One memory layer: the Engram layer before one block, its table and its handle. Rows are in no state_dict."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.addressing import AddressScheme
from engram_lm.addressing.device import DeviceAddresses
from engram_lm.memory.controls import bias_of
from engram_lm.memory.record import record
from engram_lm.nn import EngramLayer, LayerOutput
from engram_lm.tables.gradients import require_trains
from engram_lm.vocab import TokenMap

if TYPE_CHECKING:
    from engram_lm.memory.memory import MemoryCall

# Torch's name for what `get_extra_state` returns.
RUN = "_extra_state"


class MemoryLayer(EngramLayer):
    """The Engram layer before one block, with the handle of its table.

    `layer(hidden, call)` looks up, applies what intervenes, and returns what is to be added to the hidden states. It knows no
    hooks: any decoder may call it between its blocks (see `memory.memory.MemoryCall`).
    """

    def __init__(
        self,
        *,
        scheme: AddressScheme,
        table: Any,
        block: int,
        token_map: TokenMap,
        dead_token_ids: tuple[int, ...] = (),
        **layer: Any,
    ) -> None:
        super().__init__(**layer)
        self.scheme, self.table, self.block = scheme, table, block
        self.handle = table.gradients.handle
        # of a control that looks nothing up, float [M, D]
        self.register_parameter("bias", None)
        self._prepare(token_map, dead_token_ids)

    def forward(self, hidden: Tensor, call: "MemoryCall") -> LayerOutput:
        """hidden [B, T, D], [B, T, M, D] or [B, T, M*D], of the call's tokens; delta has its shape."""
        if self.bias is not None:
            return LayerOutput(bias_of(self, hidden), None, None)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            learning = torch.is_grad_enabled() and self.handle.requires_grad
            self.table.gradients.check(self.handle, training=learning)
            if learning and self.training:
                require_trains(self.handle)
        address_BTC, memory = call.addresses[self.block], call.memory
        rows_BTCW = self.table.read(address_BTC, self.handle, call.tickets[self.block])
        rows_BTCW = on_device(rows_BTCW, hidden.device)
        if memory.intervention is not None:
            rows_BTCW = memory.intervention.rows(self, address_BTC, rows_BTCW, call)
        output = super().forward(hidden, rows_BTCW.flatten(2), call.window, key=(memory.name, self.block))
        if call.sink is not None and not compiling:
            call.sink.append(record(memory, self, hidden, address_BTC, rows_BTCW, output, call.window))
        return output

    def _prepare(self, token_map: Any, dead_token_ids: tuple[int, ...] = ()) -> None:
        """The token map and the scheme's constants on the layer's device, for compiled graphs and accelerators.

        Plain attributes, remade when the layer moves: buffers would be broadcast by DDP and cast by checkpoints.
        """
        device = self.key_norm.device
        if device.type == "meta":
            return
        canonical = np.append(token_map.canonical, -1)  # index -1, no token, stays DEAD
        canonical[list(dead_token_ids)] = -1
        self.canonical_of_raw = torch.from_numpy(canonical).to(device)
        self.on_device = DeviceAddresses(self.scheme, device=device)

    def _apply(self, *args: Any, **kwargs: Any) -> "MemoryLayer":
        super()._apply(*args, **kwargs)
        device = self.key_norm.device
        if device.type != "meta" and device != self.canonical_of_raw.device:
            self.canonical_of_raw = self.canonical_of_raw.to(device)
            self.on_device = self.on_device.to(device)
        return self

    def get_extra_state(self) -> Tensor:
        """The number of the training run that the rows come from: in a state_dict it stands beside the handle's count."""
        return torch.tensor([self.table.gradients.run])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing here: it is the rows' number that counts, and `_load_from_state_dict` has the two compared."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """A state_dict brings weights, never rows: the next forward compares their counts of updates and their runs."""
        if prefix + "handle" in state_dict:
            self.table.gradients.weights_were_loaded(state_dict.get(prefix + RUN))
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        if prefix + RUN in missing:  # of weights that were saved before there was such a number
            missing.remove(prefix + RUN)

    def extra_repr(self) -> str:
        return f"block={self.block}, rows={self.table.n_rows}x{self.table.width}"


def on_device(rows_BTCW: Tensor, device: torch.device) -> Tensor:
    """Rows where the hidden states are. From pinned memory the CPU does not wait for the copy.

    Safe, because nobody writes to the rows again, and torch gives pinned memory away only when copies from it are done.
    """
    if torch.compiler.is_compiling() or rows_BTCW.device == device:
        return rows_BTCW.to(device)
    return rows_BTCW.to(device, non_blocking=rows_BTCW.is_pinned())
