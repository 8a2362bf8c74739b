"""One forward of a model with memory: from the ids the decoder was called with to what each block's slot adds.

    decoder(input_ids, attention_mask, position_ids, cache)
      before the decoder:  mask, documents, decoding state -> Window -> addresses of every slot of every memory
      before each block:   rows, gate, conv -> hidden + delta
      after the decoder:   a cache that the decoder made for itself gets its memory state

The call travels as a keyword argument from the decoder to its blocks, so that nothing of one forward is kept where
another could find it; to decoders that pass nothing on (Falcon, Bloom, GPT-J) as a context variable, which belongs to one
thread. Hooks are bound methods of objects, so that a deep copy of the model is a working copy.
"""

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from engram_lm.attachment.arguments import (
    SequenceTraits,
    document_starts,
    real_places,
    refuse_paged,
    token_ids,
)
from engram_lm.attachment.cache import CachedMemoryState, find_state, state_of
from engram_lm.attachment.structure import Decoder
from engram_lm.errors import ConfigError, ModelError, StateError
from engram_lm.identity import BaseRef
from engram_lm.kvcache import cache_in
from engram_lm.memory.memory import Memory, MemoryCall
from engram_lm.nn import Window
from engram_lm.traces import LayerTrace

CALL = "engram_call"  # the keyword that carries a ModelCall to the blocks


class ModelCall:
    """What one forward of the decoder needs at its blocks."""

    def __init__(self, window: Window, active: list[Memory], sink: list[LayerTrace] | None) -> None:
        self.window = window
        self.memories = [MemoryCall(memory, window, sink=sink) for memory in active]


# The runtime and call of the decoder that runs in this thread; read only by blocks that got no keyword.
_NOW: ContextVar[tuple[Any, ModelCall | None] | None] = ContextVar("engram_call", default=None)

# `memory` and `memory_ids` as the whole model was called with them: some models do not hand them to their decoder.
_ASKED: ContextVar[dict[str, Any] | None] = ContextVar("engram_asked", default=None)


class MemoryRuntime:
    """The memories of one model and the hooks that run them."""

    def __init__(self, decoder: Decoder, *, base: BaseRef, tokenizer: Any, model: nn.Module) -> None:
        self.base, self.tokenizer = base, tokenizer
        self.decoder_class = type(decoder.module).__name__
        self.n_blocks = len(decoder.blocks)
        self.decoder_config = decoder.module.config
        self.argument_names = tuple(inspect.signature(decoder.module.forward).parameters)
        self.sequence = SequenceTraits.of(decoder)
        self.memories: dict[str, Memory] = {}
        self.sink: list[LayerTrace] | None = None
        self.handles: list[Any] = [
            decoder.module.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.module.register_forward_hook(self.after_decoder, with_kwargs=True, always_call=True),
        ]
        if model is not decoder.module:
            self.handles += [
                model.register_forward_pre_hook(self.before_model, with_kwargs=True),
                model.register_forward_hook(self.after_model, always_call=True),
            ]
        for index, block in enumerate(decoder.blocks):
            hook = _BlockHook(self, index)
            self.handles.append(block.register_forward_pre_hook(hook.before_block, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    # ---- around the whole model ----------------------------------------------------------------------------------

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.compiler.is_compiling():
            _ASKED.set({name: kwargs[name] for name in ("memory", "memory_ids") if name in kwargs})

    def after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            _ASKED.set(None)

    # ---- before the decoder -------------------------------------------------------------------------------------

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        asked = None if torch.compiler.is_compiling() else _ASKED.get()
        asked = {**(asked or {}), **kwargs}
        switch, given_ids = asked.get("memory", "on"), asked.get("memory_ids")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("memory", "memory_ids")}
        if switch not in ("on", "off"):
            raise ConfigError(f'memory is "on" or "off"; got {switch!r}.')
        active = [memory for memory in self.memories.values() if memory.enabled]
        call = None
        if switch == "on" and active:
            call = self.begin_call(module, self._given(args, kwargs), given_ids, active)
        if not torch.compiler.is_compiling():
            _NOW.set((self, call))
        return args, {**kwargs, CALL: call}

    def begin_call(
        self, module: nn.Module, given: dict, given_ids: Tensor | None, active: list[Memory]
    ) -> ModelCall:
        """Window and addresses of a decoder call with the arguments `given` by name."""
        ids_BT = token_ids(given, given_ids)
        refuse_paged(given)
        cache = cache_in(given)
        if isinstance(cache, EncoderDecoderCache) or (cache is not None and not isinstance(cache, Cache)):
            raise StateError(f"Memory keeps its state in a transformers Cache; got {type(cache).__name__}.")
        use_cache = given.get("use_cache")
        if use_cache is None:
            # read now: Trainer and gradient checkpointing change it after attach
            use_cache = getattr(self.decoder_config, "use_cache", False)
        if getattr(module, "gradient_checkpointing", False) and module.training:
            use_cache = False  # as the decoder will
        keep = max(memory.keep for memory in active)
        past = 0 if cache is None else cache.get_seq_length()
        real_BT = real_places(given.get("attention_mask"), ids_BT, past)
        starts_BT = document_starts(given, ids_BT, real_BT, use_cache=bool(use_cache) or cache is not None)
        if not torch.compiler.is_compiling():
            self.sequence.check(given, starts_BT, past=int(past), n_chunk=ids_BT.shape[1])
        state = None
        names = tuple(memory.name for memory in active)
        if cache is not None:
            state = state_of(cache, n_layers=self.n_blocks, keep=keep, memories=names)
        elif use_cache:
            # the decoder is about to make a cache of its own kind; `after_decoder` puts this state into it
            state = CachedMemoryState(keep=keep, fixed=False, memories=names)
        window = Window.begin(ids_BT, real_BT, starts_BT=starts_BT, state=state, keep=keep)
        return ModelCall(window, active, self.sink)

    def _given(self, args: tuple, kwargs: dict) -> dict:
        """The decoder's arguments by name, however they were passed."""
        return {**dict(zip(self.argument_names, args, strict=False)), **kwargs}

    def after_decoder(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            _NOW.set(None)
        call = kwargs.get(CALL)
        if call is None or call.window.state is None or output is None:
            return output
        if cache_in(self._given(args, kwargs)) is not None:
            return output
        values = output if isinstance(output, tuple) else output.values()
        for value in values:
            if isinstance(value, Cache) and find_state(value) is None:
                value.layers.append(call.window.state)
        return output

    # ---- before a block -----------------------------------------------------------------------------------------

    def add_to(self, hidden: Tensor, call: ModelCall, block: int) -> Tensor:
        """hidden plus what every memory at this block adds."""
        for each in call.memories:
            for slot in each.memory.slots:
                if slot.block == block:
                    hidden = hidden + slot(hidden, each).delta
        return hidden


class _BlockHook:
    """The pre-hook of one block. An object, so that deep copies of the model carry copies of it."""

    def __init__(self, runtime: MemoryRuntime, index: int) -> None:
        self.runtime, self.index = runtime, index

    def before_block(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        call = kwargs.pop(CALL) if CALL in kwargs else self._call_of_thread()
        if call is None:
            return args, kwargs
        if args:
            return (self.runtime.add_to(args[0], call, self.index), *args[1:]), kwargs
        kwargs["hidden_states"] = self.runtime.add_to(kwargs["hidden_states"], call, self.index)
        return args, kwargs

    def _call_of_thread(self) -> ModelCall | None:
        name = self.runtime.decoder_class
        if torch.compiler.is_compiling():
            raise ModelError(
                f"{name} passes no keyword arguments to its blocks, so memory in it cannot be compiled."
            )
        now = _NOW.get()
        if now is None or now[0] is not self.runtime:
            raise ModelError(
                f"A block of {name} ran outside its decoder's forward, so memory does not know the token ids."
            )
        return now[1]


@contextlib.contextmanager
def recording(runtime: MemoryRuntime) -> Iterator[list[LayerTrace]]:
    """Collect a LayerTrace of every slot of every forward inside the block."""
    before, runtime.sink = runtime.sink, []
    try:
        yield runtime.sink
    finally:
        runtime.sink = before


RUNTIME = "engram_runtime"  # the attribute of the decoder that holds it


def runtime_of(model: nn.Module) -> MemoryRuntime:
    """The runtime of a model with memory; ModelError for one without."""
    for module in model.modules():
        if RUNTIME in module.__dict__:
            return module.__dict__[RUNTIME]
    raise ModelError("The model has no memory; attach one first.")


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that a model's memory was attached with."""
    return runtime_of(model).tokenizer


def base_of(model: nn.Module) -> BaseRef:
    """Which base a model's memory was attached to."""
    return runtime_of(model).base
