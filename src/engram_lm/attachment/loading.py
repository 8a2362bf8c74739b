"""Any model by its name: what `engram-lm train` or `save_memory` wrote, smollm2, a path, a hub name.

model, tokenizer = load_any("demo/memory")
"""

from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError
from engram_lm.train.base import load_base, quiet_libraries


def load_any(name: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer): a memory directory, a run, smollm2, a path or a hub name."""
    directory = Path(name)
    if directory.is_dir() and any((directory / file).exists() for file in ("memory.json", "run.json")):
        return load_with_memory(directory)
    base = load_base(name, report=lambda line: None)
    return base.model, base.tokenizer


def load_with_memory(directory: Path, **placement: Any) -> tuple[Any, Any]:
    """(model with memory, tokenizer) of a directory. CheckpointError says where a run that is not over can be used.

    placement: `tier` and `cache_bytes`, as `from_pretrained` takes them.
    """
    from engram_lm.attachment import _runtime, from_pretrained

    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory. Wanted what engram-lm train or save_memory wrote."
        )
    if not (directory / "memory.json").exists() and (directory / "run.json").exists():
        whole = sorted(
            (path.parent for path in directory.glob("checkpoints/checkpoint-*/whole.json")),
            key=lambda path: int(path.name.rpartition("-")[2]),
        )
        advice = f"its last checkpoint can be used: {whole[-1]}" if whole else "it has no checkpoint yet"
        raise CheckpointError(f"{directory} holds a run that is not over; {advice}.")
    with quiet_libraries():
        model = from_pretrained(directory, **placement)
    return model, _runtime(model).tokenizer
