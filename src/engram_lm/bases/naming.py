"""What the name of a model means, found out before torch is imported and before any weights are read or fetched.

    find_base("smollm2").kind               # "smollm2"
    find_base("smolm2")                     # CheckpointError: ... Did you mean smollm2?
    find_model("my-memory")                 # a memory's directory, or a base
    require_memory("smollm2")               # CheckpointError: smollm2 has no memory yet ...

A directory is looked into, not read. A hub name is asked for once, with a time limit and without retries: what is in the
hub's cache on this machine is then used without asking again, and what is neither there nor to be had is said at once.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engram_lm.bases.recipes import RECIPES, recipe_named
from engram_lm.errors import CheckpointError
from engram_lm.extras import missing

OWN_NAMES = ("smollm2", *(f"scratch:{name}" for name in RECIPES))
WANTED = (
    "Wanted smollm2, scratch:tiny, a directory that save_pretrained wrote, or a hub name such as owner/name."
)
# what transformers loads a directory by: a model, or a LoRA adapter that names its base
_CONFIGS = ("config.json", "adapter_config.json")
# difflib's ratio: "smolm2" has 0.92 of "smollm2", "scratch" 0.74 of "scratch:tiny", "gpt2" 0.36 of "smollm2".
_CLOSE = 0.7
# Seconds that the hub may take for its first answer; the hub's own variable, HF_HUB_ETAG_TIMEOUT, sets another number.
_HUB_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class FoundBase:
    """A base that can be loaded. cached_only: of a hub name: the hub cannot be asked, the files are on this machine."""

    name: str
    kind: Literal["smollm2", "scratch", "local", "hub"]
    cached_only: bool = False


def find_base(name: str | Path) -> FoundBase:
    """Which base a name means. CheckpointError or ConfigError where it means none, with a suggestion where one is close."""
    name = str(name)
    path = Path(name)
    if is_own(name):
        scratch = name.startswith("scratch:")
        if scratch:
            recipe_named(name.removeprefix("scratch:"))
        return FoundBase(name=name, kind="scratch" if scratch else "smollm2")
    if path.is_dir():
        _require_config(path)
        return FoundBase(name=name, kind="local")
    if path.exists():
        raise CheckpointError(f"{name} is a file, and no base is read from one. {WANTED}")
    if looks_local(name):
        raise CheckpointError(
            f"{name}: no such directory.{_did_you_mean(_beside(path))} Wanted what save_pretrained wrote."
        )
    return _find_in_hub(name)


def find_model(name: str | Path) -> None:
    """CheckpointError where a name is neither a memory that can be used nor a base."""
    if holds_memory(name):
        require_memory(name)
    else:
        find_base(name)


def holds_memory(name: str | Path) -> bool:
    """Whether a name is the directory of a memory, or of a run that will leave one."""
    return any((Path(name) / file).exists() for file in ("memory.json", "run.json"))


def require_memory(name: str | Path, *, instead: str = "") -> None:
    """CheckpointError where a name is no directory of a memory. instead: what else the command that was typed can do."""
    directory = Path(name)
    if (directory / "memory.json").exists():
        return _require_base_of(directory)
    if (directory / "run.json").exists():
        raise CheckpointError(f"{directory} holds a run that is not over; {_last_checkpoint(directory)}.")
    if is_own(name) or any((directory / file).exists() for file in _CONFIGS):
        raise CheckpointError(
            f"{name} has no memory yet. Train one: `engram-lm train {shlex.quote(str(name))} --data FILES --out my-memory`; "
            f"or see one that is trained: `engram-lm demo`.{instead}"
        )
    if directory.is_dir():
        raise CheckpointError(
            f"{directory} holds no memory: memory.json is missing. Wanted what engram-lm train or save_memory wrote."
        )
    told = "is a file" if directory.exists() else "no such directory"
    raise CheckpointError(
        f"{name}: {told}.{_did_you_mean(_beside(directory))} Wanted what engram-lm train or save_memory wrote.{instead}"
    )


def is_own(name: str | Path) -> bool:
    """Whether a name is engram-lm's own word for a base, which comes before any file or directory of that name."""
    return str(name) == "smollm2" or str(name).startswith("scratch:")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path: a hub name has at most one slash, between two names."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


# ---- directories -----------------------------------------------------------------------------------------------------


def _require_config(path: Path) -> None:
    if any((path / file).exists() for file in _CONFIGS):
        return
    if (path / "memory.json").exists():
        raise CheckpointError(f"{path} holds a memory, not a base. {WANTED}")
    raise CheckpointError(
        f"{path} holds no config.json, so it is not a base that transformers can load. {WANTED}"
    )


def _require_base_of(directory: Path) -> None:
    """CheckpointError where a memory's base is not to be had. What is wrong with memory.json is said when it is read."""
    try:
        manifest = json.loads((directory / "memory.json").read_text(encoding="utf8"))
        kept, base = manifest["base_files"], str(manifest["base"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if kept == "base":
        return
    try:
        find_base(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory} belongs to the base {base!r}, which cannot be loaded. {error}"
        ) from None


def _last_checkpoint(directory: Path) -> str:
    whole = sorted(
        (path.parent for path in directory.glob("checkpoints/checkpoint-*/whole.json")),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    return f"its last checkpoint can be used: {whole[-1]}" if whole else "it has no checkpoint yet"


def _beside(path: Path) -> str | None:
    """The directory beside `path` whose name is closest to its own, as the user would type it."""
    try:
        names = [found.name for found in path.parent.iterdir() if found.is_dir()]
    except OSError:
        return None
    close = _closest(path.name, names)
    return None if close is None else str(path.parent / close)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def _find_in_hub(name: str) -> FoundBase:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise missing(f"{name!r} is no directory; a hub name needs huggingface_hub", "hf") from error
    try:
        cached = any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGS)
    except HFValidationError:
        cached = None
    # A name without an owner is one of the hub's first models ("gpt2"): none of those is close to a name of ours.
    close = None if "/" in name else _closest(name, OWN_NAMES)
    if cached is None or (close is not None and not cached):
        raise CheckpointError(f"{name!r} names no base.{_did_you_mean(close)} {WANTED}")
    refusal = _ask_hub(name)
    if refusal is not None and not cached:
        raise CheckpointError(
            f"{name!r} is no directory, and not in the hub's cache on this machine; {refusal}."
            f"{_did_you_mean(_beside(Path(name)) or _closest(Path(name).name, OWN_NAMES))} {WANTED}"
        )
    return FoundBase(name=name, kind="hub", cached_only=refusal is not None)


def _ask_hub(name: str) -> str | None:
    """None where the hub has a model, else why it cannot be fetched. One request, no retry, no setting changed."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    hub, seconds = constants.ENDPOINT, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _HUB_SECONDS)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
    except EntryNotFoundError:
        return None  # the model is there; transformers says what it misses
    except GatedRepoError:
        return f"{hub} gives it to those alone who were granted access: ask for it there, then log in (hf auth login)"
    except RepositoryNotFoundError:
        return f"{hub} has no public model of that name (a private one needs a login: hf auth login)"
    except OfflineModeIsEnabled:
        return f"{hub} was not asked, as HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return f"{hub} answered with status {error.response.status_code}"
    except Exception as error:  # of httpx, httpx2 or requests, as the hub's version has it
        return f"{hub} could not be reached ({_first_line(error)}; one try of at most {seconds:g} s)"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- suggestions -----------------------------------------------------------------------------------------------------


def _closest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` resembles, or that it begins with ("SmolLM2-135M-Instruct"); None without one."""
    by_lower, lower = {other.lower(): other for other in names}, name.lower()
    found = difflib.get_close_matches(lower, by_lower, n=1, cutoff=_CLOSE)
    found = found or [other for other in by_lower if lower.startswith(other)]
    return by_lower[found[0]] if found else None


def _did_you_mean(close: str | None) -> str:
    return "" if close is None else f" Did you mean {close}?"
