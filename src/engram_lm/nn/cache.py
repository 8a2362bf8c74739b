"""Decoding state of memory: the ids and conv inputs that came before, and the window of them that one forward sees.

A state holds, for every past token, the raw token id and, for every memory layer with a short conv, the normalised gated
value that the conv reads.

A *window* is what one forward sees: the tail of the past, then the new tokens. Padding is not a token: it is skipped, as
attention skips it, wherever it stands (left, right, or in the middle once a right-padded prompt goes on). Where padding
stands between tokens, the window is put in order first (padding to the front, tokens in their order) and the results are
put back. ABSENT (-1) marks a place without a token.

    window = Window.begin(ids_BT, real_BT, state=state, keep=12)
    u_BTC -> window.with_past(key, u_BTC, length) -> conv over time -> window.chunk_of(...)

Growing history (dynamic caches) makes any crop exact; a static cache gets a tail of fixed length, updated in place, so
that compiled graphs and CUDA graphs see the same memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from engram_lm.errors import StateError

ABSENT = -1


class MemoryState:
    """Past ids [B, N] and conv inputs {key: [B, N, C]}; N grows, or is `keep` for static caches."""

    def __init__(self, *, keep: int, fixed: bool, memories: tuple[str, ...] = ()) -> None:
        self.keep, self.fixed = keep, fixed
        # names of the memories that computed the prefix
        self.memories = memories
        self.is_croppable = not fixed
        self.ids: Tensor | None = None
        self.conv_inputs: dict[Any, Tensor] = {}
        # tokens seen so far, to be compared with the cache's own length; padding counts, as it does there. A tensor once
        # a fixed state is in use: as a number it would be part of a compiled graph, which is then compiled again
        self.seen: int | Tensor = 0
        self.cropped = False

    def begin_ids(self, ids_BT: Tensor) -> Tensor:
        """Past ids [B, n] (n <= keep, ABSENT where a row has fewer), before remembering the chunk."""
        if self.fixed:
            if self.ids is None:
                self.ids = ids_BT.new_full((ids_BT.shape[0], self.keep), ABSENT)
                self.seen = torch.zeros((), dtype=torch.int64, device=ids_BT.device)
                _mark_static(self.ids)
                _mark_static(self.seen)
            return self.ids.clone()
        past = ids_BT.new_empty((ids_BT.shape[0], 0)) if self.ids is None else self.ids
        if past.shape[0] != ids_BT.shape[0]:
            raise StateError(
                f"The cache holds memory state for {past.shape[0]} sequences; this forward has {ids_BT.shape[0]}."
            )
        return past

    def _map(self, change: Any) -> None:
        if self.ids is not None:
            self.ids = change(self.ids)
        self.conv_inputs = {key: change(value) for key, value in self.conv_inputs.items()}

    # ---- rows and tokens that move: the operations of a transformers cache ----------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.fixed:
            for tensor in self._tensors():
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        else:
            self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"Calling `crop` with a positive value (`{tokens_to_remove}`) is not supported. Use a negative count."
            )
        if tokens_to_remove == 0 or self.ids is None:
            return
        if self.fixed:
            raise StateError("The memory state of a static cache has a fixed length and cannot be cropped.")
        self._map(lambda x: x[:, :tokens_to_remove])
        self.seen = max(0, self.seen + tokens_to_remove)
        self.cropped = True

    def reset(self) -> None:
        if self.fixed:
            if self.ids is not None:
                self.ids.fill_(ABSENT)
                self.seen.zero_()
            for tensor in self.conv_inputs.values():
                tensor.zero_()
        else:
            self.seen, self.cropped = 0, False
            self.ids = None
            self.conv_inputs = {}

    # ---- sequences that join a batch and leave it ---------------------------------------------------------------------

    @classmethod
    def join(cls, states: Sequence["MemoryState"], pads: Sequence[int]) -> "MemoryState":
        """One growing state of the sequences of several; pads: places without a token put before each state's."""
        first = states[0]
        made = cls(keep=first.keep, fixed=False, memories=first.memories)
        if first.ids is not None:
            made.ids = torch.cat(
                [pad(state.ids, (n, 0), value=ABSENT) for state, n in zip(states, pads, strict=True)]
            )
            made.conv_inputs = {
                key: torch.cat(
                    [pad(state.conv_inputs[key], (0, 0, n, 0)) for state, n in zip(states, pads, strict=True)]
                )
                for key in first.conv_inputs
            }
        made.seen = int(first.seen) + pads[0]
        return made

    def take(self, rows: list[int], cut: int = 0) -> "MemoryState":
        """A growing state of some of its sequences, without the first `cut` places."""
        made = type(self)(keep=self.keep, fixed=False, memories=self.memories)
        if self.ids is not None:
            made.ids = self.ids[rows, cut:]
            made.conv_inputs = {key: value[rows, cut:] for key, value in self.conv_inputs.items()}
        made.seen = int(self.seen) - cut
        return made

    def _tensors(self) -> list[Tensor]:
        return ([] if self.ids is None else [self.ids]) + list(self.conv_inputs.values())

    @property
    def batch_size(self) -> int | None:
        return None if self.ids is None else self.ids.shape[0]


class Window:
    """What one forward sees of the token sequence: the tail of the past and the new chunk, in order."""

    def __init__(self, ids_BS: Tensor, n_chunk: int, *, state: MemoryState | None) -> None:
        self.ids_BS = ids_BS
        self.n_chunk = n_chunk
        self.state = state
        # None: the chunk is the last n_chunk places. Otherwise: order_BS sorts raw places, take_BT finds the chunk.
        self.order_BS: Tensor | None = None
        self.take_BT: Tensor | None = None
        # first token of a document, for packed documents without a cache; [B, T] or None
        self.starts_BT: Tensor | None = None
        # False where the chunk has padding; [B, T] or None when every place is a token
        self.real_BT: Tensor | None = None
        # growing histories: index [B, n] of the past tokens in the tail (-1: none), or None when it is the last n places
        self.tail_BN: Tensor | None = None

    @classmethod
    def begin(
        cls,
        ids_BT: Tensor,
        real_BT: Tensor | None,
        *,
        starts_BT: Tensor | None = None,
        state: MemoryState | None = None,
        keep: int = 0,
    ) -> "Window":
        """Start a forward and remember its ids in `state`.

        ids int64 [B, T]; real bool [B, T] or None; starts bool [B, T] or None; keep: how many past tokens are needed.
        """
        if real_BT is not None:
            ids_BT = torch.where(real_BT, ids_BT, ABSENT)
        n_chunk = ids_BT.shape[1]
        tail_BN = None
        if state is None:
            window_BS = ids_BT
        else:
            past_BN = state.begin_ids(ids_BT)
            tail_ids_BN = past_BN
            if not state.fixed:
                tail_ids_BN, tail_BN = _tail(past_BN, keep)
                state.ids = torch.cat([past_BN, ids_BT], 1)
            window_BS = torch.cat([tail_ids_BN, ids_BT], 1)
        self = cls(window_BS, n_chunk, state=state)
        self.real_BT, self.starts_BT, self.tail_BN = real_BT, starts_BT, tail_BN
        if real_BT is not None:
            self._put_in_order()
        if state is not None and state.fixed:
            state.ids.copy_(self.ids_BS[:, -state.keep :])
        if state is not None:
            state.seen += n_chunk
        return self

    def _put_in_order(self) -> None:
        real_BS = self.ids_BS != ABSENT
        if not torch.compiler.is_compiling():
            # left padding alone needs no ordering
            if not bool((real_BS[:, :-1] & ~real_BS[:, 1:]).any()):
                return
        self.order_BS = torch.argsort(real_BS.to(torch.int8), dim=1, stable=True)
        place_BS = torch.argsort(self.order_BS, dim=1)
        self.ids_BS = self.ids_BS.gather(1, self.order_BS)
        self.take_BT = place_BS[:, -self.n_chunk :]

    # ---- results for the chunk ----------------------------------------------------------------------------------

    def chunk_of(self, window_BSX: Tensor) -> Tensor:
        """The chunk's places of a result over the whole window [B, S, ...]."""
        if self.take_BT is None:
            return window_BSX[:, -self.n_chunk :]
        index = self.take_BT.view(*self.take_BT.shape, *[1] * (window_BSX.dim() - 2))
        return window_BSX.gather(1, index.expand(*self.take_BT.shape, *window_BSX.shape[2:]))

    def with_past(self, key: Any, new_BTC: Tensor, length: int) -> Tensor:
        """[B, length + S', C]: at least `length` places before the first token of the chunk (zero where there is none),
        then the chunk, in window order. Remembers `new` under `key`.

        The last S' places are the window's; use `chunk_of` on a result of that length.
        """
        state, past_BNC = self.state, None
        if state is not None:
            past_BNC = state.conv_inputs.get(key)
            if past_BNC is None:
                n_past = state.keep if state.fixed else self.state.ids.shape[1] - self.n_chunk
                past_BNC = new_BTC.new_zeros((new_BTC.shape[0], n_past, new_BTC.shape[2]))
                if state.fixed:
                    _mark_static(past_BNC)
                    state.conv_inputs[key] = past_BNC
            if state.fixed:
                tail_BNC = past_BNC.clone()
            else:
                state.conv_inputs[key] = torch.cat([past_BNC, new_BTC], 1)
                tail_BNC = _take_tail(past_BNC, self.tail_BN, self.ids_BS.shape[1] - self.n_chunk)
            window_BSC = torch.cat([tail_BNC, new_BTC], 1)
        else:
            window_BSC = new_BTC
        if self.order_BS is not None:
            index = self.order_BS[:, :, None].expand(-1, -1, window_BSC.shape[2])
            window_BSC = window_BSC.gather(1, index)
        if state is not None and state.fixed:
            state.conv_inputs[key].copy_(window_BSC[:, -state.keep :])
        if self.order_BS is None:
            window_BSC = window_BSC[:, max(0, window_BSC.shape[1] - self.n_chunk - length) :]
            missing = length + self.n_chunk - window_BSC.shape[1]
        else:
            missing = length
        if missing > 0:
            window_BSC = pad(window_BSC, (0, 0, missing, 0))
        return window_BSC


def _tail(past_BN: Tensor, keep: int) -> tuple[Tensor, Tensor | None]:
    """The last `keep` tokens of each row of a raw history, and where they stand (None: simply the last places)."""
    tail_BN = past_BN[:, max(0, past_BN.shape[1] - keep) :]
    if tail_BN.shape[1] == 0 or keep == 0:
        return tail_BN, None
    if not torch.compiler.is_compiling() and not bool((tail_BN == ABSENT).any()):
        return tail_BN, None
    place_N = torch.arange(past_BN.shape[1], device=past_BN.device)
    place_BN = torch.where(past_BN != ABSENT, place_N, -1)
    index_BN = place_BN.topk(tail_BN.shape[1], dim=1, sorted=True).values.flip(1)
    taken_BN = past_BN.gather(1, index_BN.clamp_min(0))
    return torch.where(index_BN >= 0, taken_BN, ABSENT), index_BN


def _take_tail(past_BNC: Tensor, index_BN: Tensor | None, n_tail: int) -> Tensor:
    if index_BN is None:
        return past_BNC[:, past_BNC.shape[1] - n_tail :]
    index = index_BN.clamp_min(0)[:, :, None].expand(-1, -1, past_BNC.shape[2])
    return past_BNC.gather(1, index) * (index_BN >= 0)[:, :, None]


def _mark_static(tensor: Tensor) -> None:
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
