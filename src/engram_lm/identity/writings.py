"""First prints: the sha256 of how a tokenizer is written down, which engram-lm took before prints of what it does.

What it is: the way to know a tokenizer by a hash that an old gate, table, corpus or run holds. What it is not: the print of
anything new. The same tokenizer is written in more than one way, so it has several first prints:

    as it is, and the fields of a BPE model that are null written as "" (what another reader of GGUF files did)
    as its tokenizer.json stands in the directory that it was loaded from, where that is the same tokenizer
    as transformers rebuilds it after saving: once more unset fields change their writing

    stored in first_prints(print_of(tokenizer))
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.identity import tokenizers as second

# Fields of a BPE model that some writers leave null and others write as "".
_UNSET = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")


def first_prints(found: second.TokenizerPrint) -> Iterator[str]:
    """Every first print of one tokenizer, the likeliest first."""
    for facts in _writings(found):
        yield first_print(facts)
        model = facts["model"]
        if model.get("type") == "BPE":
            empty = {name: "" for name in _UNSET[:2] if model.get(name) is None}
            yield first_print({**facts, "model": {**model, **empty}})
            without = {name: None for name in _UNSET if name in model}
            yield first_print({**facts, "model": {**model, **without}})


def first_print(facts: dict[str, Any]) -> str:
    """sha256 of a serialisation: vocabulary, merges, added tokens, normaliser, pre-tokeniser, decoder.

    Left out: truncation, padding, the post-processor, whether an added token counts as special, and fields at null or
    false, which other versions of tokenizers omit.
    """
    model = dict(facts["model"])
    # The long parts, as lines. Older releases of tokenizers write a merge as one string with a space.
    vocabulary = model.pop("vocab", None)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in model.pop("merges", None) or ()
    ]
    added = sorted(facts.get("added_tokens") or (), key=lambda token: token["id"])
    kept = {name: facts.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    kept |= {
        "model": model,
        "added_tokens": [{k: v for k, v in token.items() if k != "special"} for token in added],
    }
    parts = (_without_unset(kept), vocabulary, merges)
    text = "\n".join(json.dumps(part, sort_keys=True, separators=(",", ":")) for part in parts)
    return hashlib.sha256(b"engram tokenizer 1\n" + text.encode()).hexdigest()


def _writings(found: second.TokenizerPrint) -> Iterator[dict[str, Any]]:
    """Serialisations of this very tokenizer: checked by print, where they come from elsewhere."""
    yield json.loads(found.serialisation)
    path = Path(found.source, "tokenizer.json")
    if not found.source or not path.is_file():
        return
    from tokenizers import Tokenizer

    with contextlib.suppress(Exception):  # the file may be anybody's
        read = Tokenizer.from_file(str(path))
        if second.print_of(read).text == found.text:
            yield json.loads(read.to_str())
            yield json.loads(path.read_text(encoding="utf8"))


def _without_unset(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_unset(item) for key, item in value.items() if item is not None and item is not False
        }
    if isinstance(value, list):
        return [_without_unset(item) for item in value]
    return value
