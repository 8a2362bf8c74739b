"""A profile: one family's address scheme, and the facts of its memory layer, as data.

Deployed models disagree on every constant here, so a scheme is data with a name and never a global default. The shipped
ones are in `shipped.PROFILES`; a new one is a constructor call or a `replace`:

    mine = PROFILES["deepseek-v4.1"].replace(name="mine", rows_per_head=65_536)
    mine == Profile.from_json(mine.json)

A profile is not a scheme: it knows no vocabulary, no layer and no tokenizer. `resolve` adds these.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from engram_lm.errors import ConfigError

# Bumped when the meaning of a field changes; part of every identity.
PROFILE_VERSION = 1

_CHOICES = {
    "id_space": ("canonical", "raw"),
    "multipliers": ("pcg64", "splitmix64", "polynomial"),
    "moduli": ("distinct-primes", "odd"),
    "fill": ("pad", "eos", "zero"),
    "gate": ("signed-sqrt", "plain", "none"),
    "fusion": ("gate", "mean"),
}
_STOPS = ("start", "dead", "eos")
# (field, smallest value)
_INTEGERS = (
    ("version", 1),
    ("heads", 1),
    ("seed", 0),
    ("rows_per_head", 2),
    ("row_multiple", 1),
    ("head_width", 1),
    ("conv_kernel", 0),
    ("conv_dilation", 1),
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How ids become row addresses, and what the rows are used for. Checked when built; immutable."""

    name: str
    version: int = PROFILE_VERSION
    # N-gram orders, ascending; columns are all heads of the lowest order, then the next.
    orders: tuple[int, ...]
    # Heads of each order.
    heads: int
    # "canonical": ids after tokenizer compression; "raw": the tokenizer's own ids.
    id_space: str
    # How the multipliers of the mix are drawn, or "polynomial": powers of the vocabulary size instead of a mix.
    multipliers: str
    # "distinct-primes" over layers, orders and heads, or "odd": rows_per_head + 2c + 1 for column c.
    moduli: str
    seed: int = 0
    rows_per_head: int
    # The total of rows is padded up to a multiple of this; padding rows have no address.
    row_multiple: int = 1
    # Where look-back stops. "start" always; "eos": behind every end-of-sequence id; "dead": at a DEAD place, itself
    # included. Stopping latches: nothing further back is read.
    stop: tuple[str, ...]
    # What stands in a place that look-back cannot reach, and in a DEAD place.
    fill: str
    # Facts of the memory layer that travel with the addresses.
    head_width: int
    # 0: no short convolution.
    conv_kernel: int
    conv_dilation: int = 1
    gate: str
    projection_bias: bool = False
    fusion: str = "gate"

    def __post_init__(self) -> None:
        for field in ("orders", "stop"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise ConfigError(f"Profile.{field} is {value!r}; wanted a tuple, as in {field}=(...,).")
            object.__setattr__(self, field, tuple(value))
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"Profile.name is {self.name!r}; wanted a non-empty string.")
        for field, smallest in _INTEGERS:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                raise ConfigError(f"Profile.{field} is {value!r}; wanted an integer of at least {smallest}.")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"Profile.{field} is {getattr(self, field)!r}; wanted one of {', '.join(choices)}."
                )
        if not isinstance(self.projection_bias, bool):
            raise ConfigError(f"Profile.projection_bias is {self.projection_bias!r}; wanted True or False.")
        self._check_orders()
        self._check_rules()

    def _check_orders(self) -> None:
        whole = all(
            isinstance(order, int) and not isinstance(order, bool) and order >= 1 for order in self.orders
        )
        if not self.orders or not whole or list(self.orders) != sorted(set(self.orders)):
            raise ConfigError(
                f"Profile.orders is {self.orders!r}; wanted ascending distinct integers, as in (2, 3)."
            )

    def _check_rules(self) -> None:
        if (
            len(set(self.stop)) != len(self.stop)
            or not set(self.stop) <= set(_STOPS)
            or "start" not in self.stop
        ):
            raise ConfigError(
                f"Profile.stop is {self.stop!r}; wanted 'start' and, where they apply, 'dead' and 'eos', each once."
            )
        # One order of the names, so that equal rules are equal tuples and equal identities.
        object.__setattr__(self, "stop", tuple(stop for stop in _STOPS if stop in self.stop))
        if (self.multipliers == "polynomial") != (self.fill == "zero"):
            raise ConfigError(
                f"Profile.fill is {self.fill!r} with multipliers {self.multipliers!r}. Missing terms of a polynomial "
                "are 0, and in a mix 0 is a token: use fill='zero' with 'polynomial' and only there."
            )
        if self.multipliers == "polynomial" and self.seed:
            raise ConfigError(f"Profile.seed is {self.seed}, but a polynomial draws nothing. Leave it at 0.")
        if (self.fusion == "mean") != (self.gate == "none"):
            raise ConfigError(
                f"Profile.gate is {self.gate!r} with fusion {self.fusion!r}: a mean has no gate (gate='none'), and "
                "fusion='gate' needs one ('signed-sqrt' or 'plain')."
            )
        if not self.conv_kernel and self.conv_dilation != 1:
            raise ConfigError(
                f"Profile.conv_dilation is {self.conv_dilation} without a convolution. Leave it at 1."
            )

    @property
    def max_order(self) -> int:
        """The longest N-gram; an address depends on max_order - 1 earlier ids."""
        return self.orders[-1]

    @property
    def columns(self) -> int:
        """Rows looked up for one token in one layer."""
        return len(self.orders) * self.heads

    @property
    def memory_width(self) -> int:
        """Width of the concatenated rows of one token."""
        return self.columns * self.head_width

    def replace(self, **changes: Any) -> Self:
        """This profile with some fields changed, checked again."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, lists for tuples."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def json(self) -> str:
        """JSON text that `from_json` reads back to an equal profile."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The profile of `to_dict`. Unknown and missing keys are errors."""
        if not isinstance(values, dict):
            raise ConfigError(f"A profile is an object of fields; got {type(values).__name__}.")
        _refuse_unknown(values)
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ConfigError(f"Profile lacks {', '.join(missing)}. Wanted at least: {', '.join(required)}.")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The profile that `json` wrote."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"This profile is not JSON: {error}.") from error
        return cls.from_dict(values)


def _refuse_unknown(values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Profile)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"Profile has no field {', '.join(map(repr, unknown))}. Fields: {', '.join(known)}."
        )
