"""Text that tells tokenizers apart: what two of them read alike here, they read alike.

What it is: some 14,000 short texts, the same in every Python and for ever, because fingerprints are made of their ids. What
it is not: a proof. Tokenizers that differ on a rare run of letters alone can agree on all of it.

    code points      every character of Unicode 14.0 once behind a blank and once without, in rows of 64
    combining marks  letters as Unicode decomposes them, and Latin, Greek and Cyrillic letters with marks of their own
    languages        names of months, days and countries in 143 languages
    code and prose   eight languages of programming and markup, figures, contractions, emoji, case, signs that do not show
    blanks           runs of 1 to 32 blanks, tabs and line ends: alone, first, last and in the middle

No text begins with a blank. Two writings of one SentencePiece tokenizer are about in the world, the file's and the one that
transformers rebuilds from it, which differ there (whether a further blank is put in front) and nowhere else.

    for text in probe(): ...
"""

from __future__ import annotations

import functools
import json
import unicodedata
from importlib import resources

_ROW = 64
_HANGUL = range(0xAC00, 0xD7A4)
# Hangul is composed by rule; every seventh syllable stands for all.
_HANGUL_STEP = 7
_LETTERS = "aeiouyAEIOUYcnszCNSZαεηιουωаеиоуыАЕИОУЫ"
_MARKS = (0x300, 0x301, 0x302, 0x303, 0x304, 0x306, 0x307, 0x308, 0x30A, 0x30B, 0x30C, 0x323, 0x327, 0x328)
_BLANKS = (" ", "\t", "\n", "\r\n", "\u00a0", "\u3000")
_RUNS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 31, 32)


@functools.cache
def probe() -> tuple[str, ...]:
    """The texts, always the same ones in the same order."""
    kept = json.loads(resources.files(__package__).joinpath("probe.json").read_text(encoding="utf8"))
    signs = code_points(kept["code_points"])
    texts = [""]
    for start in range(0, len(signs), _ROW):
        row = signs[start : start + _ROW]
        texts += [" ".join(row), "".join(row)]
    texts += _decomposed(signs)
    texts += [letter + chr(mark) + letter for letter in _LETTERS for mark in _MARKS]
    texts += [*kept["languages"].values(), *kept["code"], *kept["prose"]]
    texts += [word for text in kept["languages"].values() for word in text.split(" ")]
    texts += [text.swapcase() for text in kept["prose"]]
    for blank in _BLANKS:
        for n in _RUNS:
            run = blank * n
            texts += [run, f"{run}a", f"a{run}", f"a{run}b", f"1{run}2", f".{run}."]
    texts += ["\n \t\n", "a \n b", "a\n\n\n b", "\r\r\n", "a\t b \t", "\u00a0 \u00a0 a"]
    texts += [chr(byte) * 2 for byte in range(256)]
    return tuple(text for text in texts if not text.startswith(" "))


def code_points(written: str) -> list[str]:
    """The characters that "gap+length gap+length ..." (hexadecimal) names, ascending."""
    found, at = [], 0
    for part in written.split():
        gap, length = (int(number, 16) for number in part.split("+"))
        at += gap
        found += map(chr, range(at, at + length))
        at += length
    return found


def _decomposed(signs: list[str]) -> list[str]:
    """What canonical decomposition makes of each sign that it changes. Unicode never changes these once assigned."""
    wanted = (c for c in signs if ord(c) not in _HANGUL or not ord(c) % _HANGUL_STEP)
    return [text for c in wanted if (text := unicodedata.normalize("NFD", c)) != c]
