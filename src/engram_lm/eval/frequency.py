"""How often an n-gram was seen in training text, counted exactly, and buckets of that.

    seen = Frequencies.count([text.ids for text in texts], training, orders=(1, 2, 3))
    seen.of(ids, order=2)               # int64 [T]: of the 2-gram that ends at each token; -1 where fewer tokens came before
    bucket_of(seen.of(ids, order=2))    # int64 [T]: a place in BUCKETS, or -1

Counted are the raw token ids of the model's tokenizer, inside documents. Only n-grams of the texts that are asked about are
kept, so the training text may be of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engram_lm.errors import ConfigError

EDGES = (0, 1, 2, 4, 16, 256)
BUCKETS = ("0", "1", "2–3", "4–15", "16–255", "256 and more")


class Frequencies:
    """Counts of the n-grams of some documents."""

    def __init__(self, keys: dict[int, np.ndarray], counts: dict[int, np.ndarray], bits: int) -> None:
        self._keys, self._counts, self._bits = keys, counts, bits

    @classmethod
    def count(
        cls, documents: Sequence[np.ndarray], training: Iterable[np.ndarray], *, orders: Sequence[int] = (1, 2, 3)
    ) -> Frequencies:  # fmt: skip
        """documents: int [T] each, what will be asked about. training: int [T] of each training document.

        ConfigError where orders times the bits of the largest id exceed the 63 bits of a key.
        """
        largest = max((int(ids.max()) for ids in documents if len(ids)), default=0)
        bits = max(1, largest.bit_length())
        if min(orders, default=0) < 1 or bits * max(orders) > 63:
            raise ConfigError(
                f"orders are from 1, up to {63 // bits} with ids of {bits} bits; got {list(orders)}."
            )
        keys = {
            n: np.unique(np.concatenate([_keys(np.asarray(ids, np.int64), n, bits) for ids in documents]))
            for n in orders
        }
        counts = {n: np.zeros(len(keys[n]), np.int64) for n in orders}
        for ids in training:
            ids = np.asarray(ids, np.int64)
            # an id that no document holds would spill into its neighbour's bits
            foreign_T = ids > largest
            for n in orders:
                found = _keys(np.where(foreign_T, 0, ids), n, bits)[~_touched(foreign_T, n)]
                _add(counts[n], keys[n], found)
        return cls(keys, counts, bits)

    @property
    def orders(self) -> tuple[int, ...]:
        return tuple(self._keys)

    def of(self, ids: np.ndarray, *, order: int) -> np.ndarray:
        """int64 [T]: how often the n-gram that ends at each token was seen; -1 for the first order - 1 tokens."""
        found = np.full(len(ids), -1, np.int64)
        wanted = _keys(np.asarray(ids, np.int64), order, self._bits)
        keys = self._keys[order]
        place = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
        if len(wanted) and not (keys[place] == wanted).all():
            raise ConfigError("These ids were not among the documents whose n-grams were counted.")
        found[order - 1 :] = self._counts[order][place]
        return found


def bucket_of(counts: np.ndarray) -> np.ndarray:
    """int64: the bucket of each count, -1 for -1."""
    return np.searchsorted(EDGES, counts, side="right") - 1


def _keys(ids: np.ndarray, n: int, bits: int) -> np.ndarray:
    """int64 [T - n + 1]: the n-grams of ids, one number each."""
    if len(ids) < n:
        return np.empty(0, np.int64)
    key = np.zeros(len(ids) - n + 1, np.int64)
    for i in range(n):
        key = (key << bits) | ids[i : i + len(key)]
    return key


def _touched(foreign_T: np.ndarray, n: int) -> np.ndarray:
    """bool [T - n + 1]: n-grams that hold a foreign id."""
    if len(foreign_T) < n:
        return np.empty(0, bool)
    touched = np.zeros(len(foreign_T) - n + 1, bool)
    for i in range(n):
        touched |= foreign_T[i : i + len(touched)]
    return touched


def _add(counts: np.ndarray, keys: np.ndarray, found: np.ndarray) -> None:
    unique, times = np.unique(found, return_counts=True)
    place = np.searchsorted(keys, unique)
    inside = place < len(keys)
    inside[inside] = keys[place[inside]] == unique[inside]
    counts[place[inside]] += times[inside]
