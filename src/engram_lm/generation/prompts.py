"""Prompts as token ids, for every way of generating. What a person or a document writes never becomes a special token.

    prompts = PromptEncoder(tokenizer)
    prompts.text("Alexander the Great")            # the text as it is, behind what the tokenizer puts before every text
    prompts.chat("Who repairs microscopes?")       # a user's turn in the tokenizer's chat template

"<|im_end|>" in a prompt is encoded as its letters, as in documents (`library.encoding`): only the template opens and closes
turns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from engram_lm.errors import ConfigError
from engram_lm.library.encoding import TextEncoder

_CONTENT = "\x00"


class PromptEncoder:
    """Encodes prompts for one tokenizer. encoder: the tokenizer's `TextEncoder`, where there is one already."""

    def __init__(self, tokenizer: Any, encoder: TextEncoder | None = None) -> None:
        self.tokenizer = tokenizer
        self._encoder = encoder

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder.of(self.tokenizer) if self._encoder is None else self._encoder

    @property
    def can_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text(self, text: str) -> list[int]:
        """Ids of a text that the model goes on with. ConfigError for an empty one where nothing can stand before it."""
        ids = [*self.start, *self.encoder.encode(text).tolist()]
        if ids:
            return ids
        start = getattr(self.tokenizer, "bos_token_id", None)
        start = getattr(self.tokenizer, "eos_token_id", None) if start is None else start
        if start is None:
            raise ConfigError("The prompt is empty and the tokenizer has no token to begin with.")
        return [start]

    def chat(self, turn: str) -> list[int]:
        """Ids of a user's turn and the beginning of the answer. ConfigError where the tokenizer has no chat template."""
        if not self.can_chat:
            raise ConfigError("The tokenizer has no chat template; leave --chat out.")
        turn = turn.strip()
        plain = self.encoder.encode(turn).tolist()
        if plain == self._as_written(turn):
            return self._as_written(self._rendered(turn))
        # the turn holds a marker: it is read as letters, between what the template puts around it
        head, _, tail = self._rendered(_CONTENT).partition(_CONTENT)
        return [*self._as_written(head), *plain, *self._as_written(tail)]

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before every text, such as <bos>."""
        whole, bare = list(self.tokenizer("a").input_ids), self._as_written("a")
        n = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        return whole[:n]

    def _rendered(self, turn: str) -> str:
        turns = [{"role": "user", "content": turn}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _as_written(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def prompt_ids(
    tokenizer: Any, prompt: str, *, chat: bool = False, encoder: TextEncoder | None = None
) -> list[int]:
    """The ids of a prompt, as it is or as a user's turn in the tokenizer's chat template."""
    prompts = PromptEncoder(tokenizer, encoder)
    return prompts.chat(prompt) if chat else prompts.text(prompt)
