"""What one memory layer did in a forward, as plain numbers (`engram_lm.traces`)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engram_lm.nn import LayerOutput, Window
from engram_lm.traces import LayerTrace

if TYPE_CHECKING:
    from engram_lm.memory.layer import MemoryLayer
    from engram_lm.memory.memory import Memory


def record(
    memory: "Memory",
    slot: "MemoryLayer",
    hidden: Tensor,
    address_BTC: Tensor,
    rows_BTCW: Tensor,
    output: LayerOutput,
    window: Window,
) -> LayerTrace:
    batch, n_tokens = address_BTC.shape[:2]
    ids_BT = window.chunk_of(window.ids_BS).cpu()
    streams = (batch, n_tokens, slot.branches, slot.hidden_size)
    size = output.delta.reshape(streams).float().norm(dim=-1)
    against = hidden.reshape(streams).float().norm(dim=-1).clamp_min(1e-12)
    seen_BS = _seen(window, slot)
    return LayerTrace(
        memory=memory.name,
        block=slot.block,
        orders=slot.scheme.profile.orders,
        heads=slot.scheme.profile.heads,
        token_ids=ids_BT.numpy(),
        canonical_ids=memory.canonical(ids_BT),
        ngrams=np.stack([np.minimum(seen_BS, order) for order in slot.scheme.profile.orders], -1),
        address=address_BTC.cpu().numpy(),
        gate=output.gate.detach().float().cpu().numpy(),
        row_norm=rows_BTCW.detach().float().norm(dim=-1).cpu().numpy(),
        value_norm=output.value_norm.detach().float().norm(dim=-1).cpu().numpy(),
        share=(size / against).detach().cpu().numpy(),
    )


def _seen(window: Window, slot: "MemoryLayer") -> np.ndarray:
    """How many tokens back-to-back end at each token of the chunk, up to the highest order: int64 [B, T]."""
    scheme = slot.scheme
    ids_BS = window.ids_BS.cpu()
    open_BS = (ids_BS >= 0).numpy()
    stop_BS = (
        np.isin(ids_BS.numpy(), scheme.eos_ids)
        if scheme.profile.id_space == "raw"
        else np.zeros_like(open_BS)
    )
    if window.starts_BT is not None:
        start_BS = window.starts_BT.cpu().numpy()
    else:
        start_BS = np.zeros_like(open_BS)
    seen_BS = np.zeros(open_BS.shape, dtype=np.int64)
    for s in range(open_BS.shape[1]):
        before = seen_BS[:, s - 1] * ~stop_BS[:, s - 1] if s else 0
        seen_BS[:, s] = np.where(open_BS[:, s], 1 + np.where(start_BS[:, s], 0, before), 0)
    seen_BS = np.minimum(seen_BS, scheme.max_order)
    return window.chunk_of(torch.from_numpy(seen_BS)).numpy()
