"""Token ids to text piece by piece, so that a character of several tokens is printed once and right.

A byte-level tokenizer spreads one character over several tokens, and others put a token's space where its neighbour is;
so ids are decoded behind the piece before them, and held back while they end in the middle of a character.

    pieces = PieceDecoder(tokenizer)
    for token in ids:
        text = pieces.add(token)      # "" while a character is incomplete
    text = pieces.end()
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"
# A character has at most four bytes, so longer than this it is not one that is still to come.
_LONGEST = 8


class PieceDecoder:
    """Decodes a stream of ids; the pieces joined are the text of the whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes, or "" while it is held back."""
        self._held.append(token)
        text = self._text()
        if text.endswith(_INCOMPLETE) and len(self._held) < _LONGEST:
            return ""
        return self._give(text)

    def end(self) -> str:
        """What was held back, complete or not."""
        return self._give(self._text()) if self._held else ""

    def _text(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._held)[len(before) :]

    def _give(self, text: str) -> str:
        self._before, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
