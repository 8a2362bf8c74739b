"""Whether a model gives the same answer whatever the wording: ParaRel (Elazar et al., TACL 2021).

    relations = read_pararel("pararel_trex.tar.xz", facts=5, seed=0)      # or the unpacked folder
    measured = consistency(subject, relations, states=("on", "off"))

In the archive or folder, for every relation: graphs_json/P19.jsonl with {"pattern": "[X] was born in [Y]."} a line, and
trex_lms_vocab/P19.jsonl with {"sub_label": ..., "obj_label": ...} a line. Used are patterns that end with [Y], since a
decoder continues text; relations with fewer than two are left out. The answer is the most probable of the true object and
up to `candidates` other objects of the relation, the same ones for all patterns of a fact; the true one loses a tie.

    same answer             share of pairs of patterns that get the same answer, mean over facts
    right                   share of patterns that get the true object, mean over facts
    right in all wordings   share of facts whose patterns all get it

A model that ignores the subject and always says one word of the set is consistent too: read the three together.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.eval.facts import CANDIDATES, CONSTANT, others_of, ranked
from engram_lm.eval.intervals import share_interval
from engram_lm.eval.result import Result, Value

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel
    from engram_lm.progress import Progress

PATTERNS, OBJECTS = "graphs_json", "trex_lms_vocab"
NAMES = ("same answer", "right", "right in all wordings")

# [Y] at the end, behind it no letter
_ENDS = re.compile(r"\[Y\][\s.,;:!?]*$")


@dataclass(frozen=True)
class Relation:
    """A relation's wordings that end with the object, its chosen (subject, object) pairs, all of its objects, and the one
    that most of its subjects have."""

    name: str
    patterns: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    objects: tuple[str, ...]
    common: str


def read_pararel(path: str | Path, *, facts: int = 5, patterns: int = 4, seed: int = 0) -> list[Relation]:
    """`facts` subjects of every relation and up to `patterns` wordings, drawn with the seed. DataError for another layout."""
    if facts < 1 or patterns < 2:
        raise ConfigError(
            f"facts is 1 or more and patterns 2 or more of each relation; got {facts} and {patterns}."
        )
    files = _files(Path(path))
    found = []
    for name in sorted(
        {n for kind, n in files if kind == PATTERNS} & {n for kind, n in files if kind == OBJECTS}
    ):
        usable = [text for text in _lines(files[PATTERNS, name], "pattern", path) if _fits(text[0])]
        pairs = list(dict.fromkeys(_lines(files[OBJECTS, name], ("sub_label", "obj_label"), path)))
        if len(usable) < 2 or not pairs:
            continue
        random = np.random.default_rng([seed, *name.encode()])
        chosen = sorted(random.permutation(len(pairs))[:facts])
        kept = sorted(random.permutation(len(usable))[:patterns])
        wordings = tuple(usable[i][0] for i in kept)
        asked = tuple((pairs[i][0], pairs[i][1]) for i in chosen)
        counts = Counter(pair[1] for pair in pairs)
        found.append(Relation(name, wordings, asked, tuple(sorted(counts)), counts.most_common(1)[0][0]))
    if not found:
        raise DataError(
            f"{path} holds no relation with two patterns that end with [Y]. Wanted {PATTERNS}/P19.jsonl and "
            f"{OBJECTS}/P19.jsonl, in an archive or a folder."
        )
    return found


def prompt_of(pattern: str, subject: str) -> str:
    """The pattern's words before [Y], about a subject."""
    return pattern[: pattern.index("[Y]")].replace("[X]", subject).rstrip()


def settings(
    relations: Sequence[Relation], *, states: Sequence[str], candidates: int, seed: int
) -> dict[str, Any]:
    """What `consistency` depends on beside the model."""
    text = json.dumps([asdict(relation) for relation in relations])
    return {
        "relations": len(relations), "facts": sum(len(r.pairs) for r in relations),
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "states": list(states), "candidates": candidates,
        "seed": seed,
    }  # fmt: skip


def consistency(
    subject: EvaluatedModel, relations: Sequence[Relation], *, states: Sequence[str], candidates: int = CANDIDATES,
    seed: int = 0, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """All relations in every state."""
    subject.require_states(states)
    if candidates < 1:
        raise ConfigError(f"candidates is 1 or more other answers; got {candidates}.")
    begun, values, by_relation = time.perf_counter(), [], {}
    total, done = sum(len(relation.pairs) for relation in relations) * len(states), 0
    for state in states:
        rows: list[tuple[str, dict[str, float]]] = []
        with subject.state(state):
            for relation in relations:
                for about, answer in relation.pairs:
                    others = others_of(
                        relation.objects, answer, most=candidates, key=[seed, relation.name, about]
                    )
                    chosen = [
                        _choose(subject, prompt_of(p, about), answer, others) for p in relation.patterns
                    ]
                    same = [a == b for a, b in combinations(chosen, 2)]
                    right = [one == answer for one in chosen]
                    shares = (float(np.mean(same)), float(np.mean(right)), float(all(right)))
                    rows.append((relation.name, dict(zip(NAMES, shares, strict=True))))
                    done += 1
                    if progress:
                        progress(done, total)
        for name in NAMES:
            mean, ends = share_interval([numbers[name] for _, numbers in rows])
            values.append(Value(name, "", state, mean, len(rows), "facts", ends))
            for relation in relations:
                found = [numbers[name] for of, numbers in rows if of == relation.name]
                by_relation.setdefault(relation.name, {}).setdefault(name, {})[state] = round(
                    float(np.mean(found)), 4
                )
    constant = [float(answer == relation.common) for relation in relations for _, answer in relation.pairs]
    mean, ends = share_interval(constant)
    for name in NAMES[1:]:
        values.append(Value(name, "", CONSTANT, mean, len(constant), "facts", ends))
    wordings = np.mean([len(relation.patterns) for relation in relations])
    return Result(
        "consistency", tuple(values), settings(relations, states=states, candidates=candidates, seed=seed),
        notes=(
            f"{len(relations)} relations, {wordings:.1f} wordings each on average. The answer is the most probable of the "
            f"true object, which loses a tie, and up to {candidates} other objects of its relation. One constant word "
            "would be consistent too.",
        ),
        seconds=round(time.perf_counter() - begun, 2), facts={"relations": by_relation},
    )  # fmt: skip


def _choose(subject: EvaluatedModel, prompt: str, answer: str, others: Sequence[str]) -> str:
    """The most probable; a tie goes to another one than the true answer, as in `facts`."""
    answers = [*others, answer]
    log_p, _ = ranked(subject, prompt, answers)
    return answers[int(log_p.argmax())]


def _fits(pattern: str) -> bool:
    return (
        pattern.count("[X]") == 1
        and pattern.count("[Y]") == 1
        and bool(_ENDS.search(pattern))
        and not pattern.startswith("[Y]")
    )


def _files(path: Path) -> dict[tuple[str, str], bytes]:
    """(folder, relation) -> content of the archive's or folder's files."""
    found: dict[tuple[str, str], bytes] = {}
    if path.is_dir():
        for file in path.rglob("*.jsonl"):
            if file.parent.name in (PATTERNS, OBJECTS):
                found[file.parent.name, file.stem] = file.read_bytes()
        return found
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                place = Path(member.name)
                data = archive.extractfile(member)
                if data is not None and place.suffix == ".jsonl" and place.parent.name in (PATTERNS, OBJECTS):
                    found[place.parent.name, place.stem] = data.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a folder or a tar archive: {error}.") from None
    return found


def _lines(data: bytes, fields: str | tuple[str, ...], path: str | Path) -> list[tuple[str, ...]]:
    fields = (fields,) if isinstance(fields, str) else fields
    found = []
    for line in data.decode("utf8").split("\n"):
        if line.strip():
            try:
                record = json.loads(line)
                found.append(tuple(str(record[name]) for name in fields))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{path}: a line with {', '.join(fields)} is wanted; got {line[:80]!r}."
                ) from None
    return found
