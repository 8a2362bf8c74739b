"""Draw docs/state-matrix.md from a run: every way of running on every shape, with memory and bare, side by side.

    python benchmarks/state_matrix.py                 # tiny models in float64, compiled ways in float32: minutes
    python benchmarks/state_matrix.py --smollm2       # and the real SmolLM2-135M, also in float64

The cells are those of tests/support/matrix.py, which the tests assert; this writes down what they measured. Cells that
are not run again keep what docs/state-matrix.json says.
"""

import argparse
import copy
import datetime
import json
import os
import sys
import time
import warnings
from pathlib import Path

HOME = Path(__file__).parent.parent
sys.path.insert(0, str(HOME / "tests" / "support"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import models
from matrix import ON_REAL_MODELS, WAYS, run, text, verdict

JSON, PAGE = HOME / "docs" / "state-matrix.json", HOME / "docs" / "state-matrix.md"
COMPILED_SHAPES = ("llama", "gpt2", "mistral")


def cell(name, model, bare, ids, dtype):
    ours, base = run(WAYS[name], model, ids), run(WAYS[name], bare, ids)
    said = [
        None if o.raised is None else f"{type(o.raised).__name__}: {str(o.raised)[:200]}"
        for o in (ours, base)
    ]
    return {
        "verdict": verdict(ours, base, dtype),
        "ours": None if said[0] else ours.error,
        "bare": None if said[1] else base.error,
        "largest_logit": round(ours.scale, 2),
        "ours_raised": said[0],
        "bare_raised": said[1],
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure(shape, bare64, bare32, ids, *, tokenizer=None, leave=()):
    cells = {}
    pairs = {}
    for dtype, bare in ((torch.float64, bare64), (torch.float32, bare32)):
        if bare is not None:
            pairs[dtype] = models.give_memory(copy.deepcopy(bare), "paper", tokenizer=tokenizer), bare
    for name, way in WAYS.items():
        if name in leave:
            continue
        dtype = torch.float32 if way.compiled else torch.float64
        begin = time.perf_counter()
        cells[name] = cell(name, *pairs[dtype], ids, dtype)
        line = f"{shape:12s} {name:36s} {cells[name]['verdict']}"
        print(f"{line}  {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return cells


def draw(found):
    shapes = {**models.SHAPES, "smollm2": "SmolLM2-135M"}
    shown = [s for s in shapes if s in found["cells"]]
    lines = [
        "# The state matrix",
        "",
        "A language model can be run in many ways that must give the numbers of its plain full forward. Memory adds state",
        "to each: the ids and conv inputs that came before. This table says, for every way and shape of model, how far the",
        "logits are from those of full forwards over plain sequences (for beam search the scores too; for gradient",
        "checkpointing the largest relative difference of any gradient), with two memory layers, random rows of standard",
        "deviation 1 and conv weights far from zero.",
        "",
        "Each cell is *with memory* / *bare model*. Tiny random models and SmolLM2 in float64, where a lost token or conv",
        "input shows as 1e-2 or more and the order of sums as 1e-15; compiled ways in float32. **refused**: both",
        "raise, as the bare model cannot run this way. **refused, bare wrong**: the bare model answers, but not what its own",
        "full forward says, and with memory it raises instead. —: not run.",
        "",
        f"transformers {found['transformers']}, torch {found['torch']}, CPU, {found['date']};",
        "`python benchmarks/state_matrix.py --smollm2`. The tests hold every cell to 1e-9 (float64), or to twice the bare",
        "model's own error with a floor of 2e-5 · max(1, largest logit / 8) (float32), and require an error above 1e-2 when",
        "the state is broken on purpose (`tests/support/matrix.py`).",
        "",
        "| way | " + " | ".join(shapes[s] for s in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for name in found["ways"]:
        row = []
        for shape in shown:
            c = found["cells"][shape].get(name)
            if c is None:
                row.append("—")
            elif c["verdict"] == "pass":
                row.append(f"{c['ours']:.0e} / {c['bare']:.0e}")
            elif c["verdict"].startswith("WRONG"):
                row.append(f"**{c['verdict']}**")
            else:
                row.append("refused, bare wrong" if c["bare_raised"] is None else "refused")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "## What the refusals say", ""]
    for shape in shown:
        for name, c in found["cells"][shape].items():
            if c["ours_raised"]:
                base = c["bare_raised"] or f"off by {c['bare']:.0e}"
                lines.append(
                    f"- {shapes[shape]}, {name}: `{_one_line(c['ours_raised'])}` (bare: `{_one_line(base)}`)"
                )
    return "\n".join(lines) + "\n"


def _one_line(text):
    return text.split("\n")[0][:140].replace("`", "'").replace("|", "/")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--smollm2", action="store_true", help="also the real SmolLM2-135M (93 MB, kept after first use)"
    )
    parser.add_argument("--shapes", nargs="*", default=list(models.SHAPES), help="tiny shapes to run again")
    parser.add_argument("--draw-only", action="store_true", help="only make the page from the JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    found = json.loads(JSON.read_text()) if JSON.exists() else {"cells": {}}
    compiled = {name for name, way in WAYS.items() if way.compiled}
    for shape in [] if arguments.draw_only else arguments.shapes:
        bares = models.build(shape, torch.float64), models.build(shape)
        leave = () if shape in COMPILED_SHAPES else compiled
        found["cells"][shape] = measure(shape, *bares, text(), leave=leave)
        save(found)
    if arguments.smollm2 and not arguments.draw_only:
        from engram_lm.bases.base import load_base

        torch.set_num_threads(2)
        bare, tokenizer, _ = load_base("smollm2")
        bare.generation_config.eos_token_id = None
        leave = set(WAYS) - set(ON_REAL_MODELS)
        ids = text(vocab_size=len(tokenizer))
        bare = bare.double()
        found["cells"]["smollm2"] = measure("smollm2", bare, None, ids, tokenizer=tokenizer, leave=leave)
    save(found)


def save(found):
    found.update(
        ways=list(WAYS), transformers=transformers.__version__, torch=torch.__version__.split("+")[0]
    )
    found["date"] = datetime.date.today().isoformat()
    JSON.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(draw(found))


if __name__ == "__main__":
    main()
