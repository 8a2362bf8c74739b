"""report.md of a directory of results: a table for every number's name, rows what it is of, columns the memory's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engram_lm.eval.result import Result, Value
from engram_lm.eval.tables import plain, signed, table

TITLES = {
    "perplexity": "Perplexity",
    "facts": "Facts",
    "consistency": "The same answer in other words (ParaRel)",
    "benchmarks": "Benchmarks",
    "gates": "Gates",
    "canaries": "Canaries",
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _fixed(digits: int, *, sign: bool = False) -> Callable[[float], str]:
    return lambda value: f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


# Other names are shares, told in per cent.
_TOLD: dict[str, Callable[[float], str]] = {
    "perplexity": plain,
    "change against off": signed,
    "reciprocal rank": _fixed(3),
    "exposure, bits": _fixed(2),
    "gate": _fixed(3),
    "share": _fixed(3),
    "correlation": _fixed(2, sign=True),
    "loss saved, nats": _fixed(3, sign=True),
}


def report(results: Sequence[Result], *, model: str, about: Sequence[str] = ()) -> str:
    """The report's text. about: sentences on the model and the machine."""
    lines = [f"# {model}, measured", *about]
    for measured in results:
        lines.append(f"## {TITLES.get(measured.measure, measured.measure)}")
        for name in dict.fromkeys(value.name for value in measured.values):
            lines.append(_table(name, [value for value in measured.values if value.name == name]))
        lines += [*measured.notes, f"{measured.seconds:,.0f} s. `{measured.measure}.json`"]
    lines.append("In brackets: 95 % intervals. on: memory as it is; off: without; noise: Gaussian rows of the same norms; "
                 "shuffled: rows of other addresses; none: a model without memory.")  # fmt: skip
    return "\n\n".join(lines) + "\n"


def _table(name: str, values: list[Value]) -> str:
    columns = list(dict.fromkeys(value.memory for value in values))
    by = {(value.of, value.memory): value for value in values}
    unit = values[0].unit
    rows: list[list[str]] = []
    for of in dict.fromkeys(value.of for value in values):
        cells = [by.get((of, column)) for column in columns]
        count = next(cell.count for cell in cells if cell)
        rows.append([of or "all", *(_cell(name, cell) for cell in cells), f"{count:,}"])
    return table([name, *columns, unit], rows)


def _cell(name: str, value: Value | None) -> str:
    if value is None or value.value is None:
        return ""
    told: Callable[[Any], str] = _TOLD.get(name, _percent)
    if value.interval is None:
        return told(value.value)
    low, high = (told(end).removesuffix(" %") for end in value.interval)
    return f"{told(value.value)} ({low} to {high})"
