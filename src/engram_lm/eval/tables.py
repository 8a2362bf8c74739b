"""Numbers as a reader of a report sees them, and Markdown tables."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(change: float) -> str:
    """-0.12 as −12.0 %; small changes with two digits."""
    digits = 1 if abs(change) >= 0.05 else 2
    return f"{100 * change:+.{digits}f} %".replace("-", "−")


def plain(number: float) -> str:
    return f"{number:.2f}" if number < 100 else f"{number:,.0f}"


def between(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({plain(ends[0])}–{plain(ends[1])})"
