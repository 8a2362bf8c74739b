"""Curves of `engram-lm table simulate`: hit rate against cache size, a panel for each layer and number of slots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_lm.cachesim.simulate import Cache, Simulation
from engram_lm.durable import replacing
from engram_lm.errors import DataError
from engram_lm.extras import missing

INK, GRID = "#222222", "#e6e6e6"
ALL, STATIC, LIMIT = "#c0392b", "#5d6d7e", "#b8b8b8"
ORDERS = ("#1f6f8b", "#6aa84f", "#b07d2b", "#7d5ba6")
MARKS = {"lfu": ("s", "LFU with aging"), "tinylfu": ("^", "TinyLFU")}


def draw_curves(found: Sequence[Simulation], path: Path, *, title: str) -> None:
    """One PNG. Needs no display and leaves pyplot's state alone."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("--plot needs matplotlib", "hf") from error
    layers = list(dict.fromkeys(each.layer for each in found))
    slots = list(dict.fromkeys(each.slots for each in found))
    figure = Figure(figsize=(1.2 + 4 * len(slots), 1.2 + 3.2 * len(layers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(layers), len(slots), sharex=True, sharey=True, squeeze=False)
    for each in found:
        axes = panels[layers.index(each.layer)][slots.index(each.slots)]
        draw_simulation(axes, each)
        axes.set_title(f"layer {each.layer}, {each.slots} at a time", fontsize=9, color=INK, loc="left")
    panels[0][0].legend(frameon=False, fontsize=7.5, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.supxlabel("bytes of rows in the cache", fontsize=9, color=INK)
    figure.supylabel("hits, share of reads", fontsize=9, color=INK)
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def draw_simulation(axes: Any, found: Simulation) -> None:
    """All caches of one simulation into a panel."""
    from matplotlib.ticker import EngFormatter

    shared = found.caches["all"]
    _line(axes, shared, "lru", ALL, "LRU, all orders in one cache", linewidth=2.2)
    _line(axes, shared, "static", STATIC, "most read, with hindsight", linewidth=1.2, linestyle=(0, (4, 2)))
    if shared.curve[-1].pinned is not None:
        _line(axes, shared, "pinned", STATIC, "most read in the warm-up", linewidth=1.2)
    for name, (mark, label) in MARKS.items():
        points = [(point.bytes, getattr(point, name)) for point in shared.at.values()]
        points = [(size, rate) for size, rate in points if rate is not None]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=ALL, markersize=4, mfc="white", label=label)
    for (name, cache), color in zip(list(found.caches.items())[1:], ORDERS, strict=False):
        _line(axes, cache, "lru", color, f"LRU, {name} alone", linewidth=1.2)
    axes.axhline(shared.limit, color=LIMIT, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", places=0))
    axes.set_ylim(0, 1)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _line(axes: Any, cache: Cache, policy: str, color: str, label: str, **style: Any) -> None:
    sizes = [point.bytes for point in cache.curve]
    axes.plot(sizes, [getattr(point, policy) for point in cache.curve], color=color, label=label, **style)
