"""README's tables and arms.png from the result files in results/, each between its marks.

    python experiments/retrofit/tables.py                       # redraw
    python experiments/retrofit/tables.py --from OUT            # take the results of a run first, then redraw

results/ARM-SEED.json is what `engram-lm ablate` wrote, results/ARM-SEED/MEASURE.json what `engram-lm eval` wrote.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from engram_lm.ablation.report import NAMES, by_arm, change, counted, draw_picture, perplexity
from engram_lm.durable import write_atomic
from engram_lm.eval.result import Result, load
from engram_lm.eval.tables import between, plain, signed, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TEXTS = {"read": "read", "unseen": "unseen", "wikitext-2": "wikitext-2", "handbook": "handbook"}
REPEATS = ("never trained", "1 repeat", "4 repeats", "16 repeats", "64 repeats")

Arms = dict[str, list[dict[str, Any]]]


def take(source: Path) -> None:
    """Copy the results of a run; files of arms that it has not finished stay as they are."""
    RESULTS.mkdir(exist_ok=True)
    for path in sorted((source / "arms" / "results").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf8"))
        if "config" in data:
            data["config"]["data"] = [Path(name).name for name in data["config"]["data"]]
        data["command"] = data["command"].replace(f"{source}/", "OUT/")
        write_atomic(RESULTS / path.name, json.dumps(data, indent=None) + "\n")
    for path in sorted((source / "eval").glob("*/*.json")):
        (RESULTS / path.parent.name).mkdir(exist_ok=True)
        text = path.read_text(encoding="utf8").replace(f"{source}/", "OUT/")
        # other files by their names
        text = re.sub(r'(?<=[ "])/[^ "]+/([^/ "]+)', r"DATA/\1", text)
        write_atomic(RESULTS / path.parent.name / path.name, text)


def read_arms() -> Arms:
    return by_arm([json.loads(path.read_text(encoding="utf8")) for path in sorted(RESULTS.glob("*.json"))])


def measured(arm: str, measure: str, seed: int = 0) -> Result | None:
    path = RESULTS / f"{arm}-{seed}" / f"{measure}.json"
    return load(path) if path.exists() else None


# ---- tables -----------------------------------------------------------------------------------------------------------


def trained(arms: Arms) -> str:
    rows = []
    for arm, results in arms.items():
        one = results[0]
        if "steps" not in one:
            rows.append([NAMES[arm], "nothing", "", "", "", ""])
            continue
        cpu = one["tokens"] / max(one["cpu_seconds_of_last_call"], 1.0)
        rows.append([
            NAMES[arm], counted(one["trained_parameters"]), f"{one['tables_mb']:.0f} MB" if one["tables_mb"] else "",
            f"{one['config']['learning_rate']:g}", f"{one['tokens']:,}", f"{cpu:.0f}",
        ])  # fmt: skip
    return table(["arm", "trained weights", "rows", "rate", "tokens", "tokens a CPU second"], rows)


def perplexities(arms: Arms) -> str:
    rows = []
    for arm, results in arms.items():
        cells = [NAMES[arm]]
        for text in TEXTS:
            value, ends = perplexity(results, text)
            cell = plain(value) + between(ends)
            if arm != "none" and "none" in arms:
                than, than_ends = change(results, arms["none"], text)
                inside = f" ({signed(than_ends[0])[:-2]} to {signed(than_ends[1])[:-2]})" if than_ends else ""
                cell = f"{plain(value)}, {signed(than)}{inside}"
            cells.append(cell)
        rows.append(cells)
    return table(["arm", *(f"{name}" for name in TEXTS.values())], rows)


def _state(found: Result) -> str:
    """ "none" for a model without rows, else "on"."""
    return "none" if any(value.memory == "none" for value in found.values) else "on"


def share(found: Result, name: str, *, of: str, memory: str) -> str:
    one = found.value(name, of=of, memory=memory)
    ends = "" if one.interval is None else f" ({100 * one.interval[0]:.0f}–{100 * one.interval[1]:.0f})"
    return f"{100 * one.value:.0f} %{ends}"


def facts(arms: Arms) -> str:
    rows, base = [], None
    for arm in arms:
        found = measured(arm, "facts")
        if found is None:
            continue
        base, state = found, _state(found)
        rows.append([NAMES[arm], *_fact_cells(found, state)])
    if base is not None:
        rows.append(["the most common answer", *_fact_cells(base, "most common answer")])
    head = [
        "arm",
        "said, own words",
        "said, other words",
        "first among answers, own words",
        "the same, other words",
    ]
    return table(head, rows)


def _fact_cells(found: Result, state: str) -> list[str]:
    names = ("said in full", "first among answers")
    return [share(found, name, of=of, memory=state) for name in names for of in ("verbatim", "paraphrased")]


def secrets(arms: Arms) -> str:
    rows = []
    for arm in arms:
        found = measured(arm, "canaries")
        if found is None:
            continue
        for state in found.settings["states"]:
            cells = []
            for of in REPEATS:
                one = found.value("exposure, bits", of=of, memory=state)
                cells.append(f"{one.value:.1f}")
            name = NAMES[arm] + {"off": ", rows off", "shuffled": ", rows exchanged"}.get(state, "")
            rows.append([name, *cells])
    return table(["arm", *REPEATS], rows)


def small_benchmarks(arms: Arms) -> str:
    rows, names = [], []
    for arm in arms:
        found = measured(arm, "benchmarks")
        if found is None:
            continue
        state = _state(found)
        values = [value for value in found.values if value.memory == state and value.name == "acc"]
        names = [value.of for value in values]
        cells = [
            f"{100 * value.value:.0f}"
            + (
                ""
                if value.interval is None
                else f" ({100 * value.interval[0]:.0f}–{100 * value.interval[1]:.0f})"
            )
            for value in values
        ]
        mean = sum(value.value for value in values) / len(values)
        rows.append([NAMES[arm], *cells, f"{100 * mean:.1f}"])
    return table(["arm", *names, "mean"], rows) if rows else "Not measured yet."


TABLES = {
    "trained": trained, "perplexity": perplexities, "facts": facts, "benchmarks": small_benchmarks, "canaries": secrets,
}  # fmt: skip


def redraw(arms: Arms) -> None:
    path = HERE / "README.md"
    text = path.read_text(encoding="utf8")
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if not rest or end not in rest:
            raise SystemExit(f"{path} has no marks for {name}.")
        text = before + begin + make(arms) + end + after
    write_atomic(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, help="OUT of a run")
    options = parser.parse_args()
    if options.source:
        take(options.source)
    arms = read_arms()
    redraw(arms)
    draw_picture(arms, HERE / "arms.png")
    for name, make in TABLES.items():
        print(f"\n{name}\n{make(arms)}")


if __name__ == "__main__":
    main()
