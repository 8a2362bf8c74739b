"""A memory on disk: a directory that says what it belongs to and refuses to be read as anything else.

    DIR/memory.json                  format, version, save id, base, and for every memory its config, and for every table its
                                     identity, its number of updates, and the number of the training run they are of
        memory.safetensors           projections, norms, convs, handles
        tokens-NAME.bin              the token map
        rows-NAME-BLOCK.safetensors  the rows of one table
        state-NAME-BLOCK.safetensors row-optimizer state (checkpoints only)
        tokenizer files, README.md   what `AutoTokenizer` reads, and a card
        base/ or adapter/            the base model where it was trained too, or its LoRA adapter

Every file and folder is written beside its target and moved into place, memory.json last; all carry one save id (a base
or adapter beside them its fingerprint), so that a directory with files of two saves is refused. Loading compares address
identities, sizes, and the base's fingerprint.

"run" stands in memory.json beside "updates", and in the metadata of memory.safetensors and of the files of rows and row
state. It is drawn at random at the first update and mixed with every later one (`tables.gradients`), so that weights and
rows of different runs are told apart where their numbers of updates are equal. Memories saved before it have none, and are
read without this check.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from engram_lm import durable
from engram_lm.attachment.runtime import runtime_of
from engram_lm.bases.base import quiet_libraries
from engram_lm.errors import CheckpointError
from engram_lm.identity import BaseRef, fingerprint_of
from engram_lm.memory.card import card
from engram_lm.memory.layer import RUN
from engram_lm.memory.manifest import FORMAT, MANIFEST, VERSION, config_hash
from engram_lm.memory.memory import Memory

BaseFiles = Literal["auto", "always", "never"]


def save_memory(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    base_files: BaseFiles = "auto",
    row_dtype: torch.dtype | None = None,
    row_state: bool = False,
) -> Path:
    """Write every memory of `model`; the base's weights only where they are not what the memory was attached to.

    Args:
        tokenizer: default the one the memory was attached with.
        base_files: "auto" saves the base when it was trained or came from a scratch recipe, "never" refers to it by name.
        row_dtype: store rows as bfloat16 or float16 (they load into the config's row_dtype); default as they are.
        row_state: also write the row optimizers' state, for training to go on.
    """
    runtime, directory = runtime_of(model), Path(directory)
    save = _Save(directory, row_dtype=row_dtype, row_state=row_state)
    try:
        saved = [_put(memory, save) for memory in runtime.memories.values()]
        entries = [each.entry for each in saved]
        parameters = {name: tensor for each in saved for name, tensor in each.parameters.items()}
        runs = {name: run for each in saved for name, run in each.runs.items()}
        save.tensors("memory.safetensors", parameters, config=config_hash(entries), run=json.dumps(runs))
        kept = _save_base(model, save.folder, runtime.base, base_files)
        tokenizer = tokenizer if tokenizer is not None else runtime.tokenizer
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(save.folder)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": save.id,
            "base": asdict(runtime.base),
            "base_files": kept,
            "base_files_sha256": fingerprint_of(model) if kept == "base" else None,
            "adapter_sha256": adapter_hash(save.folder) if kept == "adapter" else None,
            "memories": entries,
        }
        save.settle(json.dumps(manifest, indent=1) + "\n")
    except BaseException:
        save.abandon()
        raise
    save.move_into_place()
    durable.write_atomic(directory / "README.md", card(manifest))
    return directory


class _Saved(NamedTuple):
    """What memory.json says of a memory, and its layers' parameters and runs by the names of memory.safetensors."""

    entry: dict[str, Any]
    parameters: dict[str, Tensor]
    runs: dict[str, int]


def _put(memory: Memory, save: "_Save") -> _Saved:
    """Rows and token map of a memory into a save."""
    tables, parameters, runs = [], {}, {}
    for index, slot in enumerate(memory.slots):
        if type(slot.projection) is not nn.Linear:
            raise CheckpointError(
                f"The projection of {memory.name!r} was replaced by {type(slot.projection).__name__}, which a memory "
                'cannot be loaded into. Give PEFT exclude_modules=".*engram.*".'
            )
        gradients, identity = slot.table.gradients, slot.scheme.identity
        gradients.check_updates()
        weights = {k: v for k, v in slot.state_dict().items() if k != RUN}
        parameters |= {f"{memory.name}.{index}.{k}": v for k, v in weights.items()}
        runs[f"{memory.name}.{index}"] = gradients.run
        rows = slot.table.save(save, f"{memory.name}-{slot.block}", identity=identity.hash)
        tables.append(
            {
                "block": slot.block,
                "rows": slot.table.n_rows,
                "width": slot.table.width,
                "updates": gradients.updates,
                "run": gradients.run,
                **rows,
                "identity": identity.hash,
                "identity_facts": json.loads(identity.json),
            }
        )
    memory.token_map.save(save.path(f"tokens-{memory.name}.bin"))
    return _Saved({"config": memory.config.to_json(), "tables": tables}, parameters, runs)


class _Save:
    """A directory that is being written: files beside their targets until all are there (`tables.protocol.Save`).

    folder: for what libraries write by names of their own; made by them.
    """

    def __init__(self, directory: Path, *, row_dtype: torch.dtype | None, row_state: bool) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".*.*"):
            if re.fullmatch(r"[0-9a-f]{16}", left.suffix[1:]):
                _remove(left)  # of a save that was killed
        self.directory, self.id = directory, secrets.token_hex(8)
        self.row_dtype, self.row_state = row_dtype, row_state
        self.folder = directory / f".staged.{self.id}"
        self._waiting: list[tuple[Path, Path]] = []

    def path(self, name: str) -> Path:
        beside = self._beside(name)
        self._waiting.append((beside, self.directory / name))
        return beside

    def tensors(self, name: str, tensors: dict[str, Tensor], **marks: str) -> None:
        held = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
        try:
            save_file(held, self.path(name), metadata={"save_id": self.id, "format": FORMAT, **marks})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.directory / name} cannot be written: {error}. What was there before is untouched."
            ) from None

    def settle(self, manifest: str) -> None:
        """Write memory.json, the last to be moved, and have everything on disk."""
        if self.folder.is_dir():
            self._waiting += [(path, self.directory / path.name) for path in sorted(self.folder.iterdir())]
        beside = self.path(MANIFEST)
        beside.write_text(manifest, encoding="utf8")
        mode = beside.stat().st_mode
        for part, _ in self._waiting:
            for path in [part] if part.is_file() else [x for x in part.rglob("*") if x.is_file()]:
                path.chmod(mode)  # safetensors writes files that only their owner can read
                durable.sync_path(path)

    def abandon(self) -> None:
        """Leave the directory as it was."""
        for path in [self.folder, *(path for path, _ in self._waiting)]:
            _remove(path)

    def move_into_place(self) -> None:
        """Give every file its name, in the order in which they were put."""
        for path, target in self._waiting:
            earlier = self._beside(target.name)
            if path.is_dir() and target.exists():
                durable.rename(target, earlier)  # a directory replaces none that has files
            durable.rename(path, target)
            _remove(earlier)
        _remove(self.folder)

    def _beside(self, name: str) -> Path:
        return self.directory / f".{name}.{self.id}"


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike, **options: Any) -> None:
    """What `model.save_pretrained` does while memory is attached: `save_memory`, the base's files included when trained.

    Takes transformers' own options where they mean something here (`tokenizer`), and ignores `state_dict`,
    `safe_serialization` and `is_main_process`, which Trainer passes.
    """
    if options.pop("is_main_process", True):
        save_memory(model, save_directory, tokenizer=options.get("tokenizer"))


# ---- parts -----------------------------------------------------------------------------------------------------------


def other_save(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} belongs to another save than {MANIFEST}; copy the directory again, whole."
    )


def adapter_hash(directory: Path) -> str:
    """sha256 of a LoRA adapter's weights."""
    path = directory / "adapter" / "adapter_model.safetensors"
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _save_base(model: nn.Module, directory: Path, ref: BaseRef, base_files: BaseFiles) -> str | None:
    if hasattr(model, "peft_config"):
        if ref.kind == "scratch":
            raise CheckpointError(
                "A LoRA adapter refers to its base by name, and this base has none: save the base to a directory, load it "
                "from there, and attach again."
            )
        type(model).save_pretrained(model, directory / "adapter")
        return "adapter"
    changed = ref.kind == "scratch" or not ref.name or fingerprint_of(model) != ref.sha256
    if base_files == "never" and changed:
        raise CheckpointError(
            'The base model was trained, so its weights must be saved: use base_files="auto".'
        )
    if base_files == "always" or changed:
        state = {name: tensor for name, tensor in model.state_dict().items() if ".engram." not in f".{name}"}
        with quiet_libraries():
            type(model).save_pretrained(model, directory / "base", state_dict=state)
        return "base"
    return None
