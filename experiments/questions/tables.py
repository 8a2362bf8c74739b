"""Tables of what ask.py kept, and results.json beside this file.

$ python experiments/questions/tables.py runs/questions
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
SIZES = (1, 8, 100)
PROMPTS = ["prompt 1", "prompt 3", "prompt 5"]
WHOLE = ["whole, gate", "whole, λ 0.5", "whole, λ 0.9"]
TOP = [
    "top 1, gate", "top 1, believing gate", "top 1, λ 0.5", "top 1, λ 0.9", "top 3, gate", "top 3, λ 0.5", "top 5, λ 0.5",
]  # fmt: skip
POINTING = ["top 1, pointing", "top 3, pointing", "top 5, pointing", "top 3, pointing always"]
BOTH = ["both, top 3, gate", "both, top 3, pointing"]
IDEAS = [
    "quote", "quote from word", "pointing", "pointing at 3 sentences", "pointing λ 0.2", "pointing λ 0.5",
    "pointing alpha 0.0", "pointing alpha 0.5",
]  # fmt: skip


def read(directory: Path) -> dict[str, dict[int, dict]]:
    arms: dict[str, dict[int, dict]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text(encoding="utf8").splitlines():
            found = json.loads(line)
            arms.setdefault(found["arm"], {})[found["fact"]] = found
    return arms


def summed(found: dict[int, dict]) -> dict:
    """Answered by part, and the means of what it cost."""
    rows = list(found.values())
    parts = {}
    for part in ("test", "tuning"):
        here = [row["answered"] for row in rows if row["part"] == part]
        parts[part] = [sum(here), len(here)]
    mean = {
        name: round(sum(row[name] for row in rows) / len(rows), 5)
        for name in ("prompt_tokens", "new_tokens", "prompt_seconds", "choosing_seconds", "memory_seconds")
    }
    return {**parts, **mean}


def share(arm: dict | None) -> str:
    if arm is None or not arm["test"][1]:
        return ""
    right, n = arm["test"]
    return f"{100 * right / n:.0f} %"


def table(arms: dict, harm: dict, rows: list[str], *, before: str = "") -> list[str]:
    lines = [
        "| arm | 1 sentence | 8 | 100 | prompt tokens | general perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [arms.get(f"{before}{size}: {row}") for size in SIZES]
        tokens = "/".join(f"{one['prompt_tokens']:.0f}" for one in found if one)
        worst = [harm[f"{size}: {row}"] for size in SIZES if f"{size}: {row}" in harm]
        cost = f"{100 * max(worst):+.2f} %" if worst else ""
        lines.append(f"| {row} | {' | '.join(share(one) for one in found)} | {tokens} | {cost} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    arms = {arm: summed(found) for arm, found in read(options.out).items()}
    harm = (
        json.loads((options.out / "harm.json").read_text())
        if (options.out / "harm.json").exists()
        else {"arms": {}}
    )
    single = [arm for arm in ("alone", "oracle sentence 1", "oracle passage 1", "cloze alone") if arm in arms]
    alone = [f"| {arm} | {share(arms[arm])} | {arms[arm]['test'][1]} facts |" for arm in single]
    print("\n".join(["| arm | answered | of |", "|---|---|---|", *alone, ""]))
    print("\n".join(table(arms, harm["arms"], PROMPTS + WHOLE + TOP + POINTING + BOTH)), "\n")
    print("\n".join(table(arms, harm["arms"], [f"top 3, {idea}" for idea in IDEAS])), "\n")
    print("\n".join(table(arms, {}, [*WHOLE, "top 3, gate", "top 3, pointing"], before="cloze ")), "\n")
    for kind in ("general", "general, shared words"):
        names = sorted(name for name in arms if name.startswith(f"{kind}: "))
        totals = {
            name: [sum(arms[name][part][i] for part in ("test", "tuning")) for i in (0, 1)] for name in names
        }
        print("\n".join(f"| {name} | {right} of {n} |" for name, (right, n) in totals.items()), "\n")
    results = {"harm": harm, "arms": arms}
    (HERE / "results.json").write_text(
        json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf8"
    )


if __name__ == "__main__":
    main()
