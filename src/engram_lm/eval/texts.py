"""Documents of files, as many tokens as asked for, and the stretches that intervals are drawn from.

    texts = read_texts(["held-out.jsonl.xz", "book.txt"], subject.encode, tokens=20_000)     # of each file

Documents are taken in the order of the file; the last one is cut. A stretch is a document, or STRETCH tokens of a longer
one: so one book gives an interval too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_lm.corpus.text import find_files, read_documents
from engram_lm.errors import ConfigError, DataError

STRETCH = 512


@dataclass(frozen=True, eq=False)
class Text:
    """One document. file: its file's name. ids: int64 [T], two or more."""

    file: str
    ids: np.ndarray


def read_texts(
    files: Sequence[str | Path], encode: Callable[[str], np.ndarray], *, tokens: int, field: str = "text"
) -> list[Text]:
    """Documents of every file up to `tokens` tokens a file; DataError for a file without two tokens."""
    if tokens < 2:
        raise ConfigError(f"tokens is how many of each file are read, from 2 on; got {tokens}.")
    found = []
    for path in find_files(list(files)):
        left = tokens
        for document in read_documents([path], field=field):
            # a token has a character or more, but for rare ones of several tokens: no need to encode a whole book
            ids = encode(document.text[: 16 * left])[:left]
            if len(ids) > 1:
                found.append(Text(path.name, ids))
                left -= len(ids)
            if left < 2:
                break
        if left == tokens:
            raise DataError(f"{path} holds no text of two tokens or more: there is nothing to measure on.")
    names = [path.name for path in find_files(list(files))]
    if len(set(names)) != len(names):
        raise ConfigError("Two files have the same name; results go by the name, so rename one of them.")
    return found


def stretches(texts: Sequence[Text]) -> np.ndarray:
    """int64 [N]: for every predicted token (all but each document's first, in order) the number of its stretch."""
    numbers, first = [], 0
    for text in texts:
        stretch_T = np.arange(len(text.ids) - 1) // STRETCH
        numbers.append(first + stretch_T)
        first += int(stretch_T[-1]) + 1
    return np.concatenate(numbers)
