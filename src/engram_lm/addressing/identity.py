"""The identity of an address scheme: a content hash of everything that changes an address or its meaning.

Two tokenizers can have equal compressed sizes and different maps, and two schemes equal row counts and different
multipliers. A table read with the wrong one gives wrong rows and no error, so every table, checkpoint and overlay
stores the identity it was made with, and loading compares:

    scheme.identity.hash                                        # sha256 over canonical JSON, 64 hex digits
    Identity.from_json(stored).require_equal(scheme.identity, where="rows.tbl")
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from engram_lm.errors import IdentityError

IDENTITY_VERSION = 1

# Every key is always present; what does not apply is null or empty.
KEYS = (
    "identity_version",
    "profile",
    "profile_version",
    "id_space",
    "orders",
    "heads",
    "multipliers_rule",
    "multipliers",
    "moduli_rule",
    "moduli",
    "stop",
    "eos_ids",
    "fill",
    "fill_id",
    "token_map_hash",
    "tokenizer_fingerprint",
    "layer",
    "vocab_size",
    "rows",
)


@dataclass(frozen=True, eq=False)
class Identity:
    """Readable facts and their hash. Equal when the hashes are equal."""

    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        missing = [key for key in KEYS if key not in self.facts]
        unknown = sorted(set(self.facts) - set(KEYS))
        if missing or unknown:
            raise IdentityError(
                f"An address identity lacks {', '.join(missing) or 'nothing'} and has unknown keys "
                f"{', '.join(map(repr, unknown)) or 'none'}. Was it written by another version of engram-lm?"
            )
        # Through JSON and back: tuples become lists and later changes to the caller's data do not reach in here.
        object.__setattr__(self, "facts", MappingProxyType(json.loads(json.dumps(dict(self.facts)))))

    def __reduce__(self) -> tuple:
        return Identity, (dict(self.facts),)

    @property
    def hash(self) -> str:
        """sha256 over canonical JSON: sorted keys, no spaces, ASCII."""
        canonical = json.dumps(dict(self.facts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def json(self) -> str:
        """The facts as readable JSON, one key a line."""
        lines = (f"{json.dumps(key)}: {json.dumps(self.facts[key])}" for key in sorted(self.facts))
        return "{\n " + ",\n ".join(lines) + "\n}"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The identity that `json` wrote, whatever its spacing."""
        try:
            facts = json.loads(text)
        except ValueError as error:
            raise IdentityError(f"This address identity is not JSON: {error}.") from error
        if not isinstance(facts, dict):
            raise IdentityError(f"An address identity is a JSON object; got {type(facts).__name__}.")
        return cls(facts)

    def __eq__(self, other: object) -> bool:
        return self.hash == other.hash if isinstance(other, Identity) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.hash)

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ, each with this value and the other."""
        return {
            key: (self.facts[key], other.facts[key]) for key in KEYS if self.facts[key] != other.facts[key]
        }

    def require_equal(
        self, other: "Identity", *, where: str, is_tokenizer: Callable[[str], bool] = lambda stored: False
    ) -> None:
        """Raise IdentityError unless equal. `where` names the holder of this identity: a file, a checkpoint.

        other: the model's. is_tokenizer: whether this identity's fingerprint, though another one, is of the model's tokenizer
            too, as an older engram-lm took it.
        """
        if self == other:
            return
        differences = self.differences(other)
        if set(differences) == {"tokenizer_fingerprint"} and is_tokenizer(
            self.facts["tokenizer_fingerprint"]
        ):
            return
        lines = (
            f"  {key}: {json.dumps(stored)} there, {json.dumps(wanted)} here"
            for key, (stored, wanted) in differences.items()
        )
        raise IdentityError(
            f"{where} was made for address identity {self.hash}; this model has {other.hash}. "
            "Its rows would mean something else. Different:\n"
            + "\n".join(lines)
            + "\nLoad it with the tokenizer and profile it was made with."
        )
