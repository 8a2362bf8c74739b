"""Which checkpoint vLLM serves, from its files: the fingerprint that gates are fitted for (`identity.fingerprint_of`).

vLLM gives a logits processor no way to the weights, and its own are fused and split. So the checkpoint's safetensors
files are read instead, a few values of every row. Their names and shapes are those of transformers' parameters for
plain checkpoints; where they are not (quantised ones, adapters), the fingerprint is another one and the gate is refused.

    fingerprint_of_checkpoint("/models/smollm2")      # sha256, 64 hexadecimal digits
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.errors import IdentityError

if TYPE_CHECKING:
    import torch

_OR = "Use a fixed lambda (ENGRAM_LAMBDA), or take the gate unchecked with ENGRAM_MODEL=trust."


def fingerprint_of_checkpoint(model: str, *, revision: str | None = None) -> str:
    """Of a directory, or of a hub's model that is in the local cache. IdentityError where there are no files to read."""
    from engram_lm.identity import fingerprint_of

    directory = Path(model) if Path(model).is_dir() else _in_cache(model, revision)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise IdentityError(
            f"{directory} has no safetensors files, so whether this gate fits them cannot be known. {_OR}"
        )
    return fingerprint_of(_Checkpoint(files))


class _Checkpoint:
    """As much of a torch module as a fingerprint needs."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        for path in self._files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)


def _in_cache(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found: Any = snapshot_download(
            model, revision=revision, local_files_only=True, allow_patterns=["*.safetensors"]
        )
    except Exception as error:
        raise IdentityError(f"The files of {model} cannot be found here ({error}). {_OR}") from None
    return Path(found)
