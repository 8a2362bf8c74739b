"""The tables of README.md and recall.png, drawn from the files in results/ and from nothing else.

$ python experiments/where_a_fact_lives/figures.py                               # results/ beside this file
$ python experiments/where_a_fact_lives/figures.py --from runs/proof/results     # copied there first

Each table stands in README.md between its marks and is written anew. `--size` says which of the sizes is drawn.
"""

import argparse
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE))

from book import BITS, BITS_PER_TOKEN
from tables import HUNDRED, TABLES, Told, read, runs_of

from models import ARMS

COLOURS = {
    "none": "#4d4d4d",
    "memory": "#c0392b",
    "mostly-memory": "#e67e22",
    "wide": "#2c6e9b",
}


def draw(told: dict[str, Told], path: Path) -> None:
    """Bits a parameter by arm; how they came with the exposures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), dpi=90, layout="constrained")
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
        for pattern in (f"{options.size}-*.json", "tuning-*.json", *(f"{name}-*.json" for name in HUNDRED)):
            for path in sorted(options.source.glob(pattern)):
                text = path.read_text(encoding="utf8").replace(str(options.source.parent), "OUT")
                (RESULTS / path.name).write_text(text, encoding="utf8")
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
