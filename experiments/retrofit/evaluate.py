"""What each arm of the retrofit knows afterwards, by `engram-lm eval`. Perplexity is in the arms' own results.

    python experiments/retrofit/evaluate.py --arms OUT/arms --text OUT/text --data DATA --out OUT/eval

OUT/eval/ARM-SEED holds one file a measure. The same command goes on after a stop, and measures arms that came later.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

TASKS = ("lambada_openai", "arc_easy", "piqa", "winogrande", "openbook_qa")
# of most interest first; the benchmarks of all arms last: they take longest
ARMS = ("memory", "lora", "none", "one-row", "shuffled", "frozen-random", "unigram", "continued", "bias")
WITHOUT_ROWS = ("none", "lora", "continued")


def measures(text: Path, data: Path) -> dict[str, list[str]]:
    """Measure -> options of `engram-lm eval`."""
    probes = [str(data / "probes" / f"{task}.jsonl.xz") for task in TASKS]
    return {
        "facts": ["--facts", str(text / "facts.jsonl"), "--most", "80", "--candidates", "3"],
        "canaries": ["--canaries", str(text / "canaries.jsonl"), "--references", "63"],
        "benchmarks": ["--benchmarks", *probes, "--most", "60"],
    }


def states(arm: str, measure: str) -> list[str]:
    """Which states of the memory are measured. Off is the base: the arm `none`."""
    if arm in WITHOUT_ROWS:
        return []
    return ["--memory", "on", *(["shuffled"] if (arm, measure) == ("memory", "canaries") else [])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("arms", "text", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    names = ["facts", "canaries", "benchmarks"]
    parser.add_argument("--measures", nargs="+", choices=names, default=names)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=ARMS, help="arms (all)")
    options = parser.parse_args()
    stems = {path.stem: json.loads(path.read_text())["arm"] for path in options.arms.glob("results/*.json")}
    run = str(Path(sys.executable).with_name("engram-lm"))
    for measure, wanted in measures(options.text, options.data).items():
        for stem, arm in sorted(stems.items(), key=lambda item: (ARMS.index(item[1]), item[0])):
            if measure in options.measures and arm in options.only:
                model = "smollm2" if arm == "none" else str(options.arms / "runs" / stem)
                arguments = [model, "--out", str(options.out / stem), *wanted, *states(arm, measure)]
                print(f"{stem}: {measure}", flush=True)
                one = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run([run, "eval", *arguments], check=True, env=one, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
