"""Memory in any decoder-only transformers model.

    model = attach(model, tokenizer, MemoryConfig(layers=(1, 5), rows_per_head=20_011, head_width=32))
    model(input_ids)                      # exactly the base model's answer while the memory is new
    model(input_ids, memory="off")        # the base model
    with memory_off(model): model.generate(...)
    with trace(model) as records: model(input_ids)
    with reading(model, NoiseRows(seed=0)): model(input_ids)    # other rows than its own, for a control
    detach(model)

Memory enters the residual stream before the named blocks. Rows live beside the model, not in it (see
`engram_lm.tables`); `save_memory` writes them, `from_pretrained` reads them back.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from engram_lm.attachment.controls import put_control
from engram_lm.attachment.files import from_pretrained, load_memory, save_memory, save_pretrained
from engram_lm.attachment.memory import Memory, build_memory, profile_of
from engram_lm.attachment.placement import open_rows, use_table
from engram_lm.attachment.reading import Intervention, NoiseRows, OneRow, OtherRows, reading
from engram_lm.attachment.runtime import MemoryRuntime, recording
from engram_lm.attachment.structure import find_decoder
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, ModelError
from engram_lm.identity import BaseRef, fingerprint_of
from engram_lm.traces import LayerTrace
from engram_lm.vocab import TokenMap

_ATTRIBUTE = "engram_runtime"


def attach(
    model: nn.Module,
    tokenizer: Any,
    config: MemoryConfig,
    *,
    token_map: TokenMap | None = None,
    base: BaseRef | None = None,
) -> nn.Module:
    """Put a new memory into `model`, in place, and return it. New memory changes no output bit.

    With PEFT, call get_peft_model first: it freezes whatever it finds, and its save_pretrained writes the adapter alone.

    Args:
        model: a decoder-only transformers causal model.
        tokenizer: its fast tokenizer; decides which tokens share an address.
        config: see MemoryConfig. A second memory needs another `name`.
        token_map: reuse of one already built for this tokenizer.
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
    memory = build_memory(config, decoder, tokenizer, token_map=token_map, like=like)
    runtime = getattr(decoder.module, _ATTRIBUTE, None)
    if runtime is None:
        runtime = MemoryRuntime(decoder, base=base or _base_of(model), tokenizer=tokenizer, model=model)
        setattr(decoder.module, _ATTRIBUTE, runtime)
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
    runtime = _runtime(model)
    for found in [name] if name is not None else list(runtime.memories):
        if found not in runtime.memories:
            raise ConfigError(
                f"The model has no memory named {found!r}; it has {', '.join(runtime.memories) or 'none'}."
            )
        del runtime.memories[found]
        del decoder.module.engram[found]
    if not runtime.memories:
        runtime.remove()
        delattr(decoder.module, _ATTRIBUTE)
        del decoder.module.engram
        model.__dict__.pop("save_pretrained", None)
    return model


def memories(model: nn.Module) -> dict[str, Memory]:
    """The memories on a model by name; empty when there are none."""
    for module in model.modules():
        runtime = module.__dict__.get(_ATTRIBUTE)
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
    with recording(_runtime(model)) as records:
        yield records


def _runtime(model: nn.Module) -> MemoryRuntime:
    for module in model.modules():
        if _ATTRIBUTE in module.__dict__:
            return module.__dict__[_ATTRIBUTE]
    raise ModelError("The model has no memory; attach one first.")


def _base_of(model: nn.Module) -> BaseRef:
    name = str(getattr(model.config, "_name_or_path", "") or "")
    kind = "local" if name and Path(name).is_dir() else "hub" if name else "scratch"
    return BaseRef(name=name or "unnamed", kind=kind, sha256=fingerprint_of(model))


def _remember_saving(model: nn.Module) -> None:
    """Trainer and users call model.save_pretrained: from now on that saves the memory too."""
    model.__dict__["save_pretrained"] = functools.partial(save_pretrained, model)


__all__ = [
    "Intervention",
    "Memory",
    "MemoryConfig",
    "NoiseRows",
    "OneRow",
    "OtherRows",
    "attach",
    "chosen_memories",
    "detach",
    "from_pretrained",
    "load_memory",
    "memories",
    "memory_off",
    "open_rows",
    "profile_of",
    "reading",
    "save_memory",
    "save_pretrained",
    "trace",
    "use_table",
]
