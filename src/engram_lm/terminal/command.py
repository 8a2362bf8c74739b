"""What `engram-lm generate`, `trace` and `demo` do with their options."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from engram_lm.bases.naming import require_memory
from engram_lm.errors import ConfigError, DataError
from engram_lm.generation.loading import load_model, load_with_memory, require_parts
from engram_lm.generation.strengths import full_share
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
        model, tokenizer = load_with_memory(directory, tier=tier, cache_bytes=cache_bytes)
    elif tier != "device":
        raise ConfigError("--tier is not for --index: load the memory's rows on the model's device.")
    else:
        require_parts(name, index, gate=gate, lam=lam)
        model, tokenizer = load_model(name)
    from engram_lm.generation.decoder import Request, stream
    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.generation.prompts import prompt_ids
    from engram_lm.generation.strengths import HeatView

    engine = TransformersEngine(model, tokenizer)
    view = HeatView(quantity=heat or ("share" if index is None else "index"), block=block, branch=branch)
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed or 0, "memory": memory, "view": view,
    }  # fmt: skip
    if index is None:
        request = Request(ids=prompt_ids(tokenizer, prompt, chat=chat), **options)
        tokens = stream(engine, request)
        coloured = wants_colour(sys.stdout, color) and memory == "on"
        scale = (lambda strengths: scale_for(directory, view.quantity, full, strengths)) if coloured else None
        write_heat(tokens, tokenizer, scale=scale, where=view.describe(), show_prompt=not chat)
        return
    lines = answer_from_index(
        index, engine, prompt, chat=chat, gate=gate, lam=lam, tenant=tenant or "public",
        documents=documents or ["auto"], top_k=top_k or 0, drafts=drafts,
        session=SESSION_TOKENS if session else "off", most_verbatim=most_verbatim, strict=strict, count=count,
        coloured=wants_colour(sys.stdout, color), options=options,
    )  # fmt: skip
    for line in lines:
        print(line, file=sys.stderr)


def answer_from_index(
    directory: Path,
    engine: Any,
    prompt: str,
    *,
    chat: bool,
    gate: Path | None,
    lam: float | None,
    tenant: str,
    documents: list[str],
    top_k: int,
    drafts: bool,
    session: int | Literal["off"],
    most_verbatim: int | None,
    strict: bool,
    count: str | None,
    coloured: bool,
    options: dict[str, Any],
) -> list[str]:
    """Print a prompt and what follows with an index beside the model; lines that say what the index did.

    options: of `generation.Request`.
    """
    from engram_lm.generation.decoder import Request, stream
    from engram_lm.generation.gates import Audit, chosen_gate, counting
    from engram_lm.generation.processors import processor_for
    from engram_lm.generation.prompts import prompt_ids
    from engram_lm.generation.report import summary
    from engram_lm.generation.selection import select
    from engram_lm.generation.speculative import Drafter
    from engram_lm.library import Library

    parts: dict[str, Any] = {"model": engine.model, "tokenizer": engine.tokenizer}
    library = Library.open(directory, tokenizer=engine.tokenizer)
    ids, notes, mixed = prompt_ids(engine.tokenizer, prompt, chat=chat, encoder=library.encoder), [], None
    selection = select(
        library, prompt, documents, top_k, chat=chat, tenant=tenant, pointing=gate is None and lam is None
    )
    if selection.focus and (drafts or session != "off" or most_verbatim is not None or count is not None):
        raise ConfigError(
            "This question is answered by naming words of a sentence, where --drafts, --session, --most-verbatim and "
            "--count have no effect: mix the documents in with --gate or --lam, or ask the whole index with --documents "
            "all."
        )
    if not selection.focus:
        mixed = chosen_gate(gate, lam, **parts)
        mixed = mixed if count is None else counting(mixed, count, selection.snapshot)
        if gone := Audit(mixed).note(library.store.snapshot(tenant)):
            if strict:
                raise ConfigError(gone)
            notes.append(gone)
    processor = processor_for(selection, mixed, ids, session=session, most_verbatim=most_verbatim, **parts)
    drafter = Drafter(processor) if drafts else None
    given: list[Any] = []

    def tokens() -> Iterator[Any]:
        for token in stream(
            engine, Request(ids=ids, watch=not drafts, **options), processor, drafter=drafter
        ):
            given.append(token)
            yield token

    scale = Scale("index", 1.0, "all of it")
    write_heat(
        tokens(),
        engine.tokenizer,
        scale=(lambda _: scale) if coloured else None,
        where="index",
        show_prompt=not chat,
    )
    if drafter is not None:
        notes.append(
            f"{len(given) - len(ids)} tokens in {drafter.forwards} forwards; {drafter.accepted} of {drafter.drafted} "
            "drafted tokens kept"
        )
    return summary(given, selection, notes)


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
    from engram_lm.generation.pieces import PieceDecoder

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
    directory: Path, quantity: Quantity, full: float | None, strengths: list[float], **of: str
) -> Scale:
    """What full red means: what was asked for, else what `full_share` says. of: of which texts the strengths are."""
    if quantity == "gate":
        return Scale("gate", 1.0, "an open gate")
    if full is not None:
        return Scale("share", full, "as asked for")
    return Scale("share", *full_share(directory, strengths, **of))


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
    model, tokenizer = load_with_memory(directory)
    import torch

    from engram_lm.attachment import trace
    from engram_lm.generation.strengths import HeatView
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
