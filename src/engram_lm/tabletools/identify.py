"""What a checkpoint's tables should be: its family's profile with the constants of its config.json, and the identity.

    expected = expect(directory, tables)
    expected.schemes[1].padded_rows                 # the rows that layer 1 must have
    expected.identities.get(1), expected.why        # facts, or a plain word why there are none

config.json (its `text_config` where it has one) fixes every constant of both families. An identity also holds the
tokenizer, so it needs tokenizer.json beside it. Without a config the released model's constants are tried, and taken if
the rows agree.

| DeepSeek-V4.1 | Qwen4-Exp | here |
|---|---|---|
| `engram_layer_ids`, from 0 | `ple_layer_ids`, from 1 | blocks from 0 |
| `engram_max_ngram_size`, `engram_n_heads` | `ngram_size`, `heads_per_ngram` | orders 2 to n, heads |
| `engram_vocab_size` | `ngram_vocab_size_base` | rows_per_head |
| `engram_compressed_vocab_size` | `vocab_size` | ids hashed |
| `engram_pad_token_id`, a raw id | `eos_token_id`, the first | fill |
| | `seed`, `make_ngram_vocab_size_divisible_by` | seed, row_multiple |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram_lm.addressing import PROFILES, SHIPPED, AddressScheme, Profile, profile_named, resolve
from engram_lm.errors import CheckpointError, ConfigError, EngramError
from engram_lm.storage import Layout
from engram_lm.tabletools.sources import Key

DEEPSEEK, QWEN = "deepseek-v4.1", "qwen-ple"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """schemes and identities by block from 0. source: what they follow from. why: why identities are missing, or ""."""

    profile: str | None = None
    source: str = ""
    schemes: Mapping[int, AddressScheme] = field(default_factory=dict)
    identities: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    why: str = ""
    token_map: Any = None

    def is_identity(self, stored: dict[str, Any], facts: dict[str, Any]) -> bool:
        """Whether a file's identity is the one wanted; the tokenizer's fingerprint may be of an older engram-lm."""
        name = "tokenizer_fingerprint"
        return stored == facts or (
            {**stored, name: None} == {**facts, name: None} and self.token_map.is_of(stored.get(name))
        )


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What `resolve` takes, and the tokenizer's part in it."""

    profile: Profile
    source: str
    vocab_size: int
    layers: tuple[int, ...]
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    raw_size: int | None = None


def expect(directory: Path, tables: Mapping[Key, Layout], *, profile: str | None = None) -> Expected:
    """What the tables of `directory` should be. `profile`: by the released model's constants, not by config.json."""
    if profile is not None:
        profile_named(profile)
    try:
        facts = _facts(directory, tables, profile)
    except EngramError as error:
        return Expected(why=f"config.json does not fit: {error}")
    if facts is None:
        return Expected(
            why="no config.json says which model it is, and no released model has these row counts"
        )
    canonical = facts.profile.id_space == "canonical"
    # Row counts, moduli and multipliers do not depend on the pad or EOS id: they are known without the tokenizer.
    eos_ids = facts.eos_ids or ((0,) if facts.profile.fill == "eos" else ())
    common = {"vocab_size": facts.vocab_size, "layers": facts.layers, "eos_ids": eos_ids}
    fill = min(facts.pad_id or 0, facts.vocab_size - 1) if facts.profile.fill == "pad" else None
    schemes = resolve(facts.profile, **common, fill_id=fill)
    told = {"profile": facts.profile.name, "source": facts.source, "schemes": {s.layer: s for s in schemes}}
    if not facts.eos_ids and facts.profile.fill == "eos":
        return Expected(**told, why="no config.json gives the end-of-sequence id")
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.exists():
        return Expected(**told, why="no tokenizer.json, and an identity holds the tokenizer")
    try:
        from tokenizers import Tokenizer

        from engram_lm.vocab import TokenMap

        backend = Tokenizer.from_file(str(tokenizer))
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1
        raw_size = max(highest, facts.raw_size or 0)
        token_map = (TokenMap.from_tokenizer if canonical else TokenMap.raw)(backend, raw_size=raw_size)
    except Exception as error:  # tokenizers raises bare Exceptions
        return Expected(**told, why=f"tokenizer.json cannot be used: {error}")
    if token_map.size != facts.vocab_size:
        return Expected(
            **told,
            why=f"tokenizer.json gives {token_map.size:,} ids to hash; the checkpoint was made for {facts.vocab_size:,}",
        )
    if fill is not None and not 0 <= (facts.pad_id or 0) < token_map.raw_size:
        return Expected(
            **told, why=f"config.json pads with id {facts.pad_id}, which tokenizer.json does not have"
        )
    fill = int(token_map.canonical[facts.pad_id or 0]) if fill is not None else None
    schemes = resolve(
        facts.profile,
        **common,
        fill_id=fill,
        token_map_hash=token_map.fingerprint if canonical else None,
        tokenizer_fingerprint=token_map.tokenizer_fingerprint,
    )
    told["schemes"] = {s.layer: s for s in schemes}
    return Expected(
        **told, token_map=token_map, identities={s.layer: dict(s.identity.facts) for s in schemes}
    )


def _facts(directory: Path, tables: Mapping[Key, Layout], profile: str | None) -> _Facts | None:
    if profile is not None:
        return _released(profile)
    config = read_config(directory)
    if config.get("engram_layer_ids"):
        return _deepseek(config)
    if config.get("ple_layer_ids"):
        return _qwen(config)
    for name in (DEEPSEEK, QWEN):
        facts = _released(name)
        schemes = resolve(
            facts.profile,
            vocab_size=facts.vocab_size,
            layers=facts.layers,
            fill_id=facts.pad_id,
            eos_ids=(0,) if name == QWEN else (),
        )
        if {layout.n_rows for layout in tables.values()} <= {scheme.padded_rows for scheme in schemes}:
            return facts
    return None


def _released(name: str) -> _Facts:
    shipped = SHIPPED[name]
    return _Facts(
        profile=PROFILES[name],
        source="the released model's constants",
        vocab_size=shipped.vocab_size,
        layers=shipped.layers,
        eos_ids=shipped.eos_ids,
        pad_id=shipped.pad_id,
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json's text part; empty where there is none."""
    path = directory / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise CheckpointError(f"{path} is no model's configuration.")
    return text


def _deepseek(config: dict[str, Any]) -> _Facts:
    base = PROFILES[DEEPSEEK]
    largest = _integer(config, "engram_max_ngram_size", base.max_order)
    pad = "engram_pad_id" if "engram_pad_id" in config else "engram_pad_token_id"
    return _Facts(
        profile=base.replace(
            orders=tuple(range(2, largest + 1)),
            heads=_integer(config, "engram_n_heads", base.heads),
            rows_per_head=_integer(config, "engram_vocab_size", base.rows_per_head),
            head_width=_integer(config, "engram_head_dim", base.head_width),
        ),
        source="config.json",
        vocab_size=_integer(config, "engram_compressed_vocab_size", SHIPPED[DEEPSEEK].vocab_size),
        layers=_integers(config, "engram_layer_ids"),
        pad_id=_integer(config, pad, SHIPPED[DEEPSEEK].pad_id),
        raw_size=_integer(config, "vocab_size", None),
    )


def _qwen(config: dict[str, Any]) -> _Facts:
    base = PROFILES[QWEN]
    largest = _integer(config, "ngram_size", base.max_order)
    heads = _integer(config, "heads_per_ngram", base.heads)
    width = (
        _integer(config, "ple_embed_dim", None) or _integer(config, "hidden_size", None) or base.memory_width
    )
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    vocab_size = _integer(config, "vocab_size", SHIPPED[QWEN].vocab_size)
    return _Facts(
        profile=base.replace(
            orders=tuple(range(2, largest + 1)),
            heads=heads,
            seed=_integer(config, "seed", base.seed),
            rows_per_head=_integer(config, "ngram_vocab_size_base", base.rows_per_head),
            row_multiple=_integer(config, "make_ngram_vocab_size_divisible_by", base.row_multiple),
            head_width=width // max(1, (largest - 1) * heads),
        ),
        source="config.json",
        vocab_size=vocab_size,
        layers=tuple(number - 1 for number in _integers(config, "ple_layer_ids")),
        eos_ids=() if eos is None else (_integer({"eos_token_id": eos}, "eos_token_id", None),),
        raw_size=vocab_size,
    )


def _integer(config: dict[str, Any], key: str, default: Any) -> Any:
    value = config.get(key, default)
    value = default if value is None else value
    if value is not None and type(value) is not int:
        raise ConfigError(f"{key} is {value!r}; wanted an integer.")
    return value


def _integers(config: dict[str, Any], key: str) -> tuple[int, ...]:
    values = config[key]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ConfigError(f"{key} is {values!r}; wanted a list of integers.")
    return tuple(sorted(set(values)))
