"""A base's tokenizer without its weights: what an index, or anything else that only cuts text into ids, needs.

    load_tokenizer("my-model")              # its tokenizer.json, read: neither torch nor transformers is imported
    load_tokenizer("smollm2")               # from the cache; the base is fetched and converted where it is not there

It is the backend, a `tokenizers.Tokenizer`. transformers is asked for one only where a model brings no tokenizer.json.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.bases.naming import FoundBase, find_base, is_own
from engram_lm.errors import CheckpointError, ModelError
from engram_lm.extras import missing
from engram_lm.progress import report_to_stderr

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"


def load_tokenizer(name: str | Path, *, report: Callable[[str], None] = report_to_stderr) -> Tokenizer:
    """The tokenizer of a base by its name, of a model's or a memory's directory, or of a tokenizer.json.

    `report` receives a line where something has to be fetched first. `scratch:` names have bytes for tokens here: their
    own tokenizer is made with the text that they train on.
    """
    path = Path(name)
    for file in () if is_own(name) else (path, path / FILE):
        if file.is_file():
            return read_tokenizer(file)
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path}: no such file. Wanted a {FILE}, a directory that holds one, or a base's name."
        )
    named = find_base(name)
    if named.kind == "smollm2":
        from engram_lm.bases.smollm2 import smollm2_directory

        return read_tokenizer(smollm2_directory(report=report) / FILE)
    if named.kind == "scratch":
        from engram_lm.bases.recipes import byte_backend

        return byte_backend()
    if named.kind == "hub" and (file := _hub_file(named)) is not None:
        return read_tokenizer(file)
    return pretrained_tokenizer(named).backend_tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json. CheckpointError where it cannot be read or is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # the library raises plain ones
        raise CheckpointError(f"{path} holds no tokenizer: {error}") from None


def pretrained_tokenizer(named: FoundBase) -> Any:
    """transformers' own tokenizer of a directory or a hub name. ModelError where it is not a fast one."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing(f"{named.name} has no {FILE}; to make one needs transformers", "hf") from error
    options = {"trust_remote_code": False, "local_files_only": named.cached_only}
    with transformers_refusals(named.name):
        tokenizer = AutoTokenizer.from_pretrained(named.name, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{named.name!r} has no fast tokenizer ({type(tokenizer).__name__}); its ids cannot be compressed"
        )
    return tokenizer


@contextlib.contextmanager
def transformers_refusals(name: str) -> Iterator[None]:
    """What transformers raises for files that it cannot load, as one CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is not a base that transformers can load ({first}). "
            "Wanted smollm2, scratch:tiny, a directory or a hub name."
        ) from error


def _hub_file(named: FoundBase) -> Path | None:
    """The hub's tokenizer.json of a model, through the hub's cache; None where the model has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with transformers_refusals(named.name):
        try:
            return Path(hf_hub_download(named.name, FILE, local_files_only=named.cached_only))
        except EntryNotFoundError:
            return None
