"""What a memory is: a frozen, checked record that goes to JSON and back. Needs no torch.

    MemoryConfig(layers=(1, 5), rows_per_head=20_011, head_width=32)

Only `layers` must be given. Fields left None take the profile's value (see `engram_lm.addressing.PROFILES`). Sizes: a
layer has orders x heads columns, about columns x rows_per_head rows, each of head_width numbers.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from engram_lm.errors import ConfigError

CONTROLS = ("one-row", "shuffled", "frozen-random", "bias", "off")


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """One memory on one model.

    Args:
        layers: blocks (0-based) before which memory enters the residual stream.
        name: tells several memories on one model apart.
        profile: name of an address scheme, or a profile's JSON as a dict.
        orders, heads: N-gram orders and hash heads of each order.
        rows_per_head: rows of the smallest head; each head's own size is a prime at or above it.
        head_width: numbers a row.
        seed: of the hash multipliers.
        gate: "signed-sqrt" (all released code) or "plain" (the paper's text).
        conv_kernel, conv_dilation: the short conv; kernel 0 for none.
        fill_token_id: raw id that fills the look-back before a sequence starts; default the tokenizer's pad, else its EOS.
        dead_token_ids: raw ids that stop the look-back wherever they stand (image placeholders, say).
        rule: how rows train: "row-adam", "row-adam-momentum", "row-momentum-sinkhorn", "row-rmsprop", "sgd", or a rule's
            JSON as a dict (see `engram_lm.tables.rules`).
        row_dtype: "float32" or "bfloat16" (both trainable; bfloat16 is rounded stochastically), or "float16" (read only).
        control: for comparisons, a memory that something is missing from: "one-row", "shuffled", "frozen-random", "bias" or
            "off" (see `engram_lm.memory.controls`).
    """

    layers: tuple[int, ...]
    name: str = "memory"
    profile: str | dict[str, Any] = "paper"
    orders: tuple[int, ...] | None = None
    heads: int | None = None
    rows_per_head: int | None = None
    head_width: int | None = None
    seed: int | None = None
    gate: str | None = None
    conv_kernel: int | None = None
    conv_dilation: int | None = None
    fill_token_id: int | None = None
    dead_token_ids: tuple[int, ...] = ()
    rule: str | dict[str, Any] = "row-adam"
    row_dtype: str = "float32"
    control: str | None = None

    def __post_init__(self) -> None:
        for field in ("layers", "orders", "dead_token_ids"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, tuple(value))
        if not self.layers:
            raise ConfigError("layers is empty; name at least one block, such as layers=(1,).")
        if any(not isinstance(layer, int) or layer < 0 for layer in self.layers):
            raise ConfigError(f"layers are block numbers from 0; got {list(self.layers)}.")
        if len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"layers names a block twice: {list(self.layers)}.")
        if not self.name.isidentifier():
            raise ConfigError(
                f"name must be a Python identifier, because parameters carry it; got {self.name!r}."
            )
        for field in ("heads", "rows_per_head", "head_width", "conv_dilation"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"{field} must be at least 1; got {value}.")
        if self.orders is not None and (not self.orders or min(self.orders) < 1):
            raise ConfigError(f"orders are N-gram lengths from 1; got {list(self.orders)}.")
        if self.conv_kernel is not None and self.conv_kernel < 0:
            raise ConfigError(f"conv_kernel must be 0 (no conv) or more; got {self.conv_kernel}.")
        if self.gate not in (None, "signed-sqrt", "plain"):
            raise ConfigError(f'gate is "signed-sqrt" or "plain"; got {self.gate!r}.')
        if self.row_dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"row_dtype is float32, bfloat16 or float16; got {self.row_dtype!r}.")
        if self.control not in (None, *CONTROLS):
            raise ConfigError(f"control is {', '.join(CONTROLS)} or None; got {self.control!r}.")

    def to_json(self) -> dict[str, Any]:
        """Every field; `control` only where there is one, so that earlier versions read ordinary memories."""
        return {name: value for name, value in asdict(self).items() if name != "control" or value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> "MemoryConfig":
        """The inverse of `to_json`. Unknown keys raise ConfigError."""
        data = json.loads(data) if isinstance(data, str) else dict(data)
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(f"Unknown memory option {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        if "layers" not in data:
            raise ConfigError("A memory needs `layers`: the blocks before which it enters.")
        return cls(**data)
