"""Texts whose entities are marked, of FewRel and Re-DocRED, and which tokens of a model stand inside them.

    marked = read_spans("fewrel_val_wiki.json.xz", most=200, seed=0)      # [Marked(text, spans)]
    ids, place = place_tokens(subject, marked[0])                         # place: int8 [T], OUTSIDE, INSIDE or LAST

    FewRel      {"P177": [{"tokens": [...], "h": [name, id, [[26, 27, 28]]], "t": [...]}]}     head and tail of a relation
    Re-DocRED   [{"sents": [[...]], "vertexSet": [[{"sent_id": 0, "pos": [0, 5], ...}]]}]     every mention of every entity

Words are joined by single spaces, as the data sets cut them; spans are character ranges of that text. A token is inside
when it shares a character with a span other than white space, and last when it is the last such token of the span: there
the n-gram that ends at it holds the end of the whole name.
"""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel

OUTSIDE, INSIDE, LAST = 0, 1, 2
PLACES = ("outside", "inside, not last", "last of an entity")


@dataclass(frozen=True)
class Marked:
    """A text and its entities: (begin, end) in characters, sorted."""

    text: str
    spans: tuple[tuple[int, int], ...]


def read_spans(path: str | Path, *, most: int | None = None, seed: int = 0) -> list[Marked]:
    """Texts of a file of either layout (.json, plain or .gz or .xz); `most` of them, drawn with the seed."""
    path = Path(path)
    try:
        with {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)(path, "rt", encoding="utf8") as file:
            data = json.load(file)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from None
    try:
        if isinstance(data, dict):
            found = [_fewrel(item) for items in data.values() for item in items]
        else:
            found = [_docred(item) for item in data]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(
            f"{path} is laid out neither as FewRel nor as Re-DocRED ({type(error).__name__}: {error}); docs/eval.md shows "
            "both."
        ) from None
    found = [one for one in found if one.spans]
    if not found:
        raise DataError(f"{path} holds no text with a marked entity.")
    if most is not None and most < 1:
        raise ConfigError(f"The number of texts is 1 or more; got {most}.")
    if most is None or most >= len(found):
        return found
    return [found[i] for i in sorted(np.random.default_rng(seed).permutation(len(found))[:most])]


def place_tokens(subject: EvaluatedModel, marked: Marked) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [T], place int8 [T]) of a text, aligned by character offsets; what the tokenizer begins with is outside."""
    encoded = subject.encoder.backend.encode(marked.text, add_special_tokens=False)
    ids = np.array([*subject.prompts.start, *encoded.ids], np.int64)
    place = np.full(len(ids), OUTSIDE, np.int8)
    for begin, end in marked.spans:
        inside = [
            t
            for t, (first, behind) in enumerate(encoded.offsets, start=len(subject.prompts.start))
            if marked.text[max(first, begin) : min(behind, end)].strip()
        ]
        if inside:
            place[inside] = np.maximum(place[inside], INSIDE)
            place[inside[-1]] = LAST
    return ids, place


def _fewrel(item: dict[str, Any]) -> Marked:
    words = [len(word) for word in item["tokens"]]
    ends = [(min(run), max(run) + 1) for side in ("h", "t") for run in item[side][2]]
    return _marked(item["tokens"], words, ends)


def _docred(item: dict[str, Any]) -> Marked:
    words = [word for sentence in item["sents"] for word in sentence]
    first = np.concatenate([[0], np.cumsum([len(sentence) for sentence in item["sents"]])])
    ends = [
        (
            int(first[mention["sent_id"]]) + mention["pos"][0],
            int(first[mention["sent_id"]]) + mention["pos"][1],
        )
        for entity in item["vertexSet"]
        for mention in entity
    ]
    return _marked(words, [len(word) for word in words], ends)


def _marked(words: list[str], lengths: list[int], ends: list[tuple[int, int]]) -> Marked:
    begin = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    spans = set()
    for a, b in ends:
        if not 0 <= a < b <= len(words):
            raise ValueError(f"an entity at words {a} to {b} of {len(words)}")
        spans.add((int(begin[a]), int(begin[b]) - 1))
    return Marked(" ".join(words), tuple(sorted(spans)))
