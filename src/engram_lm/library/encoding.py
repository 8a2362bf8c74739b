"""Text ↔ ids of documents. A document's text never becomes a special token: "<|im_start|>" in it is encoded as its letters.
So is "<tool_call>", which many tokenizers do not call special: else a document could go on where a model calls a tool.

encoder = TextEncoder.of(tokenizer)      # transformers' fast tokenizer, tokenizers.Tokenizer, or where one is saved
ids = encoder.encode("Annual leave is")
"""

import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.durable import write_atomic
from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.identity.tokenizers import as_documents_read, first_difference, print_of
from engram_lm.identity.writings import first_print

FILE = "tokenizer.json"


class TextEncoder:
    """A tokenizer as documents use it: no special tokens read or added, nothing cut or padded."""

    def __init__(self, backend: Any) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(backend.to_str())  # a copy: the caller's keeps its ways
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self._splitting = as_documents_read(self.backend)

    @classmethod
    def of(cls, tokenizer: Any) -> "TextEncoder":
        """From a tokenizer, or from a tokenizer.json, or a directory that holds one."""
        from tokenizers import Tokenizer

        if isinstance(tokenizer, str | os.PathLike):
            path = Path(tokenizer)
            path = path / FILE if path.is_dir() else path
            try:
                return cls(Tokenizer.from_str(path.read_text(encoding="utf8")))
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
            except Exception as error:  # the library raises plain ones
                raise CheckpointError(f"{path} holds no tokenizer: {error}") from None
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise ConfigError(
                f"An index needs a tokenizer of the tokenizers library (a fast one); got {type(tokenizer).__name__}."
            )
        return cls(backend)

    @cached_property
    def fingerprint(self) -> str:
        """`TokenizerPrint.text`: which ids a document gets."""
        return print_of(self.backend).text

    @cached_property
    def first_print(self) -> str:
        """What the manifest of an index says of its tokenizer: a hash of how that is written down."""
        return first_print(json.loads(self.backend.to_str()))

    def _require_manifest(self, store: Any) -> None:
        """IdentityError where an index holds another tokenizer's ids than the tokenizer.json beside them."""
        if store.tokenizer != self.first_print and not print_of(self.backend).is_the_one_of(store.tokenizer):
            raise IdentityError(
                f"{FILE} in {store.directory} is not the tokenizer that its documents were indexed with "
                f"({self.first_print[:12]}, wanted {store.tokenizer[:12]}): it was exchanged. Put the right one back, or "
                "index the texts anew."
            )

    def _require(self, tokenizer: Any, *, where: str) -> None:
        """IdentityError unless another tokenizer gives every text the same ids, markers read as letters."""
        if print_of(tokenizer).text == self.fingerprint:
            return
        text = first_difference(self.backend, tokenizer)
        example = "" if text is None else f", {text!r} for one becomes other ids"
        raise IdentityError(
            f"{where} holds tokens of another tokenizer than this model's{example}: the same numbers are other words. Make "
            "an index for this model: engram-lm index create NEW --model MODEL."
        )

    @cached_property
    def vocab_size(self) -> int:
        """One past the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a text."""
        return np.array(self._splitting.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_all(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of several, on all cores."""
        return [
            np.array(found.ids, np.uint32)
            for found in self._splitting.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json into a directory, whole or not at all."""
        write_atomic(directory / FILE, json.dumps(json.loads(self.backend.to_str()), ensure_ascii=False))


def encoder_of(store: Any, tokenizer: Any = None) -> TextEncoder:
    """The encoder of an index: the tokenizer.json in its directory, else the caller's tokenizer.

    IdentityError where that file is not what the documents were indexed with, and where the caller's tokenizer gives a text
    other ids.
    """
    directory = Path(store.directory)
    if tokenizer is None or (directory / FILE).exists():
        own = TextEncoder.of(directory)
        own._require_manifest(store)
        if tokenizer is not None:
            own._require(tokenizer, where=str(directory))
        return own
    found = print_of(tokenizer)
    if not found.is_the_one_of(store.tokenizer):
        raise IdentityError(
            f"{directory} holds tokens of the tokenizer {store.tokenizer[:12]}; yours is {found.text[:12]}. The same numbers "
            "are other words: use its tokenizer, or index the texts anew."
        )
    return TextEncoder.of(tokenizer)
