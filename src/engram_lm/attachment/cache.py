"""Memory's decoding state as one more layer of a transformers model's own cache.

Every operation of a transformers cache (reorder, crop, repeat, select, reset, deepcopy) loops over `cache.layers`, so a
state that is one of those layers follows wherever the keys and values go.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, StaticCache

from engram_lm.errors import StateError
from engram_lm.nn import MemoryState


class CachedMemoryState(MemoryState, DummyLayer):
    """A memory state among the layers of a cache."""

    def __init__(self, *, keep: int, fixed: bool, memories: tuple[str, ...] = ()) -> None:
        DummyLayer.__init__(self)
        MemoryState.__init__(self, keep=keep, fixed=fixed, memories=memories)


def state_of(cache: Cache, *, n_layers: int, keep: int, memories: tuple[str, ...] = ()) -> CachedMemoryState:
    """The memory state of `cache`, appended on first use. StateError when its prefix was computed without the memories."""
    found = find_state(cache)
    if found is None:
        if not torch.compiler.is_compiling() and int(cache.get_seq_length()) > 0:
            raise StateError(
                "This cache was filled without the memory, so the state of its prefix is missing. Start from an empty cache."
            )
        # a lazily grown DynamicCache() would otherwise take our layer for the model's first
        while cache.layer_class_to_replicate is not None and len(cache.layers) < n_layers:
            cache.layers.append(cache.layer_class_to_replicate())
        found = CachedMemoryState(keep=keep, fixed=isinstance(cache, StaticCache), memories=memories)
        cache.layers.append(found)
    if not torch.compiler.is_compiling() and int(found.seen) != int(cache.get_seq_length()):
        raise StateError(
            f"The cache holds {int(cache.get_seq_length())} tokens but its memory state {int(found.seen)}: some of them were "
            "computed with the memory off, or by another model. Start from an empty cache."
        )
    if found.cropped and not cache.is_croppable:
        raise StateError(
            "This cache was cropped, but it holds recurrent states of the model's linear-attention layers, which cannot be "
            "taken back. Start from an empty cache, or from a copy made before."
        )
    if found.memories != memories:
        if torch.compiler.is_compiling() or int(found.seen):
            raise StateError(
                f"The cache was filled with memories {', '.join(found.memories)}; this forward runs {', '.join(memories)}. "
                "Start from an empty cache."
            )
        # nothing is remembered yet: begin again for the memories that run now
        fresh = CachedMemoryState(keep=keep, fixed=found.fixed, memories=memories)
        cache.layers[cache.layers.index(found)] = fresh
        return fresh
    return found


def find_state(cache: Any) -> CachedMemoryState | None:
    for layer in reversed(getattr(cache, "layers", ())):
        if isinstance(layer, CachedMemoryState):
            return layer
    return None
