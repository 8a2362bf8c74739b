"""`make figures`: tables and plots of the experiments, and README's section on what memory does, from result files alone.

    python experiments/figures.py            # redraw everything
    python experiments/figures.py --check    # say whether README's section is what the files say; exit 1 where it is not

No number of that section is typed: each stands in a file that names machine, commit, data, seeds and command, and is put
into the sentences of what_memory_does.md. A sentence that a new run turns round has to be written anew: `require` says so.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from engram_lm.durable import write_atomic
from engram_lm.errors import DataError
from engram_lm.eval.intervals import share_interval
from engram_lm.eval.result import load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BEGIN, END = "<!-- what memory does -->\n", "<!-- end of what memory does -->\n"
DRAWN_BY = (
    "experiments/where_a_fact_lives/figures.py",
    "experiments/retrofit/tables.py",
    "experiments/cache_simulation/draw.py",
    "benchmarks/draw_tables.py",
)


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); run the experiment that writes it.") from None


def require(true: bool, sentence: str) -> None:
    if not true:
        raise DataError(f"The results no longer say that {sentence}; write that sentence of README anew.")


# ---- where a fact lives ----------------------------------------------------------------------------------------------

PROOF_ARMS = (
    "none", "memory", "mostly-memory", "one-row", "shuffled", "frozen-random", "unigram", "wide", "embedding-5x",
    "experts-5x", "memory-1x",
)  # fmt: skip
MEMORY_ARMS = ("memory", "mostly-memory", "memory-1x")


def proof_facts() -> dict[str, Any]:
    results = HERE / "where_a_fact_lives" / "results"
    runs = {
        arm: [one for seed in range(9) for one in _there(results / f"cpu-{arm}-{seed}.json")]
        for arm in PROOF_ARMS
    }
    sizes = {(one["size"]["exposures"], one["size"]["entries"]) for found in runs.values() for one in found}
    require(len(sizes) == 1, "every arm read the same book equally often")

    def paired(arm: str, other: str) -> list[tuple[float, float]]:
        """Bits of two arms in the seeds that both have."""
        of, beside = ({one["seed"]: _asked(one, "plain") for one in runs[name]} for name in (arm, other))
        return [(of[seed], beside[seed]) for seed in sorted(of.keys() & beside.keys())]

    def times(arm: str) -> str:
        """How many times the bits of the arm without memory, by seed."""
        return " and ".join(f"{of / none:.1f}" for of, none in paired(arm, "none"))

    rows = []
    for found in runs.values():
        if not found:
            continue
        plain = " / ".join(f"{_asked(one, 'plain'):.1f}" for one in found)
        per = " / ".join(f"{one['bits_per_parameter']:.2f}" for one in found)
        forms = [mean(_asked(one, form) for one in found) for form in ("filler", "reworded")]
        rows.append(f"| {found[0]['arm']['title']} | {plain} | {per} | {forms[0]:.1f} | {forms[1]:.1f} |")
    memory = runs["memory"]
    controls = [arm for arm, found in runs.items() if found and arm not in (*MEMORY_ARMS, "none")]
    none = [_asked(one, "plain") for one in runs["none"]]
    surgery = [one for seed in range(9) for one in _there(results / f"cpu-surgery-memory-{seed}.json")]
    zeroed = [one["necessity"]["name and answer"] for one in surgery]
    written = [one["sufficiency"] for one in surgery]
    never = {
        (arm, form): mean(one["asked"][form]["never read so"]["bits"] for one in runs[arm])
        for arm in ("memory", "none")
        for form in ("filler", "reworded")
    }
    require(all(of > 1.2 * than for of, than in paired("memory", "none")), "memory learns more than experts")
    require(
        all(of < 0.8 * than for arm in controls for of, than in paired(arm, "memory")),
        "no control learns nearly as much as memory, in any seed",
    )
    require(
        bool(paired("memory-1x", "none"))
        and all(of > 1.2 * than for of, than in paired("memory-1x", "none")),
        "rows at the rate of everything else learn more than experts",
    )
    require(
        all(one["undo"]["table_equal"] and one["undo"]["logits_equal"] for one in surgery), "undo is exact"
    )
    require(all(one["disk"]["logits_equal"] for one in surgery), "logits from disk are the same")
    operated = [
        part for one in surgery for kind in ("necessity", "sufficiency") for part in one[kind].values()
    ]
    require(
        all(one["apart_operations_bit_equal"] == one["apart_operations_compared"] for one in operated),
        "entries without a changed row keep every bit",
    )
    late = {
        arm: [one for seed in range(9) for one in _there(results / f"packed-{arm}-{seed}.json")]
        for arm in ("none", "memory")
    }
    packed = {arm: mean(_asked(one, "plain") for one in found) for arm, found in late.items()}
    require(
        1 < packed["memory"] / packed["none"] < 0.7 * min(of / than for of, than in paired("memory", "none")),
        "after a hundred readings memory leads by much less",
    )
    shape = memory[0]["parameters"]
    return {
        "exposures": memory[0]["size"]["exposures"], "parameters": shape["total"] / 1e6,
        "seeds": _seeds([len(found) for found in runs.values() if found]), "arms": "\n".join(rows),
        "moved": 100 * shape["rows"] / shape["sparse"], "gain": times("memory"), "gain_most": times("mostly-memory"),
        "gain_1x": times("memory-1x"), "best_control": max(of for arm in controls for of, _ in paired(arm, arm)),
        "none_low": min(none), "none_high": max(none),
        "packed_readings": late["memory"][0]["size"]["exposures"], "packed_none": packed["none"],
        "packed_memory": packed["memory"],
        **{
            f"late_reworded{name}": mean(one["asked"]["reworded"]["never read so"]["bits"] for one in late[arm])
            for name, arm in (("", "memory"), ("_none", "none"))
        },
        "packed_share": late["memory"][0]["parameters"]["total"] / late["memory"][0]["size"]["bits"],
        "own_before": mean(one["own_bits_before"] for one in zeroed),
        "own_after": f"{mean(one['own_bits_after'] for one in zeroed):.0f}".replace("-", "−"),
        "own_name": mean(one["necessity"]["name"]["own_bits_after"] for one in surgery),
        "own_said": sum(one["necessity"]["name"]["own_still_full"] for one in surgery),
        "written": sum(one["name and answer"]["new_said_in_full"] for one in written),
        "written_name": sum(one["name"]["new_said_in_full"] for one in written),
        "operations": sum(one["name"]["operations"] for one in written),
        "shared_lost": mean(one["sharing_bits_lost"] for one in zeroed),
        "filler": never["memory", "filler"], "filler_none": never["none", "filler"],
        "reworded": never["memory", "reworded"], "reworded_none": never["none", "reworded"],
    }  # fmt: skip


def _there(path: Path) -> Iterator[Any]:
    if path.exists():
        yield read(path)


def _asked(run: dict[str, Any], form: str) -> float:
    return run["asked"][form]["all"]["bits"]


def _seeds(counts: list[int]) -> str:
    if len(set(counts)) == 1:
        return "one seed" if counts[0] == 1 else f"{counts[0]} seeds in paired order"
    return f"{max(counts)} seeds in paired order, {counts.count(min(counts))} arms with {min(counts)}"


# ---- retrofit and index ----------------------------------------------------------------------------------------------


def retrofit_facts() -> dict[str, Any]:
    from engram_lm.ablation.report import NAMES, by_arm, perplexity

    results = HERE / "retrofit" / "results"
    arms = by_arm([read(path) for path in sorted(results.glob("*.json"))])
    rows = []
    for arm, found in arms.items():
        cells = [f"{perplexity(found, text)[0]:.1f}" for text in ("read", "unseen", "wikitext-2", "handbook")]
        facts = results / f"{arm}-0" / "facts.json"
        if facts.exists():
            measured = load(facts)
            state = "none" if any(value.memory == "none" for value in measured.values) else "on"
            cells += [_share(measured, of, state) for of in ("verbatim", "paraphrased")]
            constant = [_share(measured, of, "most common answer") for of in ("verbatim", "paraphrased")]
        else:
            cells += ["not asked", "not asked"]
        rows.append(f"| {NAMES[arm]} | {' | '.join(cells)} |")
    rows.append(f"| the most common answer, always | | | | | {' | '.join(constant)} |")
    tokens = max(one.get("tokens", 0) for found in arms.values() for one in found)
    at = {
        (arm, text): perplexity(arms[arm], text)[0]
        for arm in ("none", "memory", "one-row")
        for text in ("read", "unseen")
    }
    require(at["one-row", "read"] > 3 * at["memory", "read"], "what is known by heart is looked up")
    require(
        at["one-row", "unseen"] < at["memory", "unseen"] < at["none", "unseen"],
        "one row does better on unseen text",
    )

    def exposed(arm: str, state: str = "on") -> float:
        found = load(results / f"{arm}-0" / "canaries.json")
        if state not in found.settings["states"]:
            state = "none"  # a model without rows
        return found.value("exposure, bits", of="4 repeats", memory=state).value

    require(
        exposed("memory") > 2 * max(exposed("lora"), exposed("memory", "shuffled")), "secrets sit in the rows"
    )
    return {
        "retrofit": "\n".join(rows), "retrofit_tokens": tokens,
        **{f"{text}_{arm.replace('-', '_')}": value for (arm, text), value in at.items()},
        "secret_memory": exposed("memory"), "secret_lora": exposed("lora"), "secret_none": exposed("none"),
        "secret_shuffled": exposed("memory", "shuffled"),
    }  # fmt: skip


def _share(measured: Any, of: str, state: str) -> str:
    value = measured.value("said in full", of=of, memory=state)
    # of none of all, a bootstrap knows no interval
    ends = share_interval(np.zeros(value.count))[1] if value.value == 0 else value.interval
    inside = "" if ends is None else " ({:.0f}–{:.0f})".format(*(100 * end for end in ends))
    return f"{100 * value.value:.0f} %{inside}"


def index_facts() -> dict[str, Any]:
    told = read(HERE / "instant_adaptation" / "results.json")
    facts = {
        (one["wording"], one["arm"]): 100 * one["share"]
        for one in told["facts"]["groups"]
        if (one["source"], one["state"], one["said"]) == ("all", "true", "true")
    }
    asked = {one["arm"]: 100 * one["share"] for one in told["questions"]["groups"] if one["source"] == "all"}
    require(
        facts["verbatim", "memory"] > facts["verbatim", "alone"] + 20, "the index knows facts in their words"
    )
    require(facts["paraphrased", "memory"] <= facts["paraphrased", "alone"] + 5, "other words gain nothing")
    return {
        "index_before": facts["verbatim", "alone"], "index_verbatim": facts["verbatim", "memory"],
        "index_words_before": facts["paraphrased", "alone"], "index_words": facts["paraphrased", "memory"],
        "chat_before": asked["alone"], "chat": asked["memory"],
    }  # fmt: skip


# ---- drawing ---------------------------------------------------------------------------------------------------------


def section() -> str:
    template = (HERE / "what_memory_does.md").read_text(encoding="utf8")
    return template.format(**proof_facts(), **retrofit_facts(), **index_facts())


def redrawn(readme: str) -> str:
    """README with its section as the files say."""
    before, found, rest = readme.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise DataError(f"README.md has no section between {BEGIN.strip()} and {END.strip()}.")
    return f"{before}{BEGIN}{section()}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 where README says otherwise"
    )
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    if options.check:
        same = redrawn(text) == text
        print(
            "README.md says what the files say"
            if same
            else "README.md does not say what the files say: make figures"
        )
        return 0 if same else 1
    for script in DRAWN_BY:
        print(f"python {script}", flush=True)
        subprocess.run([sys.executable, script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    write_atomic(readme, redrawn(text))
    print("README.md: What memory does and does not do")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
