"""`engram-lm demo`: a trained memory on SmolLM2, with and without, and one token of it up close.

The memory is the package's own (`engram_lm.demo`), with prompts.json beside it: a list of {"about": what the prompt is to
this memory, "prompt": text}. SmolLM2 is fetched on first use and kept in the
user's cache; after that nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from engram_lm import demo
from engram_lm.bases.naming import require_memory
from engram_lm.errors import CheckpointError
from engram_lm.extras import missing
from engram_lm.terminal.command import console, scale_for, write_heat
from engram_lm.terminal.heat import ColourWish, Scale, legend, wants_colour

# for a memory without prompts of its own
PROMPTS = ({"about": "a famous name", "prompt": "Alexander the Great was"},)


def demo_command(*, memory: Path | None, max_new_tokens: int, color: ColourWish) -> None:
    """Run the demo on the memory in `memory`, or on the one that comes with the package."""
    directory = demo.memory() if memory is None else memory
    require_memory(directory)
    clock = _Clock()
    try:
        from engram_lm.attachment import from_pretrained, memories
        from engram_lm.bases.base import load_base, quiet_libraries
        from engram_lm.memory.manifest import read_manifest
    except ImportError as error:
        raise missing(f"The demo needs torch and transformers ({error})", "hf") from error
    clock.say("torch and transformers are loaded")
    manifest = read_manifest(directory)
    base = None
    if manifest["base_files"] != "base":
        base = load_base(manifest["base"]["name"], report=lambda line: print(f"  {line}", flush=True)).model
    with quiet_libraries():
        model = from_pretrained(directory, base=base)
    tokenizer = _tokenizer(model)
    found = memories(model)
    tables = [table for each in found.values() for table in each.tables]
    blocks = ", ".join(str(slot.block) for each in found.values() for slot in each.slots)
    clock.say(
        f"the memory is attached before blocks {blocks}: {sum(t.n_rows for t in tables):,} rows of {tables[0].width}, "
        f"{sum(t.n_rows * t.bytes_per_row for t in tables) / 1e6:.0f} MB in use"
    )
    prompts = _prompts(directory)
    scale = _scale(model, tokenizer, directory, prompts) if wants_colour(sys.stdout, color) else None
    print("\n" + (legend(scale) if scale else "Where memory adds most is shown in colour, on a terminal."))
    changed = 0
    for each in prompts:
        print(f"\n== {each['about']}")
        changed += _compare(model, tokenizer, each["prompt"], max_new_tokens=max_new_tokens, scale=scale)
    print()
    clock.say(f"{len(prompts)} texts are generated, with memory and without")
    _one_token(model, tokenizer, prompts[0]["prompt"])
    print(
        f"\nWhat this shows: rows looked up by the last two or three tokens reach a frozen model, and {changed} of "
        f"{len(prompts)} texts go on in other words.\nWhat it cannot do: it holds word patterns, not documents; it is no "
        "source to quote, and what it did not see often is not in it."
    )


def _prompts(directory: Path) -> list[dict[str, str]]:
    path = directory / "prompts.json"
    if not path.exists():
        return list(PROMPTS)
    try:
        return [
            {"about": str(x["about"]), "prompt": str(x["prompt"])} for x in json.loads(path.read_text("utf8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no list of {{about, prompt}}: {error}.") from None


def _scale(model: Any, tokenizer: Any, directory: Path, prompts: list[dict[str, str]]) -> Scale:
    """One scale for all texts, so that their reds can be compared."""
    from engram_lm.generation.decoder import Request, stream
    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.generation.prompts import prompt_ids

    engine = TransformersEngine(model, tokenizer)
    strengths = [
        token.strength
        for each in prompts
        for token in stream(engine, Request(ids=prompt_ids(tokenizer, each["prompt"]), max_new_tokens=0))
    ]
    return scale_for(directory, "share", None, strengths, of="of the prompts")


def _compare(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, scale: Scale | None) -> bool:
    """Print a text with memory and without; True where they differ."""
    from engram_lm.generation.decoder import Request, stream
    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.generation.prompts import prompt_ids

    engine = TransformersEngine(model, tokenizer)
    ids, texts = prompt_ids(tokenizer, prompt), []
    for memory in ("on", "off"):
        print(f"\nmemory {memory}:", flush=True)
        tokens = stream(engine, Request(ids=ids, max_new_tokens=max_new_tokens, memory=memory))
        texts.append(write_heat(tokens, tokenizer, scale=scale if memory == "on" else None, where=""))
    return texts[0] != texts[1]


def _one_token(model: Any, tokenizer: Any, text: str) -> None:
    """The trace of the token of `text` at which memory adds most."""
    import torch

    from engram_lm.attachment import trace
    from engram_lm.generation.strengths import HeatView
    from engram_lm.terminal.tables import print_trace

    with torch.no_grad(), trace(model) as records:
        model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
    place = int(HeatView().strengths(records).argmax())
    print(f"\nUp close: the token of “{text}” at which memory adds most, layer by layer")
    print_trace(records, tokenizer, view=HeatView(), limit=None, only=place, console=console())


def _tokenizer(model: Any) -> Any:
    from engram_lm.attachment import tokenizer_of

    return tokenizer_of(model)


class _Clock:
    """Says what was done and how long it took since it last spoke."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def say(self, what: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self.last:5.1f} s] {what}", flush=True)
        self.last = now
