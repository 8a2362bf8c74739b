"""loss.png: the training loss and the held-out losses with memory and without, against tokens seen.

Below them, what memory is worth: the held-out loss without it minus the one with it, on its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.durable import replacing

INK, FAINT, GRID = "#222222", "#c9d3dd", "#e6e6e6"
WITH, WITHOUT, TRAIN = "#c0392b", "#5d6d7e", "#8fa6bf"


def draw_losses(records: Sequence[dict[str, Any]], path: Path, *, title: str, mode: str) -> None:
    """Draw the records of metrics.jsonl. Needs no display and leaves pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    held = [(r["tokens"], r["eval_loss"], r["eval_loss_off"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 5.4 if held else 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if held:
        axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    else:
        axes, below = figure.subplots(), None
    if train:
        _draw_training(axes, np.array(train))
    if held:
        without = "held out, memory off" + (" (the base)" if mode == "memory" else "")
        _draw_held_out(axes, below, np.array(held), without)
    axes.set_ylabel("loss, nats a token", color=INK)
    # of the figure, so that no curve ever runs under it
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    if train or held:
        axes.legend(
            frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0), ncol=4, borderaxespad=0.2
        )
    last = below or axes
    last.set_xlabel("tokens trained on", color=INK)
    last.xaxis.set_major_formatter(EngFormatter(sep=""))
    last.set_xlim(left=0)
    for each in (axes, below):
        if each is not None:
            each.margins(x=0.07)
            each.grid(axis="y", color=GRID, linewidth=0.8)
            each.tick_params(colors=INK, length=0)
            for side in ("top", "right", "left"):
                each.spines[side].set_visible(False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def _draw_training(axes: Any, points: np.ndarray) -> None:
    tokens, losses = points.T
    axes.plot(tokens, losses, color=FAINT, linewidth=0.9, zorder=1, label="training text")
    if len(losses) >= 20:
        width = max(3, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(
            tokens[width - 1 :], smooth, color=TRAIN, linewidth=1.6, zorder=2, label=f"its mean of {width}"
        )
    if len(losses) > 50:
        # the first steps of a run from scratch would flatten the rest
        axes.set_ylim(top=float(np.quantile(losses, 0.98)) + 0.05 * float(np.ptp(losses)))


def _draw_held_out(axes: Any, below: Any, points: np.ndarray, without: str) -> None:
    tokens, on, off = points.T
    dashes = (0, (5, 2))
    axes.plot(tokens, off, color=WITHOUT, linewidth=1.6, linestyle=dashes, zorder=3, label=without)
    axes.plot(
        tokens,
        on,
        color=WITH,
        linewidth=2,
        marker="o",
        markersize=4,
        zorder=4,
        label="held out, memory on",
    )
    # the lower value is named below its line, the higher one above
    for values, other, color in ((on, off, WITH), (off, on, WITHOUT)):
        is_lower = values[-1] <= other[-1] if values is on else values[-1] < other[-1]
        axes.annotate(
            f"{values[-1]:.3f}",
            (tokens[-1], values[-1]),
            xytext=(6, -4 if is_lower else 4),
            textcoords="offset points",
            va="top" if is_lower else "bottom",
            color=color,
            fontsize=9,
        )
    gain = off - on
    below.axhline(0, color=WITHOUT, linewidth=1.2, linestyle=dashes)
    below.plot(tokens, gain, color=WITH, linewidth=2, marker="o", markersize=4)
    below.annotate(
        f"{gain[-1]:+.3f}",
        (tokens[-1], gain[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=WITH,
        fontsize=9,
    )
    below.set_ylabel("memory's gain", color=INK)
