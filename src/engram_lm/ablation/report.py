"""All arms of an ablation side by side: ablation.md and ablation.png, from the result files alone.

    draw(out)                     # writes both, returns the Markdown

Perplexity is exp(mean loss); its interval, and that of an arm's change against memory, come from 1,000 draws of the
blocks, the same draws for both arms of a change, because both read the same blocks. Of several seeds the losses of a
block are averaged first, and the spread between seeds is written out.
"""

from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.ablation.plan import RETROFIT_ARMS, SCRATCH_ARMS
from engram_lm.ablation.run import read_results
from engram_lm.durable import replacing, write_atomic
from engram_lm.errors import CheckpointError
from engram_lm.eval.intervals import drawn, interval
from engram_lm.eval.tables import between, plain, signed, table

REPORT, PICTURE = "ablation.md", "ablation.png"

NAMES = {
    "memory": "memory",
    "one-row": "one row for all n-grams",
    "shuffled": "rows dealt anew each forward",
    "frozen-random": "frozen random rows",
    "unigram": "single tokens",
    "none": "no memory",
    "wide-ffn": "no memory, wider FFN",
    "fast-embedding": "no memory, embedding at 5×",
    "continued": "no memory, all weights trained on",
    "bias": "no memory, one bias a block",
    "lora": "no memory, LoRA",
}
INK, GRID, MEMORY, OTHER = "#222222", "#e6e6e6", "#c0392b", "#5d6d7e"


def draw(out: str | Path) -> str:
    """Write the table and the picture of what has a result so far. CheckpointError where nothing has."""
    out = Path(out)
    arms = by_arm(read_results(out))
    if not arms:
        raise CheckpointError(f"{out} holds no finished arm; run engram-lm ablate first.")
    text = markdown(arms)
    write_atomic(out / REPORT, text + "\n")
    draw_picture(arms, out / PICTURE)
    return text


def by_arm(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of each arm by rising seed, arms in the order of the tables."""
    order = dict.fromkeys((*SCRATCH_ARMS, *RETROFIT_ARMS))
    found = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"]) for arm in order}
    return {arm: rows for arm, rows in found.items() if rows}


def measured(rows: list[dict[str, Any]], text: str) -> tuple[np.ndarray, np.ndarray]:
    """(nats, predicted tokens) of each block of `text`, float64 [N], over the seeds of one arm."""
    sums_SN = np.array([row["losses"][text]["sums"] for row in rows])
    return sums_SN.mean(0), np.array(rows[0]["losses"][text]["counts"], float)


def perplexity(rows: list[dict[str, Any]], text: str) -> tuple[float, list[float] | None]:
    """Of one arm, with its interval."""
    sums_N, counts_N = measured(rows, text)
    return float(np.exp(sums_N.sum() / counts_N.sum())), interval(_draws(sums_N, counts_N), len(sums_N))


def change(
    rows: list[dict[str, Any]], than: list[dict[str, Any]], text: str
) -> tuple[float, list[float] | None]:
    """How much more perplexed one arm is than another: 0.1 for 10 % more; paired by block."""
    (sums_N, counts_N), (other_N, _) = measured(rows, text), measured(than, text)
    ratio = _draws(sums_N, counts_N) / _draws(other_N, counts_N) - 1
    return float(np.exp((sums_N - other_N).sum() / counts_N.sum()) - 1), interval(ratio, len(sums_N))


def _draws(sums_N: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    draw_DN = drawn(len(sums_N))
    return np.exp(sums_N[draw_DN].sum(1) / counts_N[draw_DN].sum(1))


def markdown(arms: dict[str, list[dict[str, Any]]]) -> str:
    """What was trained, and perplexity on every text."""
    texts = list(next(iter(arms.values()))[0]["losses"])
    rows = []
    for arm, results in arms.items():
        one = results[0]
        cells = [NAMES[arm], ", ".join(str(result["seed"]) for result in results)]
        if "steps" in one:
            cells += [
                counted(one["trained_parameters"]),
                f"{one['tables_mb']:.1f} MB" if one["tables_mb"] else "",
                f"{one['config']['learning_rate']:g}",
                f"{one['tokens']:,}",
            ]
        else:
            cells += ["0", "", "", "0"]
        for text in texts:
            value, ends = perplexity(results, text)
            cells.append(plain(value) + between(ends) + _spread(results, text))
            cells.append(_change(results, arms, arm, text))
        rows.append(cells)
    head = ["arm", "seeds", "trained (rows apart)", "rows", "rate", "tokens"]
    for text in texts:
        head += [f"perplexity, {text}", "than memory"]
    return table(head, rows)


def _change(results: list[dict[str, Any]], arms: dict[str, list[dict[str, Any]]], arm: str, text: str) -> str:
    if arm == "memory" or "memory" not in arms:
        return ""
    # of several seeds, the ones that both have
    seeds = {row["seed"] for row in results} & {row["seed"] for row in arms["memory"]}
    pair = [[row for row in rows if row["seed"] in seeds] for rows in (results, arms["memory"])]
    if not seeds:
        return ""
    value, ends = change(pair[0], pair[1], text)
    inside = "" if ends is None else f" ({signed(ends[0])[:-2]} to {signed(ends[1])[:-2]})"
    return signed(value) + inside


def counted(parameters: int) -> str:
    """0.60 M; few are written out."""
    return f"{parameters / 1e6:.2f} M" if parameters >= 50_000 else f"{parameters:,}"


def _spread(results: list[dict[str, Any]], text: str) -> str:
    if len(results) < 2:
        return ""
    return "; seeds " + ", ".join(plain(perplexity([row], text)[0]) for row in results)


def draw_picture(arms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel a text: each arm's perplexity with its interval, memory in red with a line through it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    texts = list(next(iter(arms.values()))[0]["losses"])
    figure = Figure(figsize=(3.2 + 2.6 * len(texts), 0.9 + 0.32 * len(arms)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        values = {arm: perplexity(results, text) for arm, results in arms.items()}
        if "memory" in values:
            axes.axvline(values["memory"][0], color=MEMORY, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
        for place, (arm, (value, ends)) in enumerate(values.items()):
            color = MEMORY if arm == "memory" else OTHER
            if ends is not None:
                axes.plot(ends, [place, place], color=color, linewidth=1.6)
            axes.plot([value], [place], marker="o", markersize=5, color=color)
        if max(v for v, _ in values.values()) > 3 * min(v for v, _ in values.values()):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(text, fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel("perplexity, 95 %", fontsize=8.5, color=INK)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.tick_params(colors=INK, length=0, labelsize=8.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
    panels[0].invert_yaxis()
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
