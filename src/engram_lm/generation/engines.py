"""What reads token ids and says what may come next. An engine is taken by what it can give.

    engine = TransformersEngine(model, tokenizer)
    require(engine, Gives.LOGITS, to="mix an index into its answers")
    forward = engine.read(ids_NT)
    forward.logits_NKV, forward.cache

Another engine is a class with these methods in a file of its own; where its sequences cannot share a batch, it says so by
`can_join`.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from engram_lm.attachment import memories, memory_off, trace
from engram_lm.errors import ConfigError
from engram_lm.generation import caches
from engram_lm.kvcache import cache_of, with_cache
from engram_lm.traces import LayerTrace


class Gives(enum.IntEnum):
    """What can be had from an engine, each with all before it."""

    TEXT = 0
    SOME_LOG_PROBABILITIES = 1  # of the likeliest tokens
    LOGITS = 2  # of every token
    HIDDEN_STATES = 3


@dataclass(frozen=True)
class Forward:
    """logits_NKV: float32 on the CPU, behind the last K of the ids that were read. records: what memory did, if watched."""

    logits_NKV: Tensor
    cache: Any
    records: Sequence[LayerTrace] = ()


class Engine(Protocol):
    """What a `Decoder` asks of a model that gives logits."""

    gives: Gives
    name: str
    longest: int | None  # most tokens of a sequence, where it is known
    ends: frozenset[int]  # tokens that end a text

    def read(
        self,
        ids_NT: Tensor,
        *,
        cache: Any = None,
        mask_NL: Tensor | None = None,
        last: int = 1,
        memory: str = "on",
        watch: bool = False,
    ) -> Forward:
        """Read int64 ids behind what the cache holds.

        mask_NL: bool, over the cache and the ids, where sequences are padded on the left. last: how many logits are wanted.
        memory: "on" or "off". watch: whether memory's records are wanted.
        """
        ...

    def can_join(self, cache: Any) -> bool: ...

    def join(self, caches: Sequence[Any], pads: Sequence[int]) -> Any: ...

    def take(self, cache: Any, rows: Sequence[int], *, cut: int = 0) -> Any: ...


class TransformersEngine:
    """A transformers model, with or without memory."""

    gives = Gives.HIDDEN_STATES
    can_join, join, take = staticmethod(caches.can_join), staticmethod(caches.join), staticmethod(caches.take)

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, type(model).__name__
        taken = inspect.signature(model.forward).parameters
        self._keeps, self._places = "logits_to_keep" in taken, "position_ids" in taken

    @cached_property
    def longest(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    @cached_property
    def ends(self) -> frozenset[int]:
        return frozenset(end_ids(self.model, self.tokenizer))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(
        self,
        ids_NT: Tensor,
        *,
        cache: Any = None,
        mask_NL: Tensor | None = None,
        last: int = 1,
        memory: str = "on",
        watch: bool = False,
    ) -> Forward:
        """See `Engine.read`."""
        options: dict[str, Any] = {"logits_to_keep": last} if self._keeps else {}
        if mask_NL is not None:
            options["attention_mask"] = mask_NL.to(self.device, torch.int64)
            if self._places:
                place_NL = (mask_NL.long().cumsum(1) - 1).clamp_min(0)
                options["position_ids"] = place_NL[:, -ids_NT.shape[1] :].to(self.device)
        watched = trace(self.model) if watch and memories(self.model) else contextlib.nullcontext(())
        with torch.no_grad(), watched as records, memory_switch(self.model, memory):
            output = self.model(
                ids_NT.to(self.device), use_cache=True, **with_cache(self.model, cache), **options
            )
        return Forward(output.logits[:, -last:].float().cpu(), cache_of(output), records)

    def begin_drafts(self, cache: Any) -> None:
        """Have the cache keep what it may have to give back. ConfigError where it cannot."""
        if not getattr(cache, "is_croppable", False):
            raise ConfigError(
                f"The cache of {self.name} holds states that cannot be taken back when a draft is "
                "rejected. Use drafts=0."
            )
        cache.activate_past_recording()


def require(engine: Engine, least: Gives, *, to: str) -> None:
    """ConfigError where an engine gives less than is needed `to` do something."""
    if engine.gives < least:
        raise ConfigError(
            f"{engine.name} gives {_SAID[engine.gives]} at most; {_SAID[least]} are needed to {to}."
        )


_SAID = {
    Gives.TEXT: "text",
    Gives.SOME_LOG_PROBABILITIES: "the log-probabilities of the likeliest tokens",
    Gives.LOGITS: "the logits of every token",
    Gives.HIDDEN_STATES: "hidden states",
}


def memory_switch(model: Any, memory: str) -> contextlib.AbstractContextManager:
    """Without the model's tables while memory is "off"."""
    return memory_off(model) if memory == "off" else contextlib.nullcontext()


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    return (ends | {getattr(tokenizer, "eos_token_id", None)}) - {None}
