"""From a config to a memory: profile, token map, address schemes, tables and layers."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from engram_lm.addressing import PROFILES, Profile, resolve
from engram_lm.config import MemoryConfig
from engram_lm.errors import ConfigError, ModelError
from engram_lm.memory.layer import MemoryLayer
from engram_lm.memory.memory import Memory
from engram_lm.tables import DeviceTable, rule_from_json
from engram_lm.vocab import TokenMap


def profile_of(config: MemoryConfig) -> Profile:
    """The profile that a config names, with the config's own values in place."""
    if isinstance(config.profile, str):
        if config.profile not in PROFILES:
            raise ConfigError(
                f"Unknown profile {config.profile!r}; this build has {', '.join(sorted(PROFILES))}."
            )
        profile = PROFILES[config.profile]
    else:
        profile = Profile.from_dict(config.profile)
    changes = {
        field: getattr(config, field)
        for field in (
            "orders",
            "heads",
            "rows_per_head",
            "head_width",
            "seed",
            "gate",
            "conv_kernel",
            "conv_dilation",
        )
        if getattr(config, field) is not None
    }
    if "orders" in changes and "conv_dilation" not in changes and profile.conv_kernel:
        changes["conv_dilation"] = max(changes["orders"])  # the released rule: dilation is the highest order
    return profile.replace(**changes) if changes else profile


class ModelShape(NamedTuple):
    """What a memory needs to know of the model it is for. eps: of its norms. vocab_size: rows of its embedding."""

    n_blocks: int
    hidden_size: int
    branches: int
    eps: float
    vocab_size: int


class TableFactory(Protocol):
    """What makes the table of one layer, with zero rows: DeviceTable, or another that keeps `engram_lm.tables.Table`."""

    def __call__(self, *, n_rows: int, width: int, dtype: torch.dtype, rule: Any, name: str) -> Any: ...


def build_memory(
    config: MemoryConfig,
    shape: ModelShape,
    tokenizer: Any,
    *,
    token_map: TokenMap | None = None,
    like: Tensor,
    tables: TableFactory = DeviceTable,
) -> Memory:
    """Memory with zero rows for a model of this shape; parameters take dtype and device of `like`."""
    profile = profile_of(config)
    if profile.fusion != "gate":
        raise ConfigError(
            f"Profile {profile.name!r} averages rows into the token embedding, which changes any model that was not trained "
            "with it. Use engram_lm.nn.EmbeddingMean in such a model; attach offers gated profiles."
        )
    if max(config.layers) >= shape.n_blocks:
        raise ConfigError(
            f"layers names block {max(config.layers)}, but the model has blocks 0 to {shape.n_blocks - 1}."
        )
    if token_map is None:
        if tokenizer is None:
            raise ModelError("attach needs the model's tokenizer: it decides which tokens share an address.")
        make = TokenMap.from_tokenizer if profile.id_space == "canonical" else TokenMap.raw
        token_map = make(tokenizer, raw_size=_raw_size(tokenizer, shape.vocab_size))
    schemes = resolve(
        profile,
        vocab_size=token_map.size,
        layers=config.layers,
        fill_id=_fill_id(config, profile, tokenizer, token_map),
        eos_ids=_eos_ids(profile, tokenizer, token_map),
        token_map_hash=token_map.fingerprint if profile.id_space == "canonical" else None,
        tokenizer_fingerprint=token_map.tokenizer_fingerprint,
    )
    outside = [token for token in config.dead_token_ids if not 0 <= token < token_map.raw_size]
    if outside:
        raise ConfigError(
            f"dead_token_ids names {outside[0]}; the tokenizer has ids 0 to {token_map.raw_size - 1}."
        )
    slots = nn.ModuleList()
    for scheme, block in zip(schemes, config.layers, strict=True):
        table = tables(
            n_rows=scheme.padded_rows,
            width=profile.head_width,
            dtype=getattr(torch, config.row_dtype),
            rule=rule_from_json(config.rule),
            name=f"{config.name} at block {block}",
        )
        slots.append(
            MemoryLayer(
                scheme=scheme,
                table=table,
                block=block,
                token_map=token_map,
                dead_token_ids=config.dead_token_ids,
                hidden_size=shape.hidden_size,
                memory_width=len(scheme.moduli) * profile.head_width,
                branches=shape.branches,
                conv_kernel=profile.conv_kernel,
                conv_dilation=profile.conv_dilation or 1,
                gate_form=profile.gate,
                projection_bias=profile.projection_bias,
                eps=shape.eps,
                device=like.device,
                dtype=like.dtype,
            )
        )
    return Memory(config, token_map, schemes, slots)


def _raw_size(tokenizer: Any, vocab_size: int) -> int:
    """Embedding rows may exceed the tokenizer's ids (padding of the matrix) and, rarely, the other way round."""
    return max(vocab_size, TokenMap.raw(tokenizer).raw_size)


def _fill_id(config: MemoryConfig, profile: Profile, tokenizer: Any, token_map: TokenMap) -> int | None:
    if profile.fill != "pad":
        if config.fill_token_id is not None:
            raise ConfigError(
                f"fill_token_id has no effect: profile {profile.name!r} fills with {profile.fill!r}."
            )
        return None
    raw = config.fill_token_id
    for name in ("pad_token_id", "eos_token_id"):
        raw = getattr(tokenizer, name, None) if raw is None else raw
    if raw is None:
        raise ConfigError("The tokenizer has neither a pad nor an EOS token; give fill_token_id.")
    return int(token_map.canonical_of([raw])[0])


def _eos_ids(profile: Profile, tokenizer: Any, token_map: TokenMap) -> tuple[int, ...]:
    if "eos" not in profile.stop and profile.fill != "eos":
        return ()
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise ConfigError(f"Profile {profile.name!r} stops at EOS, but the tokenizer has no EOS token.")
    return (int(token_map.canonical_of([eos])[0]),)
