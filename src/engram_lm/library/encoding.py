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

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.vocab import is_marker, tokenizer_fingerprint

FILE = "tokenizer.json"


class TextEncoder:
    """A tokenizer as documents use it: no special tokens read or added, nothing cut or padded."""

    def __init__(self, backend: Any) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(backend.to_str())  # a copy: the caller's keeps its ways
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self._splitting = _all_special(self.backend)

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
        """`vocab.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self.backend)

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
        path = directory / FILE
        beside = directory / f"{FILE}.new"
        with open(beside, "w", encoding="utf8") as file:
            json.dump(json.loads(self.backend.to_str()), file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def _all_special(backend: Any) -> Any:
    """The tokenizer with its markers flagged as special, so that they are split; the same one where they are already."""
    added = backend.get_added_tokens_decoder().values()
    if all(token.special or not is_marker(token.content) for token in added):
        return backend
    from tokenizers import Tokenizer

    facts = json.loads(backend.to_str())
    for token in facts["added_tokens"]:
        token["special"] = token["special"] or is_marker(token["content"])
    splitting = Tokenizer.from_str(json.dumps(facts))
    splitting.encode_special_tokens = True
    return splitting
