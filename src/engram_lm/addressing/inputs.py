"""What an address call takes, brought to one shape: int64 ids [B, T], at most max_order - 1 previous ids, bool marks.

Ids outside the vocabulary are refused here and in the kernel with the same words. Dimension letters: B sequence,
T token, P previous token.
"""

from typing import Any, NamedTuple

import numpy as np

from engram_lm.errors import TokenIdError

# A place that holds no token: an image span, padding, or "before the sequence".
DEAD = -1

_NO_MARKS = np.zeros((0, 0), dtype=np.bool_)
_NO_PREVIOUS = np.zeros((0, 0), dtype=np.int64)


class Inputs(NamedTuple):
    """C-contiguous writable arrays; absent marks are empty. `one_dimensional`: the caller passed [T]."""

    ids_BT: np.ndarray
    previous_BP: np.ndarray
    starts_BT: np.ndarray
    mask_BT: np.ndarray
    one_dimensional: bool


def prepare(ids: Any, previous: Any, starts: Any, mask: Any, *, max_order: int) -> Inputs:
    """Check shapes and dtypes of one call; copies nothing that already fits."""
    ids_BT = _integers(ids, "ids")
    one_dimensional = ids_BT.ndim == 1
    if one_dimensional:
        ids_BT = ids_BT[None]
    elif ids_BT.ndim != 2:
        raise TokenIdError(f"ids have shape {ids_BT.shape}; wanted [tokens] or [batch, tokens].")
    if previous is None:
        previous_BP = _NO_PREVIOUS
    else:
        previous_BP = _integers(previous, "previous ids")
        previous_BP = previous_BP[None] if one_dimensional and previous_BP.ndim == 1 else previous_BP
        if (
            previous_BP.ndim != 2
            or previous_BP.shape[0] != ids_BT.shape[0]
            or previous_BP.shape[1] >= max_order
        ):
            raise TokenIdError(
                f"previous ids have shape {np.shape(previous)} beside ids of shape {np.shape(ids)}; wanted "
                f"the same batch and at most {max_order - 1} ids, the last ones before this chunk."
            )
    starts_BT = _NO_MARKS if starts is None else _marks(starts, "starts", ids, one_dimensional)
    mask_BT = _NO_MARKS if mask is None else _marks(mask, "mask", ids, one_dimensional)
    return Inputs(ids_BT, previous_BP, starts_BT, mask_BT, one_dimensional)


def _integers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == np.int64 and array.flags.c_contiguous and array.flags.writeable:
        return array
    if array.size == 0 and array.dtype == np.float64:
        # NumPy's dtype for an empty list.
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind not in "iu" or (array.dtype == np.uint64 and array.size and array.max() > 2**63 - 1):
        raise TokenIdError(f"{what} have dtype {array.dtype}; wanted integers.")
    return np.array(array, dtype=np.int64, order="C")


def _marks(values: Any, what: str, ids: Any, one_dimensional: bool) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != np.shape(ids):
        raise TokenIdError(f"{what} has shape {array.shape}; wanted the shape of the ids, {np.shape(ids)}.")
    if array.dtype != np.bool_:
        # Tokenizers give 0/1 integers. Anything else is more likely an additive float mask than a mark.
        if array.size and (array.dtype.kind not in "iu" or not ((array == 0) | (array == 1)).all()):
            raise TokenIdError(
                f"{what} has dtype {array.dtype} or values other than 0 and 1; wanted booleans."
            )
        array = array.astype(np.bool_)
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = np.array(array, order="C")
    return array[None] if one_dimensional else array


def first_bad(ids_BT: np.ndarray, mask_BT: np.ndarray, *, vocab_size: int) -> int:
    """Flat position of the first id that is neither DEAD nor in the vocabulary, or -1. Masked places are not read."""
    bad_BT = (ids_BT < DEAD) | (ids_BT >= vocab_size)
    if mask_BT.size:
        bad_BT &= mask_BT
    return int(bad_BT.argmax()) if bad_BT.any() else -1


def refuse(ids_BT: np.ndarray, flat: int, *, vocab_size: int, what: str) -> None:
    """Raise the TokenIdError of the id at flat position `flat`."""
    row, column = divmod(flat, ids_BT.shape[1])
    raise TokenIdError(
        f"{what} {int(ids_BT[row, column])} at sequence {row}, position {column} is outside the vocabulary of "
        f"{vocab_size} ids; wanted 0 to {vocab_size - 1}, or {DEAD} where there is no token."
    )
