"""Draws curves.png and length.png from results.json, and prints the tables of README.md.

python experiments/cache_simulation/draw.py
"""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from engram_lm.cachesim.report import readable_bytes

HERE = Path(__file__).resolve().parent
INK, GRID, STATIC, LIMIT = "#222222", "#e6e6e6", "#5d6d7e", "#b8b8b8"
SLOTS = {1: "#f0a29a", 8: "#d9564a", 64: "#8e1b10"}
ORDERS = {"2-gram": "#1f6f8b", "3-gram": "#6aa84f", "4-gram": "#b07d2b"}
TEXTS = ("encyclopaedia", "textbook", "chinese", "handbook")
PROFILES = ("deepseek-v4.1", "qwen-ple")


def main() -> None:
    runs = json.loads((HERE / "results.json").read_text())["runs"]
    draw_main([run for run in runs if run["settings"]["group"] == "main"])
    length = [run for run in runs if run["settings"]["group"] == "length"]
    if length:
        draw_length(length)
    print_needed(runs)
    print_policies(runs)
    print_lengths(runs)
    print_rest(runs)


def find(runs: list[dict], **wanted) -> dict | None:
    for run in runs:
        if all(run["settings"].get(name) == value for name, value in wanted.items()):
            return run
    return None


def panel(axes, title: str) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B", places=0))
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, length=0, labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def save(figure: Figure, name: str, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.supxlabel("bytes of rows in one layer's cache", fontsize=9, color=INK)
    figure.supylabel("hits, share of reads", fontsize=9, color=INK)
    figure.savefig(HERE / name, format="png")


def draw_main(runs: list[dict]) -> None:
    figure = Figure(figsize=(14, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PROFILES), len(TEXTS), sharex=True, sharey=True)
    for row, profile in zip(panels, PROFILES, strict=True):
        for axes, text in zip(row, TEXTS, strict=True):
            panel(axes, f"{text}, {profile}")
            found = {slots: find(runs, profile=profile, text=text, slots=slots) for slots in SLOTS}
            draw_panel(axes, {slots: run["caches"] for slots, run in found.items() if run is not None})
    panels[0][0].legend(frameon=False, fontsize=7, loc="upper left")
    save(figure, "curves.png", "Row caches on real text, second half of each stream")


def draw_panel(axes, caches: dict[int, dict]) -> None:
    """LRU for every number of slots; the other policies and the orders for 8."""
    for slots, of_run in caches.items():
        curve = of_run["all"]["curve"]
        label = f"LRU, {slots} at a time"
        axes.plot(curve["bytes"], curve["lru"], color=SLOTS[slots], linewidth=2, label=label)
    if 8 not in caches:
        return
    shared = caches[8]["all"]
    curve, grey = shared["curve"], {"color": STATIC, "linewidth": 1.2}
    marked = {"color": SLOTS[8], "mfc": "white", "markersize": 5, "linestyle": ""}
    sizes = [point["bytes"] for point in shared["at"]]
    for policy, mark, label in (("lfu", "s", "LFU with aging, 8"), ("tinylfu", "^", "TinyLFU, 8")):
        axes.plot(sizes, [point[policy] for point in shared["at"]], marker=mark, label=label, **marked)
    axes.plot(curve["bytes"], curve["pinned"], label="pinned: most read in the warm-up", **grey)
    dashes = (0, (4, 2))
    axes.plot(curve["bytes"], curve["static"], linestyle=dashes, label="most read, with hindsight", **grey)
    axes.axhline(shared["limit"], color=LIMIT, linewidth=1, linestyle=":")
    for name, hue in ORDERS.items():
        if name in caches[8]:
            alone = caches[8][name]["curve"]
            axes.plot(alone["bytes"], alone["lru"], color=hue, linewidth=1, label=f"LRU, {name} alone, 8")


def draw_length(runs: list[dict]) -> None:
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, profile in zip(figure.subplots(1, 2, sharex=True, sharey=True), PROFILES, strict=True):
        panel(axes, f"encyclopaedia, {profile}, 64 at a time")
        found = [
            r
            for r in runs
            if r["settings"]["profile"] == profile and r["settings"]["text"] == "encyclopaedia"
        ]
        for run, color in zip(found, ("#f7c6c0", "#f0a29a", "#d9564a", "#8e1b10"), strict=False):
            curve = run["caches"]["all"]["curve"]
            label = f"LRU, {run['tokens'] / 1e6:.2g} M tokens"
            axes.plot(curve["bytes"], curve["lru"], color=color, linewidth=2, label=label)
            axes.axhline(run["caches"]["all"]["limit"], color=color, linewidth=1, linestyle=":")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    save(
        figure, "length.png", "The same cache on longer streams; dotted: no cache that starts empty hits more"
    )


def size(n_bytes: int | None) -> str:
    return "never" if n_bytes is None else readable_bytes(n_bytes)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_needed(runs: list[dict]) -> None:
    """What each text needs, at 1, 8 and 64 requests at a time."""
    rows = []
    for profile in PROFILES:
        for text in TEXTS:
            of_text = [find(runs, group="main", profile=profile, text=text, slots=slots) for slots in SLOTS]
            caches = [run["caches"] for run in of_text if run is not None]
            names = [name for name in caches[0] if name != "all"]
            everything = caches[0]["all"]["entries"] * caches[0]["all"]["bytes_per_entry"]
            share = everything / of_text[0]["table_bytes"]
            rows.append(
                [
                    f"{profile}, {text}",
                    " / ".join(size(each["2-gram"]["needed"]["0.5"]) for each in caches),
                    " / ".join(size(each["3-gram"]["needed"]["0.5"]) for each in caches),
                    " / ".join(size(each["all"]["needed"]["0.5"]) for each in caches),
                    " / ".join(percent(caches[0][name]["limit"]) for name in names),
                    " / ".join(percent(each["all"]["limit"]) for each in caches),
                    f"{size(everything)}, {100 * share:.1f} %",
                ]
            )
    orders = ["50 % of 2-grams", "50 % of 3-grams", "50 % of all"]
    print_table(["", *orders, "ceiling by order", "ceiling of all", "all rows read"], rows)


def print_policies(runs: list[dict]) -> None:
    """Policies against sizes on the encyclopaedia, for 1, 8 and 64 requests at a time."""
    rows = []
    for profile in PROFILES:
        of_text = [
            find(runs, group="main", profile=profile, text="encyclopaedia", slots=slots) for slots in SLOTS
        ]
        at = [run["caches"]["all"]["at"] for run in of_text]
        for k, point in enumerate(at[0]):
            share = f"{100 * point['budget'] / of_text[0]['table_bytes']:.3f} %"
            cells = [
                " / ".join(percent(each[k][policy]) for each in at)
                for policy in ("lru", "lfu", "tinylfu", "pinned", "static", "whole_steps")
            ]
            rows.append([profile, f"{size(point['budget'])}, {share}", *cells])
    print_table(["", "cache", "LRU", "LFU", "TinyLFU", "pinned", "hindsight", "whole steps"], rows)


def print_lengths(runs: list[dict]) -> None:
    rows = []
    for run in runs:
        settings, shared = run["settings"], run["caches"]["all"]
        if settings["group"] != "length":
            continue
        at = {point["budget"]: point for point in shared["at"]}
        everything = shared["entries"] * shared["bytes_per_entry"]
        rows.append(
            [
                f"{settings['profile']}, {settings['text']}",
                f"{run['tokens'] / 1e6:.2f} M",
                " / ".join(percent(at[budget]["lru"]) for budget in (32 * 10**6, 256 * 10**6, 2 * 10**9)),
                " / ".join(percent(at[budget]["pinned"]) for budget in (32 * 10**6, 256 * 10**6, 2 * 10**9)),
                " / ".join(size(shared["needed"][target]) for target in ("0.5", "0.8", "0.9")),
                percent(shared["limit"]),
                f"{size(everything)}, {100 * everything / run['table_bytes']:.1f} %",
            ]
        )
    sizes = "at 32 MB / 256 MB / 2 GB"
    head = [
        "",
        "tokens",
        f"LRU {sizes}",
        f"pinned {sizes}",
        "LRU for 50 / 80 / 90 %",
        "ceiling",
        "all rows read",
    ]
    print_table(head, rows)


def print_rest(runs: list[dict]) -> None:
    """One line a run that changes one thing."""
    rows = []
    for run in runs:
        settings, shared = run["settings"], run["caches"]["all"]
        if settings["group"] in ("main", "length"):
            continue
        named = {k: v for k, v in settings.items() if k not in ("group", "profile", "text", "slots")}
        told = ", ".join(f"{name} {value}" for name, value in named.items())
        rows.append(
            [
                f"{settings['group']}: {settings['text']}" + (f" ({told})" if told else ""),
                str(settings["slots"]),
                *(
                    " / ".join(percent(point[policy]) if policy in point else "–" for point in shared["at"])
                    for policy in ("lru", "lfu", "tinylfu", "pinned")
                ),
                percent(shared["limit"]),
                percent(run["merged"]),
            ]
        )
    print_table(["run", "at a time", "LRU", "LFU", "TinyLFU", "pinned", "ceiling", "merged"], rows)


if __name__ == "__main__":
    main()
