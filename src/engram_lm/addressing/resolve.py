"""From a profile to the schemes of a model: multipliers, moduli, offsets and identity of every memory layer.

Constants follow arXiv 2601.07372 and the released code of each family:

    half = max(1, ((2^63 - 1) // V) // 2)           so that no product id * multiplier exceeds 2^63 - 1
    pcg64       m = 2 default_rng(seed + 10007 layer).integers(0, half, max_order) + 1
    splitmix64  m_j = 2 (splitmix64(seed + 10007 i + GAMMA (j + 1)) mod half) + 1,  i counts the memory layers from 0
    polynomial  none: the powers of V
    distinct-primes  the primes from rows_per_head upwards, dealt over layers, orders, heads
    odd              rows_per_head + 2 c + 1 for column c, the same in every layer
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from engram_lm.addressing.identity import IDENTITY_VERSION, Identity
from engram_lm.addressing.primes import primes_from
from engram_lm.addressing.profile import Profile
from engram_lm.addressing.scheme import AddressScheme
from engram_lm.errors import ConfigError

_LARGEST = 2**63 - 1
_MASK64 = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_LAYER_PRIME = 10_007


def resolve(
    profile: Profile,
    *,
    vocab_size: int,
    layers: Sequence[int],
    fill_id: int | None = None,
    eos_ids: Sequence[int] = (),
    token_map_hash: str | None = None,
    tokenizer_fingerprint: str | None = None,
    rows_per_head: int | None = None,
) -> tuple[AddressScheme, ...]:
    """The schemes of all memory layers of one model. Together, because moduli are distinct over layers.

    vocab_size: ids hashed, so the compressed size where the profile hashes canonical ids. fill_id: the pad id
    (canonical where the ids are) for fill "pad"; for "eos" and "zero" it follows, and if given has to agree.
    """
    if rows_per_head is not None:
        profile = profile.replace(rows_per_head=rows_per_head)
    _check_integers(vocab_size, layers, eos_ids)
    vocab_size, layers, eos_ids = int(vocab_size), tuple(map(int, layers)), tuple(map(int, eos_ids))
    _check_eos_ids(profile, eos_ids)
    fill_id = _fill_id(profile, fill_id, eos_ids, vocab_size)
    if profile.id_space == "raw" and token_map_hash is not None:
        raise ConfigError(
            f"Profile {profile.name!r} hashes raw ids, so a token map has no effect. Leave it out."
        )
    # Only those that stop look-back; the fill has taken its own.
    stopping = eos_ids if "eos" in profile.stop else ()
    schemes = []
    for index, (layer, moduli) in enumerate(zip(layers, _moduli(profile, len(layers)), strict=True)):
        _check_fits(profile, moduli, vocab_size)
        multipliers = _multipliers(profile, vocab_size, layer, index)
        facts = {
            "identity_version": IDENTITY_VERSION,
            "profile": profile.name,
            "profile_version": profile.version,
            "id_space": profile.id_space,
            "orders": profile.orders,
            "heads": profile.heads,
            "multipliers_rule": profile.multipliers,
            "multipliers": multipliers,
            "moduli_rule": profile.moduli,
            "moduli": moduli,
            "stop": profile.stop,
            "eos_ids": stopping,
            "fill": profile.fill,
            "fill_id": fill_id,
            "token_map_hash": token_map_hash,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "layer": layer,
            "vocab_size": vocab_size,
            "rows": sum(moduli),
        }
        schemes.append(
            AddressScheme(
                profile=profile,
                layer=layer,
                vocab_size=vocab_size,
                multipliers=_constant(multipliers),
                moduli=_constant(moduli),
                offsets=_constant(np.concatenate([[0], np.cumsum(moduli[:-1])])),
                fill_id=fill_id,
                eos_ids=stopping,
                identity=Identity(facts),
            )
        )
    return tuple(schemes)


def _constant(values: Any) -> np.ndarray:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array


def _moduli(profile: Profile, n_layers: int) -> list[list[int]]:
    if profile.moduli == "odd":
        return [[profile.rows_per_head + 2 * c + 1 for c in range(profile.columns)]] * n_layers
    primes = primes_from(profile.rows_per_head)
    return [list(islice(primes, profile.columns)) for _ in range(n_layers)]


def _multipliers(profile: Profile, vocab_size: int, layer: int, index: int) -> list[int]:
    if profile.multipliers == "polynomial":
        return []
    half = max(1, (_LARGEST // vocab_size) // 2)
    if profile.multipliers == "pcg64":
        generator = np.random.default_rng(profile.seed + _LAYER_PRIME * layer)
        drawn = generator.integers(0, half, size=profile.max_order, dtype=np.int64).tolist()
    else:
        base = profile.seed + _LAYER_PRIME * index
        drawn = [_splitmix64(base + _GAMMA * (j + 1)) % half for j in range(profile.max_order)]
    return [2 * number + 1 for number in drawn]


def _splitmix64(value: int) -> int:
    value = (value + _GAMMA) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _check_integers(vocab_size: int, layers: Sequence[int], eos_ids: Sequence[int]) -> None:
    if not _is_integer(vocab_size) or vocab_size < 1:
        raise ConfigError(f"vocab_size is {vocab_size!r}; wanted a positive integer.")
    if not layers or not all(_is_integer(layer) and layer >= 0 for layer in layers):
        raise ConfigError(f"layers is {layers!r}; wanted 0-based blocks, as in (1, 14).")
    if list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"layers is {layers!r}; wanted them ascending and distinct: moduli are dealt in this order."
        )
    if not all(_is_integer(eos) and 0 <= eos < vocab_size for eos in eos_ids):
        raise ConfigError(f"eos_ids is {eos_ids!r}; wanted ids in the vocabulary of {vocab_size}.")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_eos_ids(profile: Profile, eos_ids: tuple[int, ...]) -> None:
    needed = "eos" in profile.stop or profile.fill == "eos"
    if needed and not eos_ids:
        raise ConfigError(
            f"Profile {profile.name!r} stops at or fills with the end of sequence, and eos_ids is empty. "
            "Pass eos_ids=(...); models that list several hash with the first one."
        )
    if eos_ids and not needed:
        raise ConfigError(
            f"eos_ids is {eos_ids} without effect: profile {profile.name!r} neither stops nor fills with it."
        )


def _fill_id(profile: Profile, fill_id: int | None, eos_ids: tuple[int, ...], vocab_size: int) -> int:
    implied = {"eos": eos_ids[0] if eos_ids else None, "zero": 0, "pad": fill_id}[profile.fill]
    if not _is_integer(implied) or not 0 <= implied < vocab_size:
        raise ConfigError(
            f"fill_id is {fill_id!r}; profile {profile.name!r} fills with the pad id, wanted 0 to {vocab_size - 1}."
        )
    if fill_id is not None and fill_id != implied:
        raise ConfigError(
            f"fill_id is {fill_id}, but profile {profile.name!r} fills with {profile.fill!r}, "
            f"that is {implied}. Leave it out."
        )
    return int(implied)


def _check_fits(profile: Profile, moduli: list[int], vocab_size: int) -> None:
    if sum(moduli) > _LARGEST:
        raise ConfigError(
            f"{profile.columns} columns of {profile.rows_per_head} rows do not fit 64-bit addresses."
        )
    if profile.multipliers == "polynomial" and profile.max_order * vocab_size * max(moduli) > _LARGEST:
        raise ConfigError(
            f"A polynomial over {vocab_size} ids modulo {max(moduli)} does not fit 64 bits. Use fewer rows_per_head."
        )
