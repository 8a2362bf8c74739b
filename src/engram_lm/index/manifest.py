"""What an index consists of: generation, vocabulary, and each tenant's segments with their masks (docs/store.md).

    manifest = Manifest.from_bytes(data, "notes/manifest")     # CheckpointError for whatever is not as the document says
    manifest.tenants["public"][0].live_tokens
    data = manifest.to_bytes()

Immutable. It holds numbers of files, never names or paths: nothing in it leads out of its directory.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.kernels import checksums

MANIFEST = "manifest"
MOST_BYTES = 2**28
SEALED = 4096
_NAME, _VERSION = "engram-index", 1
_SEAL = re.compile("[0-9a-f]{16}")
_MOST = 2**53
_MOST_VOCAB = 2**31
_MOST_NAME = 256


def require_index(directory: Path) -> None:
    """CheckpointError where a directory holds no index."""
    if not (directory / MANIFEST).exists():
        raise CheckpointError(f"{directory} holds no index. Make one: engram-lm index create.")


def require_new(directory: Path) -> None:
    """CheckpointError where an index cannot be made, as there is a file or an index already."""
    if (directory / MANIFEST).exists():
        raise CheckpointError(
            f"{directory} holds an index already. Name another directory, or add to it: engram-lm index add."
        )
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; an index is a directory. Name another.")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Some deleted documents of a segment; tokens count their ENDs. seal: XXH64 of the file's start, its checksum in it."""

    number: int
    documents: int
    tokens: int
    seal: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A segment's file; tokens count ENDs, deleted documents are in all counts. seal: as of a mask."""

    number: int
    tokens: int
    documents: int
    bytes: int
    seal: str
    masks: tuple[Mask, ...] = ()

    @property
    def dead_tokens(self) -> int:
        return sum(mask.tokens for mask in self.masks)

    @property
    def dead_documents(self) -> int:
        return sum(mask.documents for mask in self.masks)

    @property
    def live_tokens(self) -> int:
        return self.tokens - self.dead_tokens


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One generation of an index. next: the number of the next file."""

    vocab_size: int
    tokenizer: str
    generation: int = 0
    next: int = 0
    tenants: dict[str, tuple[Entry, ...]] = field(default_factory=dict)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Every segment with its tenant."""
        for tenant, entries in self.tenants.items():
            for entry in entries:
                yield tenant, entry

    def files(self) -> set[str]:
        """Names of the segments and masks."""
        names = set()
        for _, entry in self.entries():
            names.add(segment_name(entry.number))
            names.update(mask_name(mask.number) for mask in entry.masks)
        return names

    def to_bytes(self) -> bytes:
        tenants = {
            name: [_entry_to_json(entry) for entry in entries]
            for name, entries in self.tenants.items()
            if entries
        }
        facts = {
            "generation": self.generation, "next": self.next, "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer, "tenants": tenants,
        }  # fmt: skip
        text = json.dumps(facts).encode()
        return f"{_NAME} {_VERSION} {_hash(text):016x}\n".encode() + text

    @classmethod
    def from_bytes(cls, data: bytes, path: object) -> "Manifest":
        """Read what `to_bytes` wrote; `path` is for the error."""
        line, _, text = data.partition(b"\n")
        words = line[:100].split(b" ")
        if len(words) != 3 or words[0] != _NAME.encode():
            raise CheckpointError(f"{path} is no manifest of an index (it begins with {line[:20]!r}).")
        if words[1] != str(_VERSION).encode():
            raise CheckpointError(
                f"{path} has version {words[1].decode(errors='replace')[:20]}; this build reads version {_VERSION}. "
                "Upgrade engram-lm."
            )
        if words[2] != f"{_hash(text):016x}".encode():
            raise CheckpointError(f"{path} is damaged: its checksum is wrong.")
        try:
            return _manifest_of(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {str(error)[:200]}.") from None


def seal(start: bytes) -> str:
    """What tells a file from another of the same number: XXH64 of its first SEALED bytes, 16 hexadecimal digits."""
    return f"{_hash(start[:SEALED]):016x}"


def segment_name(number: int) -> str:
    return f"{number:012d}.segment"


def mask_name(number: int) -> str:
    return f"{number:012d}.mask"


def require_tenant(name: object) -> str:
    """Any words of up to 256 characters are a tenant's name. ConfigError otherwise."""
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME or not name.isprintable():
        raise ConfigError(
            f"A tenant's name is 1 to {_MOST_NAME} printable characters; got {str(name)[:50]!r}."
        )
    return name


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    # asdict copies deeply: with many segments that is most of a small change
    facts: dict[str, Any] = {
        "number": entry.number, "tokens": entry.tokens, "documents": entry.documents, "bytes": entry.bytes,
        "seal": entry.seal,
    }  # fmt: skip
    if entry.masks:
        facts["masks"] = [vars(mask) for mask in entry.masks]
    return facts


def _hash(text: bytes) -> int:
    return int(checksums.xxh64(np.frombuffer(text, np.uint8)))


# ---- reading what others wrote: every error is a ValueError with one sentence ------------------------------------------


def _manifest_of(facts: object) -> Manifest:
    found = _object(facts, "the manifest", {"generation", "next", "vocab_size", "tokenizer", "tenants"})
    if not isinstance(found["tokenizer"], str):
        raise ValueError("tokenizer is no text")
    if not isinstance(found["tenants"], dict):
        raise ValueError("tenants is no object")
    limit, seen = _whole(found, "next"), set[int]()
    tenants = {}
    for name, entries in found["tenants"].items():
        if not isinstance(entries, list):
            raise ValueError(f"tenant {name[:50]!r} is no list")
        try:
            tenants[require_tenant(name)] = tuple(_entry_of(entry, limit, seen) for entry in entries)
        except ConfigError as error:
            raise ValueError(str(error).rstrip(".")) from None
    vocab_size = _whole(found, "vocab_size")
    if not 0 < vocab_size < _MOST_VOCAB:
        raise ValueError(f"vocab_size is {vocab_size:,}")
    return Manifest(
        vocab_size=vocab_size, tokenizer=found["tokenizer"], generation=_whole(found, "generation"), next=limit,
        tenants=tenants,
    )  # fmt: skip


def _entry_of(facts: object, limit: int, seen: set[int]) -> Entry:
    names = {"number", "tokens", "documents", "bytes", "seal"}
    found = _object(facts, "a segment", names, optional={"masks"})
    number, tokens, documents, size = (
        _whole(found, name) for name in ("number", "tokens", "documents", "bytes")
    )
    _new_number(number, limit, seen)
    if tokens < documents:
        raise ValueError(f"segment {number} has {documents:,} documents in {tokens:,} tokens")
    masks = found.get("masks", [])
    if not isinstance(masks, list):
        raise ValueError("masks is no list")
    entry = Entry(
        number=number, tokens=tokens, documents=documents, bytes=size, seal=_seal(found),
        masks=tuple(_mask_of(mask, limit, seen) for mask in masks),
    )  # fmt: skip
    if entry.dead_documents > documents or entry.dead_tokens > tokens:
        raise ValueError(f"the masks of segment {number} count more than it has")
    return entry


def _mask_of(facts: object, limit: int, seen: set[int]) -> Mask:
    found = _object(facts, "a mask", {"number", "documents", "tokens", "seal"})
    number, documents, tokens = (_whole(found, name) for name in ("number", "documents", "tokens"))
    _new_number(number, limit, seen)
    if not 0 < documents <= tokens:
        raise ValueError(f"mask {number} has {documents:,} documents in {tokens:,} tokens")
    return Mask(number=number, documents=documents, tokens=tokens, seal=_seal(found))


def _object(found: object, what: str, names: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    if missing := names - found.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := found.keys() - names - optional:
        raise ValueError(f"{what} has the unknown field {sorted(unknown)[0][:50]!r}")
    return found


def _whole(facts: dict[str, Any], name: str) -> int:
    number = facts[name]
    # True is an int, and 3.0 is none of ours
    if type(number) is not int or not 0 <= number <= _MOST:
        raise ValueError(f"{name} is no whole number from 0 to 2^53")
    return number


def _seal(facts: dict[str, Any]) -> str:
    if not isinstance(facts["seal"], str) or not _SEAL.fullmatch(facts["seal"]):
        raise ValueError("a seal is not 16 hexadecimal digits")
    return facts["seal"]


def _new_number(number: int, limit: int, seen: set[int]) -> None:
    if number >= limit or number in seen:
        raise ValueError(f"the file number {number} is named twice or not below next ({limit})")
    seen.add(number)
