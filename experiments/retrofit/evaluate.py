"""What each arm of the retrofit knows afterwards: facts, canaries, small benchmarks. Perplexity is in the arms' own results.

    python experiments/retrofit/evaluate.py --arms OUT/arms --text OUT/text --data DATA --out OUT/eval

One file an arm and measure, OUT/eval/ARM-SEED/MEASURE.json; what is there is not measured again. Arms that are finished later
are measured by the same command.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from engram_lm.eval import canaries, facts
from engram_lm.eval.circumstances import circumstances
from engram_lm.eval.measured import Measured, finished, save
from engram_lm.eval.subject import Subject

FACTS, CANDIDATES, REFERENCES, ITEMS = 80, 3, 63, 60
TASKS = ("lambada", "arc_easy", "piqa", "winogrande", "openbookqa")
# the benchmarks last: they take longest
MEASURES = ("facts", "canaries", "benchmarks")


def states_of(arm: str, measure: str) -> tuple[str, ...]:
    """Which states of the memory are measured. Off is the base: the arm `none`. LoRA and `continued` have no rows."""
    if arm in ("none", "lora", "continued"):
        return ("none",)
    return ("on", "shuffled") if (arm, measure) == ("memory", "canaries") else ("on",)


def measure(name: str, arm: str, subject: Subject, options: argparse.Namespace, out: Path) -> None:
    states, begun = states_of(arm, name), time.process_time()
    if name == "facts":
        asked = facts.read_facts([options.text / "facts.jsonl"], most=FACTS)
        settings = facts.settings(asked, states=states, candidates=CANDIDATES, seed=0)
        if finished(name, settings, out):
            return
        found = facts.facts_measured(subject, asked, states=states, candidates=CANDIDATES)
    elif name == "canaries":
        secrets = canaries.read(options.text / "canaries.jsonl")
        settings = canaries.settings(secrets, states=states, references=REFERENCES, seed=0)
        if finished(name, settings, out):
            return
        found = canaries.exposure(subject, secrets, states=states, references=REFERENCES)
    else:
        from engram_lm.eval import benchmarks
        from engram_lm.eval.tasks import find_benchmarks, read_items

        files = find_benchmarks([options.data / "probes"])
        tasks = {task: read_items(files[task], most=ITEMS) for task in TASKS}
        settings = benchmarks.settings(tasks, states=states, harness=benchmarks.require_harness())
        if finished(name, settings, out):
            return
        found = benchmarks.benchmarks(subject, tasks, states=states)
    more = {"circumstances": circumstances(), "cpu_seconds": round(time.process_time() - begun, 1)}
    save(Measured(**{**vars(found), "facts": found.facts | more}), out)
    print(f"{arm}: {name}, {found.seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--only", help="arms, with commas (all)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * options.minutes
    results = [json.loads(path.read_text(encoding="utf8")) for path in options.arms.glob("results/*.json")]
    # of most interest first
    order = ("memory", "lora", "none", "one-row", "shuffled", "frozen-random", "unigram", "continued", "bias")
    results.sort(key=lambda result: order.index(result["arm"]))
    if options.only:
        results = [result for result in results if result["arm"] in options.only.split(",")]
    wanted = options.measures.split(",")
    for names in (
        [name for name in wanted if name != "benchmarks"],
        [n for n in wanted if n == "benchmarks"],
    ):
        for result in results if names else []:
            stem = f"{result['arm']}-{result['seed']}"
            out = options.out / stem
            if all((out / f"{name}.json").exists() for name in names):
                continue
            name = "smollm2" if result["arm"] == "none" else str(options.arms / "runs" / stem)
            subject = Subject.load(name)
            for one in names:
                if time.monotonic() < until:
                    measure(one, result["arm"], subject, options, out)


if __name__ == "__main__":
    main()
