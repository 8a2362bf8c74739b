"""Models by name, with their tokenizers: what `engram-lm train` or `save_memory` wrote, smollm2, a path, a hub name.

require_parts("my-memory", Path("notes"))       # looked for before anything is loaded
model, tokenizer = load_model("my-memory")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engram_lm.bases.naming import find_model, holds_memory, require_memory
from engram_lm.extras import missing


def require_parts(
    name: str, index: Path | None, *, gate: Path | None = None, lam: float | None = None
) -> None:
    """What a command with a model, and perhaps an index, needs: looked for before any of it is loaded."""
    from engram_lm.generation.gates import named_gate
    from engram_lm.index.manifest import require_index

    find_model(name)
    if index is not None:
        require_index(index)
        named_gate(gate, lam)


def load_model(name: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a memory directory, a run, smollm2, a path or a hub name."""
    if holds_memory(name):
        return load_with_memory(Path(name))
    try:
        from engram_lm.bases.base import load_base
    except ImportError as error:
        raise missing(f"A model needs torch and transformers ({error})", "hf") from error
    base = load_base(name, report=lambda line: None)
    return base.model, base.tokenizer


def load_with_memory(directory: Path, **placement: Any) -> tuple[Any, Any]:
    """(model with memory, tokenizer) of a directory. CheckpointError says where a run that is not over can be used.

    placement: `tier` and `cache_bytes`, as `from_pretrained` takes them.
    """
    require_memory(directory)
    try:
        from engram_lm.attachment import from_pretrained, tokenizer_of
        from engram_lm.bases.base import quiet_libraries
    except ImportError as error:
        raise missing(f"A model with memory needs torch and transformers ({error})", "hf") from error
    with quiet_libraries():
        model = from_pretrained(directory, **placement)
    return model, tokenizer_of(model)
