"""The invented handbook: a hundred facts, each with a question, in documents of 1, 8 and 100 sentences.

A document of 8 sentences holds two facts, one of 100 sentences five; the rest is filler, drawn with a fixed seed.

    facts = read_facts()
    documents = handbook(facts, sentences=8)        # {"handbook/03": Page(sentences=[...], facts=[6, 41]), ...}
    passages(documents)                             # the same, cut into passages of at most 8 sentences
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
FACTS_IN = {1: 1, 8: 2, 100: 5}
PASSAGE = 8


@dataclass(frozen=True)
class Fact:
    """answer: what an answer has to contain, word for word. part: "tuning" facts are what settings were chosen on."""

    number: int
    sentence: str
    question: str
    cloze: str
    answer: str

    @property
    def part(self) -> str:
        return "tuning" if self.number % 3 == 0 else "test"

    def is_answered_by(self, text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Page:
    """A document, or a passage of one. facts: numbers of the facts in it."""

    sentences: tuple[str, ...]
    facts: frozenset[int]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def read_facts() -> list[Fact]:
    lines = (DATA / "facts.txt").read_text(encoding="utf8").splitlines()
    rows = [line.split(" | ") for line in lines if line and not line.startswith("#")]
    return [Fact(number, *row) for number, row in enumerate(rows)]


def handbook(facts: list[Fact], *, sentences: int) -> dict[str, Page]:
    draw = random.Random(sentences)
    order = facts[:]
    draw.shuffle(order)
    write, each = filler(draw), FACTS_IN[sentences]
    pages = {}
    for n, start in enumerate(range(0, len(order), each)):
        held = order[start : start + each]
        lines = [write() for _ in range(sentences - len(held))]
        for fact in held:
            lines.insert(draw.randrange(len(lines) + 1), fact.sentence)
        pages[f"handbook/{n:02}"] = Page(tuple(lines), frozenset(fact.number for fact in held))
    return pages


def passages(pages: dict[str, Page]) -> dict[str, Page]:
    found = {}
    by_sentence = {fact.sentence: fact.number for fact in read_facts()}
    for name, page in pages.items():
        for start in range(0, len(page.sentences), PASSAGE):
            lines = page.sentences[start : start + PASSAGE]
            held = frozenset(by_sentence[line] for line in lines if line in by_sentence)
            found[f"{name}#{start // PASSAGE}"] = Page(lines, held)
    return found


def filler(draw: random.Random):
    """A function that writes one sentence after the other, none of them twice."""
    lines = [line for line in (DATA / "filler.txt").read_text(encoding="utf8").splitlines() if line[0] != "#"]
    words = dict(re.fullmatch(r"\[(\w+)\] (.*)", line).groups() for line in lines if line[0] == "[")
    words = {slot: found.split(", ") for slot, found in words.items()}
    forms, said = [line for line in lines if line[0] != "["], set()

    def write() -> str:
        while True:
            left = {slot: iter(draw.sample(found, len(found))) for slot, found in words.items()}
            parts = re.split(r"\{(\w+)\}", draw.choice(forms))
            line = "".join(next(left[part]) if n % 2 else part for n, part in enumerate(parts))
            if line not in said:
                said.add(line)
                return line

    return write
