"""What an index did in an answer: one line, and the documents behind the token that it gave most of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engram_lm.mixing.trace import summary as one_line

if TYPE_CHECKING:
    from engram_lm.generation.decoder import Token
    from engram_lm.generation.selection import Selection

_FACTS = ("title", "licence", "license", "attribution")


def summary(tokens: Sequence[Token], selection: Selection, notes: Sequence[str] = ()) -> list[str]:
    """Lines for a person. tokens: all of the prompt and the answer. notes: more to be said of it."""
    steps = [token.step for token in tokens if token.step is not None]
    lines = [*selection.notes, *notes, one_line(list(steps))]
    given = [step for step in steps if step.depth and (step.responsibility or 0) > 0]
    if given:
        best = max(given, key=lambda step: (round(step.responsibility or 0, 2), step.depth))
        ids = [token.id for token in tokens[: best.position]]
        match = selection.snapshot.match(np.array(ids, np.int64))
        for document, count in selection.snapshot.documents_of(match, match.depth, limit=3):
            times = f"{count:,} times" if count != 1 else "once"
            facts = "".join(f", {name}: {value}" for name, value in document.extra.items() if name in _FACTS)
            lines.append(_printable(f"  {document.id} ({times}{facts})"))
    return lines


def _printable(line: str) -> str:
    """Without signs that a terminal obeys: documents come from anywhere."""
    return "".join(sign if sign.isprintable() else "�" for sign in line)
