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
BESIDE = {1: -0.15, 8: 0.0, 64: 0.15}  # intervals of one block stand beside each other


def draw(axes, rows, *, limit):
    """Median and interval of what the disk adds, with and without prefetch, by block."""
    for batch, colour in COLOURS.items():
        mine = [row for row in rows if row["batch"] == batch]
        for name, style in (("disk", "-"), ("disk, no prefetch", ":")):
            added = [row[name]["added_share"] for row in mine]
            axes.errorbar(
                [row["block"] + BESIDE[batch] + (0.05 if style == ":" else 0) for row in mine],
                [100 * one["median"] for one in added],
                yerr=[
                    [100 * (one["median"] - one["low"]) for one in added],
                    [100 * (one["high"] - one["median"]) for one in added],
                ],
                color=colour,
                linestyle=style,
                marker="o",
                ms=4,
                capsize=2,
                label=f"batch {batch}" + (", no prefetch" if style == ":" else ""),
            )
    axes.axhline(100 * limit, color="black", linewidth=0.8)
    first, last = min(row["block"] for row in rows), max(row["block"] for row in rows)
    axes.set_xlim(first - 0.6, last + 0.6)
    axes.text(last + 0.6, 100 * limit, "wanted: 1 % ", va="bottom", ha="right", fontsize=7)
    axes.set_xlabel("block that the memory enters before")
    axes.set_xticks(sorted({row["block"] for row in rows}))
    axes.spines[["top", "right"]].set_visible(False)


def main():
    found = json.loads((ROOT / "benchmarks" / "results" / "tables.json").read_text(encoding="utf8"))
    found = found["generation"]
    rows = found["found"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(
        1, len(models), figsize=(3.8 * len(models), 3.3), dpi=110, sharey=True, squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        draw(axes, [row for row in rows if row["model"] == model], limit=found["at_most_added"])
        axes.set_title(f"Llama {model}, random weights", fontsize=9)
    panels[0, 0].set_ylabel("added to a decode step, %")
    panels[0, 0].set_yscale("symlog", linthresh=2)
    panels[0, 0].set_yticks([-1, 0, 1, 2, 5, 10, 20, 50], ["-1", "0", "1", "2", "5", "10", "20", "50"])
    panels[0, -1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(ROOT / "docs" / "generation-from-disk.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
