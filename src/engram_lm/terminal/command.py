"""What `engram-lm generate`, `trace` and `demo` do with their options."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_lm.bases.naming import require_memory
from engram_lm.errors import ConfigError, DataError
from engram_lm.extras import missing
from engram_lm.terminal.heat import ColourWish, Quantity, Scale, legend, paint, wants_colour

SESSION_TOKENS = 4096  # of prompt and output that a session remembers


def generate_command(
    name: str,
    prompt: str,
    *,
    index: Path | None = None,
    gate: Path | None = None,
    lam: float | None = None,
    tenant: str | None = None,
    documents: list[str] | None = None,
    top_k: int | None = None,
    drafts: bool = False,
    session: bool = False,
    most_verbatim: int | None = None,
    strict: bool = False,
    count: str | None = None,
    heat: Quantity | None = None,
    block: int | None = None,
    branch: int | None = None,
    full: float | None = None,
    memory: str = "on",
    tier: str = "device",
    cache_bytes: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    chat: bool = False,
    color: ColourWish = "auto",
) -> None:
    """Print the prompt and what follows, reddened by memory where the terminal can."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
    if temperature < 0:
        raise ConfigError(f"temperature must be 0 (greedy) or more; got {temperature}.")
    if seed is not None and not temperature:
        raise ConfigError("seed has no effect at temperature 0; add --temperature.")
    if memory == "off" and (heat, block, branch, full) != (None, None, None, None):
        raise ConfigError("--heat, --block, --branch and --full have no effect with --memory off.")
    if heat == "gate" and full is not None:
        raise ConfigError("--full has no effect with --heat gate: a gate's full is 1.")
    if (cache_bytes is not None) != (tier == "cached"):
        raise ConfigError("--cache-mb belongs to --tier cached, and to that alone.")
    flags = (flag or None for flag in (drafts, session, strict))
    if index is None and any(
        value is not None for value in (gate, lam, tenant, documents, top_k, most_verbatim, count, *flags)
    ):
        raise ConfigError(
            "--gate, --lam, --tenant, --documents, --top-k, --drafts, --session, --most-verbatim, --strict and --count "
            "belong to --index."
        )
    if strict and lam is not None:
        raise ConfigError("--strict is about a gate; --lam is none.")
    if most_verbatim is not None and most_verbatim < 1:
        raise ConfigError(f"--most-verbatim is a number of tokens from 1 on; got {most_verbatim}.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is 1 or more documents; got {top_k}.")
    if index is not None and (heat, block, branch, full) != (None, None, None, None):
        raise ConfigError(
            "With --index the red is the index's part; leave out --heat, --block, --branch and --full."
        )
    directory = Path(name)
    if index is None:
        require_memory(name, instead=" To go on without one, mix documents in: --index DIR.")
        model, tokenizer = load(directory, tier=tier, cache_bytes=cache_bytes)
    elif tier != "device":
        raise ConfigError("--tier is not for --index: load the memory's rows on the model's device.")
    else:
        from engram_lm.terminal.indexed import Indexed, load_any, require_parts

        require_parts(name, index, gate=gate, lam=lam)
        model, tokenizer = load_any(name)
    from engram_lm.terminal.speaking import HeatView, prompt_ids, speak

    view = HeatView(quantity=heat or ("share" if index is None else "index"), block=block, branch=branch)
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    indexed = (
        None if index is None else Indexed(
            index, model=model, tokenizer=tokenizer, gate=gate, lam=lam, tenant=tenant or "public",
            prompt=prompt, chat=chat, documents=documents or ["auto"], top_k=top_k or 0, drafts=drafts,
            session=SESSION_TOKENS if session else "off", most_verbatim=most_verbatim, strict=strict,
            count=count,
        )
    )  # fmt: skip
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0, "memory": memory,
    }  # fmt: skip
    if indexed is None:
        tokens = speak(model, tokenizer, ids, view=view, **options)
    else:
        tokens = indexed.speak(ids, **options)
    coloured = wants_colour(sys.stdout, color) and (memory == "on" or indexed is not None)
    write_heat(
        tokens if indexed is None else indexed.watched(tokens),
        tokenizer,
        scale=(lambda strengths: scale_for(directory, view.quantity, full, strengths)) if coloured else None,
        where=view.told if indexed is None else "index",
        show_prompt=not chat,
    )
    for line in [] if indexed is None else indexed.told():
        print(line, file=sys.stderr)


def write_heat(
    tokens: Any,
    tokenizer: Any,
    *,
    scale: Callable[[list[float]], Scale] | Scale | None,
    where: str,
    show_prompt: bool = True,
) -> str:
    """Stream tokens to stdout and return their text. `scale` None writes plain text; a function makes one from the
    strengths of the prompt, and then a legend comes first."""
    from engram_lm.terminal.decoding import PieceDecoder

    decoder, held, written = PieceDecoder(tokenizer), 0.0, []
    waiting, tokens = _prompt_first(tokens)
    if callable(scale):
        scale = scale([token.strength for token in waiting])
        print(legend(scale, where=where), flush=True)
    for token in itertools.chain(waiting, tokens):
        held = max(held, token.strength)
        piece = decoder.add(token.id)
        if token.is_prompt and not show_prompt:
            held = 0.0
            continue
        if piece:
            print(paint(piece, scale.heat(held)) if scale else piece, end="", flush=True)
            written.append(piece)
            held = 0.0
    written.append(decoder.end())
    print(written[-1])
    return "".join(written)


def _prompt_first(tokens: Any) -> tuple[list[Any], Any]:
    """The tokens of the prompt, which come at once, and the iterator of the rest."""
    waiting, tokens = [], iter(tokens)
    for token in tokens:
        waiting.append(token)
        if not token.is_prompt:
            break
    return waiting, tokens


def scale_for(
    directory: Path,
    quantity: Quantity,
    full: float | None,
    strengths: list[float],
    *,
    of: str = "of the prompt",
) -> Scale:
    """What full red means: what was asked for, else what the run measured, else the strongest token of the prompt."""
    if quantity == "gate":
        return Scale("gate", 1.0, "an open gate")
    if quantity == "index":
        return Scale("index", 1.0, "all of it")
    if full is not None:
        return Scale("share", full, "as asked for")
    measured = measured_share(directory)
    if measured:
        return Scale("share", measured, "1 held-out token in 100 has more")
    strongest = max(strengths)
    return Scale(
        "share",
        strongest or 1.0,
        f"the strongest token {of}" if strongest else "memory adds nothing here",
    )


def measured_share(directory: Path) -> float | None:
    """The share that one held-out token in a hundred exceeds, where the training run beside the memory measured it."""
    for beside in (directory, directory.parent.parent):
        try:
            return (
                float(json.loads((beside / "run.json").read_text(encoding="utf8"))["results"]["share"]["p99"])
                or None
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def trace_command(
    directory: Path,
    text: str,
    *,
    block: int | None = None,
    branch: int | None = None,
    limit: int = 40,
    as_json: bool = False,
) -> None:
    """Print what memory read and let in at every token of `text`."""
    if not text:
        raise DataError("The text is empty: there is no token to trace.")
    if limit < 0:
        raise ConfigError(f"limit is a number of tokens, 0 for all; got {limit}.")
    require_memory(directory)
    model, tokenizer = load(directory)
    import torch

    from engram_lm.attachment import trace
    from engram_lm.terminal.speaking import HeatView
    from engram_lm.terminal.tables import print_trace, trace_json

    view = HeatView(block=block, branch=branch)
    ids = torch.tensor([tokenizer(text).input_ids], device=next(model.parameters()).device)
    with torch.no_grad(), trace(model) as records:
        model(ids, use_cache=False)
    view.strengths(records)
    if as_json:
        print(trace_json(records, tokenizer, view=view, limit=limit or None))
        return
    print_trace(records, tokenizer, view=view, limit=limit or None, console=console())


def console() -> Any:
    """A rich console on stdout; outside a terminal its lines are as long as they need to be."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def load(directory: Path, **placement: Any) -> tuple[Any, Any]:
    """(model with memory, tokenizer) of a directory that `engram-lm train` or `save_memory` wrote.

    placement: `tier` and `cache_bytes`, as `from_pretrained` takes them.
    """
    try:
        from engram_lm.attachment.loading import load_with_memory
    except ImportError as error:
        raise missing(f"A model with memory needs torch and transformers ({error})", "hf") from error
    return load_with_memory(directory, **placement)
