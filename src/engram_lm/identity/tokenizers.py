"""Which tokenizer it is, by what it does: two prints of the ids that it gives to text.

    found = print_of(tokenizer)          # tokenizers.Tokenizer, or a transformers fast tokenizer
    found.text                           # sha256 of the ids that documents get: indexes and gates compare it
    found.all                            # sha256 of every id, tokens that were added too: tables and corpora compare it
    found.is_the_one_of(stored)          # also where an older engram-lm wrote `stored` (see writings.py)

    text   every (token, id) but markers'; merges, or scores; added tokens that a document's letters can become; the ids of
           some 14,000 texts (probe.py), read as documents are: markers spelled out are letters
    all    `text`; every (token, id); every added token with the rules by which it takes blanks

A tokenizer.json, the object that transformers builds from it and one read from a GGUF file often write the same rules in
other words. What they are set to is not asked, only what they do. Markers are tokens that are special or look it
(`is_marker`). The post-processor, truncation, padding, dropout and whether a token is called special change no id here.

Taking a print costs one to two seconds, so prints are kept in the cache directory by the sha256 of the serialisation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lm.cache import cache_directory
from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError
from engram_lm.identity.probe import probe

# <tool_call>, </think>, [INST]: markers of a chat format that not every tokenizer flags as special
_MARKER = re.compile(r"</?[^<>\s][^<>]*>|\[/?[A-Z_]{2,}\]|.*tool.*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class TokenizerPrint:
    """Both prints, 64 hexadecimal digits each. n_tokens: one past the highest id. serialisation: as the library writes it."""

    text: str
    all: str
    n_tokens: int
    serialisation: str
    source: str = ""

    def is_the_one_of(self, stored: str) -> bool:
        """Whether a print that some file holds is this tokenizer's: either of these two, or the first version's."""
        from engram_lm.identity.writings import first_prints

        return stored in (self.text, self.all) or stored in first_prints(self)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of every id and of how text becomes ids: `TokenizerPrint.all`."""
    return print_of(tokenizer).all


def print_of(tokenizer: Any) -> TokenizerPrint:
    """The prints of a tokenizers.Tokenizer or a transformers fast tokenizer, without importing transformers."""
    source = getattr(tokenizer, "name_or_path", "")
    return _print_of(backend_of(tokenizer).to_str(), source if isinstance(source, str) else "")


def backend_of(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` inside; ConfigError where there is none."""
    for candidate in (
        tokenizer,
        getattr(tokenizer, "backend_tokenizer", None),
        getattr(tokenizer, "_tokenizer", None),
    ):
        if all(hasattr(candidate, name) for name in ("to_str", "get_vocab", "decode", "id_to_token")):
            return candidate
    raise ConfigError(
        f"got {type(tokenizer).__module__}.{type(tokenizer).__name__}, wanted a fast tokenizer: tokenizers.Tokenizer, "
        "or a transformers tokenizer that is backed by one (AutoTokenizer.from_pretrained(…))"
    )


def is_marker(added_token: str) -> bool:
    """Whether an added token marks turns or tools, whatever the tokenizer says of it: no word of a document, and none that
    memory may say."""
    return _MARKER.fullmatch(added_token.strip() or " ") is not None


def as_documents_read(backend: Any) -> Any:
    """A copy that reads markers as the letters they are spelled with, cuts nothing and pads nothing."""
    return _reader(json.loads(backend.to_str()))


def without_tokens_since(found: TokenizerPrint, n_tokens: int) -> TokenizerPrint:
    """The print of the same tokenizer before tokens of ids from `n_tokens` on were added; itself where none was."""
    facts = json.loads(found.serialisation)
    kept = [token for token in facts.get("added_tokens") or () if token["id"] < n_tokens]
    if len(kept) == len(facts.get("added_tokens") or ()):
        return found
    facts["added_tokens"] = kept
    from tokenizers import Tokenizer

    return _print_of(Tokenizer.from_str(json.dumps(facts)).to_str(), "")


def first_difference(one: Any, other: Any) -> str | None:
    """A short text that two tokenizers give other ids, read as documents are; None where neither an added token nor a text of
    the probe gets any."""
    read = [as_documents_read(backend_of(tokenizer)) for tokenizer in (one, other)]
    added = {token.content for reader in read for token in reader.get_added_tokens_decoder().values()}
    texts = sorted(
        {*probe(), *added}, key=lambda text: (not text.isascii(), not text.strip(), len(text), text)
    )
    for first, second, text in zip(*(_encode(backend, texts) for backend in read), texts, strict=True):
        if first != second:
            return text
    return None


# ---- taking a print --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _print_of(serialisation: str, source: str) -> TokenizerPrint:
    key = hashlib.sha256(serialisation.encode("utf8", "surrogatepass")).hexdigest()
    found = _kept(key)
    if found is None:
        found = _take(json.loads(serialisation))
        _keep(key, found)
    return TokenizerPrint(found["text"], found["all"], found["n_tokens"], serialisation, source)


def _take(facts: dict[str, Any]) -> dict[str, Any]:
    added = sorted(facts.get("added_tokens") or (), key=lambda token: token["id"])
    silent = {token["content"] for token in added if token.get("special") or is_marker(token["content"])}
    reader = _reader(facts)
    tokens: dict[str, int] = reader.get_vocab(with_added_tokens=True)
    if not tokens:
        raise ConfigError("the tokenizer has no tokens; train it or load it first")

    text = hashlib.sha256(b"engram tokenizer text 2\n")
    _update(text, sorted((i, token) for token, i in tokens.items() if token not in silent))
    _update(text, _rules(facts["model"]))
    _update(text, [_added(token) for token in added if token["content"] not in silent])
    for ids in _encode(reader, probe()):
        text.update(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids))

    every = hashlib.sha256(b"engram tokenizer all 2\n" + text.digest())
    _update(every, sorted((i, token) for token, i in tokens.items()))
    _update(every, [_added(token) for token in added])
    return {"text": text.hexdigest(), "all": every.hexdigest(), "n_tokens": max(tokens.values()) + 1}


def _reader(facts: dict[str, Any]) -> Any:
    """A tokenizer of these facts as documents are read: markers are letters; without dropout, cuts and padding."""
    from tokenizers import Tokenizer

    facts = {**facts, "truncation": None, "padding": None}
    if facts["model"].get("dropout") is not None:
        facts["model"] = {**facts["model"], "dropout": None}
    facts["added_tokens"] = [
        {**token, "special": bool(token.get("special")) or is_marker(token["content"])}
        for token in facts.get("added_tokens") or ()
    ]
    reader = Tokenizer.from_str(json.dumps(facts))
    reader.encode_special_tokens = True
    return reader


def _encode(reader: Any, texts: Iterable[str]) -> list[list[int]]:
    return [found.ids for found in reader.encode_batch_fast(list(texts), add_special_tokens=False)]


def _rules(model: dict[str, Any]) -> Any:
    """What decides which pieces a word is cut into: merges in their order, or scores (as float32: files differ beyond)."""
    if "merges" in model:
        return [
            merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"] or ()
        ]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        return [[token, struct.pack("<f", score).hex()] for token, score in vocabulary]
    return None


def _added(token: dict[str, Any]) -> list[Any]:
    return [token[name] for name in ("id", "content", "lstrip", "rstrip", "single_word")]


def _update(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, separators=(",", ":")).encode() + b"\n")


# ---- prints that were taken ------------------------------------------------------------------------------------------


def _place(key: str) -> Path:
    return cache_directory() / "fingerprints" / _taken_by() / f"{key[:40]}.json"


@functools.cache
def _taken_by() -> str:
    """Another name wherever another print could be taken: by another text of this room, another release of tokenizers."""
    import tokenizers

    digest = hashlib.sha256(tokenizers.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.[pj][ys]*")):
        digest.update(path.read_bytes())
    return f"2-{digest.hexdigest()[:12]}"


def _kept(key: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads(_place(key).read_text(encoding="utf8"))
        if facts.get("serialisation_sha256") == key and all(
            re.fullmatch("[0-9a-f]{64}", facts[name]) for name in ("text", "all")
        ):
            return facts
    return None


def _keep(key: str, facts: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        # several processes may take the same print at once
        write_atomic(place, json.dumps({"serialisation_sha256": key, **facts}) + "\n", shared=True)
