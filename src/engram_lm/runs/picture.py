"""loss.png: the training loss and the held-out losses with memory and without, against tokens seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK, FAINT, GRID = "#222222", "#b9c4d0", "#e6e6e6"
WITH, WITHOUT, TRAIN = "#c0392b", "#5d6d7e", "#9fb3c8"


def draw_losses(records: Sequence[dict[str, Any]], path: Path, *, title: str, mode: str) -> None:
    """Draw the records of metrics.jsonl. Needs no display and leaves pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    held = [(r["tokens"], r["eval_loss"], r["eval_loss_off"]) for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        tokens, losses = np.array(train).T
        axes.plot(tokens, losses, color=FAINT, linewidth=0.9, zorder=1, label="training text")
        if len(losses) >= 20:
            width = max(3, len(losses) // 20)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axes.plot(
                tokens[width - 1 :], smooth, color=TRAIN, linewidth=1.6, zorder=2, label=f"mean of {width}"
            )
    if held:
        tokens, on, off = np.array(held).T
        without = "held-out text, memory off" + (" (the base)" if mode == "memory" else "")
        axes.plot(tokens, off, color=WITHOUT, linewidth=1.6, linestyle=(0, (5, 2)), zorder=3, label=without)
        axes.plot(
            tokens,
            on,
            color=WITH,
            linewidth=2,
            marker="o",
            markersize=4,
            zorder=4,
            label="held-out text, memory on",
        )
        last = (tokens[-1], on[-1])
        axes.annotate(
            f"{on[-1]:.3f}",
            last,
            xytext=(6, -4),
            textcoords="offset points",
            color=WITH,
            va="top",
            fontsize=9,
        )
        axes.annotate(
            f"{off[-1]:.3f}",
            (tokens[-1], off[-1]),
            xytext=(6, 4),
            textcoords="offset points",
            color=WITHOUT,
            fontsize=9,
        )
    values = np.array([value for _, *pair in [*train, *held] for value in pair])
    if len(values):
        low, high = values.min(), np.quantile(values, 0.98) if len(values) > 50 else values.max()
        margin = max(0.05 * (high - low), 0.01)
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("tokens trained on", color=INK)
    axes.set_ylabel("loss, nats a token", color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if train or held:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png")
    os.replace(beside, path)
