"""Base models: a record of which one it is, and a fingerprint that tells one from another by its weights.

What it is: a sample of every weight, so that it costs tens of milliseconds. What it is not: a checksum of all of them.

    ref = BaseRef(name="smollm2", kind="smollm2", sha256=fingerprint_of(model))
    require_base(model, ref=ref)                # IdentityError where the weights are another base's
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engram_lm.errors import ConfigError, IdentityError, ModelError

if TYPE_CHECKING:
    import torch

# Values looked at in each row of a weight.
_SAMPLES_PER_ROW = 8
# Parameters whose name holds this word belong to a memory, not to the base.
_MEMORY_WORD = "engram"


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """Which base: the name it was loaded by, and `fingerprint_of` its weights, which checkpoints compare."""

    name: str
    kind: Literal["smollm2", "scratch", "local", "hub"]
    sha256: str

    def __post_init__(self) -> None:
        if self.kind not in ("smollm2", "scratch", "local", "hub"):
            raise ConfigError(f"a base is smollm2, scratch, local or hub; got kind {self.kind!r}")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ConfigError(f"a base's sha256 has 64 hexadecimal digits; got {self.sha256!r}")


def fingerprint_of(model: torch.nn.Module) -> str:
    """sha256 over name, shape and a fixed sample of every parameter, leaving out memory ("engram" in the name).

    The sample: 8 values of every row, at places that move along with the row, so that every row and nearly every column
    of every matrix is looked at, 1–2 % of the weights. Training, merging or editing a base changes it; a change of a
    few single values can go unseen. Values are compared at bfloat16 precision: the same base in float32 and in bfloat16
    agrees, in float16 it does not. Tied parameters count once. Buffers and configuration are not part of it.
    """
    import torch

    digest = hashlib.sha256(b"engram base 1\n")
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if _MEMORY_WORD in name.lower():
            continue
        if parameter.is_meta:
            raise ModelError(
                f"{name} has no values (device meta); load the weights before asking which base this is"
            )
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        values = _sample(parameter.detach())
        bits = (
            values.to(torch.bfloat16).view(torch.int16)
            if values.is_floating_point()
            else values.to(torch.int64)
        )
        digest.update(bits.cpu().numpy().tobytes())
    return digest.hexdigest()


def require_base(model: torch.nn.Module, *, ref: BaseRef) -> None:
    """IdentityError unless the model's weights are those of `ref`."""
    found = fingerprint_of(model)
    if found != ref.sha256:
        raise IdentityError(
            f"this memory belongs to the base {ref.name!r} with weights {ref.sha256[:12]}; "
            f"this model has {found[:12]}. Load the base it was trained on (same revision, float32 or bfloat16)."
        )


def _sample(weight: torch.Tensor) -> torch.Tensor:
    import torch

    rows = weight.reshape(weight.shape[0], -1) if weight.dim() > 1 else weight.reshape(1, -1)
    height, width = rows.shape
    if weight.dim() <= 1 or width <= _SAMPLES_PER_ROW:
        return rows
    row = torch.arange(height, device=weight.device)[:, None]
    place = torch.arange(_SAMPLES_PER_ROW, device=weight.device)[None, :] * width // _SAMPLES_PER_ROW
    return rows.gather(1, (row + place) % width)
