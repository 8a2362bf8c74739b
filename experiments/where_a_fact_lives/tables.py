"""The tables of README.md: each a function from the result files to Markdown.

told = read(Path("results"), "cpu")
print(arms(told))
"""

import json
import math
from pathlib import Path
from typing import Any

from book import BITS, BITS_PER_TOKEN

from engram_lm.eval.tables import table
from models import ARMS

Told = dict[str, Any]
HUNDRED = ("crowded", "packed")  # sizes of a hundred readings


def read(directory: Path, size: str) -> dict[str, Told]:
    """Result files of one size by what comes after the size in their names, tuning runs, and those of a hundred readings."""
    told = {
        path.stem.removeprefix(f"{size}-"): json.loads(path.read_text(encoding="utf8"))
        for pattern in (f"{size}-*.json", "tuning-*.json")
        for path in sorted(directory.glob(pattern))
    }
    hundred = [path for name in HUNDRED for path in sorted(directory.glob(f"{name}-*.json"))]
    if hundred:
        told["hundred"] = {"runs": [json.loads(path.read_text(encoding="utf8")) for path in hundred]}
    return told


def runs_of(told: dict[str, Told], arm: str) -> list[Told]:
    """The finished seeds of an arm, in order."""
    found = [one for name, one in told.items() if name.rpartition("-")[0] == arm]
    return sorted(found, key=lambda one: one["seed"])


def each(values: list[str]) -> str:
    """One number a seed."""
    return " / ".join(values)


# ---- in short --------------------------------------------------------------------------------------------------------


def short(told: dict[str, Told]) -> str:
    """The numbers that answer the question, one line each; means over seeds."""

    def bits(arm: str, form: str = "plain", part: str = "all") -> str:
        return _mean(runs_of(told, arm), form, part)

    def per(arm: str) -> str:
        found = runs_of(told, arm)
        return f"{sum(one['bits_per_parameter'] for one in found) / len(found):.2f}"

    def total(arm: str, scope: str, key: str, kind: str = "necessity") -> float:
        return sum(one[kind][scope][key] for one in runs_of(told, f"surgery-{arm}"))

    def of(arm: str, scope: str, key: str, kind: str = "necessity") -> str:
        return f"{total(arm, scope, key, kind):.0f} of {total(arm, scope, 'operations', kind):.0f}"

    def share(arm: str, scope: str, kind: str = "necessity") -> str:
        gone = total(arm, scope, "sharing_no_longer_full", kind) / total(
            arm, scope, "sharing_were_full", kind
        )
        return f"{100 * gone:.0f} %"

    lines = [
        [
            "bits recalled a parameter: no memory, 79/21 memory, 21/79 memory",
            f"{per('none')}, **{per('memory')}**, **{per('mostly-memory')}**",
        ],
        [
            f"the same as bits an entry, of {BITS}",
            f"{bits('none')}, **{bits('memory')}**, **{bits('mostly-memory')}**",
        ],
        [
            "controls of the memory: one row, shuffled, frozen random, unigrams",
            ", ".join(bits(arm) for arm in ("one-row", "shuffled", "frozen-random", "unigram")),
        ],
        [
            "no memory but: wider FFN, embedding at 5× rate, experts at 5× rate",
            ", ".join(bits(arm) for arm in ("wide", "embedding-5x", "experts-5x")),
        ],
        ["79/21 memory with rows at 1× rate", bits("memory-1x") if runs_of(told, "memory-1x") else ""],
        [
            "reworded, for entries never read so: no memory, 79/21, 21/79",
            ", ".join(bits(arm, "reworded", "never read so") for arm in ("none", "memory", "mostly-memory")),
        ],
    ]
    late = [_hundred_of(told, "packed", arm) for arm in ("none", "memory")]
    if all(late):
        per_parameter = [sum(one["bits_per_parameter"] for one in found) / len(found) for found in late]
        lines.append(
            [
                "bits a parameter after a hundred readings (0.55 parameters a bit): no memory, 79/21",
                ", ".join(f"{value:.2f}" for value in per_parameter),
            ]
        )
    for arm in ("memory", "mostly-memory"):
        if not runs_of(told, f"surgery-{arm}"):
            continue
        title = ARMS[arm].title
        lines += [
            [f"{title}: still said after the rows at its name are zero", of(arm, "name", "own_still_full")],
            [
                f"{title}: still said after as many random rows are zero",
                of(arm, "random rows", "own_still_full"),
            ],
            [
                f"{title}: others that share one of these rows, and were said, no longer said",
                share(arm, "name"),
            ],
            [
                f"{title}: new bits said after writing the rows the new text reads",
                of(arm, "name and answer", "new_said_in_full", "sufficiency"),
            ],
            [
                f"{title}: others that share one of those, no longer said",
                share(arm, "name and answer", "sufficiency"),
            ],
        ]
    return table(["", "measured"], lines)


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
    found = [one for name, one in told.items() if name.startswith("tuning-")]
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


def hundred(told: dict[str, Told]) -> str:
    """The whole book a hundred times, for models with fewer parameters than it has bits; one number a seed."""
    rows = []
    for size in HUNDRED:
        for arm in ARMS.values():
            found = _hundred_of(told, size, arm.name)
            if not found:
                continue
            plain = [one["asked"]["plain"]["all"] for one in found]
            rows.append(
                [
                    f"{arm.title}, {found[0]['parameters']['total'] / found[0]['size']['bits']:.2f} parameters a bit",
                    each([f"{one['bits_per_parameter']:.2f}" for one in found]),
                    each([f"{one['bits']:.1f}" for one in plain]),
                    each([f"{100 * one['full']:.1f} %" for one in plain]),
                    each([f"{_half_way(one):.0f}" for one in found]),
                    _mean(found, "filler", "never read so"),
                    _mean(found, "reworded", "never read so"),
                ]
            )
    head = [
        "arm", "bits a parameter", f"bits an entry, of {BITS}", "in full", "readings until it said half of the bits",
        "text between, never read so", "reworded, never read so",
    ]  # fmt: skip
    return table(head, rows)


def _hundred_of(told: dict[str, Told], size: str, arm: str) -> list[Told]:
    runs = told.get("hundred", {"runs": []})["runs"]
    return [one for one in runs if (one["size"]["name"], one["arm"]["name"]) == (size, arm)]


def _half_way(one: Told) -> float:
    """Readings until half of the bits were told while reading; from means over parts of the run, straight between them."""
    loss, exposures = one["training"]["loss"], one["size"]["exposures"]
    half = BITS_PER_TOKEN * math.log(2) / 2
    place = next((i for i, value in enumerate(loss) if value < half), len(loss))
    if not 0 < place < len(loss):
        return math.nan
    part = exposures / len(loss)
    return (place - 0.5 + (loss[place - 1] - half) / (loss[place - 1] - loss[place])) * part


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


TABLES = {
    "short": short,
    "arms": arms,
    "forms": forms,
    "accounting": accounting,
    "rates": rates,
    "hundred": hundred,
    "surgery": surgery,
    "whole": whole,
}
