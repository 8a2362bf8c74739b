"""A run's directory: what is in it, whether it holds a run that can go on, and who is at work in it. No torch is needed here.

begun_run("runs/first", "continue")      # run.json of an unfinished run; None: a new one may begin; else CheckpointError
with alone_in("runs/first", "train"): ...
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.durable import try_lock, write_atomic
from engram_lm.errors import CheckpointError

OPTIONS, FACTS, METRICS, PICTURE, CHECKPOINTS = (
    "train.json",
    "run.json",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
)
FORMAT, VERSION = "engram-lm run", 1


def begun_run(out: Path, earlier: str) -> dict[str, Any] | None:
    """run.json of a run that `out` holds and that shall go on; None for a new run."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a directory.")
    facts = None
    if (out / OPTIONS).exists() and (out / FACTS).exists():
        facts = read_json(out / FACTS)
        if facts.get("format") != FORMAT or facts.get("version") != VERSION:
            raise CheckpointError(
                f"{out / FACTS} has format {facts.get('format')!r} version {facts.get('version')}; this build reads "
                f"{FORMAT!r} version {VERSION}. Name another --out."
            )
    ours = {OPTIONS, FACTS, ".lock", f".{OPTIONS}", f".{FACTS}"}
    if facts is None and out.is_dir() and any(path.name not in ours for path in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no run of engram-lm train; name another --out.")
    if earlier == "overwrite":
        return None
    if facts is None:
        if earlier == "require":
            raise CheckpointError(f"{out} holds no run to resume.")
        return None
    if facts["state"] == "finished":
        raise CheckpointError(
            f"{out} holds a finished run; name another --out, or add --overwrite to replace it."
        )
    return facts


@contextlib.contextmanager
def alone_in(out: Path, command: str) -> Iterator[None]:
    """No other `engram-lm COMMAND` works in a directory; the lock dies with its process."""
    with open(out / ".lock", "a") as lock:
        if not try_lock(lock):
            raise CheckpointError(f"Another engram-lm {command} is at work in {out}.")
        yield


def clear(out: Path) -> None:
    """Remove a run's files, run.json last; anything else stays."""
    names = [METRICS, PICTURE, "memory.json", "memory.safetensors", "README.md", OPTIONS, FACTS]
    names[:0] = [path.name for pattern in ("rows-*", "state-*", "tokens-*.bin") for path in out.glob(pattern)]
    for folder in (CHECKPOINTS, "base", "adapter"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name in names:
        (out / name).unlink(missing_ok=True)


def drop_unfinished(checkpoints: Path, *, keep: Path | None) -> None:
    last = int(keep.name.rpartition("-")[2]) if keep else -1
    for path in checkpoints.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdigit() or int(number) > last:
            shutil.rmtree(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(data, indent=1) + "\n")
