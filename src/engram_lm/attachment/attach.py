"""Putting memories on a model, taking them off, switching them, and watching them."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engram_lm.attachment.runtime import RUNTIME, MemoryRuntime, recording, runtime_of
from engram_lm.attachment.structure import find_decoder
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, ModelError
from engram_lm.identity import BaseRef, fingerprint_of
from engram_lm.memory.build import TableFactory, build_memory
from engram_lm.memory.controls import put_control
from engram_lm.memory.interventions import Intervention, stacked
from engram_lm.memory.memory import Memory
from engram_lm.memory.placement import put_table, require_fit
from engram_lm.tables import DeviceTable
from engram_lm.traces import LayerTrace
from engram_lm.vocab import TokenMap


def attach(
    model: nn.Module,
    tokenizer: Any,
    config: MemoryConfig,
    *,
    token_map: TokenMap | None = None,
    base: BaseRef | None = None,
    tables: TableFactory = DeviceTable,
) -> nn.Module:
    """Put a new memory into `model`, in place, and return it. New memory changes no output bit.

    With PEFT, call get_peft_model first: it freezes whatever it finds, and its save_pretrained writes the adapter alone.

    Args:
        model: a decoder-only transformers causal model.
        tokenizer: its fast tokenizer; decides which tokens share an address.
        config: see MemoryConfig. A second memory needs another `name`.
        token_map: reuse of one already built for this tokenizer.
        tables: what makes the table of each layer.
        base: what the model is, as `load_base` says it; default its config's name and the fingerprint of its weights.

    Raises: ModelError for a model that does not fit, ConfigError for a memory that cannot be.
    """
    decoder = find_decoder(model)
    if base is None and hasattr(model, "peft_config"):
        raise ModelError(
            "PEFT has renamed this model's weights, so the memory could not say what it belongs to. Give base=, the ref "
            "that load_base returned before get_peft_model."
        )
    existing = memories(model)
    if config.name in existing:
        raise ConfigError(
            f"The model already has a memory named {config.name!r}; choose another name or detach it first."
        )
    like = next((p for p in decoder.module.parameters() if p.is_floating_point()), None)
    memory = build_memory(config, decoder.shape, tokenizer, token_map=token_map, like=like, tables=tables)
    runtime = getattr(decoder.module, RUNTIME, None)
    if runtime is None:
        runtime = MemoryRuntime(decoder, base=base or _base_of(model), tokenizer=tokenizer, model=model)
        setattr(decoder.module, RUNTIME, runtime)
        decoder.module.engram = nn.ModuleDict()
        _remember_saving(model)
    decoder.module.engram[config.name] = memory.slots
    runtime.memories[config.name] = memory
    put_control(memory)
    for table in memory.tables:
        table.gradients.belong_to(decoder.module)
    memory.slots.train(model.training)
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one memory, or all of them; without memories the model is the object it was."""
    decoder = find_decoder(model)
    runtime = runtime_of(model)
    for found in [name] if name is not None else list(runtime.memories):
        if found not in runtime.memories:
            raise ConfigError(
                f"The model has no memory named {found!r}; it has {', '.join(runtime.memories) or 'none'}."
            )
        del runtime.memories[found]
        del decoder.module.engram[found]
    if not runtime.memories:
        runtime.remove()
        delattr(decoder.module, RUNTIME)
        del decoder.module.engram
        model.__dict__.pop("save_pretrained", None)
    return model


def memories(model: nn.Module) -> dict[str, Memory]:
    """The memories on a model by name; empty when there are none."""
    for module in model.modules():
        runtime = module.__dict__.get(RUNTIME)
        if runtime is not None:
            return dict(runtime.memories)
    return {}


@contextlib.contextmanager
def memory_off(model: nn.Module, *names: str) -> Iterator[None]:
    """Switch the named memories (default: all) off inside the block. For calls that take no extra keyword, as generate."""
    chosen = chosen_memories(model, names)
    before = [memory.enabled for memory in chosen]
    for memory in chosen:
        memory.enabled = False
    try:
        yield
    finally:
        for memory, enabled in zip(chosen, before, strict=True):
            memory.enabled = enabled


def chosen_memories(model: nn.Module, names: Sequence[str]) -> list[Memory]:
    """The memories of these names, all for none; ConfigError for a name that the model has not."""
    found = memories(model)
    unknown = set(names) - set(found)
    if unknown:
        raise ConfigError(f"The model has no memory named {sorted(unknown)[0]!r}.")
    return [memory for name, memory in found.items() if not names or name in names]


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[list[LayerTrace]]:
    """Record what every memory layer read and let in, forward by forward. Eager only."""
    with recording(runtime_of(model)) as records:
        yield records


def _base_of(model: nn.Module) -> BaseRef:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    kind = "local" if name and Path(name).is_dir() else "hub" if name else "scratch"
    return BaseRef(name=name or "unnamed", kind=kind, sha256=fingerprint_of(model))


def _remember_saving(model: nn.Module) -> None:
    """Trainer and users call model.save_pretrained: from now on that saves the memory too."""
    from engram_lm.attachment.saving import save_pretrained

    model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)


@contextlib.contextmanager
def reading(model: nn.Module, change: Intervention, *names: str) -> Iterator[None]:
    """Let the named memories (default: all) read through `change` inside the block, after what changes them already."""
    chosen = chosen_memories(model, names)
    before = [memory.intervention for memory in chosen]
    for memory in chosen:
        memory.intervention = stacked(memory.intervention, change)
    try:
        yield
    finally:
        for memory, was in zip(chosen, before, strict=True):
            memory.intervention = was


def use_table(model: nn.Module, block: int, table: Any, *, memory: str = "memory") -> nn.Module:
    """Let the memory before `block` read `table`. Other sizes, or a file of another identity, are refused.

    table: a ReadOnlyTable over a file, a DeviceTable, or anything that keeps `engram_lm.tables.Table`.
    """
    runtime = runtime_of(model)
    if memory not in runtime.memories:
        raise ConfigError(f"The model has no memory named {memory!r}; it has {', '.join(runtime.memories)}.")
    found: Memory = runtime.memories[memory]
    slot = next((slot for slot in found.slots if slot.block == block), None)
    if slot is None:
        raise ConfigError(
            f"{memory!r} has no table at block {block}; it has {[s.block for s in found.slots]}."
        )
    require_fit(slot, table, found.token_map)
    put_table(slot, table, model=model)
    return model
