"""Reading a decoder's arguments: which places are tokens, where documents start, and what the base itself gets wrong.

Whatever way of running the bare model answers right, memory must answer right; where the bare model mixes documents or
counts padding as text, memory refuses, so that nobody trains or measures on a wrong number.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from engram_lm.attachment.structure import Decoder
from engram_lm.errors import ModelError, StateError


def token_ids(given: dict, given_ids: Tensor | None) -> Tensor:
    ids = given.get("input_ids")
    if given_ids is not None:
        if ids is not None:
            raise ModelError("memory_ids goes with inputs_embeds; input_ids are the ids already.")
        ids = given_ids
    if ids is None:
        raise ModelError(
            "Memory is addressed by token ids, and this call has inputs_embeds without ids. Pass input_ids, add "
            'memory_ids=ids of the same length, or call with memory="off".'
        )
    embeds = given.get("inputs_embeds")
    if embeds is not None and embeds.shape[:2] != ids.shape:
        raise ModelError(
            f"memory_ids has shape {tuple(ids.shape)}; inputs_embeds has {tuple(embeds.shape[:2])} tokens."
        )
    return ids


def real_places(mask: Any, ids_BT: Tensor, past: Any) -> Tensor | None:
    """True where a place of the chunk is a token: bool [B, T]; None when all are."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.dim() not in (2, 4):
        raise ModelError(f"attention_mask has {mask.dim()} dimensions; memory reads padding from 2 or 4.")
    n_chunk = ids_BT.shape[1]
    # The column of the chunk's first place: masks may be longer than the sequence (static caches), and those of sliding
    # windows shorter, ending with the chunk. `past` is a tensor on static caches.
    last = mask.shape[-1] - n_chunk
    first = min(past, last) if isinstance(past, int) else past.to(mask.device).clamp(max=last)
    own_T = torch.arange(n_chunk, device=mask.device) + first
    if mask.dim() == 2:
        real_BT = mask.index_select(1, own_T).bool()
    else:
        # a query that may not see its own place is padding
        index = own_T[None, :, None].expand(mask.shape[0], -1, 1)
        own_BT = mask[:, 0].gather(2, index)[..., 0]
        real_BT = own_BT if own_BT.dtype == torch.bool else own_BT == 0
        if not torch.compiler.is_compiling():
            _refuse_hidden_neighbours(mask, own_T, real_BT)
    real_BT = real_BT.to(ids_BT.device).expand(ids_BT.shape)
    if not torch.compiler.is_compiling() and bool(real_BT.all()):
        return None
    return real_BT


def _refuse_hidden_neighbours(mask_BHTK: Tensor, own_T: Tensor, real_BT: Tensor) -> None:
    """Documents kept apart by a mask (or a tree of guesses) would share n-grams: only causal masks with padding are read."""
    if own_T.shape[0] < 2:
        return
    index = own_T[None, :-1, None].expand(mask_BHTK.shape[0], -1, 1)
    seen_BT = mask_BHTK[:, 0, 1:].gather(2, index)[..., 0]
    seen_BT = seen_BT if seen_BT.dtype == torch.bool else seen_BT == 0
    if bool((real_BT[:, 1:] & real_BT[:, :-1] & ~seen_BT).any()):
        raise StateError(
            "The 4-D attention_mask hides the token before a token. Memory reads padding from such masks, not documents: "
            "pack documents by position_ids that restart, without attention_mask and with use_cache=False."
        )


def refuse_paged(given: dict) -> None:
    # a paged cache is no Cache of transformers', whichever name that has
    paged = given.get("cache") is not None and not isinstance(given["cache"], Cache)
    if paged or given.get("block_table") is not None:
        raise StateError(
            "Continuous batching (generate_batch) keeps its state in a paged cache that memory is no part of. Use generate, "
            "or switch the memory off."
        )


def document_starts(
    kwargs: dict, ids_BT: Tensor, real_BT: Tensor | None, *, use_cache: bool
) -> Tensor | None:
    """True at the first token of each packed document, from positions that restart: bool [B, T] or None.

    transformers keeps documents apart when there is neither a mask nor a cache. Where positions restart and it does not,
    its answer mixes documents, and this raises.
    """
    position_ids = kwargs.get("position_ids")
    if position_ids is None or ids_BT.shape[1] < 2:
        return None
    if position_ids.dim() == 3:
        position_ids = position_ids[0]
    position_BT = position_ids.expand(ids_BT.shape)
    isolated = kwargs.get("attention_mask") is None and not use_cache
    if isolated:
        jump_BT = position_BT[:, 1:] != position_BT[:, :-1] + 1
        if not torch.compiler.is_compiling() and not bool(jump_BT.any()):
            return None
        return torch.cat([torch.ones_like(jump_BT[:, :1]), jump_BT], 1)
    if torch.compiler.is_compiling():
        return None
    restart_BT = (position_BT[:, 1:] == 0) & (position_BT[:, :-1] >= 0)
    if real_BT is not None:
        restart_BT = restart_BT & real_BT[:, 1:] & real_BT[:, :-1]
    if bool(restart_BT.any()):
        raise StateError(
            "position_ids restart inside a sequence (packed documents), but transformers keeps documents apart only without "
            "attention_mask and with use_cache=False. Pass both that way."
        )
    return None


class SequenceTraits:
    """What the base itself does not keep apart: where its own answer would be wrong, memory refuses to add to it."""

    def __init__(self, *, recurrent: bool, sliding_window: int | None) -> None:
        self.recurrent, self.sliding_window = recurrent, sliding_window

    @classmethod
    def of(cls, decoder: Decoder) -> "SequenceTraits":
        layers = DynamicCache(config=decoder.module.config).layers
        windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        return cls(recurrent=recurrent, sliding_window=min(windows, default=None))

    def check(self, given: dict, starts_BT: Tensor | None, *, past: int, n_chunk: int) -> None:
        """StateError for packed documents or padding between tokens where this base gets them wrong. Eager only."""
        aware = any(given.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q"))
        if self.recurrent and starts_BT is not None and not aware:
            raise StateError(
                "position_ids restart (packed documents), but this model has recurrent or convolutional layers, which run "
                "across documents. Run the documents as rows of a padded batch."
            )
        total = past + n_chunk
        slides = self.sliding_window is not None and total > self.sliding_window
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not (self.recurrent or slides):
            return
        if self.recurrent and mask.shape[1] > total:
            raise StateError(
                f"attention_mask covers {mask.shape[1]} places, the sequence has {total}. Recurrent and convolutional "
                "layers would read the wrong part of it: cut the mask to the sequence."
            )
        if past and bool((mask[:, : total - 1].bool() & ~mask[:, 1:total].bool()).any()):
            kind = "recurrent or convolutional layers" if self.recurrent else "a sliding window"
            raise StateError(
                f"There is padding between tokens (a right-padded prompt that goes on), which {kind} of this model count as "
                "text. Pad on the left."
            )
