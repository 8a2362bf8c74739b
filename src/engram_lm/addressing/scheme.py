"""One memory layer's address scheme: a profile with its vocabulary, layer and constants; ids in, row addresses out.

    deepseek = PROFILES["deepseek-v4.1"]
    layer_1, layer_14 = resolve(deepseek, vocab_size=99_092, layers=(1, 14), fill_id=2)
    address_BTC = layer_1.addresses(ids_BT)                       # int64 rows of one table, [batch, token, column]
    layer_1.addresses(next_BT, previous_BP=layer_1.carry(ids_BT))   # the same as in one piece

Addresses depend on token ids alone, and of these on max_order - 1 before each token: rows can be fetched long before
the layer needs them. Nothing here keeps state. `plain` is the readable twin, `device` the torch form,
`resolve` makes schemes.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_lm.addressing import plain
from engram_lm.addressing.identity import Identity
from engram_lm.addressing.inputs import prepare, refuse
from engram_lm.addressing.profile import Profile
from engram_lm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class AddressScheme:
    """Made by `resolve`. All arrays are int64; columns are all heads of the lowest order, then the next."""

    profile: Profile
    # 0-based block that the memory stands in.
    layer: int
    vocab_size: int
    # [max_order], the newest token first; empty for a polynomial, whose base is vocab_size.
    multipliers: np.ndarray
    # [C] rows of each column, and where each column starts in the layer's table.
    moduli: np.ndarray
    offsets: np.ndarray
    fill_id: int
    eos_ids: tuple[int, ...]
    identity: Identity
    # What the kernel reads, prepared on first use.
    _constants: list = field(default_factory=list, repr=False)

    def __deepcopy__(self, memo: dict) -> "AddressScheme":
        """Immutable, so a copied model shares it."""
        return self

    @property
    def rows(self) -> int:
        """Rows that have an address."""
        return int(self.offsets[-1] + self.moduli[-1])

    @property
    def padded_rows(self) -> int:
        """Rows of the table: `rows`, padded up to the profile's multiple."""
        return -(-self.rows // self.profile.row_multiple) * self.profile.row_multiple

    @property
    def columns(self) -> int:
        """Rows looked up for one token."""
        return self.profile.columns

    @property
    def max_order(self) -> int:
        """The longest N-gram; max_order - 1 earlier ids matter."""
        return self.profile.max_order

    @property
    def is_polynomial(self) -> bool:
        """Whether addresses are a polynomial in the vocabulary size, not a mix."""
        return self.profile.multipliers == "polynomial"

    def addresses(
        self,
        ids_BT: Any,
        *,
        previous_BP: Any = None,
        starts_BT: Any = None,
        mask_BT: Any = None,
        check: str = "raise",
        out_BTC: np.ndarray | None = None,
    ) -> np.ndarray:
        """Row addresses of every token: int64 [B, T, C], C-contiguous; for 1-D ids [T, C].

        ids_BT       integers in [0, vocab_size), or -1 (DEAD) where there is no token
        previous_BP  up to max_order - 1 ids before this chunk, oldest first; fewer: the sequence starts there
        starts_BT    True at the first token of a document: its tokens look no further back
        mask_BT      False where there is no token, as -1; the id there is not read
        out_BTC      where to write, for loops over long inputs: fresh memory costs as much as the addresses in it
        check        "raise" (TokenIdError names the first id outside) or "none" (ids known to be right)
        """
        from engram_lm.addressing import hashing

        if check not in ("raise", "none"):
            raise ConfigError(f"check is {check!r}; wanted 'raise' or 'none'.")
        inputs = prepare(ids_BT, previous_BP, starts_BT, mask_BT, max_order=self.max_order)
        if not self._constants:
            self._constants.extend(self._kernel_constants(hashing))
        B, T = inputs.ids_BT.shape
        shape = (B, T, self.moduli.shape[0])
        address_BTC = np.empty(shape, dtype=np.int64) if out_BTC is None else _output(out_BTC, shape)
        bad = hashing.addresses(*inputs[:4], *self._constants, check == "raise", address_BTC)
        if bad >= 0:
            refuse(inputs.ids_BT, bad, vocab_size=self.vocab_size, what="Token id")
        if bad < -1:
            refuse(inputs.previous_BP, -2 - bad, vocab_size=self.vocab_size, what="Previous token id")
        return address_BTC[0] if inputs.one_dimensional else address_BTC

    def carry(
        self, ids_BT: Any, *, previous_BP: Any = None, starts_BT: Any = None, mask_BT: Any = None
    ) -> np.ndarray:
        """What the next chunk needs as `previous_BP`: int64 [B, max_order - 1], -1 where nothing may be seen."""
        inputs = prepare(ids_BT, previous_BP, starts_BT, mask_BT, max_order=self.max_order)
        previous_BH = plain.carry(self, inputs)
        return previous_BH[0] if inputs.one_dimensional else previous_BH

    def weights(self) -> np.ndarray:
        """Of a polynomial: V^d mod p_c, int64 [max_order, C], 0 beyond the order of a column. Otherwise empty."""
        if not self.is_polynomial:
            return np.zeros((0, 0), dtype=np.int64)
        order_C = np.repeat(self.profile.orders, self.profile.heads)
        return np.array(
            [
                [
                    pow(self.vocab_size, d, int(p)) if d < n else 0
                    for n, p in zip(order_C, self.moduli, strict=True)
                ]
                for d in range(self.max_order)
            ],
            dtype=np.int64,
        )

    def _kernel_constants(self, hashing: Any) -> tuple:
        heads_N = np.array(
            [self.profile.heads * (d + 1 in self.profile.orders) for d in range(self.max_order)]
        )
        # Writable copies: numba compiles a second time for read-only arrays.
        return (
            self.multipliers.copy(),
            self.weights(),
            heads_N,
            self.moduli.copy(),
            1.0 / self.moduli,
            self.offsets.copy(),
            np.array(self.eos_ids, dtype=np.int64),
            self.fill_id,
            "dead" in self.profile.stop,
            hashing.two_steps(self.moduli),
            hashing.takes_eights(self.moduli, heads_N, polynomial=self.profile.multipliers == "polynomial"),
            self.vocab_size,
        )


def _output(out_BTC: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    fits = isinstance(out_BTC, np.ndarray) and out_BTC.dtype == np.int64 and out_BTC.size == np.prod(shape)
    fits = fits and out_BTC.shape[-2:] == shape[1:] and out_BTC.flags.c_contiguous and out_BTC.flags.writeable
    if not fits:
        found = (
            f"{getattr(out_BTC, 'dtype', type(out_BTC).__name__)} of shape {getattr(out_BTC, 'shape', None)}"
        )
        raise ConfigError(f"out_BTC is {found}; wanted a writable contiguous int64 array of shape {shape}.")
    return out_BTC.reshape(shape)
