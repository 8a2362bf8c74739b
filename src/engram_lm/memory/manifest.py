"""memory.json: what a directory holds, and what it belongs to. The whole directory is described in `attachment.saving`."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, EngramError

FORMAT, VERSION = "engram-lm memory", 1
MANIFEST = "memory.json"


def read_manifest(directory: Path) -> dict[str, Any]:
    """memory.json, checked. CheckpointError when there is none, or it is of another format or a later version."""
    path = directory / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{directory} holds no memory: {MANIFEST} is missing.")
    try:
        manifest = json.loads(path.read_text(encoding="utf8"))
        form, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if form != FORMAT or version != VERSION:
        raise CheckpointError(
            f"{path} has format {form!r} version {version}; this build reads {FORMAT!r} version {VERSION}."
        )
    return manifest


def runs_in(manifest: dict[str, Any]) -> dict[str, int] | None:
    """The number of the training run of every layer, as memory.safetensors names layers; None in older memories."""
    tables = {
        f"{entry['config']['name']}.{index}": table.get("run")
        for entry in manifest["memories"]
        for index, table in enumerate(entry["tables"])
    }
    return None if None in tables.values() else tables


def config_hash(entries: list[dict[str, Any]]) -> str:
    """sha256 of what the weights mean: a gate or a dilation edited in memory.json would load and answer wrongly."""
    configs = json.dumps([entry["config"] for entry in entries], sort_keys=True)
    return hashlib.sha256(configs.encode()).hexdigest()


@contextlib.contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """A memory.json that was edited or cut short fails in many ways; all of them are one error."""
    try:
        yield
    except EngramError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error}); copy the directory again, whole."
        ) from error
