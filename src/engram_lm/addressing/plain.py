"""Row addresses in plain NumPy: the readable twin of `addressing.hashing`, equal to it in every bit.

    x_d     = the id d places back, or the fill id where look-back stopped
    mix_n   = x_0 m_0 XOR x_1 m_1 XOR ... XOR x_{n-1} m_{n-1}            (arXiv 2601.07372, hashing of suffix N-grams)
    sum_n,c = x_0 + x_1 (V mod p_c) + ... + x_{n-1} (V^{n-1} mod p_c)    (polynomial profiles, arXiv 2601.21204)
    address = mix_n mod p_c + offset_c

Dimension letters: B sequence, T token, P previous token, H = max_order - 1 places of history, C column.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.addressing.inputs import DEAD, Inputs, first_bad, prepare, refuse
from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from engram_lm.addressing.scheme import AddressScheme


def addresses(
    scheme: "AddressScheme",
    ids_BT: Any,
    *,
    previous_BP: Any = None,
    starts_BT: Any = None,
    mask_BT: Any = None,
    check: str = "raise",
) -> np.ndarray:
    """Same arguments and answer as `AddressScheme.addresses`."""
    inputs = prepare(ids_BT, previous_BP, starts_BT, mask_BT, max_order=scheme.max_order)
    check_ids(inputs, vocab_size=scheme.vocab_size, check=check)
    values = looked_back(scheme, inputs)
    columns = []
    for order in scheme.profile.orders:
        # All heads of one order share the mix.
        mix_BT = None if scheme.is_polynomial else mix(values[:order], scheme.multipliers)
        for _ in range(scheme.profile.heads):
            modulus, offset = scheme.moduli[len(columns)], scheme.offsets[len(columns)]
            if mix_BT is None:
                columns.append(polynomial(values[:order], scheme.vocab_size, modulus) + offset)
            else:
                columns.append(mix_BT % modulus + offset)
    address_BTC = np.stack(columns, axis=-1)
    return address_BTC[0] if inputs.one_dimensional else address_BTC


def looked_back(scheme: "AddressScheme", inputs: Inputs) -> list[np.ndarray]:
    """[x_0, x_1, ...]: for every token the id d places back, int64 [B, T] each."""
    ids_BT, fill, reach = inputs.ids_BT, scheme.fill_id, scheme.max_order - 1
    B, T = ids_BT.shape
    if inputs.mask_BT.size:
        ids_BT = np.where(inputs.mask_BT, ids_BT, DEAD)
    # Before the first known id there is no token.
    history_BX = np.full((B, reach + T), DEAD, dtype=np.int64)
    history_BX[:, reach:] = ids_BT
    if inputs.previous_BP.size:
        history_BX[:, reach - inputs.previous_BP.shape[1] : reach] = inputs.previous_BP
    starts_BX = np.zeros((B, reach + T), dtype=bool)
    if inputs.starts_BT.size:
        starts_BX[:, reach:] = inputs.starts_BT

    dead_BX = history_BX < 0
    token_BX = np.where(dead_BX, fill, history_BX)
    # Places that look-back may not enter: an end of sequence, and DEAD where the profile says so.
    wall_BX = np.isin(token_BX, scheme.eos_ids) if scheme.eos_ids else np.zeros_like(dead_BX)
    if "dead" in scheme.profile.stop:
        wall_BX |= dead_BX
    # A token that is itself DEAD sees nothing; an EOS token sees its own segment.
    open_BT = ~dead_BX[:, reach:] if "dead" in scheme.profile.stop else np.ones((B, T), dtype=bool)
    values = [token_BX[:, reach:]]
    for d in range(1, reach + 1):
        source = slice(reach - d, reach - d + T)
        open_BT = open_BT & ~wall_BX[:, source] & ~starts_BX[:, reach - d + 1 : reach - d + 1 + T]
        values.append(np.where(open_BT, token_BX[:, source], fill))
    return values


def mix(values: list[np.ndarray], multipliers: np.ndarray) -> np.ndarray:
    """values[0] m_0 XOR values[1] m_1 XOR ...; non-negative for ids in the vocabulary."""
    mix_BT = values[0] * multipliers[0]
    for d in range(1, len(values)):
        mix_BT = mix_BT ^ (values[d] * multipliers[d])
    return mix_BT


def polynomial(values: list[np.ndarray], base: int, modulus: int) -> np.ndarray:
    """Sum of values[d] * base^d mod modulus by Horner's rule; every intermediate is below modulus * base."""
    total_BT = np.zeros_like(values[0])
    for value_BT in reversed(values):
        total_BT = (total_BT * base + value_BT) % modulus
    return total_BT


def carry(scheme: "AddressScheme", inputs: Inputs) -> np.ndarray:
    """The `previous` of the next chunk, int64 [B, H]: the last ids, DEAD where nothing may be seen."""
    reach = scheme.max_order - 1
    ids_BT = np.where(inputs.mask_BT, inputs.ids_BT, DEAD) if inputs.mask_BT.size else inputs.ids_BT
    B, T = ids_BT.shape
    if not reach:
        return np.empty((B, 0), dtype=np.int64)
    history_BX = np.full((B, reach + T), DEAD, dtype=np.int64)
    history_BX[:, reach:] = ids_BT
    if inputs.previous_BP.size:
        history_BX[:, reach - inputs.previous_BP.shape[1] : reach] = inputs.previous_BP
    if inputs.starts_BT.size:
        # A place is behind a start if a later place starts a document.
        later_BT = np.logical_or.accumulate(inputs.starts_BT[:, ::-1], axis=1)[:, ::-1]
        behind_BX = np.zeros(history_BX.shape, dtype=bool)
        behind_BX[:, reach - 1 : -1] = later_BT
        behind_BX[:, : reach - 1] = later_BT[:, :1]
        history_BX = np.where(behind_BX, DEAD, history_BX)
    return history_BX[:, T:]


def check_ids(inputs: Inputs, *, vocab_size: int, check: str) -> None:
    """Raise TokenIdError for the first id outside the vocabulary, unless check is "none"."""
    if check == "none":
        return
    if check != "raise":
        raise ConfigError(f"check is {check!r}; wanted 'raise' or 'none'.")
    for ids_BT, mask_BT, what in (
        (inputs.previous_BP, inputs.mask_BT[:0], "Previous token id"),
        (inputs.ids_BT, inputs.mask_BT, "Token id"),
    ):
        flat = first_bad(ids_BT, mask_BT, vocab_size=vocab_size)
        if flat >= 0:
            refuse(ids_BT, flat, vocab_size=vocab_size, what=what)
