"""A new domain, known now: every part of the comparison (README.md).

$ python experiments/instant_adaptation/run.py --data DATA --out runs/adaptation               # an hour of one core
$ python experiments/instant_adaptation/run.py --data DATA --out runs/adaptation --quick       # three minutes
$ python experiments/instant_adaptation/run.py --data DATA --out runs/adaptation --only facts living
$ python experiments/instant_adaptation/tables.py runs/adaptation                  # tables, results.json, plot

DATA holds corpora/ and domain/ as named in domains.py. Rows are kept an arm a file below OUT: a stopped run goes on.
One thread, deterministic; seconds are CPU seconds of a machine that others use.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from domains import DOMAINS, CachedReader, Domain

from engram_lm.bases.base import load_base
from engram_lm.index.snapshot import Snapshot
from engram_lm.library.encoding import TextEncoder
from engram_lm.mixing import default_gate
from engram_lm.mixing.identity import rules_of

PARTS = ("perplexity", "facts", "questions", "living", "lambdas", "lora", "infini-gram")


@dataclass(eq=False)
class Setting:
    """The model, the documents and where things are."""

    data: Path
    out: Path
    quick: bool
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model, self.tokenizer, self.base = load_base("smollm2", report=lambda line: None)
        self.encoder, self.gate = TextEncoder.of(self.tokenizer), default_gate()
        self.read = CachedReader(self.model, self.out / "cache")
        self.rules = rules_of(self.tokenizer, self.model, Snapshot([], vocab_size=self.encoder.vocab_size))

    @cached_property
    def domains(self) -> dict[str, Domain]:
        names = ["handbook"] if self.quick else DOMAINS
        return {name: Domain.of(self.data, name, self.encoder) for name in names}


def hardware() -> dict[str, Any]:
    cpu = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )  # fmt: skip
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "dtype": "float32"}


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(out: Path, part: str, found: dict[str, Any], setting: Setting) -> None:
    """OUT/results/PART.json: what a part found, and what it was found with."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    about = {
        "commit": commit(), "hardware": hardware(), "torch": torch.__version__, "python": platform.python_version(),
        "model": setting.base.name, "base": setting.base.sha256[:12], "quick": setting.quick, **setting.facts,
    }  # fmt: skip
    text = json.dumps({"about": about, **found}, indent=1, ensure_ascii=False)
    (out / "results" / f"{part}.json").write_text(text + "\n", encoding="utf8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--quick", action="store_true", help="the handbook alone, four texts of each kind, ten facts"
    )
    parser.add_argument("--only", choices=PARTS, nargs="*")
    parser.add_argument("--windows", type=int, default=24, help="texts of each kind")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--most", type=int, help="texts in all, some of each kind")
    parser.add_argument("--infini-gram-python", type=Path, help="a Python that has infini-gram 2.6.0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out / ("quick" if options.quick else "full")
    setting = Setting(options.data, out, options.quick)
    windows = 4 if options.quick else options.windows
    parts = options.only or (["perplexity", "facts", "living"] if options.quick else PARTS)
    for part in parts:
        if part == "infini-gram" and options.infini_gram_python is None:
            print("infini-gram: left out; --infini-gram-python names a Python that has it", file=sys.stderr)
            continue
        found = measured(part, setting, windows, options)
        write(out, part, found, setting)
        print(f"{part}: done", file=sys.stderr, flush=True)


def measured(part: str, setting: Setting, windows: int, options: argparse.Namespace) -> dict[str, Any]:
    from engram_lm.adapt.kept import ResultRows

    out = setting.out
    if part == "perplexity":
        from perplexity import Perplexity

        kept, run = (
            ResultRows(out / "perplexity", {"base": setting.base.sha256}),
            Perplexity(setting, windows, options.most),
        )
        run.run(kept)
        return run.results(kept)
    if part == "facts":
        from facts import measure_facts

        return measure_facts(setting, n=10 if setting.quick else 40)
    if part == "questions":
        from facts import ask_questions

        return ask_questions(
            setting, ResultRows(out / "questions", {"base": setting.base.sha256}), n=options.questions
        )
    if part == "living":
        from living import measure_living

        return measure_living(setting, times=6 if setting.quick else 24)
    if part == "lambdas":
        from lambdas import measure_lambdas

        return measure_lambdas(setting, windows, options.most)
    if part == "lora":
        from lora import measure_lora

        return measure_lora(setting, windows, options.most)
    from peer import measure_infini_gram

    return measure_infini_gram(setting, windows, options.infini_gram_python, options.most)


if __name__ == "__main__":
    main()
