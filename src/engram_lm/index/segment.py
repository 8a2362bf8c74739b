"""One segment: documents in sorted order, memory-mapped, immutable (docs/index.md). No torch.

write_segment(path, documents, vocab_size=49_152, tokenizer=fingerprint)
with Segment.open(path) as segment:
    match = segment.match(context)                     # longest suffix of the context that occurs, and all shorter
    tokens, counts = segment.continuations(match, match.depth)
    segment.documents_of(match, match.depth, limit=5)
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index.sorting import context_order, heavy_nodes
from engram_lm.kernels import checks, search

MAGIC = b"\x89ENGS\r\n\x1a"
VERSION = 1
SUFFIX = ".segment"
HEAVY = 1024
MAX_ORDER = 64  # tokens of context that a match looks at

_START = struct.Struct("<8sIIQ")
_ALIGNMENT = 4096
_MOST_JSON = 2**30
_SECTIONS = (
    "tokens", "order", "next", "first", "node_low", "node_high", "node_at", "node_token", "node_count", "document_at",
    "documents",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Document:
    """What is known of a document. added: seconds since 1970; sha256: of its tokens as little-endian u32."""

    id: str
    source: str = ""
    added: float = 0.0
    sha256: str = ""


@dataclass(frozen=True)
class Match:
    """Intervals of the last 0, 1, ..., depth tokens of a context: low and high int64 [depth + 1]."""

    low: np.ndarray
    high: np.ndarray

    @property
    def depth(self) -> int:
        """How many of the last tokens occur together; END after them counts as occurring."""
        return len(self.low) - 1

    def count(self, order: int) -> int:
        """Positions whose last `order` tokens are the context's."""
        return int(self.high[order] - self.low[order])


class Segment:
    """Arrays of a segment, in memory or mapped from its file."""

    def __init__(self, arrays: dict[str, np.ndarray], *, vocab_size: int, tokenizer: str, heavy: int) -> None:
        self.vocab_size, self.tokenizer, self.heavy = vocab_size, tokenizer, heavy
        self.arrays = arrays
        self.tokens, self.order, self.next = arrays["tokens"], arrays["order"], arrays["next"]
        self.document_at = arrays["document_at"]
        self._documents: list[Document] | None = None

    @property
    def end(self) -> int:
        """The id that ends a document."""
        return self.vocab_size

    @property
    def n_documents(self) -> int:
        return len(self.document_at) - 1

    def __len__(self) -> int:
        """Tokens, ENDs included."""
        return len(self.tokens)

    # ---- reading ------------------------------------------------------------------------------------------------------

    def match(self, context: Sequence[int] | np.ndarray, *, max_order: int = MAX_ORDER) -> Match:
        """The longest suffix of `context` (token ids, oldest first) that occurs in a document, and every shorter one."""
        found = np.asarray(context)
        if found.size and found.dtype.kind not in "iu":
            raise TokenIdError(f"Token ids are whole numbers; got {found.dtype}.")
        context_K = np.ascontiguousarray(found, np.int64)
        low_D, high_D = np.empty(max_order + 1, np.int64), np.empty(max_order + 1, np.int64)
        depth = search.walk(
            self.tokens, self.order, self.arrays["first"], context_K, max_order, self.end, low_D, high_D
        )
        return Match(low_D[: depth + 1], high_D[: depth + 1])

    def continuations(self, match: Match, order: int) -> tuple[np.ndarray, np.ndarray]:
        """What followed the last `order` tokens: token ids ascending (END: vocab_size) and counts, both int64."""
        low, high = int(match.low[order]), int(match.high[order])
        if high - low > self.heavy:
            node = search.find_node(self.arrays["node_low"], self.arrays["node_high"], low, high)
            if node < 0:
                raise CheckpointError(
                    f"This segment lacks the counts of {high - low:,} positions: it is damaged."
                )
            part = slice(int(self.arrays["node_at"][node]), int(self.arrays["node_at"][node + 1]))
            return self.arrays["node_token"][part].astype(np.int64), self.arrays["node_count"][part].astype(
                np.int64
            )
        token_I, count_I = np.unique(self.next[low:high], return_counts=True)
        return token_I.astype(np.int64), count_I

    def documents_of(self, match: Match, order: int, *, limit: int = 10) -> list[tuple[Document, int]]:
        """Documents in which the last `order` tokens occur, each with how often, most often first."""
        position_I = self.order[int(match.low[order]) : int(match.high[order])]
        number_I, count_I = np.unique(
            np.searchsorted(self.document_at, position_I, "right") - 1, return_counts=True
        )
        by = np.argsort(-count_I, kind="stable")[:limit]
        return [(self.document(int(number_I[i])), int(count_I[i])) for i in by]

    def document(self, number: int) -> Document:
        """What is known of the document `number`."""
        if self._documents is None:
            lines = bytes(self.arrays["documents"]).splitlines()
            self._documents = [Document(**json.loads(line)) for line in lines]
        return self._documents[number]

    def document_tokens(self, number: int) -> np.ndarray:
        """Its tokens, without END."""
        return self.tokens[int(self.document_at[number]) : int(self.document_at[number + 1]) - 1]

    # ---- making -------------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        token_lists: Iterable[Sequence[int] | np.ndarray],
        *,
        vocab_size: int,
        tokenizer: str = "",
        documents: Sequence[Document] | None = None,
        heavy: int = HEAVY,
    ) -> "Segment":
        """Sort documents (token ids each) into a segment. TokenIdError names an id outside the vocabulary."""
        lists = [np.asarray(tokens, np.int64).reshape(-1) for tokens in token_lists]
        documents = documents or [Document(id=str(i)) for i in range(len(lists))]
        if len(documents) != len(lists):
            raise ConfigError(f"{len(lists)} documents have {len(documents)} descriptions.")
        for number, tokens in enumerate(lists):
            bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
            if len(bad):
                raise TokenIdError(
                    f"Token id {tokens[bad[0]]} at place {bad[0]} of document {documents[number].id!r} is outside the "
                    f"vocabulary of {vocab_size:,}."
                )
        dtype = np.dtype("<u2") if vocab_size < 2**16 else np.dtype("<u4")
        size_D = np.array([len(tokens) + 1 for tokens in lists], np.int64)
        if size_D.sum() >= 2**32:
            raise ConfigError(
                f"A segment holds fewer than 2^32 tokens; these documents have {size_D.sum():,}."
            )
        stream_N = np.concatenate(
            [part for tokens in lists for part in (tokens, [vocab_size])] or [np.empty(0)]
        )
        tokens_N = stream_N.astype(dtype)
        order_N = context_order(tokens_N, vocab_size) if len(tokens_N) else np.empty(0, np.int64)
        next_N = tokens_N[order_N]
        last_N = np.where(order_N > 0, tokens_N[order_N - 1], vocab_size) if len(tokens_N) else order_N
        last_N = np.where(last_N == vocab_size, -1, last_N.astype(np.int64))
        first_V = np.searchsorted(last_N, np.arange(vocab_size + 1)).astype("<u4")
        nodes = heavy_nodes(tokens_N, order_N, next_N, end=vocab_size, heavy=heavy)
        described = [
            Document(**{**asdict(document), "sha256": sha256_of(tokens)})
            for document, tokens in zip(documents, lists, strict=True)
        ]
        text = b"".join(json.dumps(asdict(document)).encode() + b"\n" for document in described)
        arrays = {
            "tokens": tokens_N,
            "order": order_N.astype("<u4"),
            "next": next_N,
            "first": first_V,
            **dict(zip(_SECTIONS[4:9], nodes, strict=True)),
            "document_at": np.concatenate([[0], np.cumsum(size_D)]).astype("<u4"),
            "documents": np.frombuffer(text, np.uint8),
        }
        return cls(arrays, vocab_size=vocab_size, tokenizer=tokenizer, heavy=heavy)

    # ---- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> Path:
        """Write the segment beside `path`, sync it and rename it there."""
        path = Path(path)
        sections, at = {}, 0
        for name in _SECTIONS:
            data = np.ascontiguousarray(self.arrays[name])
            flat = data.view(np.uint8).reshape(-1)
            sections[name] = {
                "dtype": data.dtype.str, "count": len(data), "at": at, "xxh64": f"{int(checks.xxh64(flat)):016x}",
            }  # fmt: skip
            at += -(-len(flat) // _ALIGNMENT) * _ALIGNMENT
        facts = {
            "vocab_size": self.vocab_size, "tokenizer": self.tokenizer, "heavy": self.heavy, "sections": sections,
        }  # fmt: skip
        # places in the file depend on how long the JSON is: leave room for them to grow
        room = -(-(_START.size + len(json.dumps(facts)) + 20 * len(sections)) // _ALIGNMENT) * _ALIGNMENT
        for section in sections.values():
            section["at"] += room
        text = json.dumps(facts).encode()
        start = _START.pack(MAGIC, VERSION, len(text), int(checks.xxh64(np.frombuffer(text, np.uint8))))
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with open(beside, "wb") as file:
                file.write((start + text).ljust(room, b"\0"))
                for name in _SECTIONS:
                    file.seek(sections[name]["at"])
                    np.ascontiguousarray(self.arrays[name]).tofile(file)
                file.truncate(room + at)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None
        return path

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: bool = False) -> "Segment":
        """Map a segment's file. CheckpointError for whatever is not as docs/index.md says."""
        path = Path(path)
        facts = _read_facts(path)
        try:
            size = path.stat().st_size
            mapped = np.memmap(path, np.uint8, "r")
            arrays = {name: _section(path, mapped, size, name, facts["sections"][name]) for name in _SECTIONS}
            segment = cls(
                arrays,
                vocab_size=int(facts["vocab_size"]),
                tokenizer=str(facts["tokenizer"]),
                heavy=int(facts["heavy"]),
            )
            _require_sizes(path, segment)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}.") from None
        if verify:
            segment.verify(path, facts)
        return segment

    def verify(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Check every section's checksum. CheckpointError names the section."""
        facts = facts or _read_facts(path)
        for name in _SECTIONS:
            flat = np.ascontiguousarray(self.arrays[name]).view(np.uint8).reshape(-1)
            if f"{int(checks.xxh64(flat)):016x}" != facts["sections"][name]["xxh64"]:
                raise CheckpointError(f"{path}: the section {name} is damaged: its checksum is wrong.")


def sha256_of(tokens: np.ndarray) -> str:
    """Of token ids as little-endian u32: equal for equal texts under one tokenizer."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").tobytes()).hexdigest()


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(_START.size)
            if len(start) < _START.size or start[:8] != MAGIC:
                raise CheckpointError(f"{path} is no segment (it begins with {start[:8]!r}).")
            _, version, n_json, wanted = _START.unpack(start)
            if version != VERSION:
                raise CheckpointError(
                    f"{path} is a segment of version {version}; this build reads version {VERSION}."
                )
            text = file.read(min(n_json, _MOST_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(text) < n_json or int(checks.xxh64(np.frombuffer(text, np.uint8))) != wanted:
        raise CheckpointError(f"{path} has a damaged header: its checksum is wrong.")
    return json.loads(text)


def _section(path: Path, mapped: np.ndarray, size: int, name: str, facts: dict[str, Any]) -> np.ndarray:
    dtype, count, at = np.dtype(facts["dtype"]), int(facts["count"]), int(facts["at"])
    if dtype.kind not in "u" or count < 0 or at % _ALIGNMENT or not 0 <= at <= size - count * dtype.itemsize:
        raise ValueError(f"the section {name} lies outside the file")
    return mapped[at : at + count * dtype.itemsize].view(dtype)


def _require_sizes(path: Path, segment: Segment) -> None:
    arrays, N = segment.arrays, len(segment.tokens)
    H, D = len(arrays["node_low"]), len(arrays["document_at"]) - 1
    wanted = {
        "order": N, "next": N, "first": segment.vocab_size + 1, "node_high": H, "node_at": H + 1,
        "node_count": len(arrays["node_token"]), "document_at": max(D, 0) + 1,
    }  # fmt: skip
    for name, count in wanted.items():
        if len(arrays[name]) != count:
            raise ValueError(f"the section {name} has {len(arrays[name]):,} numbers, not {count:,}")
    ends = {
        "order": (arrays["order"], N), "first": (arrays["first"], N + 1), "node_high": (arrays["node_high"], N + 1),
        "node_at": (arrays["node_at"], len(arrays["node_token"]) + 1), "document_at": (arrays["document_at"], N + 1),
    }  # fmt: skip
    for name, (array, limit) in ends.items():
        if len(array) and int(array.max()) >= limit:
            raise ValueError(f"the section {name} points outside")
