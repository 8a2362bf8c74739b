"""transformers' Trainer for models with memory: rows, their optimizer state and the weights in one checkpoint.

The stock Trainer trains rows too (their handles are parameters), but its checkpoints cannot be resumed. This one saves

    checkpoint-N/   what `save_memory(row_state=True)` writes: memory, rows, row state, the base or adapter if trained
                    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json
                    whole.json      written last: a checkpoint without it was cut short and is never read

so that an interrupted and resumed run is, on a CPU, bit for bit the uninterrupted one. Weight decay falls on matrices
alone; rows have their own rule (`tables.rules`). One process and one device; what is not supported is refused by name.

    trainer = MemoryTrainer(model, TrainingArguments(...), train_dataset=data.train)
    trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from engram_lm.attachment import load_memory, memories, save_memory
from engram_lm.attachment.loading import require_own_adapter, require_own_base
from engram_lm.durable import sync_path, write_atomic
from engram_lm.errors import CheckpointError, ConfigError, IdentityError, ModelError, RowUpdateError
from engram_lm.memory.manifest import read_manifest

WHOLE = "whole.json"


class MemoryTrainer(Trainer):
    """A Trainer whose checkpoints hold the memory. Takes the same arguments."""

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, **options: Any
    ) -> None:
        if model is None:
            raise ConfigError("MemoryTrainer needs a model with memory; model_init is not supported.")
        if not memories(model):
            raise ModelError("The model has no memory; attach one first, or use transformers' own Trainer.")
        if args is not None:
            _refuse(args)
        # Trainer switches the cache off in the model's config; what is saved keeps the model's own choice
        self.own_use_cache = getattr(model.config, "use_cache", None)
        # the token embedding's multiple of the rate; other than 1 also without weight decay
        self.embedding_rate = 1.0
        super().__init__(model, args, **options)
        _refuse(self.args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters under weight decay: transformers' choice without the memory's handles, norms and convs."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if ".engram." not in f".{name}" or name.endswith("projection.weight")]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' choice; the token embedding in a group of its own where its rate is another."""
        if self.optimizer is not None or self.embedding_rate == 1:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        embedding = self.model.get_input_embeddings().weight
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not embedding]
        optimizer.add_param_group(
            {"params": [embedding], "lr": self.args.learning_rate * self.embedding_rate, "weight_decay": 0.0}
        )
        return optimizer

    # ---- saving -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        training_use_cache = getattr(self.model.config, "use_cache", None)
        try:
            if self.own_use_cache is not None:
                self.model.config.use_cache = self.own_use_cache
            save_memory(
                self.model,
                output_dir or self.args.output_dir,
                tokenizer=self.processing_class,
                row_state=True,
            )
        finally:
            if training_use_cache is not None:
                self.model.config.use_cache = training_use_cache

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        directory = run / f"checkpoint-{self.state.global_step}"
        if directory.exists():
            # of a run that went further before it was cut off: its place is taken, whole or not
            (directory / WHOLE).unlink(missing_ok=True)
            shutil.rmtree(directory)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        mark_whole(directory, step=self.state.global_step)
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    # ---- going on -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As Trainer.train; True goes on from the last whole checkpoint of the output directory."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(f"{self.args.output_dir} holds no whole checkpoint to go on from.")
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
            if not (Path(resume_from_checkpoint) / name).exists():
                raise CheckpointError(
                    f"{resume_from_checkpoint} has no {name}, so training cannot go on from it as if nothing had happened "
                    "(save_only_model leaves it out). engram_lm.from_pretrained reads the memory alone."
                )
        load_checkpoint(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_checkpoint(self.model, self.state.best_model_checkpoint)


def mark_whole(directory: Path, *, step: int) -> None:
    """Sync every file of a checkpoint and say that it is complete."""
    for path in [p for p in directory.rglob("*") if p.is_file()]:
        sync_path(path)
    write_atomic(directory / WHOLE, json.dumps({"step": step}) + "\n")


def last_checkpoint(directory: str | os.PathLike) -> Path | None:
    """The whole checkpoint with the most steps, or None."""
    found = {}
    for path in Path(directory).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / WHOLE).exists():
            found[int(number[1])] = path
    return found[max(found)] if found else None


def load_checkpoint(model: nn.Module, directory: str | os.PathLike) -> None:
    """Fill model, rows and row state from a checkpoint of MemoryTrainer. Nothing changes unless it fits."""
    from engram_lm.attachment import base_of

    directory = Path(directory)
    manifest = read_manifest(directory)
    if not (directory / WHOLE).exists():
        raise CheckpointError(
            f"{directory} was not written to its end, or by another Trainer: {WHOLE} is missing. Go on from an earlier one."
        )
    ref = base_of(model)
    if manifest["base"]["sha256"] != ref.sha256:
        raise IdentityError(
            f"{directory} belongs to the base {manifest['base']['name']!r} with weights {manifest['base']['sha256'][:12]}; "
            f"this model is {ref.name!r} with {ref.sha256[:12]}."
        )
    found = {memory.name: memory for memory in memories(model).values()}
    for entry in manifest["memories"]:
        memory = found.get(entry["config"]["name"])
        for table in entry["tables"]:
            state = directory / f"state-{entry['config']['name']}-{table['block']}.safetensors"
            stateful = memory is not None and memory.tables[0].gradients.rule.state_bytes_per_row(
                table["width"]
            )
            if table["updates"] and stateful and "log" not in table and not state.exists():
                raise CheckpointError(
                    f"{state} is missing: the rows cannot go on as if nothing had happened."
                )
    kept = manifest["base_files"]
    is_adapted = hasattr(model, "peft_config")
    if (kept == "adapter") != is_adapted:
        raise CheckpointError(
            f"{directory} holds {'an adapter' if kept == 'adapter' else 'no adapter'}; "
            f"the model has {'one' if is_adapted else 'none'}."
        )
    trained = _trained_weights(model, directory, manifest)
    load_memory(model, directory, row_state=True)
    if kept == "adapter":
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, trained)
    elif kept == "base":
        own = model.state_dict()
        with torch.no_grad():
            for name, tensor in trained.items():
                own[name].copy_(tensor)


def _trained_weights(model: nn.Module, directory: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    kept = manifest["base_files"]
    if kept == "adapter":
        from safetensors.torch import load_file

        require_own_adapter(directory, manifest)
        return load_file(directory / "adapter" / "adapter_model.safetensors")
    if kept != "base":
        return {}
    from engram_lm.bases.base import quiet_libraries

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with quiet_libraries():
        base = type(model).from_pretrained(directory / "base", dtype=dtype)
    require_own_base(directory, manifest, base, dtype=dtype)
    weights = base.state_dict()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if ".engram." not in f".{name}"}
    if set(weights) != set(wanted) or any(weights[name].shape != wanted[name].shape for name in wanted):
        raise CheckpointError(
            f"{directory / 'base'} does not hold the weights of a {type(model).__name__} of this shape."
        )
    return weights


def _refuse(args: TrainingArguments) -> None:
    reasons = {
        "fp16 (not tried with rows yet; use bf16 or float32)": getattr(args, "fp16", False),
        "DeepSpeed": bool(getattr(args, "deepspeed", None)),
        "FSDP": bool(getattr(args, "fsdp", None)),
        "torch.distributed with several processes": args.world_size > 1,
        "DataParallel over several devices (set CUDA_VISIBLE_DEVICES to one)": args.n_gpu > 1,
        "auto_find_batch_size (it starts again on rows and weights that have moved)": args.auto_find_batch_size,
    }
    for name, asked in reasons.items():
        if asked:
            raise RowUpdateError(
                f"Rows do not train with {name}. MemoryTrainer runs in one process on one device."
            )
