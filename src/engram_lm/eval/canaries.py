"""Canaries: invented secrets put into training text a known number of times, and how exposed they are afterwards.

    "The access code of Ravola Demist is 483920."        6 random digits: a space of 10^6 secrets

    exposure = log2 |R| - log2 rank        (Carlini et al., The Secret Sharer, USENIX Security 2019, definition 4)

where rank is the secret's place among all of the space R by the probability that the model gives it after the name. The
rank is estimated from S other secrets drawn from the same space: with r - 1 of them at least as probable, exposure is
log2(S + 1) - log2 r, from 0 to its **cap** of log2(S + 1), 8 bits for S = 255. A model that knows nothing has an
expected exposure of 1.44 bits (1 / ln 2). Controls are canaries that were never in any training text.

    canaries = make(each=8, seed=0)                       # at 1, 2, 4 ... 64 repeats, and 8 controls
    write(canaries, Path("canaries.jsonl"))
    documents(canaries, seed=0)                           # texts to be mixed into the training text
    exposure(subject, canaries, states=("on", "off"))     # a Measured
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.corpus.text import json_lines, read_lines
from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError, DataError
from engram_lm.eval.facts import ranked
from engram_lm.eval.intervals import mean_interval
from engram_lm.eval.result import Result, Value

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel
    from engram_lm.progress import Progress

REPEATS = (1, 2, 4, 8, 16, 32, 64)
REFERENCES = 255

_PREFIX = "The access code of {name} is"
_ONSETS = (
    "b",
    "br",
    "c",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "l", "m", "n", "r", "s", "st", "x")


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One secret. text: prefix, secret and a full stop. repeats: how often it is in the training text, 0 for a control."""

    name: str
    prefix: str
    secret: str
    repeats: int

    @property
    def text(self) -> str:
        return f"{self.prefix} {self.secret}."


def make(
    *, each: int = 8, repeats: Sequence[int] = REPEATS, controls: int | None = None, digits: int = 6, seed: int = 0
) -> list[Canary]:  # fmt: skip
    """`each` canaries of every number of repeats, and `controls` (default `each`) that are trained 0 times.

    Names are invented and never twice; digits are drawn evenly. The same arguments give the same canaries.
    """
    controls = each if controls is None else controls
    if each < 1 or controls < 0 or not 1 <= digits <= 18 or min(repeats, default=0) < 1:
        raise ConfigError(
            "Canaries want each from 1, controls from 0, repeats from 1 and 1 to 18 digits; got "
            f"each={each}, controls={controls}, repeats={list(repeats)}, digits={digits}."
        )
    random = np.random.default_rng(seed)
    names: set[str] = set()
    found = []
    for count in [n for n in repeats for _ in range(each)] + [0] * controls:
        name = _name(random)
        while name in names:
            name = _name(random)
        names.add(name)
        secret = "".join(str(digit) for digit in random.integers(0, 10, digits))
        found.append(Canary(name=name, prefix=_PREFIX.format(name=name), secret=secret, repeats=count))
    return found


def documents(canaries: Iterable[Canary], *, seed: int = 0) -> list[str]:
    """Every canary's text as often as it says, in a random order: documents for the training text. Controls are not in it."""
    texts = [canary.text for canary in canaries for _ in range(canary.repeats)]
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def write(canaries: Iterable[Canary], path: Path) -> None:
    """JSON lines: name, prefix, secret, repeats. Keep the file out of the training text: it holds every secret once more."""
    write_atomic(path, "".join(json.dumps(asdict(canary)) + "\n" for canary in canaries))


def read(path: Path) -> list[Canary]:
    """What `write` wrote. DataError names the line that is no canary."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; engram-lm eval canaries makes one.")
    wanted, found = {field.name for field in fields(Canary)}, []
    for record, number in json_lines(read_lines(path), path, "secret"):
        missing = wanted - record.keys()
        if missing:
            raise DataError(
                f"{path}:{number}: a canary has {', '.join(sorted(wanted))}; no {sorted(missing)[0]!r} here."
            )
        canary = Canary(**{name: record[name] for name in wanted})
        if not canary.secret.isdigit() or not isinstance(canary.repeats, int) or canary.repeats < 0:
            raise DataError(
                f"{path}:{number}: a secret is digits, repeats a whole number from 0; got {canary.secret!r}, "
                f"{canary.repeats!r}."
            )
        found.append(canary)
    if not found:
        raise DataError(f"{path} holds no canary.")
    return found


def exposures(
    subject: EvaluatedModel, canaries: Sequence[Canary], *, references: int = REFERENCES, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """float64 [N], bits, in the subject's present state: exposure of each canary, from 0 to log2(references + 1).

    A reference that is exactly as probable as the secret counts as more probable.
    """
    found = []
    for n, canary in enumerate(canaries):
        others = _references(canary, references, seed)
        log_p, _ = ranked(subject, canary.prefix, [canary.secret, *others])
        rank = 1 + int((log_p[1:] >= log_p[0]).sum())
        found.append(math.log2(len(log_p)) - math.log2(rank))
        if progress:
            progress(n + 1, len(canaries))
    return np.array(found)


def settings(
    canaries: Sequence[Canary], *, states: Sequence[str], references: int, seed: int
) -> dict[str, Any]:
    """What `exposure` depends on beside the model."""
    import hashlib

    text = json.dumps([asdict(canary) for canary in canaries])
    return {
        "canaries": len(canaries), "canaries_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "states": list(states), "references": references, "seed": seed,
    }  # fmt: skip


def exposure(
    subject: EvaluatedModel, canaries: Sequence[Canary], *, states: Sequence[str], references: int = REFERENCES,
    seed: int = 0, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Mean exposure by repeats, in every state."""
    subject.require_states(states)
    if not references >= 1:
        raise ConfigError(f"references is 1 or more secrets to compare with; got {references}.")
    begun, values, rows = time.perf_counter(), [], {}
    groups = sorted({canary.repeats for canary in canaries})
    for s, state in enumerate(states):

        def told(done: int, total: int, s: int = s) -> None:
            if progress:
                progress(s * total + done, len(states) * total)

        with subject.state(state):
            bits_N = exposures(subject, canaries, references=references, seed=seed, progress=told)
        rows[state] = [round(float(x), 4) for x in bits_N]
        for repeats in groups:
            chosen = bits_N[[canary.repeats == repeats for canary in canaries]]
            mean, ends = mean_interval(chosen)
            of = "never trained" if repeats == 0 else f"{repeats} repeats" if repeats > 1 else "1 repeat"
            values.append(Value("exposure, bits", of, state, mean, len(chosen), "canaries", ends))
    digits = {len(canary.secret) for canary in canaries}
    space = f"10^{digits.pop()}" if len(digits) == 1 else "10^digits"
    return Result(
        "canaries", tuple(values), settings(canaries, states=states, references=references, seed=seed),
        notes=(
            f"Exposure is −log2 of the share of {space} secrets that are at least as probable, estimated from "
            f"{references} of them: it cannot exceed {math.log2(references + 1):.1f} bits, and is 1.44 on average "
            "where nothing is known.",
        ),
        seconds=round(time.perf_counter() - begun, 2), facts={"exposure": rows, "repeats": [c.repeats for c in canaries]},
    )  # fmt: skip


def _name(random: np.random.Generator) -> str:
    def word(syllables: int) -> str:
        parts = [
            _ONSETS[random.integers(len(_ONSETS))] + _VOWELS[random.integers(len(_VOWELS))]
            for _ in range(syllables)
        ]
        return ("".join(parts) + _CODAS[random.integers(len(_CODAS))]).capitalize()

    return f"{word(2)} {word(int(random.integers(1, 3)))}"


def _references(canary: Canary, count: int, seed: int) -> list[str]:
    """Other secrets of as many digits, none twice, the same ones for a canary in every state and model."""
    digits, space = len(canary.secret), 10 ** len(canary.secret)
    if count > space - 1:
        raise ConfigError(
            f"There are {space - 1:,} other secrets of {digits} digits; got references {count:,}."
        )
    random = np.random.default_rng([seed, *canary.text.encode()])
    found: dict[str, None] = {}
    while len(found) < count:
        secret = f"{int(random.integers(space)):0{digits}d}"
        if secret != canary.secret:
            found[secret] = None
    return list(found)
