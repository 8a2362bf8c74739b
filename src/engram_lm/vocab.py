"""Tokenizer compression: token id → canonical id, so that " Apple", "apple" and "APPLE" share one memory address.

What it is: one array over all raw ids of a fast tokenizer, added tokens included, and two hashes that say which map and
which tokenizer it is. What it is not: a tokenizer (text is never re-cut) and not part of the hash (see addressing).

The rule (Engram paper, arXiv 2601.07372, section 2.2, and its released code), for each id in ascending order:

    text = decode([id])                    special tokens kept, no clean-up
    key  = raw token string                if text holds U+FFFD: a piece of a character, bytes that are no text
           normalise(text) or text         otherwise
    canonical = the number of distinct keys seen before the first id with this key

    normalise = NFKC, NFD, strip accents, lowercase, [ \\t\\r\\n]+ → one space,
                a lone space → sentinel, strip, sentinel → space

Holes are ids below `raw_size` that name no token: gaps in the vocabulary, or a model's embedding rows beyond it
(`raw_size=`). They decode to "", so the rule gives all of them one canonical id, shared with any token that decodes
to "". No text reaches them.

    tokens = TokenMap.from_tokenizer(tokenizer)      # tokenizers.Tokenizer or a transformers fast tokenizer
    canonical_BT = tokens.canonical_of(ids_BT)       # −1 (DEAD: padding, image) stays −1
    print(tokens.raw_size, "→", tokens.size, tokens.groups(limit=3))

File (`save`, `load`), little-endian: magic "ENGRMAP\\0"; u32 version = 2 (1 is read); u32 header bytes; header (UTF-8 JSON,
padded by spaces so that the ids begin at a multiple of 64); raw_size × i32 canonical ids; sha256 (32 bytes) of all before it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from engram_lm.durable import replacing_file
from engram_lm.errors import CheckpointError, ConfigError, IdentityError, TokenIdError
from engram_lm.identity.tokenizers import TokenizerPrint, backend_of, print_of, without_tokens_since

DEAD = -1
MAGIC = b"ENGRMAP\0"
VERSION = 2
# A private-use character that keeps a lone space from being stripped. A token that is this character becomes a space.
_SENTINEL = "\ue000"
# More ids than any tokenizer has; keeps canonical ids inside int32 and a hostile header from asking for all memory.
_MAX_IDS = 1 << 27


class TokenGroup(NamedTuple):
    """Raw ids that share one canonical id, ascending."""

    canonical: int
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TokenMap:
    """A map and the tokenizer it belongs to. Built by the class methods.

    canonical: int64 [raw_size], read-only, values 0 … size−1 dealt in first-seen order
    size, raw_size: how many canonical ids, how many raw ids
    fingerprint: sha256 of the map alone
    tokenizer_fingerprint, n_tokens: `TokenizerPrint.all` and `.n_tokens`; a map of file version 1 has the first print
        (identity/writings.py) and 0
    """

    canonical: np.ndarray
    kind: Literal["compressed", "raw"]
    tokenizer_fingerprint: str
    n_tokens: int = 0
    size: int = field(init=False)
    raw_size: int = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        canonical = np.array(self.canonical, dtype=np.int64)
        if canonical.ndim != 1 or not 0 < canonical.size <= _MAX_IDS:
            raise ConfigError(f"a token map is one row of 1 to {_MAX_IDS} ids; got shape {canonical.shape}")
        highest_before = np.maximum.accumulate(np.concatenate(([-1], canonical[:-1])))
        wrong = np.flatnonzero((canonical < 0) | (canonical > highest_before + 1))
        if wrong.size:
            at = int(wrong[0])
            raise ConfigError(
                f"canonical ids are dealt in first-seen order: id {at} has {canonical[at]}, "
                f"wanted 0 … {highest_before[at] + 1}. Build the map with TokenMap.from_tokenizer."
            )
        if self.kind not in ("compressed", "raw"):
            raise ConfigError(f'a token map is "compressed" or "raw"; got {self.kind!r}')
        if self.kind == "raw" and int(canonical[-1]) != canonical.size - 1:
            raise ConfigError("a raw token map is the identity; this one merges ids")
        # One more entry, at index −1: a DEAD id reads DEAD without a branch.
        lookup = np.append(canonical, DEAD)
        lookup.flags.writeable = False
        object.__setattr__(self, "_lookup", lookup)
        object.__setattr__(self, "canonical", lookup[:-1])
        object.__setattr__(self, "size", int(canonical.max()) + 1)
        object.__setattr__(self, "raw_size", int(canonical.size))
        content = f"engram token map 1\n{canonical.size}\n".encode() + canonical.astype("<i4").tobytes()
        object.__setattr__(self, "fingerprint", hashlib.sha256(content).hexdigest())
        object.__setattr__(self, "_print", None)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, *, raw_size: int | None = None) -> TokenMap:
        """Compress by the module's rule. `raw_size`, a model's embedding rows, may exceed the ids: holes follow."""
        backend = backend_of(tokenizer)
        tokens = _tokens_by_id(backend, raw_size)
        decode = functools.partial(backend.decode, skip_special_tokens=False)
        canonical = _deal([_key(token, decode([i])) for i, token in enumerate(tokens)])
        return cls._of(canonical, "compressed", print_of(tokenizer))

    @classmethod
    def raw(cls, tokenizer: Any, *, raw_size: int | None = None) -> TokenMap:
        """The identity: for profiles that hash raw ids. It still knows which tokenizer gave the ids their meaning."""
        count = len(_tokens_by_id(backend_of(tokenizer), raw_size))
        return cls._of(np.arange(count), "raw", print_of(tokenizer))

    @classmethod
    def _of(
        cls, canonical: np.ndarray, kind: Literal["compressed", "raw"], found: TokenizerPrint
    ) -> TokenMap:
        made = cls(canonical, kind, found.all, found.n_tokens)
        object.__setattr__(made, "_print", found)
        return made

    def require_tokenizer(self, tokenizer: Any, *, where: str) -> None:
        """IdentityError where `tokenizer` gives text other ids than the one that this map was made of. Tokens that were added
        since may stand beside them: no other id changed its meaning by them."""
        found = print_of(tokenizer)
        before = [without_tokens_since(found, self.n_tokens)] if self.n_tokens else _before_additions(found)
        if any(one.is_the_one_of(self.tokenizer_fingerprint) for one in itertools.chain([found], before)):
            return
        raise IdentityError(
            f"The tokenizer in {where} (fingerprint {found.all[:12]}) is not the one the memory was trained with "
            f"({self.tokenizer_fingerprint[:12]}): its ids mean other text."
        )

    def is_of(self, stored: str) -> bool:
        """Whether a fingerprint that a file holds is of the tokenizer that this map was made of."""
        return stored == self.tokenizer_fingerprint or (
            self._print is not None and self._print.is_the_one_of(stored)
        )

    def canonical_of(self, ids: Any) -> np.ndarray:
        """ids: integers of any shape, each −1 or 0 … raw_size−1 → int64 of that shape. Else TokenIdError."""
        ids = np.asarray(ids)
        if ids.size == 0:
            return np.zeros(ids.shape, dtype=np.int64)
        if ids.dtype.kind not in "iu":
            raise TokenIdError(f"token ids are integers; got an array of {ids.dtype}")
        if int(ids.min()) < DEAD or int(ids.max()) >= self.raw_size:
            at = tuple(int(i[0]) for i in np.nonzero((ids < DEAD) | (ids >= self.raw_size)))
            raise TokenIdError(
                f"token id {ids[at]} at position {at[0] if len(at) == 1 else at} is outside this vocabulary "
                f"of {self.raw_size} ids (wanted −1 or 0 … {self.raw_size - 1}). Is this another tokenizer's id?"
            )
        return self._lookup[ids.astype(np.int64, copy=False)]  # type: ignore[attr-defined]

    def groups(self, *, limit: int | None = 10) -> list[TokenGroup]:
        """The canonical ids that merge two or more raw ids, largest first; equal sizes by canonical id."""
        counts = np.bincount(self.canonical, minlength=self.size)
        merged = np.flatnonzero(counts > 1)
        merged = merged[np.argsort(-counts[merged], kind="stable")][:limit]
        order = np.argsort(self.canonical, kind="stable")
        starts = np.cumsum(counts) - counts
        return [
            TokenGroup(int(c), tuple(order[starts[c] : starts[c] + counts[c]].tolist()))
            for c in merged.tolist()
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, whole or not at all."""
        keys = _HEADER_KEYS[VERSION if self.n_tokens else 1]
        header: dict[str, Any] = {name: getattr(self, name) for name in keys}
        text = json.dumps(header, sort_keys=True).encode()
        text += b" " * (-(len(MAGIC) + 8 + len(text)) % 64)
        version = VERSION if self.n_tokens else 1
        body = MAGIC + struct.pack("<II", version, len(text)) + text + self.canonical.astype("<i4").tobytes()
        with replacing_file(Path(path), shared=True) as file:
            file.write(body + hashlib.sha256(body).digest())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenMap:
        """Read what `save` wrote; CheckpointError for anything else."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: no token map can be read here ({error.strerror})") from None
        if data[: len(MAGIC)] != MAGIC:
            raise CheckpointError(f"{path} is not a token map: it begins with {data[:8]!r}, wanted {MAGIC!r}")
        start = len(MAGIC) + 8
        if len(data) < start + 32:
            raise CheckpointError(f"{path} is cut short: {len(data)} bytes")
        version, header_bytes = struct.unpack_from("<II", data, len(MAGIC))
        if version not in _HEADER_KEYS:
            raise CheckpointError(
                f"{path} has format {version}; this build reads 1 to {VERSION}. Upgrade engram-lm."
            )
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise CheckpointError(
                f"{path} is damaged or cut short: its sha256 does not match its {len(data)} bytes"
            )
        try:
            header = json.loads(data[start : start + header_bytes])
            keys = _HEADER_KEYS[version]
            if set(header) != set(keys):
                raise ValueError(f"header keys {sorted(header)}, wanted {sorted(keys)}")
            found = cls(
                np.frombuffer(data[start + header_bytes : -32], dtype="<i4"),
                header["kind"],
                header["tokenizer_fingerprint"],
                int(header.get("n_tokens", 0)),
            )
            for name in keys:
                if getattr(found, name) != header[name]:
                    raise ValueError(
                        f"the header says {name} {header[name]}, the ids give {getattr(found, name)}"
                    )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a token map of format {version}: {error}") from None
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_print": None,
        }  # a tokenizer's text, megabytes that no other process asks for

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenMap):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"TokenMap({self.kind}, {self.raw_size} → {self.size} ids, {self.fingerprint[:12]})"

    def _identity(self) -> tuple[str, str, str]:
        return self.kind, self.fingerprint, self.tokenizer_fingerprint


_FIRST_KEYS = ("kind", "size", "raw_size", "fingerprint", "tokenizer_fingerprint")
# by file version
_HEADER_KEYS = {1: _FIRST_KEYS, 2: (*_FIRST_KEYS, "n_tokens")}
# A map of file version 1 does not say how many tokens its tokenizer had: as many additions are taken back.
_ADDITIONS = 64


def _before_additions(found: TokenizerPrint) -> Iterator[TokenizerPrint]:
    """The tokenizer without the last added token, without the last two, ..."""
    added = sorted((token["id"] for token in json.loads(found.serialisation)["added_tokens"]), reverse=True)
    return (without_tokens_since(found, first) for first in added[:_ADDITIONS])


def normalise(text: str) -> str:
    """The released code's normaliser. Most tokens are ASCII, where its passes are plain string methods."""
    return _normalise_ascii(text) if text.isascii() else _normaliser()(text)


def _normalise_ascii(text: str) -> str:
    # str.split would also split at \x1c–\x1f, which the regex and Rust's trim leave alone.
    for blank in "\t\r\n":
        text = text.replace(blank, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text if text == " " else text.lower().strip(" \x0b\x0c")


@functools.cache
def _normaliser() -> Callable[[str], str]:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(_SENTINEL, " "),
        ]
    ).normalize_str


def _key(token: str | None, text: str) -> str:
    if "\ufffd" in text:
        # A hole decodes to ""; only a token can hold U+FFFD.
        assert token is not None
        return token
    return normalise(text) or text


def _deal(keys: list[str]) -> np.ndarray:
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def _tokens_by_id(backend: Any, raw_size: int | None) -> list[str | None]:
    """Every id's raw token string, None for holes."""
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ConfigError("the tokenizer has no tokens; train it or load it first")
    highest = max(vocabulary.values())
    count = highest + 1 if raw_size is None else raw_size
    if not highest < count <= _MAX_IDS:
        raise ConfigError(
            f"raw_size {count} is below the tokenizer's {highest + 1} ids (or above {_MAX_IDS})"
        )
    tokens: list[str | None] = [None] * count
    for token, i in vocabulary.items():
        tokens[i] = token
    return tokens
