"""One segment: documents in sorted order, memory-mapped, immutable (docs/index.md). No torch.

write_segment(path, [(Document(id="a"), token_ids), ...], vocab_size=49_152, tokenizer=fingerprint)
segment = Segment.open(path)
match = segment.match(context)                     # longest suffix of the context that occurs, and all shorter
tokens, counts = segment.continuations(match, match.depth)
segment.documents_of(match, match.depth, limit=5)
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index.kernels import segment_search
from engram_lm.index.kernels.sorting import gather
from engram_lm.index.segment_file import (
    SECTIONS,
    STRIDE,
    SegmentFile,
    Sync,
    Verify,
    read,
    require_checksums,
    to_bytes,
    token_dtype,
    tokens_before,
    wrong_inside,
)
from engram_lm.index.sorting import MOST_TOKENS, nodes_of, sort_contexts, wide_intervals

SUFFIX = ".segment"
HEAVY = 8192
_MOST_IDS = 1024
WIDE = 256
MAX_ORDER = 64  # tokens of context that a match looks at, and up to which intervals become nodes

_PART = 2**20  # tokens of `next` worked out at once when a file is written


@dataclass(frozen=True, kw_only=True)
class Document:
    """What is known of a document. added: seconds since 1970; sha256: of its tokens as little-endian u32.

    extra: whatever else should be told of it (title, licence, attribution, ...).
    """

    id: str
    source: str = ""
    added: float = 0.0
    sha256: str = ""
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "source", "sha256"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"The {name} of a document is text; got {getattr(self, name)!r}.")
        if not isinstance(self.added, int | float) or self.added != self.added:
            raise ConfigError(
                f"The document {self.id!r} was added at {self.added!r}; wanted seconds since 1970."
            )
        if not all(isinstance(word, str) for pair in self.extra.items() for word in pair):
            raise ConfigError(f"extra of the document {self.id!r} holds text by name; got {self.extra!r}.")

    def to_line(self) -> bytes:
        """One JSON line: id, and what is not empty. The sha256 stands elsewhere."""
        known = {"id": self.id, "source": self.source, "added": self.added, "extra": self.extra}
        return (
            json.dumps({k: v for k, v in known.items() if v or k == "id"}, separators=(",", ":")).encode()
            + b"\n"
        )

    @classmethod
    def from_line(cls, line: bytes, sha256: str) -> "Document":
        """What `to_line` wrote. CheckpointError for anything else."""
        try:
            known = json.loads(line)
            unknown = set(known) - {"id", "source", "added", "extra"}
            if unknown:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            return cls(**known, sha256=sha256)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"A document's line is damaged ({error}): {line[:80]!r}.") from None


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
    """Arrays of a segment, in memory or mapped from its file; none can be written.

    arrays: the sections of docs/index.md by name.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        *,
        vocab_size: int,
        heavy: int,
        wide: int,
        path: Path | None = None,
    ) -> None:
        self.vocab_size, self.heavy, self.wide, self.path = vocab_size, heavy, wide, path
        self.arrays = dict(arrays)
        for array in self.arrays.values():
            array.flags.writeable = False
        self.tokens, self.order, self.next = arrays["tokens"], arrays["order"], arrays["next"]
        self.document_at = arrays["document_at"]
        self.tokenizer = arrays["tokenizer"].tobytes().decode("utf8", "replace")
        self._ids: dict[int, str] = {}

    @cached_property
    def first(self) -> np.ndarray:
        """Where the positions with each last token begin in `order`, and N: uint32 [V + 1]."""
        try:
            found = _first(self.arrays, self.vocab_size)
        except ValueError:
            raise CheckpointError(
                f"{self.path or 'This segment'} is damaged: its table of last tokens is not in order."
            ) from None
        found.flags.writeable = False
        return found

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
        depth = segment_search.walk(
            self.tokens, self.order, self.first, context_K, max_order, self.end, low_D, high_D
        )
        return Match(low_D[: depth + 1], high_D[: depth + 1])

    def continuations(self, match: Match, order: int) -> tuple[np.ndarray, np.ndarray]:
        """What followed the last `order` tokens: token ids ascending (END: vocab_size) and counts, both int64."""
        low, high = int(match.low[order]), int(match.high[order])
        if high - low > self.heavy:
            arrays = self.arrays
            node = segment_search.find_node(arrays["node_low"], arrays["node_high"], low, high)
            if node >= 0:
                part = slice(int(arrays["node_at"][node]), int(arrays["node_at"][node + 1]))
                return self._known(arrays["node_token"][part], arrays["node_count"][part])
        return self._known(*np.unique(self.next[low:high], return_counts=True))

    def _known(self, token_I: np.ndarray, count_I: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without ids beyond END, which only a file that was not verified has: callers count by id."""
        known = token_I <= self.vocab_size
        return token_I[known].astype(np.int64), count_I[known].astype(np.int64)

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
        sha256 = self.arrays["document_sha256"][32 * number : 32 * number + 32].tobytes().hex()
        return Document.from_line(self._line(number), sha256)

    def number_of(self, document_id: str) -> int:
        """The number of the first document with this id, -1 where there is none."""
        by_id = self.arrays["document_by_id"]
        low, high, found = 0, len(by_id), -1
        while low < high:
            middle = (low + high) // 2
            number = int(by_id[middle])
            known = self._ids.get(number)
            if known is None:
                known = _id_of(self._line(number))
                # every search passes the same first places
                if len(self._ids) < _MOST_IDS:
                    self._ids[number] = known
            if known < document_id:
                low = middle + 1
            else:
                high, found = middle, number if known == document_id else found
        return found

    def _line(self, number: int) -> bytes:
        if not 0 <= number < self.n_documents:
            raise IndexError(f"There is no document {number} among {self.n_documents:,}.")
        at = self.arrays["document_line"]
        return self.arrays["documents"][int(at[number]) : int(at[number + 1])].tobytes()

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
        wide: int = WIDE,
        threads: int | None = None,
    ) -> "Segment":
        """Sort documents (token ids each) into a segment in memory. TokenIdError names an id outside the vocabulary."""
        lists = list(token_lists)
        documents = documents or [Document(id=str(i)) for i in range(len(lists))]
        if len(documents) != len(lists):
            raise ConfigError(f"{len(lists)} documents have {len(documents)} descriptions.")
        tokens_N, facts = _gather(zip(documents, lists, strict=True), vocab_size)
        order_N, first_V = sort_contexts(tokens_N, vocab_size=vocab_size, threads=threads)
        next_N = gather(tokens_N, order_N)
        wide = min(wide, heavy)
        node_H2 = wide_intervals(tokens_N, order_N, end=vocab_size, wide=wide, most_order=MAX_ORDER)
        heavy, nodes = nodes_of(node_H2, next_N, end=vocab_size, heavy=heavy)
        arrays = {
            "tokens": tokens_N, "order": order_N, "next": next_N, **occurring(first_V), **nodes, **facts,
            "tokenizer": np.frombuffer(tokenizer.encode(), np.uint8),
            "before": tokens_before(tokens_N, order_N[::STRIDE], end=vocab_size),
        }  # fmt: skip
        return cls(arrays, vocab_size=vocab_size, heavy=heavy, wide=wide)

    @classmethod
    def merged(
        cls, segments: Sequence["Segment"], keep: Sequence[Collection[int]] | None = None, **options: int
    ) -> "Segment":
        """One segment in memory of these segments' documents, of each those whose numbers are in its `keep`."""
        pairs = list(documents_in(segments, keep))
        return cls.build(
            [tokens for _, tokens in pairs],
            documents=[document for document, _ in pairs],
            vocab_size=segments[0].vocab_size,
            tokenizer=segments[0].tokenizer,
            **options,
        )

    # ---- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike, *, sync: Sync = "all") -> Path:
        """Write the segment beside `path` and rename it there.

        sync: the file and its directory ("all"), the file alone, or "none".
        """
        with SegmentFile.create(path, vocab_size=self.vocab_size, wide=self.wide) as file:
            for name in SECTIONS:
                file.put(name, self.arrays[name])
            file.finish(heavy=self.heavy, sync=sync)
        return Path(path)

    def to_bytes(self) -> np.ndarray:
        """The file that `save` would write, uint8."""
        return to_bytes(self.arrays, vocab_size=self.vocab_size, heavy=self.heavy, wide=self.wide)

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: Verify = "small") -> "Segment":
        """Read a segment's file, or map it if it is large. CheckpointError for whatever is not as docs/index.md says.

        verify: "all" compares checksums and every number that points somewhere. "small" does so in files up to 1 MiB, "none"
        in none; the tables of documents and nodes are always looked at, so that no query of this class reads outside.
        """
        path = Path(path)
        if verify not in ("small", "all", "none"):
            raise ConfigError(f"verify is 'small', 'all' or 'none'; got {verify!r}.")
        facts, arrays = read(path, verify=verify)
        return cls(arrays, vocab_size=facts.vocab_size, heavy=facts.heavy, wide=facts.wide, path=path)

    def verify(self) -> None:
        """Compare the file's checksums with what is mapped, and every number with what it points into."""
        if self.path is None:
            return
        facts, _ = read(self.path, verify="none")
        require_checksums(self.path, facts, self.arrays)
        wrong = wrong_inside(self.arrays, self.vocab_size)
        if wrong:
            raise CheckpointError(f"{self.path} is damaged: {wrong}.")


def write_segment(
    path: str | os.PathLike,
    documents: Iterable[tuple[Document, Sequence[int] | np.ndarray]],
    *,
    vocab_size: int,
    tokenizer: str = "",
    heavy: int = HEAVY,
    wide: int = WIDE,
    threads: int | None = None,
    sync: Sync = "all",
) -> Segment:
    """Sort documents into a file without holding it: 6 bytes a token (u16) at most, and some scratch. Returns it, open."""
    path, wide = Path(path), min(wide, heavy)
    tokens_N, facts = _gather(documents, vocab_size)
    with SegmentFile.create(path, vocab_size=vocab_size, wide=wide) as file:
        order_N, first_V = sort_contexts(tokens_N, vocab_size=vocab_size, threads=threads)
        file.put("tokens", tokens_N)
        file.put("order", order_N)
        file.put("next", (gather(tokens_N, order_N[i : i + _PART]) for i in range(0, len(order_N), _PART)))
        node_H2 = wide_intervals(tokens_N, order_N, end=vocab_size, wide=wide, most_order=MAX_ORDER)
        before = tokens_before(tokens_N, order_N[::STRIDE], end=vocab_size)
        del tokens_N, order_N
        heavy, nodes = nodes_of(node_H2, file.section("next"), end=vocab_size, heavy=heavy)
        text = np.frombuffer(tokenizer.encode(), np.uint8)
        facts |= {"tokenizer": text, "before": before}
        for name, array in {**occurring(first_V), **nodes, **facts}.items():
            file.put(name, array)
        file.finish(heavy=heavy, sync=sync)
    return Segment.open(path, verify="none")


def documents_in(
    segments: Sequence[Segment], keep: Sequence[Collection[int]] | None = None
) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents of segments and their tokens, in order: what `write_segment` takes. keep: numbers of each, all by default."""
    for s, segment in enumerate(segments):
        for number in range(segment.n_documents) if keep is None else sorted(keep[s]):
            yield segment.document(number), segment.document_tokens(number)


def sha256_of(tokens: np.ndarray) -> str:
    """Of token ids as little-endian u32: equal for equal texts under one tokenizer."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").tobytes()).hexdigest()


def _id_of(line: bytes) -> str:
    try:
        known = json.loads(line)["id"]
        return known if isinstance(known, str) else Document.from_line(line, "").id
    except (TypeError, ValueError, KeyError):
        return Document.from_line(line, "").id


# ---- parts of building ------------------------------------------------------------------------------------------------


def _gather(
    pairs: Iterable[tuple[Document, Sequence[int] | np.ndarray]], vocab_size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The stream, and the sections about documents."""
    if not 1 <= vocab_size < 2**32 - 1:
        raise ConfigError(f"A segment has a vocabulary of 1 to 2^32 - 2 tokens; got {vocab_size:,}.")
    # grown in place: parts of a gigabyte, once more as a whole, would be the peak of building
    tokens_N = np.empty(0, token_dtype(vocab_size))
    ids, lines, hashes, line_at, at = [], bytearray(), bytearray(), [0], [0]
    for document, tokens in pairs:
        given = np.asarray(tokens).reshape(-1)
        if given.size:
            if given.dtype.kind not in "iu":
                raise TokenIdError(
                    f"Token ids are whole numbers; document {document.id!r} has {given.dtype}."
                )
            if given.max() >= vocab_size or (given.dtype.kind == "i" and given.min() < 0):
                place = int(np.flatnonzero((given < 0) | (given >= vocab_size))[0])
                raise TokenIdError(
                    f"Token id {given[place]} at place {place} of document {document.id!r} is outside the "
                    f"vocabulary of {vocab_size:,}."
                )
        start, stop = at[-1], at[-1] + len(given)
        if stop + 1 >= MOST_TOKENS:
            raise ConfigError(
                f"A segment holds fewer than 2^31 tokens; these documents have {stop + 1:,} or more."
            )
        if stop >= len(tokens_N):
            tokens_N.resize(max(stop + 1, len(tokens_N) * 9 // 8), refcheck=False)
        tokens_N[start:stop], tokens_N[stop] = given, vocab_size
        at.append(stop + 1)
        ids.append(document.id)
        lines += document.to_line()
        line_at.append(len(lines))
        hashes += hashlib.sha256(given.astype("<u4").tobytes()).digest()
    tokens_N.resize(at[-1], refcheck=False)
    return tokens_N, {
        "document_at": np.array(at, np.uint32),
        "document_line": np.array(line_at, np.uint64),
        "document_by_id": np.array(sorted(range(len(ids)), key=ids.__getitem__), np.uint32),
        "document_sha256": np.frombuffer(hashes, np.uint8),
        "documents": np.frombuffer(lines, np.uint8),
    }


def occurring(first_V: np.ndarray) -> dict[str, np.ndarray]:
    """The last tokens that occur and where each begins."""
    token_F = np.flatnonzero(first_V[1:] > first_V[:-1])
    return {"first_token": token_F, "first_at": first_V[token_F]}


def _first(arrays: dict[str, np.ndarray], vocab_size: int) -> np.ndarray:
    """Where the positions with each last token begin, and N: uint32 [V + 1]."""
    N = np.array([len(arrays["tokens"])], np.uint32)
    edge = np.concatenate([[-1], arrays["first_token"].astype(np.int64), [vocab_size]])
    return np.repeat(np.concatenate([arrays["first_at"], N]).astype(np.uint32), np.diff(edge))
