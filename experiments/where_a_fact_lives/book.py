"""A phone book made of chance: names of two or three parts, each with 50 random bits. Nothing in it can be guessed.

    book = make_book(SIZES["cpu"], seed=0)
    for batch in batches(book, epoch=0, size=128, seed=0): ...      # int64 [B, T]; the last ANSWER tokens are the answer

An entry as tokens, in the three ways it is asked:

    after the name      <entry> p1 p2 [p3] a1 .. a10
    text between        <entry> p1 p2 [p3] f f f f a1 .. a10        f: filler, drawn anew every time
    reworded            <entry> last , first [middle] a1 .. a10

The 50 bits are 10 tokens of 5 bits, not 5 of 10: with 32 answer tokens a pair of them stands in some 45 entries of 5,000
and names none, so the name is the only key; and no parameters are spent on a thousand answer embeddings.

No two names hold the same parts, and no name, reworded or not, begins like another whole name, so every question has
one answer. A quarter of the entries is sometimes read with text between, another quarter sometimes reworded (`MIXED` of
their exposures), half of the book never in another form than plain: what is asked of that half in another form was never
seen in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PAD, BEGIN, COMMA = 0, 1, 2
FIRST = 3  # the first id that is a word
BITS, ANSWER = 50, 10  # bits of an entry; tokens that say them
BITS_PER_TOKEN = BITS // ANSWER
VALUES = 1 << BITS_PER_TOKEN  # answer tokens
FILLERS = 16
FILLER_LENGTHS = (2, 3, 4, 5)  # tokens between name and answer, in training
MIXED = 0.4  # share of exposures in the other form, for entries that have one

PLAIN, FILLER, REWORDED = "plain", "filler", "reworded"
FORMS = (PLAIN, FILLER, REWORDED)


@dataclass(frozen=True, kw_only=True)
class Size:
    """entries and how often each is read; parts: words that names are made of."""

    name: str
    entries: int
    exposures: int
    parts: int


SIZES = {
    size.name: size
    for size in (
        Size(name="quick", entries=200, exposures=4, parts=32),
        Size(name="small", entries=2_500, exposures=40, parts=96),
        Size(name="cpu", entries=5_000, exposures=20, parts=128),
        Size(name="crowded", entries=5_000, exposures=100, parts=128),
        Size(name="packed", entries=5_000, exposures=100, parts=128),
        Size(name="full", entries=100_000, exposures=100, parts=1_024),
    )
}


@dataclass(frozen=True)
class Book:
    """name_N3: ids of the parts, -1 where a name has two; value_NA: answers 0 .. 31; form_N: index into FORMS."""

    size: Size
    seed: int
    name_N3: np.ndarray
    value_NA: np.ndarray
    form_N: np.ndarray

    def __len__(self) -> int:
        return len(self.name_N3)

    @property
    def first_value(self) -> int:
        """The id that says 00000."""
        return FIRST + self.size.parts

    @property
    def first_filler(self) -> int:
        return self.first_value + VALUES

    @property
    def vocabulary(self) -> int:
        return self.first_filler + FILLERS

    @property
    def bits(self) -> int:
        return BITS * len(self)

    @cached_property
    def parts_N(self) -> np.ndarray:
        """How many parts each name has."""
        return (self.name_N3 >= 0).sum(1)

    def length(self, entry: int, form: str, filler: int) -> int:
        """Tokens of an entry in a form, the answer included."""
        more = {PLAIN: 0, FILLER: filler, REWORDED: 1}[form]
        return 1 + int(self.parts_N[entry]) + more + ANSWER

    def question(self, entry: int, form: str, filler_F: np.ndarray) -> list[int]:
        """The tokens before the answer. filler_F are used in the form FILLER alone."""
        name = [int(part) for part in self.name_N3[entry] if part >= 0]
        if form == REWORDED:
            name = [name[-1], COMMA, *name[:-1]]
        return [BEGIN, *name, *((int(f) for f in filler_F) if form == FILLER else ())]

    def answer(self, entry: int) -> list[int]:
        return [self.first_value + int(value) for value in self.value_NA[entry]]

    def words(self) -> list[str]:
        """One word an id, for a tokenizer: no two differ in case or accents alone."""
        return [
            "<pad>",
            "<entry>",
            ",",
            *(f"n{i}" for i in range(self.size.parts)),
            *(format(i, f"0{BITS_PER_TOKEN}b") for i in range(VALUES)),
            *(f"f{i}" for i in range(FILLERS)),
        ]


def make_book(size: Size, *, seed: int) -> Book:
    """The book of a seed. Half of the names have two parts, half three."""
    draw = np.random.default_rng([seed, 1])
    names: list[tuple[int, ...]] = []
    pairs: set[tuple[int, int]] = set()
    taken: set[tuple[int, ...]] = set()
    while len(names) < size.entries:
        three = len(names) >= size.entries // 2
        name = tuple(FIRST + int(i) for i in draw.choice(size.parts, 3 if three else 2, replace=False))
        key = tuple(sorted(name))
        # a name of three whose beginning, plain or reworded, is a whole name of two could not be told from it
        if key in taken or (three and ((name[0], name[1]) in pairs or (name[0], name[2]) in pairs)):
            continue
        taken.add(key)
        if not three:
            pairs.add(name)
        names.append(name)
    order = draw.permutation(len(names))
    name_N3 = np.array([(*names[i], -1)[:3] for i in order])
    return Book(
        size=size,
        seed=seed,
        name_N3=name_N3,
        value_NA=draw.integers(VALUES, size=(len(names), ANSWER)),
        form_N=np.array([0, 0, 1, 2])[draw.permutation(len(names)) % 4],
    )


def encode(
    book: Book, entries: np.ndarray, forms: list[str], *, filler: int, draw: np.random.Generator
) -> list[np.ndarray]:
    """One array of ids for each entry in its form."""
    out = []
    for entry, form in zip(entries, forms, strict=True):
        filler_F = book.first_filler + draw.integers(FILLERS, size=filler) if form == FILLER else ()
        out.append(np.array([*book.question(entry, form, filler_F), *book.answer(entry)]))
    return out


def batches(book: Book, *, epoch: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Every entry once, in the order of (seed, epoch): int64 [B, T], B at most `size`, all rows of one length, no padding."""
    draw = np.random.default_rng([seed, 2, epoch])
    order = draw.permutation(len(book))
    mixed = draw.random(len(book)) < MIXED
    forms = [FORMS[book.form_N[entry]] if mixed[entry] else PLAIN for entry in order]
    rows = encode(book, order, forms, filler=int(draw.choice(FILLER_LENGTHS)), draw=draw)
    by_length: dict[int, list[np.ndarray]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    cut = [
        np.stack(group)[part]
        for group in (by_length[length] for length in sorted(by_length))
        for part in np.array_split(np.arange(len(group)), -(-len(group) // size))
    ]
    for index in draw.permutation(len(cut)):
        yield cut[index]


def questions(
    book: Book, entries: np.ndarray, *, form: str, filler: int = 4, seed: int = 0, size: int = 512
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which entries, int64 [B, T]) with every entry asked once in one form, B at most `size`, no padding."""
    draw = np.random.default_rng([seed, 3])
    rows = encode(book, entries, [form] * len(entries), filler=filler, draw=draw)
    length = np.array([len(row) for row in rows])
    for one in np.unique(length):
        at = np.flatnonzero(length == one)
        for part in np.array_split(at, -(-len(at) // size)):
            yield entries[part], np.stack([rows[i] for i in part])
