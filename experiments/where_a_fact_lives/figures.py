"""The tables of README.md and recall.png, drawn from the files in results/ and from nothing else.

$ python experiments/where_a_fact_lives/figures.py                               # results/ beside this file
$ python experiments/where_a_fact_lives/figures.py --from runs/proof/results     # copied there first

Each table stands in README.md between its marks and is written anew. `--size` says which of the sizes is drawn.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE))

from book import BITS, BITS_PER_TOKEN

from models import ARMS

Told = dict[str, Any]
COLOURS = {
    "none": "#4d4d4d",
    "memory": "#c0392b",
    "mostly-memory": "#e67e22",
    "wide": "#2c6e9b",
    "experts-5x": "#7a8c2a",
}


def read(directory: Path, size: str) -> dict[str, Told]:
    """Result files of one size by what comes after the size in their names."""
    return {
        path.stem.removeprefix(f"{size}-"): json.loads(path.read_text(encoding="utf8"))
        for path in sorted(directory.glob(f"{size}-*.json"))
    }


def runs_of(told: dict[str, Told], arm: str) -> list[Told]:
    """The finished seeds of an arm, in order."""
    found = [one for name, one in told.items() if name.rpartition("-")[0] == arm]
    return sorted(found, key=lambda one: one["seed"])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def each(values: list[str]) -> str:
    """One number a seed."""
    return " / ".join(values)


# ---- arms ------------------------------------------------------------------------------------------------------------


def arms(told: dict[str, Told]) -> str:
    """Bits per parameter, with the interval of a bootstrap over entries, one number a seed."""
    rows = []
    for arm in ARMS.values():
        found = runs_of(told, arm.name)
        if not found:
            continue

        def per(one: Told, key: str) -> str:
            scale = one["size"]["entries"] / one["parameters"][key]
            asked = one["asked"]["plain"]["all"]
            low, high = (scale * end for end in asked["bits_interval"])
            return f"{scale * asked['bits']:.3f} ({low:.3f}–{high:.3f})"

        plain = [one["asked"]["plain"]["all"] for one in found]
        rows.append(
            [
                arm.title,
                each([per(one, "total") for one in found]),
                each([f"{one['bits_per_sparse_parameter']:.3f}" for one in found]),
                each([f"{one['bits']:.1f}" for one in plain]),
                each([f"{100 * one['full']:.1f} %" for one in plain]),
            ]
        )
    head = [
        "arm",
        "bits a parameter (95 %)",
        "bits a sparse parameter",
        f"bits an entry, of {BITS}",
        "said in full",
    ]
    return table(head, rows)


def forms(told: dict[str, Told]) -> str:
    """Bits an entry in each form of asking, means over the seeds."""
    rows = []
    for arm in ARMS.values():
        found = runs_of(told, arm.name)
        if not found:
            continue

        rows.append(
            [
                arm.title,
                _mean(found, "plain", "all"),
                *(
                    _mean(found, form, part)
                    for form in ("filler", "reworded")
                    for part in ("read so", "never read so")
                ),
                _mean(found, "filler-8", "all"),
            ]
        )
    head = [
        "arm", "after the name", "text between: read so", "never read so", "reworded: read so", "never read so",
        "8 tokens between, more than any in training",
    ]  # fmt: skip
    return table(head, rows)


def _mean(runs: list[Told], form: str, part: str) -> str:
    return f"{sum(one['asked'][form][part]['bits'] for one in runs) / len(runs):.1f}"


def accounting(told: dict[str, Told]) -> str:
    """What each arm has, and what it costs."""
    rows = []
    for arm in ARMS.values():
        for one in runs_of(told, arm.name)[:1]:
            numbers = one["parameters"]
            rows.append(
                [
                    arm.title,
                    *(
                        f"{numbers[key]:,}"
                        for key in ("total", "sparse", "rows", "active", "flops_per_token")
                    ),
                    each([f"{run['training']['cpu_seconds']:.0f}" for run in runs_of(told, arm.name)]),
                ]
            )
    head = ["arm", "parameters", "sparse", "of these rows", "active", "FLOPs a token", "CPU s of training"]
    return table(head, rows)


def rates(told: dict[str, Told]) -> str:
    """The tuning runs."""
    found = list(read(RESULTS, "tuning").values())
    tried = sorted({one["recipe"]["rate"] for one in found})
    rows = []
    for arm in ARMS.values():
        of = {one["recipe"]["rate"]: one for one in found if one["arm"]["name"] == arm.name}
        if of:
            cells = [
                f"{of[rate]['asked']['plain']['all']['bits']:.1f}" if rate in of else "" for rate in tried
            ]
            rows.append([arm.title, *cells])
    return table(["bits an entry at a rate of", *(f"{rate:g}" for rate in tried)], rows)


# ---- surgery ---------------------------------------------------------------------------------------------------------


def surgery(told: dict[str, Told]) -> str:
    """Necessity, sufficiency, transplant, for every operated model."""
    rows = []
    for arm in ARMS.values():
        for one in runs_of(told, f"surgery-{arm.name}"):
            who = f"{arm.title}, seed {one['seed']}"
            for scope, found in one["necessity"].items():
                rows.append(
                    _row(who, _zeroed(scope), found, found["own_bits_after"], found["own_still_full"])
                )
            for scope, found in one["sufficiency"].items():
                new = f"{found['new_bits']:.1f}; in full {found['new_said_in_full']} of {found['operations']}"
                rows.append(
                    _row(who, f"new bits written into rows at {scope}", found, found["old_bits"], 0, new)
                )
            found = one["transplant"]
            if found["operations"]:
                donor = f"the donor's {found['donor_bits']:.1f}; in full {found['donor_said_in_full']}"
                own = f"{found['own_bits']:.1f}; in full {found['own_said_in_full']} of {found['operations']}"
                rows.append([who, "a donor's rows in the name's places", "", own, donor, "", "", ""])
    head = [
        "model", "operation", "rows", "its own old bits after (before)", "its new bits",
        "watched entries that share a row", "bits these lost", "said in full before → after",
    ]  # fmt: skip
    return table(head, rows)


def _zeroed(scope: str) -> str:
    return "as many random rows zero" if scope == "random rows" else f"rows at {scope} zero"


def _row(who: str, what: str, found: Told, bits: float, full: int, new: str = "") -> list[str]:
    were, gone = found["sharing_were_full"], found["sharing_no_longer_full"]
    own = f"{bits:.1f} ({found['own_bits_before']:.1f})"
    if not new:
        own += f"; in full {full} of {found['operations']}"
    return [
        who, what, f"{found['rows_changed']:.0f}", own, new, f"{found['sharing_entries']:.0f} of {found['watched']}",
        f"{found['sharing_bits_lost']:.2f}", f"{were:,} → {were - gone:,}",
    ]  # fmt: skip


def whole(told: dict[str, Told]) -> str:
    """Memory on, off, exchanged; undo and disk."""
    rows = []
    for arm in ARMS.values():
        for one in runs_of(told, f"surgery-{arm.name}"):
            states = [one["whole"][state] for state in ("on", "off", "other rows")]
            apart = [*one["necessity"].values(), *one["sufficiency"].values()]
            equal = sum(found["apart_operations_bit_equal"] for found in apart)
            of = sum(found["apart_operations_compared"] for found in apart)
            rows.append(
                [
                    f"{arm.title}, seed {one['seed']}",
                    *(f"{state['bits']:.1f}; {100 * state['full']:.0f} %" for state in states),
                    f"{equal} of {of}",
                    "table and logits"
                    if one["undo"]["table_equal"] and one["undo"]["logits_equal"]
                    else "no",
                    f"{one['disk']['logits_compared']:,} logits" if one["disk"]["logits_equal"] else "no",
                ]
            )
    head = [
        "model", "memory on: bits an entry, in full", "off", "other rows",
        "operations after which entries without a changed row are bit-equal", "undo bit-equal", "from disk bit-equal",
    ]  # fmt: skip
    return table(head, rows)


# ---- picture ---------------------------------------------------------------------------------------------------------


def draw(told: dict[str, Told], path: Path) -> None:
    """Bits a parameter by arm; how they came with the exposures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    other_arms = False
    there = [arm for arm in ARMS.values() if runs_of(told, arm.name)]
    for place, arm in enumerate(there):
        colour = COLOURS.get(arm.name, "#a0a0a0")
        for run, one in enumerate(runs_of(told, arm.name)):
            scale = one["size"]["entries"] / one["parameters"]["total"]
            asked = one["asked"]["plain"]["all"]
            low, high = (scale * end for end in asked["bits_interval"])
            y = -place - 0.14 + 0.28 * run
            left.plot([low, high], [y, y], color=colour, linewidth=2)
            left.plot([scale * asked["bits"]], [y], "o", color=colour, markersize=5)
        runs = [one["training"]["loss"] for one in runs_of(told, arm.name)]
        exposures = runs_of(told, arm.name)[0]["size"]["exposures"]
        x = [(i + 0.5) * exposures / len(runs[0]) for i in range(len(runs[0]))]
        y = [
            BITS - BITS / BITS_PER_TOKEN * sum(parts) / len(runs) / math.log(2)
            for parts in zip(*runs, strict=True)
        ]
        style = "-" if arm.name in COLOURS else ":"
        grey = arm.name not in COLOURS
        label = ("the other arms" if not other_arms else None) if grey else arm.title
        other_arms |= grey
        right.plot(x, [max(one, 0) for one in y], style, color=colour, linewidth=1.6, label=label)
    left.set_yticks([-place for place in range(len(there))], [arm.title for arm in there])
    left.set_xlabel("bits recalled a parameter, asked right after the name (one point a seed)")
    left.set_xlim(left=0)
    left.set_ylim(0.5 - len(there), 0.5)
    right.set_xlabel("exposures of an entry")
    right.set_ylabel(f"bits an entry, of {BITS}, while reading")
    right.set_ylim(0, BITS)
    right.legend(fontsize=6.5, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    figure.savefig(path)


TABLES = {
    "arms": arms, "forms": forms, "accounting": accounting, "rates": rates, "surgery": surgery, "whole": whole,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", type=Path, help="OUT/results of run.py; its files are copied to results/"
    )
    parser.add_argument("--size", default="cpu")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if options.source is not None:
        for pattern in (f"{options.size}-*.json", "tuning-*.json"):
            for path in sorted(options.source.glob(pattern)):
                shutil.copyfile(path, RESULTS / path.name)
    told = read(RESULTS, options.size)
    if not told:
        raise SystemExit(
            f"{RESULTS} has no results of size {options.size!r}; run.py writes them, --from names where."
        )
    readme = (HERE / "README.md").read_text(encoding="utf8")
    for name, make in TABLES.items():
        made = make(told)
        print(f"## {name}\n\n{made}\n")
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin in readme and end in readme:
            before, rest = readme.split(begin)
            readme = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    (HERE / "README.md").write_text(readme, encoding="utf8")
    draw(told, HERE / "recall.png")


if __name__ == "__main__":
    main()
