"""Draw benchmarks/results/tables.json: what reading rows from disk adds to a decode step, by block and batch.

python benchmarks/draw_tables.py            # writes docs/generation-from-disk.png
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {1: "#b3261e", 8: "#33658a", 64: "#5b7553"}


def main():
    found = json.loads((ROOT / "benchmarks" / "results" / "tables.json").read_text(encoding="utf8"))["disk"]
    rows = found["generation"]["found"]
    figure, axes = plt.subplots(figsize=(6.4, 3.4), dpi=110)
    for batch, colour in COLOURS.items():
        mine = [row for row in rows if row["batch"] == batch]
        blocks = [row["block"] for row in mine]
        for name, style in (("disk", "-"), ("disk, no prefetch", ":")):
            added = [row[name]["added_share"] for row in mine]
            middle = [100 * one["median"] for one in added]
            spread = [
                [100 * (one["median"] - one["low"]) for one in added],
                [100 * (one["high"] - one["median"]) for one in added],
            ]
            label = f"batch {batch}" + (", no prefetch" if style == ":" else "")
            axes.errorbar(
                blocks,
                middle,
                yerr=spread,
                color=colour,
                linestyle=style,
                marker="o",
                ms=4,
                capsize=2,
                label=label,
            )
    axes.axhline(100 * found["generation"]["at_most_added"], color="black", linewidth=0.8)
    axes.text(5.5, 0.6, "wanted: 1 %", ha="center", va="top", fontsize=7)
    axes.set_xlabel("block that the memory enters before (of 8)")
    axes.set_ylabel("added to a decode step, %")
    axes.set_xticks(blocks)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    figure.savefig(ROOT / "docs" / "generation-from-disk.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
