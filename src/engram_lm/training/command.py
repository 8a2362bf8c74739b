"""What `engram-lm train` does with its options: defaults, then --config's file, then the command line.

`--resume` takes the options of the run in --out instead of defaults, so that `engram-lm train --resume --out DIR` is enough.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engram_lm.bases.naming import find_base
from engram_lm.corpus.text import require_documents
from engram_lm.errors import ConfigError
from engram_lm.extras import missing
from engram_lm.training.config import TrainConfig, read_options
from engram_lm.training.directory import begun_run

_FINISHED, _INTERRUPTED = 0, 130
_NUMBERS = ("layers", "orders")


def train_command(
    given: dict[str, Any], *, out: Path, config_file: Path | None, resume: bool, overwrite: bool
) -> int:
    """Train with the options of `TrainConfig` that are given, and return the exit code."""
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; choose one.")
    if resume and config_file:
        raise ConfigError("--config has no effect with --resume: the run's own options are used.")
    options: dict[str, Any] = {}
    if config_file is not None:
        options = read_options(config_file)
    elif resume:
        stored = out / "train.json"
        if not stored.exists():
            raise ConfigError(f"{out} holds no run to resume; begin one without --resume.")
        options = read_options(stored) | {"minutes": None}
    for name in _NUMBERS:
        if name in given:
            given[name] = numbers(given[name], name)
    config = TrainConfig.from_json(options | given)
    earlier = "overwrite" if overwrite else "require" if resume else "continue"
    begun_run(out, earlier)
    require_documents(config.data, field=config.field)
    find_base(config.base)
    # before torch and transformers: their own notes are not for the reader of this command
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing(f"Training needs torch and transformers ({error})", "hf") from error
    from engram_lm.training.progress import shown_progress
    from engram_lm.training.run import told, train

    outcome = train(config, out=out, earlier=earlier, progress=shown_progress())
    print("\n".join(told(outcome)))
    return _INTERRUPTED if outcome.state == "interrupted" else _FINISHED


def numbers(text: str, name: str) -> tuple[int, ...]:
    """Whole numbers with commas between, as an option gives them."""
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(
            f"{name} is {text!r}; wanted whole numbers with commas between, as in 1,15."
        ) from None
