"""Every way of training, and the tables of verdicts that docs/training.md shows.

judge(WAYS["zeroing: p.grad = None of a NaN"].run)
"""

from support import ways_of_clipping, ways_of_stepping, ways_of_training, ways_of_zeroing

from training_loops import OPTIMIZERS, RULES, Point
from ways import WAYS

__all__ = [
    "WAYS",
    "grid_table",
    "ways_of_clipping",
    "ways_of_stepping",
    "ways_of_training",
    "ways_of_zeroing",
    "ways_tables",
]


def ways_tables(verdicts: dict[str, str]) -> str:
    """A table a group: every way with its verdict, by the way's full name."""
    lines: list[str] = []
    for group in dict.fromkeys(way.group for way in WAYS.values()):
        lines += [f"### {group[0].upper()}{group[1:]}", "", "| | |", "|---|---|"]
        lines += [f"| {way.name} | {verdicts[full]} |" for full, way in WAYS.items() if way.group == group]
        lines.append("")
    return "\n".join(lines)


def grid_table(verdicts: dict[Point, str]) -> str:
    """Optimizers, and rules under two of them, against the number of loops and what was said of them."""
    lines = ["| optimizer | row rule | loops | without a scaler | with GradScaler |", "|---|---|---|---|---|"]
    for optimizer in OPTIMIZERS:
        for rule in RULES:
            ours = [p for p in verdicts if (p.optimizer, p.rule) == (optimizer, rule)]
            if ours:
                said = [
                    ", ".join(sorted({verdicts[p] for p in ours if p.scaled == scaled}))
                    for scaled in (False, True)
                ]
                lines.append(f"| {optimizer} | `{rule}` | {len(ours)} | {said[0]} | {said[1]} |")
    return "\n".join([*lines, ""])
