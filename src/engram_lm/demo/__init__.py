"""The demo's data, part of the package: a clone, an sdist and a wheel have it alike.

    memory()            # a trained memory on SmolLM2: what `save_memory` wrote, its prompts, its ATTRIBUTION.md
    documents()         # the handbook of a company that does not exist, with quiz.json and examples.json

`engram-lm serve` and `engram-lm demo` show it where no model is named.
"""

from importlib.resources import files
from pathlib import Path

from engram_lm.errors import CheckpointError


def memory() -> Path:
    """The directory of the trained memory."""
    return _part("memory", "memory.json")


def documents() -> Path:
    """The directory of the documents."""
    return _part("documents", "quiz.json")


def _part(name: str, holds: str) -> Path:
    # files on a disk: tables are read in place, which a zip file does not allow
    directory = Path(str(files(__name__))) / name
    if not (directory / holds).is_file():
        raise CheckpointError(
            f"{directory} holds no {holds}: this installation of engram-lm is not whole. Install it again, or name a model: "
            "engram-lm serve smollm2 --index DIR."
        )
    return directory
