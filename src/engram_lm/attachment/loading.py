"""A memory's directory read back, into a model of its own or one that is there. `attachment.saving` says what is in it."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from engram_lm.addressing import Identity
from engram_lm.attachment.attach import attach
from engram_lm.attachment.runtime import runtime_of
from engram_lm.attachment.saving import adapter_hash, other_save
from engram_lm.bases.base import load_base, quiet_libraries
from engram_lm.config import MemoryConfig
from engram_lm.errors import CheckpointError
from engram_lm.identity import BaseRef, fingerprint_of, require_base
from engram_lm.memory.layer import RUN
from engram_lm.memory.manifest import MANIFEST, config_hash, damage_named, read_manifest, runs_in
from engram_lm.memory.placement import Tier
from engram_lm.memory.rows import find_rows, read_tensors
from engram_lm.vocab import TokenMap


def from_pretrained(
    directory: str | os.PathLike,
    *,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    tier: Tier = "device",
    cache_bytes: int | None = None,
) -> nn.Module:
    """The model with its memory, in eval mode.

    Args:
        base: the base model, when it is already in memory; otherwise it is loaded by the name in memory.json.
        dtype: of the base and the memory's parameters; rows keep the config's row_dtype.
        tier: "device" (trainable), or read only from "host" memory, from "disk" where the files lie, or "cached": from disk
            with hot rows in at most `cache_bytes` of memory a table. The answers are the same.

    Raises: CheckpointError for files that are missing, mixed or cut short, IdentityError for another base or addresses.
    """
    directory = Path(directory)
    with damage_named(directory):
        base = _with_memories(directory, base, dtype)
        _load_memory(base, directory, row_state=False, tier=tier, cache_bytes=cache_bytes)
    return base.eval()


def _with_memories(directory: Path, base: nn.Module | None, dtype: torch.dtype | None) -> nn.Module:
    """The base with the memories of memory.json, new."""
    manifest = read_manifest(directory)
    ref = BaseRef(**manifest["base"])
    kept = manifest["base_files"]
    if base is None and kept == "base":
        base = _base_beside(directory, dtype)
        require_own_base(directory, manifest, base, dtype=dtype)
    elif base is None:
        base = load_base(ref.name, dtype=dtype, report=lambda line: None).model
    if kept != "base":
        require_base(base, ref=ref)
    if kept == "adapter":
        from peft import PeftModel

        require_own_adapter(directory, manifest)
        with quiet_libraries():
            base = PeftModel.from_pretrained(base, str(directory / "adapter"))
    tokenizer = _tokenizer(directory)
    for entry in manifest["memories"]:
        config = MemoryConfig.from_json(entry["config"])
        token_map = TokenMap.load(directory / f"tokens-{config.name}.bin")
        token_map.require_tokenizer(tokenizer, where=str(directory))
        attach(base, tokenizer, config, token_map=token_map, base=ref)
    return base


def load_memory(model: nn.Module, directory: str | os.PathLike, *, row_state: bool = False) -> None:
    """Fill the memories already on `model` from `directory`. Nothing changes unless everything fits.

    row_state: also restore the row optimizers' state, as a checkpoint that training goes on from needs.
    """
    directory = Path(directory)
    with damage_named(directory):
        _load_memory(model, directory, row_state=row_state)


def _load_memory(
    model: nn.Module,
    directory: Path,
    *,
    row_state: bool,
    tier: Tier = "device",
    cache_bytes: int | None = None,
) -> None:
    runtime = runtime_of(model)
    manifest = read_manifest(directory)
    saved = {entry["config"]["name"]: entry for entry in manifest["memories"]}
    if set(saved) != set(runtime.memories):
        raise CheckpointError(
            f"{directory} holds the memories {sorted(saved)}; the model has {sorted(runtime.memories)}."
        )
    parameters = read_tensors(
        directory / "memory.safetensors",
        manifest["save_id"],
        run=runs_in(manifest),
        config=config_hash(manifest["memories"]),
    )
    fill = []
    for name, memory in runtime.memories.items():
        for index, (slot, entry) in enumerate(zip(memory.slots, saved[name]["tables"], strict=True)):
            where = f"{directory} (memory {name!r}, block {entry['block']})"
            Identity(entry["identity_facts"]).require_equal(
                slot.scheme.identity, where=where, is_tokenizer=memory.token_map.is_of
            )
            rows = find_rows(
                directory, f"{name}-{entry['block']}", entry, slot, save_id=manifest["save_id"], tier=tier,
                cache_bytes=cache_bytes, row_state=row_state,
            )  # fmt: skip
            if rows.shape != (slot.table.n_rows, slot.table.width):
                raise CheckpointError(
                    f"{where}: the rows are {rows.shape}; the model's table is "
                    f"{(slot.table.n_rows, slot.table.width)}. Attach with the same rows_per_head and head_width."
                )
            prefix = f"{name}.{index}."
            weights = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
            wanted = {k: v for k, v in slot.state_dict().items() if k != RUN}
            if set(weights) != set(wanted) or any(weights[k].shape != wanted[k].shape for k in wanted):
                raise CheckpointError(f"{where}: memory.safetensors does not hold this layer's parameters.")
            updates = int(entry["updates"])
            if float(weights["handle"]) != float(torch.tensor(float(updates)).to(weights["handle"].dtype)):
                raise CheckpointError(
                    f"{where}: the weights carry {float(weights['handle']):.0f} row updates, {MANIFEST} says {updates}."
                )
            fill.append((slot, weights, rows, updates, int(entry.get("run", 0))))
    for slot, weights, rows, updates, run in fill:
        rows.put(slot, model)
        slot.load_state_dict(weights)
        slot.table.gradients.set_updates(updates, run=run)


def _base_beside(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    """The base that was saved with the memory; its tokenizer is the memory's."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries():
            return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype or "auto")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory / 'base'} cannot be read: {first}") from None


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError):
        raise CheckpointError(f"{directory} holds no tokenizer; it belongs to the memory.") from None


def require_own_base(
    directory: Path, manifest: dict[str, Any], base: nn.Module, *, dtype: torch.dtype | None
) -> None:
    """CheckpointError unless `base`, read from base/ in `dtype`, is of memory.json's save. Older ones do not say."""
    wanted = manifest.get("base_files_sha256")
    # float16 rounds what the fingerprint reads
    if dtype != torch.float16 and wanted not in (None, fingerprint_of(base)):
        raise other_save(directory / "base")


def require_own_adapter(directory: Path, manifest: dict[str, Any]) -> None:
    """CheckpointError unless adapter/ is of the save that memory.json is of. Older ones do not say."""
    if manifest.get("adapter_sha256") not in (None, adapter_hash(directory)):
        raise other_save(directory / "adapter")
