"""Tables of what run.py measured, results.json and perplexity.png beside this file.

$ python experiments/instant_adaptation/tables.py runs/adaptation            # tables here, in README.md, results.json

Between its marks in README.md each table is written anew. results.json holds a part for each file of OUT/full/results, with
the commit and machine that it was made with.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_lm.eval.tables import between, plain, signed, table

HERE = Path(__file__).parent
NAMES = {
    "alone": "model alone", "fixed": "memory, λ 0.3", "memory": "memory, gate", "retrieval": "retrieval in the prompt",
    "both": "both", "oracle": "oracle passage in the prompt", "memory 0.3": "memory, λ 0.3",
    "memory top 3": "memory of the 3 best documents", "lora": "LoRA", "infini-gram": "infini-gram, same gate",
}  # fmt: skip
KINDS = (
    "handbook indexed",
    "handbook unseen",
    "articles indexed",
    "articles unseen",
    "factbook indexed",
    "factbook unseen",
)
GENERAL = ("wikitext2-test", "textbooks")
SIZES = ("1", "10", "100", "all")

Part = dict[str, Any]


def read(directory: Path) -> dict[str, Part]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf8")) for path in sorted(directory.glob("*.json"))
    }


def percent(share: float | None, ends: list[float] | None = None) -> str:
    if share is None:
        return ""
    inside = "" if ends is None else f" ({100 * ends[0]:.0f}–{100 * ends[1]:.0f})"
    return f"{100 * share:.0f} %{inside}"


# ---- perplexity -------------------------------------------------------------------------------------------------------


def by_size(parts: dict[str, Part]) -> str:
    """Perplexity of memory with the gate against the size of the index."""
    groups = parts["perplexity"]["groups"]
    by = {(one["domain"], one["kind"], one["arm"], one["index"]): one for one in groups}
    rows = []
    for name in KINDS:
        domain, kind = name.split()
        cells = [by.get((domain, kind, "memory", f"{domain} {size}")) for size in SIZES]
        alone = by.get((domain, kind, "alone", ""))
        if alone:
            rows.append(
                [
                    name,
                    f"{alone['windows']}",
                    plain(alone["perplexity"]) + between(alone["interval"]),
                    *map(change, cells),
                ]
            )
    for domain in GENERAL:
        for index in ("handbook", "articles", "factbook"):
            cells = [by.get((domain, "general", "memory", f"{index} {size}")) for size in SIZES]
            alone = by.get((domain, "general", "alone", ""))
            if alone and any(cells):
                before = plain(alone["perplexity"]) + between(alone["interval"])
                rows.append([f"{domain}, index {index}", f"{alone['windows']}", before, *map(change, cells)])
    return table(["text", "texts", "alone", *(f"{size} indexed" for size in SIZES)], rows)


def change(one: Part | None) -> str:
    if one is None:
        return ""
    ends = one["change_interval"]
    inside = "" if ends is None else f" ({signed(ends[0])[:-2]} to {signed(ends[1])[:-2]})"
    return f"{plain(one['perplexity'])}, {signed(one['change'])}{inside}"


def by_arm(parts: dict[str, Part]) -> str:
    """Every arm with the whole index."""
    groups = list(parts["perplexity"]["groups"])
    groups += parts.get("infini-gram", {}).get("groups", [])
    columns = [*(tuple(name.split()) for name in KINDS), *((domain, "general") for domain in GENERAL)]
    rows = []
    for arm in ("alone", "fixed", "memory", "infini-gram", "retrieval", "both"):
        of = [
            one for one in groups if one["arm"] == arm and (arm == "alone" or one["index"].endswith(" all"))
        ]
        if not of:
            continue
        cells = []
        for domain, kind in columns:
            found = [one for one in of if (one["domain"], one["kind"]) == (domain, kind)]
            # general text stands beside several indexes: the handbook's
            found = [
                one
                for one in found
                if one["index"].startswith(("handbook", "")[kind != "general" or arm == "alone"])
            ]
            cells.append(plain(found[0]["perplexity"]) if found else "")
        own = [one for one in of if one["kind"] != "general"]
        tokens = sum(one["prompt_tokens"] for one in own) / len(own)
        ms = [1e3 * sum(one[f"{part}_seconds"] for one in own) / len(own) for part in ("model", "memory")]
        rows.append(
            [
                NAMES[arm],
                *cells,
                f"{tokens:.0f}",
                f"{ms[0]:,.0f} + {ms[1]:,.0f}" if arm != "infini-gram" else "",
            ]
        )
    head = ["arm", *(f"{domain} {kind}" if kind != "general" else domain for domain, kind in columns)]
    return table([*head, "prompt tokens", "CPU ms a text: model + memory"], rows)


def draw(parts: dict[str, Part], path: Path) -> None:
    """What an index of n documents changes: unseen documents of its kind, and general text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [one for one in parts["perplexity"]["groups"] if one["arm"] == "memory"]
    documents = {name: one["documents"] for name, one in parts["perplexity"]["indexes"].items()}
    colours = {"handbook": "#c0392b", "articles": "#2c6e9b", "factbook": "#7a8c2a"}
    figure = Figure(figsize=(9.0, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, 2), ("unseen", "general"), strict=True):
        for index, colour in colours.items():
            for domain, style in (
                ((index, "-"),) if kind == "unseen" else zip(GENERAL, ("-", "--"), strict=True)
            ):
                of = [
                    one
                    for one in groups
                    if (one["domain"], one["kind"]) == (domain, kind) and one["index"].startswith(index)
                ]
                of.sort(key=lambda one: documents[one["index"]])
                if not of:
                    continue
                x = [documents[one["index"]] for one in of]
                name = index if kind == "unseen" else f"{domain}, index: {index}"
                axes.plot(
                    x,
                    [100 * one["change"] for one in of],
                    style,
                    color=colour,
                    marker="o",
                    markersize=4,
                    linewidth=1.6,
                    label=name,
                )
                if kind == "unseen" and all(one["change_interval"] for one in of):
                    low, high = zip(*(one["change_interval"] for one in of), strict=True)
                    axes.fill_between(
                        x,
                        [100 * end for end in low],
                        [100 * end for end in high],
                        color=colour,
                        alpha=0.12,
                        linewidth=0,
                    )
        axes.axhline(
            0.5 if kind == "general" else 0,
            color="#222222" if kind == "general" else "#999999",
            linewidth=0.8,
            linestyle=":",
        )
        if kind == "general":
            axes.text(1, 0.5, "the bound, +0.5 %", fontsize=8, va="bottom", color="#222222")
        axes.set_xscale("log")
        axes.xaxis.set_ticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        axes.set_title(
            "documents left out of the index" if kind == "unseen" else "general text",
            fontsize=10,
            loc="left",
            color="#222222",
        )
        axes.set_xlabel("documents in the index", color="#222222")
        axes.set_ylabel("perplexity, % against the model alone", color="#222222")
        axes.grid(color="#ececec", linewidth=0.8)
        axes.tick_params(colors="#222222", length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5, handlelength=3.2)
    figure.savefig(path, format="png")


# ---- facts ------------------------------------------------------------------------------------------------------------

COLUMNS = (
    ("true", "verbatim", "true", "verbatim"),
    ("true", "paraphrased", "true", "in other words"),
    ("contradicted", "verbatim", "other", "contradicted: says the document"),
    ("contradicted", "verbatim", "true", "contradicted: says the truth"),
    ("contradicted", "paraphrased", "other", "in other words: says the document"),
    ("corrected", "verbatim", "true", "corrected"),
)


def facts(parts: dict[str, Part], source: str = "all") -> str:
    by = {
        (one["source"], one["state"], one["wording"], one["said"], one["arm"]): one
        for one in parts["facts"]["groups"]
    }
    rows = []
    for arm in ("alone", "memory", "memory 0.3", "memory top 3", "retrieval", "both", "oracle"):
        cells = [by.get((source, state, wording, said, arm)) for state, wording, said, _ in COLUMNS]
        known = [cell for cell in cells if cell]
        if known:
            ms = [
                1e3 * sum(cell[f"{part}_seconds"] for cell in known) / len(known)
                for part in ("model", "memory")
            ]
            rows.append([
                NAMES[arm], *(percent(cell["share"], cell["interval"]) if cell else "" for cell in cells),
                f"{known[0]['prompt_tokens']:.0f}", f"{ms[1]:.1f}",
            ])  # fmt: skip
    return table(["arm", *(name for *_, name in COLUMNS), "prompt tokens", "memory, ms a token"], rows)


def questions(parts: dict[str, Part]) -> str:
    rows = []
    for arm in ("alone", "memory", "retrieval", "both", "oracle"):
        of = {one["source"]: one for one in parts["questions"]["groups"] if one["arm"] == arm}
        if of:
            cells = [
                percent(of[source]["share"], of[source]["interval"]) if source in of else ""
                for source in ("all", "articles", "factbook")
            ]
            rows.append(
                [
                    NAMES[arm] if arm != "memory" else "memory, pointing",
                    *cells,
                    f"{of['all']['prompt_tokens']:.0f}",
                    f"{of['all']['seconds']:.1f}",
                ]
            )
    n = max(one["questions"] for one in parts["questions"]["groups"])
    return table(["arm", f"answered of {n}", "articles", "factbook", "prompt tokens", "CPU seconds"], rows)


def abstaining(parts: dict[str, Part]) -> str:
    rows = [
        [
            NAMES.get(one["arm"], one["arm"]), one["document"], f"{one['facts']}", f"{one['threshold']:.2f}",
            *(percent(one[name]) for name in ("correct", "confident wrong", "abstained", "wrong without abstaining")),
        ]
        for one in parts["facts"]["abstaining"]
    ]  # fmt: skip
    return table(
        [
            "arm",
            "document",
            "facts",
            "threshold",
            "correct",
            "confidently wrong",
            "abstained",
            "wrong if it may not abstain",
        ],
        rows,
    )


# ---- the rest ---------------------------------------------------------------------------------------------------------


def lora(parts: dict[str, Part]) -> str:
    """A fine-tune beside memory of the same data."""
    part = parts["lora"]
    by = {(one["arm"], one["domain"], one["kind"]): one for one in part["groups"]}
    told = {(one["arm"], one["wording"]): one for one in part["facts"]}
    for one in parts["facts"]["groups"]:
        if (one["source"], one["state"], one["said"]) == ("factbook", "true", "true"):
            told[one["arm"], one["wording"]] = one
    columns = [("handbook", "indexed"), ("handbook", "unseen"), *((domain, "general") for domain in GENERAL)]
    rows = []
    for arm in ("alone", "memory", "lora"):
        cells = [by["lora" if arm == "alone" else arm, *column] for column in columns]
        found = [told.get((arm, wording)) for wording in ("verbatim", "paraphrased")]
        took = f"{part['training']['cpu_seconds']:,.0f} s" if arm == "lora" else ""
        rows.append([
            NAMES[arm], *(plain(cell["alone" if arm == "alone" else "perplexity"]) for cell in cells),
            *(percent(one["share"], one["interval"]) if one else "" for one in found), took,
        ])  # fmt: skip
    head = [
        "arm",
        "the excerpts",
        "other pages",
        *GENERAL,
        "facts, verbatim",
        "in other words",
        "learning, CPU",
    ]
    about = part["training"]
    return table(head, rows) + (
        f"\n\n{about['tokens']:,} tokens, {about['epochs']} passes, {about['trained_parameters']:,} trained parameters, "
        f"{about['more_memory_MB']:,} MB more memory; loss {about['first_loss']:.2f} to {about['last_loss']:.2f}."
    )


def costs(parts: dict[str, Part]) -> str:
    """What it takes to know documents, by arm."""
    about, peer, tuning = parts["facts"]["about the documents"], parts.get("infini-gram"), parts.get("lora")
    tokens, size = about["tokens"], about["index bytes"]
    rows = [
        [
            "memory",
            f"{tokens:,}",
            f"{about['build, CPU seconds']:.1f} s",
            f"{size / 1e6:.1f} MB",
            f"{size / tokens:.1f}",
            "0",
        ],
        [
            "retrieval (BM25 over the index)",
            f"{tokens:,}",
            f"{about['BM25, CPU seconds']:.1f} s",
            "",
            "",
            "see above",
        ],
    ]
    if peer:
        for name, one in peer["indexes"].items():
            size, tokens = one["bytes"], one["tokens"]
            rows.append([
                f"infini-gram, {name}", f"{tokens:,}", f"{one['seconds']:.1f} s, from token ids", f"{size / 1e6:.1f} MB",
                f"{size / tokens:.1f}", "0",
            ])  # fmt: skip
    if tuning:
        one = tuning["training"]
        size = 4 * one["trained_parameters"]
        tokens, took = one["tokens"], one["cpu_seconds"]
        rows.append(
            ["LoRA", f"{tokens:,}", f"{took:.0f} s", f"{size / 1e6:.1f} MB", f"{size / tokens:.0f}", "0"]
        )
    return table(["arm", "tokens", "to learn them, CPU", "on disk", "bytes a token", "prompt tokens"], rows)


def living(parts: dict[str, Part]) -> str:
    part = parts["living"]
    rows = [
        [told, *(f"{1e3 * part[name][of]:.1f} ms" for of in ("median", "p90", "most"))]
        for name, told in (
            ("add_seconds", "`add`, durable"),
            ("seconds_to_changed_if_asked_at_once", "`add` to a changed probability, asked at once"),
            ("seconds_to_changed_step", "`add` to the first changed step of a running generator"),
            ("step_seconds", "a step of that generator"),
        )
    ]
    p, gone = part["probability of the new word, median"], part["after delete"]
    return table(["", "median", "p90", "most"], rows) + (
        f"\n\n{part['repeats']} times; the new word's probability: {p['p_before']:.1e}, then {p['p_after']:.2f} (median). "
        f"{gone['documents added and deleted']} documents added and deleted: of {gone['numbers compared']:,} (log-)"
        f"probabilities {gone['differ while the documents are there']:,} differed while they were there, "
        f"{gone['differ after delete']} after `delete`, {gone['differ after a merge']} after a merge."
    )


def lambdas(parts: dict[str, Part]) -> str:
    part = parts["lambdas"]
    rows = []
    for kind, of in part["by frequency"].items():
        for measure in ("token", "trigram"):
            for one in of[measure]:
                rows.append([
                    kind, measure, f"{one['from']:,}–{one['to']:,}", f"{one['positions']:,}", f"{one['mean lambda']:.3f}",
                    f"{one['mean gain, nats']:+.3f}",
                ])  # fmt: skip
    first = table(["text", "frequency of the", "occurs", "positions", "mean λ", "gain, nats"], rows)
    rows = [
        [
            name,
            f"{one['prompts']}",
            f"{one['mean lambda']:.4f}",
            f"{one['largest']:.3f}",
            f"{one['mean gain, nats']:+.4f}",
        ]
        for name, one in part["arithmetic"].items()
    ]
    return f"{first}\n\n{table(['index', 'sums', 'mean λ', 'largest λ', 'gain, nats'], rows)}"


def summary(parts: dict[str, Part]) -> str:
    """Model alone, retrieval, memory: the table of the main README."""
    groups = parts["perplexity"]["groups"]
    by = {(one["domain"], one["kind"], one["arm"], one["index"]): one for one in groups}
    arms = ("alone", "retrieval", "memory", "both")

    def perplexity(domain: str, kind: str, arm: str) -> str:
        index = "" if arm == "alone" else f"{domain if kind != 'general' else 'handbook'} all"
        one = by.get((domain, kind, arm, index))
        return plain(one["perplexity"]) if one else ""

    def fact(state: str, wording: str, said: str, arm: str) -> str:
        for one in parts["facts"]["groups"]:
            if (one["source"], one["state"], one["wording"], one["said"], one["arm"]) == (
                "all",
                state,
                wording,
                said,
                arm,
            ):
                return percent(one["share"])
        return ""

    def cost(name: str, arm: str, scale: float, form: str) -> str:
        of = [one for one in groups if one["arm"] == arm and one["kind"] != "general"]
        of = [one for one in of if arm == "alone" or one["index"].endswith(" all")]
        return format(scale * sum(one[name] for one in of) / len(of), form)

    def asked(arm: str) -> str:
        found = [
            one
            for one in parts.get("questions", {}).get("groups", [])
            if (one["arm"], one["source"]) == (arm, "all")
        ]
        return percent(found[0]["share"]) if found else ""

    rows = [
        [f"perplexity, {name}", *(perplexity(*name.split(), arm) for arm in arms), ""]
        for name in KINDS
        if perplexity(*name.split(), "alone")
    ]
    rows += [
        [f"perplexity, {domain} (index: handbook)", *(perplexity(domain, "general", arm) for arm in arms), ""]
        for domain in GENERAL
    ]
    ways = (*arms, "oracle")
    rows += [
        [f"facts, {name}", *(fact(state, wording, said, arm) for arm in ways)]
        for state, wording, said, name in COLUMNS
    ]
    if "questions" in parts:
        rows.append(["questions in a chat", *(asked(arm) for arm in ways)])
    rows.append(
        ["prompt tokens added to a text", *(cost("prompt_tokens", arm, 1, ",.0f") for arm in arms), ""]
    )
    rows.append(
        ["CPU ms a text of 320 tokens, model", *(cost("model_seconds", arm, 1e3, ",.0f") for arm in arms), ""]
    )
    rows.append(
        ["CPU ms a text, looking up", *(cost("memory_seconds", arm, 1e3, ",.0f") for arm in arms), ""]
    )
    return table(["", *(NAMES[arm] for arm in ways)], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Part]], str]]] = {
    "summary": ("perplexity", summary), "index size": ("perplexity", by_size), "every arm": ("perplexity", by_arm),
    "facts": ("facts", facts), "facts, articles": ("facts", lambda parts: facts(parts, "articles")),
    "facts, factbook": ("facts", lambda parts: facts(parts, "factbook")), "questions": ("questions", questions),
    "abstaining": ("facts", abstaining), "costs": ("facts", costs), "living": ("living", living),
    "LoRA": ("lora", lora), "lambda": ("lambdas", lambdas),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, nargs="?", help="what run.py wrote; without it, the tables of results.json"
    )
    options = parser.parse_args()
    kept = HERE / "results.json"
    parts = (
        json.loads(kept.read_text(encoding="utf8"))
        if options.out is None
        else read(options.out / "full" / "results")
    )
    readme = (HERE / "README.md").read_text(encoding="utf8")
    for name, (needs, make) in TABLES.items():
        if needs in parts:
            made = make(parts)
            print(f"## {name}\n\n{made}\n")
            marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
            if all(mark in readme for mark in marks):
                before, rest = readme.split(marks[0])
                readme = f"{before}{marks[0]}\n{made}\n{marks[1]}{rest.split(marks[1])[1]}"
    (HERE / "README.md").write_text(readme, encoding="utf8")
    if options.out is not None:
        kept.write_text(json.dumps(parts, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
        draw(parts, HERE / "perplexity.png")


if __name__ == "__main__":
    main()
