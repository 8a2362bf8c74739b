"""Sequences that join a batch and leave it: transformers' caches put together and taken apart, memory's state with them.

    together = join([one, other], [0, 3])         # the second is 3 tokens shorter: padded on the left
    alone = take(together, [1], cut=3)            # its sequence again, without the padding

Both make new caches of new tensors; the old ones stay as they are. Padding stands on the left, so that the newest tokens of
all sequences stand in one place; the attention mask hides it. What is one state for the whole past (linear attention) has no
places to pad. A cache with other layers (static, quantised) is refused: its sequences are decoded one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from engram_lm.nn.cache import MemoryState

_KEYS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer)
_STATES = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


def can_join(cache: Any) -> bool:
    """Whether sequences of such a cache can share a batch."""
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return False
    return all(
        not layer.fixed if isinstance(layer, MemoryState) else type(layer) in {*_KEYS, *_STATES}
        for layer in layers
    )


def join(caches: Sequence[Any], pads: Sequence[int]) -> Any:
    """One cache of all sequences of several, in their order; pads: places put before each cache's sequences."""
    joined = copy.copy(caches[0])
    joined.layers = [
        _joined(layers, pads) for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
    return joined


def take(cache: Any, rows: Sequence[int], *, cut: int = 0) -> Any:
    """A cache of some sequences, without the first `cut` places, which hold their padding."""
    taken = copy.copy(cache)
    taken.layers = [_taken(layer, list(rows), cut) for layer in cache.layers]
    return taken


def _joined(layers: Sequence[Any], pads: Sequence[int]) -> Any:
    first = layers[0]
    if isinstance(first, MemoryState):
        return type(first).join(layers, pads)
    made = copy.copy(first)
    if type(first) in _KEYS and first.is_initialized:
        # a window's layer keeps its last places alone, so that padding may fall out of it
        longest = max(layer.keys.shape[-2] for layer in layers)
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            setattr(made, name, torch.cat([_padded(part, longest - part.shape[-2]) for part in parts]))
        if isinstance(first, DynamicSlidingWindowLayer):
            made.cumulative_length = max(
                layer.cumulative_length + n for layer, n in zip(layers, pads, strict=True)
            )
    if type(first) in _STATES:
        _map_states(made, lambda name, index: torch.cat([getattr(layer, name)[index] for layer in layers]))
    return made


def _taken(layer: Any, rows: list[int], cut: int) -> Any:
    if isinstance(layer, MemoryState):
        return layer.take(rows, cut)
    made = copy.copy(layer)
    if type(layer) in _KEYS and layer.is_initialized:
        is_window = isinstance(layer, DynamicSlidingWindowLayer)
        if is_window:
            made.cumulative_length = layer.cumulative_length - cut
            cut = max(0, layer.keys.shape[-2] - min(made.cumulative_length, layer.sliding_window - 1))
        for name in ("keys", "values"):
            setattr(made, name, getattr(layer, name)[rows, :, cut:].contiguous())
    if type(layer) in _STATES:
        _map_states(made, lambda name, index: getattr(layer, name)[index][rows])
    return made


def _padded(part: Tensor, n: int) -> Tensor:
    return pad(part, (0, 0, n, 0)) if n else part


def _map_states(layer: Any, change: Callable[[str, int], Tensor]) -> None:
    for name in ("conv_states", "recurrent_states"):
        is_there = getattr(layer, f"is_{name}_initialized")
        states = {index: change(name, index) if is_there[index] else None for index in getattr(layer, name)}
        setattr(layer, name, states)
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
        setattr(layer, name, dict(getattr(layer, name)))
