"""A tokenised corpus: every document's ids one after another in one file, read from the cache the second time.

The cache key is a sha256 over the files' bytes, how they are read, the tokenizer's print and the end id; names
and dates do not count. Special tokens spelled out in a text are cut like any other text: documents cannot make control
tokens. A document longer than a million characters is tokenised in pieces, cut before a line break.

    corpus = tokenise("corpus/*.jsonl.xz", tokenizer=tokenizer)
    ids = corpus.document(0)         # int32, end id included
    corpus.tokens, len(corpus)

On disk, a directory of little-endian files: ids.bin (i32), documents.bin (a document's u64 end, u64 text hash),
corpus.json (how it was made).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram_lm.cache import built_once, cache_directory
from engram_lm.corpus.text import Document, Files, TxtDocuments, find_files, kind_of, read_documents
from engram_lm.errors import CheckpointError, ConfigError, DataError
from engram_lm.identity import TokenizerPrint, print_of
from engram_lm.identity.writings import first_prints

# Characters in a piece, and in a batch: enough for every core, little enough to hold.
_PIECE_CHARS = 1_000_000
_BATCH_CHARS = 4_000_000
_FORMAT = 1


class Progress(NamedTuple):
    """How far tokenising has come."""

    documents: int
    tokens: int
    file: Path


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents on disk, memory-mapped.

    ids: int32 [tokens]. ends: int64 [documents], where each document ends in ids.
    text_hashes: uint64 [documents], of each text, so that equal texts always land on the same side of a split.
    fingerprint: the cache key, a sha256. empty_documents: how many held no token and were left out.
    """

    directory: Path
    ids: np.ndarray
    ends: np.ndarray
    text_hashes: np.ndarray
    fingerprint: str
    end_id: int
    empty_documents: int

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Read what `tokenise` put into the cache; CheckpointError if it is not whole."""
        try:
            facts = json.loads((directory / "corpus.json").read_text(encoding="utf8"))
            documents = np.fromfile(directory / "documents.bin", dtype="<u8").reshape(-1, 2)
            ids = np.memmap(directory / "ids.bin", dtype="<i4", mode="r")
            ends = documents[:, 0].astype(np.int64)
            if facts["format"] != _FORMAT or ids.size != facts["tokens"] or len(ends) != facts["documents"]:
                raise ValueError(f"wanted {facts}, got {ids.size} tokens in {len(ends)} documents")
            if np.any(np.diff(ends, prepend=0) <= 0) or ends[-1] != ids.size:
                raise ValueError("the documents do not cover the ids")
            return cls(
                directory,
                ids,
                ends,
                documents[:, 1].copy(),
                facts["fingerprint"],
                facts["end_id"],
                facts["empty_documents"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{directory} is no whole tokenised corpus ({error}). Delete it; it is built again."
            ) from None

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process opens the files itself; a pickled memory map would carry the ids along.
        return Corpus.open, (self.directory,)

    @property
    def tokens(self) -> int:
        """Ids over all documents, end ids included."""
        return int(self.ids.size)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: ids of each, end id included."""
        return np.diff(self.ends, prepend=0)

    def document(self, number: int) -> np.ndarray:
        """int32: the ids of one document, end id included."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        return self.ids[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]


def tokenise(
    files: Files,
    *,
    tokenizer: Any,
    field: str = "text",
    txt_documents: TxtDocuments = "file",
    end_id: int | None = None,
    known: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """Tokenise every document, `end_id` (the tokenizer's eos) after each; from the cache where it was done before.

    known: the fingerprint that an earlier run holds; the corpus keeps it where it is of this text and this tokenizer, by
        whichever engram-lm it was taken.
    """
    end_id = tokenizer.eos_token_id if end_id is None else end_id
    if end_id is None:
        raise ConfigError("the tokenizer has no eos token to put between documents; name one with end_id=")
    if not 0 <= end_id < len(tokenizer):
        raise ConfigError(f"end_id {end_id} is outside the tokenizer's {len(tokenizer)} ids")
    paths = find_files(files)
    how = {"format": _FORMAT, "field": field, "txt_documents": txt_documents, "end_id": end_id}
    fingerprint = _fingerprint(how, print_of(tokenizer), _of_files(paths), known)

    def build(directory: Path) -> None:
        documents = read_documents(paths, field=field, txt_documents=txt_documents)
        facts = _write(directory, documents, tokenizer, end_id, progress)
        facts |= how | {"fingerprint": fingerprint}
        (directory / "corpus.json").write_text(
            json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf8"
        )

    return Corpus.open(built_once(cache_directory() / "corpora" / fingerprint[:32], build=build))


def _of_files(paths: list[Path]) -> bytes:
    """Their kinds and bytes, one after another; names and places are not part of it."""
    found = b""
    for path in paths:
        with open(path, "rb") as file:
            found += f"{kind_of(path)}{path.suffix} ".encode() + hashlib.file_digest(file, "sha256").digest()
    return found


def _fingerprint(how: dict[str, Any], tokenizer: TokenizerPrint, files: bytes, known: str | None) -> str:
    """The cache key. One that is `known`, or stands in the cache, under an earlier print of this tokenizer is kept."""

    def key(of_tokenizer: str) -> str:
        text = json.dumps(how, sort_keys=True).encode() + of_tokenizer.encode()
        return hashlib.sha256(text + files).hexdigest()

    cache, new = cache_directory() / "corpora", key(tokenizer.all)
    if known == new or (known is None and ((cache / new[:32]).is_dir() or not cache.is_dir())):
        return new
    for old in map(key, first_prints(tokenizer)):
        if old == known or (known is None and (cache / old[:32]).is_dir()):
            return old
    return new


def _write(
    directory: Path,
    documents: Iterable[Document],
    tokenizer: Any,
    end_id: int,
    progress: Callable[[Progress], None] | None,
) -> dict[str, int]:
    encode = _encoder(tokenizer)
    tokens = empty = 0
    index: list[tuple[int, int]] = []
    with open(directory / "ids.bin", "wb") as file:
        for batch in _batches(documents):
            pieces = [_pieces(document.text) for document in batch]
            cut = iter(encode([piece for of_document in pieces for piece in of_document]))
            for document, of_document in zip(batch, pieces, strict=True):
                ids = [i for _ in of_document for i in next(cut)]
                if not ids:
                    empty += 1
                    continue
                file.write(np.array([*ids, end_id], dtype="<i4").tobytes())
                tokens += len(ids) + 1
                digest = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
                index.append((tokens, int.from_bytes(digest, "little")))
            if progress:
                progress(Progress(len(index), tokens, batch[-1].file))
    if not index:
        raise DataError(f"none of the {empty} documents holds any text")
    np.array(index, dtype="<u8").tofile(directory / "documents.bin")
    return {"documents": len(index), "tokens": tokens, "empty_documents": empty}


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    # A copy: the caller's truncation, padding and special tokens stay as they are.
    backend = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARS:
        # Before the line break, so that it stays with what follows, as the usual pre-tokenisers have it.
        cut = text.rfind("\n", start + 1, start + _PIECE_CHARS)
        cut = cut if cut > 0 else start + _PIECE_CHARS
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]
