"""Ideas beside pointing (`engram_lm.mixing.pointing`) for answers that begin otherwise than the document does.

quote      the answer is forced to begin as the best sentence does, and memory goes on with it
from word  the same from the first word on that the question does not hold
cache      pointing with alpha 0: those words all alike, whatever the model thinks of them

Quote(sentence, begin=0)(said, logits_V) -> next token
"""

from dataclasses import dataclass

import numpy as np

from engram_lm.mixing.pointing import Pointing, point


@dataclass
class Quote:
    """Goes through `sentence` from `begin` on while the answer is nothing else."""

    sentence: object | None
    begin: int
    lam: float = 0.95

    def __call__(self, said: list[int], logits_V: np.ndarray) -> int:
        rest = [] if self.sentence is None else self.sentence.tokens[self.begin :].tolist()
        if said == rest[: len(said)] and len(said) < len(rest):
            return argmax_of(logits_V, {rest[len(said)]: 1.0}, self.lam)
        return int(logits_V.argmax())


@dataclass
class Pointer:
    """`mixing.pointing` under greedy decoding."""

    focus: tuple
    pointing: Pointing

    def __call__(self, said: list[int], logits_V: np.ndarray) -> int:
        pointed = point(self.focus, said, logits_V, self.pointing)
        return argmax_of(
            logits_V, dict(zip(pointed.tokens.tolist(), pointed.p.tolist(), strict=True)), pointed.lam
        )


def argmax_of(logits_V: np.ndarray, p: dict[int, float], lam: float) -> int:
    """The likeliest token of (1 - lam) P_model + lam p."""
    top = int(logits_V.argmax())
    if not lam:
        return top
    highest = float(logits_V[top])
    log_z = highest + float(np.log(np.exp(logits_V - highest, dtype=np.float64).sum()))
    tokens = np.array([top, *p], np.int64)
    mixed = (1 - lam) * np.exp(logits_V[tokens].astype(np.float64) - log_z)
    mixed += lam * np.array([p.get(int(token), 0.0) for token in tokens])
    return int(tokens[mixed.argmax()])
