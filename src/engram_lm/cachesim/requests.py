"""Token streams read from files: requests, each a run of ids that a server would read from its start.

    .npy            integers: [tokens], one stream, or [requests, tokens]
    .bin            a stream of little-endian integers of `dtype`, nothing else in the file
    .jsonl          {"ids": [5, 17, ...]} a request, with "prompt_tokens": 3 where the log knows the prompt;
                    or {"text": "..."} a request, for a tokenizer
    .txt            text, for a tokenizer

.jsonl and .txt may have .gz or .xz after them. A stream is cut behind every `separator` id, which stays the last token
of its request. Requests without a token are left out and counted.

    requests = read_requests("log.jsonl", limit=1_000_000)
    requests.ids_T, requests.tokens_Q, requests.prompt_Q
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.corpus.text import TxtDocuments, read_documents
from engram_lm.errors import ConfigError, DataError

DTYPES = ("uint16", "int32", "uint32", "int64")
# Texts tokenized at a time.
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Ids of requests one after another.

    ids_T: int64. tokens_Q: the length of each request. prompt_Q: how many of its tokens come first, in one step (0: as
    one). empty: requests that were left out because they have no token. name: the file's.
    """

    name: str
    ids_T: np.ndarray
    tokens_Q: np.ndarray
    prompt_Q: np.ndarray
    empty: int = 0

    def __len__(self) -> int:
        return len(self.tokens_Q)

    @property
    def starts_T(self) -> np.ndarray:
        """True at the first token of every request."""
        starts_T = np.zeros(len(self.ids_T), dtype=np.bool_)
        starts_T[np.cumsum(self.tokens_Q) - self.tokens_Q] = True
        return starts_T

    def shuffled(self, seed: int) -> "Requests":
        """The same requests in another order."""
        order_Q = np.random.default_rng(seed).permutation(len(self))
        ends_Q = np.cumsum(self.tokens_Q)
        parts = [self.ids_T[ends_Q[q] - self.tokens_Q[q] : ends_Q[q]] for q in order_Q]
        return Requests(
            name=self.name,
            ids_T=np.concatenate(parts),
            tokens_Q=self.tokens_Q[order_Q],
            prompt_Q=self.prompt_Q[order_Q],
            empty=self.empty,
        )


def require_stream(path: str | Path) -> Path:
    """The path, or DataError where there is no file: to be said before a tokenizer is looked for."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; wanted token ids (.npy, .bin, .jsonl) or text (.jsonl, .txt)")
    return path


def read_requests(
    path: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    separator: int | None = None,
    field: str | None = None,
    txt_documents: TxtDocuments | None = None,
    prefill: int | None = None,
    limit: int | None = None,
) -> Requests:
    """Requests of one file, in its order; whole ones until they hold `limit` tokens or more.

    tokenizer: a tokenizers.Tokenizer, for text; special tokens are not added. prefill: prompt tokens of every request.
    Options that the file gives no meaning to are refused.
    """
    path = require_stream(path)
    for value, what in ((prefill, "prefill"), (limit, "limit")):
        if value is not None and value < 1:
            raise ConfigError(f"{what} is {value}; wanted a number of tokens from 1.")
    kind = (path.with_suffix("") if path.suffix in (".gz", ".xz") else path).suffix
    holds_ids = kind in (".npy", ".bin") or (kind == ".jsonl" and _has_ids(path))
    _refuse_without_effect(
        path, kind, holds_ids, dtype=dtype, separator=separator, field=field, txt_documents=txt_documents
    )
    if kind in (".npy", ".bin"):
        parts = _stream(path, kind, dtype, separator)
    elif kind not in (".jsonl", ".txt"):
        raise DataError(
            f"{path}: ids are read from .npy, .bin and .jsonl files, text from .jsonl and .txt files"
        )
    elif holds_ids:
        parts = _id_lines(path)
    elif tokenizer is None:
        raise ConfigError(f"{path} holds text: name the tokenizer that makes ids of it with --tokenizer.")
    else:
        parts = _texts(path, tokenizer, field or "text", txt_documents or "file")
    return _collect(path, parts, prefill, limit)


def _refuse_without_effect(path: Path, kind: str, holds_ids: bool, **options: Any) -> None:
    takes = {
        "dtype": kind == ".bin",
        "separator": kind in (".npy", ".bin"),
        "field": kind == ".jsonl" and not holds_ids,
        "txt_documents": kind == ".txt",
    }
    for name, value in options.items():
        if value is not None and not takes[name]:
            what = "ids" if holds_ids else "text"
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on {path.name}, {what} in a {kind} file. Leave it out."
            )


def _collect(
    path: Path, parts: Iterator[tuple[np.ndarray, int | None]], prefill: int | None, limit: int | None
) -> Requests:
    ids, prompts = [], []
    total = empty = 0
    for part_T, prompt in parts:
        if not len(part_T):
            empty += 1
            continue
        if prompt is not None and prefill is not None:
            raise ConfigError(
                f"{path} has prompt_tokens of its own, so --prefill has no effect. Leave it out."
            )
        ids.append(part_T)
        prompts.append(prompt or prefill or 0)
        total += len(part_T)
        if limit is not None and total >= limit:
            break
    if not ids:
        raise DataError(f"{path} holds no tokens")
    return Requests(
        name=path.name,
        ids_T=np.concatenate(ids).astype(np.int64),
        tokens_Q=np.array([len(part) for part in ids], dtype=np.int64),
        prompt_Q=np.array(prompts, dtype=np.int64),
        empty=empty,
    )


def _stream(
    path: Path, kind: str, dtype: str | None, separator: int | None
) -> Iterator[tuple[np.ndarray, int | None]]:
    if kind == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read as .npy: {error}") from None
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise DataError(
                f"{path} holds {array.dtype} of shape {array.shape}; wanted integers, [tokens] or [requests, tokens]"
            )
        if array.ndim == 2:
            if separator is not None:
                raise ConfigError(f"{path} has a request a row, so --separator has no effect. Leave it out.")
            return ((row, None) for row in array)
    else:
        if dtype not in DTYPES:
            raise ConfigError(
                f"a .bin file does not say what it holds: give --dtype, one of {', '.join(DTYPES)}."
            )
        size = np.dtype(dtype).itemsize
        if path.stat().st_size % size:
            raise DataError(f"{path} has {path.stat().st_size} bytes, no whole number of {dtype}")
        array = np.fromfile(path, dtype=np.dtype(dtype).newbyteorder("<"))
    if separator is None:
        return iter([(array, None)])
    cuts = np.flatnonzero(array == separator) + 1
    if not len(cuts):
        raise DataError(f"{path}: the separator {separator} is nowhere among its {len(array)} ids")
    pieces = np.split(array, cuts)
    return ((piece, None) for piece in (pieces if len(pieces[-1]) else pieces[:-1]))


def _id_lines(path: Path) -> Iterator[tuple[np.ndarray, int | None]]:
    for record, where in _records(path):
        ids, prompt = record.get("ids"), record.get("prompt_tokens")
        array = np.array(ids) if isinstance(ids, list) and _integers(ids) else None
        if array is None or (array.size and array.dtype != np.int64):
            raise DataError(f'{where}: wanted {{"ids": [5, 17, ...]}}, a list of integers')
        if prompt is not None and not (_integers([prompt]) and 0 <= prompt <= len(ids)):
            raise DataError(
                f"{where}: prompt_tokens is {prompt!r}; wanted 0 to {len(ids)}, the request's tokens"
            )
        yield array, prompt


def _integers(values: list) -> bool:
    return all(type(value) is int for value in values)


def _has_ids(path: Path) -> bool:
    return any("ids" in record for record, _ in islice(_records(path), 1))


def _records(path: Path) -> Iterator[tuple[dict, str]]:
    number = 0
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{path}:{number}: a JSON {type(record).__name__}, wanted an object")
                yield record, f"{path}:{number}"
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}:{number}: broken JSON or UTF-8: {error}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number}: {error}") from None


def _texts(
    path: Path, tokenizer: Any, field: str, txt_documents: TxtDocuments
) -> Iterator[tuple[np.ndarray, int | None]]:
    options: dict[str, Any] = {"field": field, "txt_documents": txt_documents}
    texts = (document.text for document in read_documents(path, **options))
    while batch := list(islice(texts, _BATCH)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int64), None
