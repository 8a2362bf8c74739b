"""Text whose background reddens with memory, in 24-bit ANSI colour. No torch.

Two quantities can be shown, and neither is "how much the model relied on memory":

    share   |what memory added| / |hidden state| at that token; 0 where the rows are zero
    gate    how far the gate is open, 0 to 1. It is 0.5 where the rows are zero, so it says little on its own

The legend says what full red is.
A token's colour is what memory added when the model read that token: its n-grams are those that end there.

    print(legend(Scale("share", full=0.3, why="the strongest of the prompt")))
    print(paint("Alexander", 0.8), end="")
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from engram_lm.errors import ConfigError

Quantity = Literal["share", "gate", "index"]
ColourWish = Literal["auto", "always", "never"]
RESET = "\x1b[0m"
# Below this part of the scale nothing is painted: a faint box round every word says nothing.
_FAINTEST = 0.06


@dataclass(frozen=True)
class Scale:
    """What full red means: `full` in the quantity's own unit, and where that number comes from."""

    quantity: Quantity
    full: float
    why: str

    def __post_init__(self) -> None:
        if self.quantity not in ("share", "gate", "index"):
            raise ConfigError(f"heat is share, gate or index; got {self.quantity!r}.")
        if not self.full > 0:
            raise ConfigError(f"The value at full red must be greater than 0; got {self.full}.")

    def heat(self, value: float) -> float:
        """0 to 1; values above full are full red."""
        return min(1.0, max(0.0, value / self.full))


def wants_colour(stream: Any, wish: ColourWish = "auto") -> bool:
    """Colour on a terminal, unless NO_COLOR is set (https://no-color.org) or the terminal is dumb."""
    if wish != "auto":
        return wish == "always"
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, heat: float) -> str:
    """`text` on a background as red as `heat`, 0 to 1. Line breaks stay unpainted."""
    if heat < _FAINTEST or not text:
        return text
    red, green, blue = _background(heat)
    ink = "255;255;255" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "0;0;0"
    start = f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;{ink}m"
    return "\n".join(start + line + RESET if line else "" for line in text.split("\n"))


def legend(scale: Scale, *, where: str = "strongest block") -> str:
    """One line: the ramp, its two ends, and what they measure."""
    ramp = "".join(paint("  ", (step + 0.5) / 10) for step in range(10))
    what = {
        "share": "|added| / |hidden|",
        "gate": "gate, 0.5 where rows are zero",
        "index": "λ P_memory / P, the part of a token's probability that the index gave",
    }[scale.quantity]
    return f"{scale.quantity} 0 {ramp} {scale.full:.2g}+   {what}, {where}; full red: {scale.why}"


def _background(heat: float) -> tuple[int, int, int]:
    """From the terminal's own ground to red: dark ground unless COLORFGBG says that it is light."""
    light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    ground, full = ((255, 240, 236), (235, 60, 40)) if light else ((38, 12, 12), (214, 40, 30))
    red, green, blue = (round(a + (b - a) * heat) for a, b in zip(ground, full, strict=True))
    return red, green, blue
