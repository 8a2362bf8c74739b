"""Any model by its name: what `engram-lm train` or `save_memory` wrote, smollm2, a path, a hub name.

model, tokenizer = load_any("my-memory")
"""

from pathlib import Path
from typing import Any

from engram_lm.bases.base import load_base, quiet_libraries
from engram_lm.bases.naming import holds_memory, require_memory


def load_any(name: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer): a memory directory, a run, smollm2, a path or a hub name."""
    if holds_memory(name):
        return load_with_memory(Path(name))
    base = load_base(name, report=lambda line: None)
    return base.model, base.tokenizer


def load_with_memory(directory: Path, **placement: Any) -> tuple[Any, Any]:
    """(model with memory, tokenizer) of a directory. CheckpointError says where a run that is not over can be used.

    placement: `tier` and `cache_bytes`, as `from_pretrained` takes them.
    """
    from engram_lm.attachment import _runtime, from_pretrained

    require_memory(directory)
    with quiet_libraries():
        model = from_pretrained(directory, **placement)
    return model, _runtime(model).tokenizer
