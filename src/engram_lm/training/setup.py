"""What a run trains, loaded and checked before the first byte of its directory is written.

prepared = prepare(TrainConfig(base="scratch:tiny", data=("a.txt",)), None, progress)
prepared.model, prepared.train, prepared.held_out, prepared.steps
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn import Linear
from torch.utils.data import Subset
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from engram_lm.attachment import attach, memories
from engram_lm.attachment.structure import find_decoder
from engram_lm.bases.base import load_base, quiet_libraries
from engram_lm.corpus.blocks import Blocks, pack
from engram_lm.corpus.tokenised import Corpus, tokenise
from engram_lm.errors import ConfigError, DataError
from engram_lm.extras import missing
from engram_lm.training.config import TrainConfig
from engram_lm.training.progress import Progress


class Setup(NamedTuple):
    """A run that may begin. train, held_out: data sets of whole steps and of what is measured; None for no held-out text."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    base: Any
    corpus: Corpus
    train: Any
    held_out: Any
    held_out_tokens: int
    steps: int
    trained_parameters: int


def prepare(
    config: TrainConfig, checkpoint: Path | None, progress: Progress, *, corpus: str | None = None
) -> Setup:
    """Load and check everything. checkpoint: what a scratch base's tokenizer is taken from, instead of made anew. corpus: the
    fingerprint of the text that the run was begun on."""
    set_seed(config.seed)
    own = {}
    if config.is_scratch:
        own = {"text_files": list(config.data), "seed": config.seed}
        if checkpoint is not None:
            from transformers import AutoTokenizer

            own = {"tokenizer": AutoTokenizer.from_pretrained(checkpoint), "seed": config.seed}
        own["ffn_width"] = config.ffn_width
    model, tokenizer, base = load_base(config.base, dtype="float32", report=progress.say, **own)
    decoder = find_decoder(model)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length is {config.sequence_length}; {config.base} takes at most {longest} tokens."
        )
    read = tokenise(
        list(config.data),
        tokenizer=tokenizer,
        known=corpus,
        field=config.field,
        txt_documents=config.txt_documents,
        progress=_tokenising(progress),
    )
    train_part, held_out = _split(read, config)
    per_step = config.batch_size * config.accumulation
    per_epoch = len(train_part) // per_step
    if not per_epoch:
        raise DataError(
            f"{len(train_part):,} sequences of {config.sequence_length} tokens do not fill one step of {per_step}; "
            "give more text, or lower --batch-size or --sequence-length."
        )
    steps = per_epoch * config.epochs
    config = config.resolved(n_blocks=len(decoder.blocks), steps=steps)
    progress.say(
        f"text: {read.tokens:,} tokens in {len(read):,} documents; "
        f"{per_epoch * config.tokens_per_step:,} to train on"
        + (f" x {config.epochs} epochs" if config.epochs > 1 else "")
        + (f", {held_out.tokens:,} held out" if held_out else ", none held out")
    )
    measured = None
    if held_out is not None:
        measured = Subset(
            held_out, range(max(1, min(len(held_out), config.eval_tokens // config.sequence_length)))
        )
    if config.train_from is not None and config.train_from >= len(decoder.blocks):
        raise ConfigError(
            f"train_from is block {config.train_from}; {config.base} has blocks 0 to {len(decoder.blocks) - 1}."
        )
    model = _with_memory(model, tokenizer, base, config)
    tables = [table for memory in memories(model).values() for table in memory.tables]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = "no memory" if config.control == "off" else f"{config.control or 'memory'} before blocks "
    if config.control != "off":
        shape += ", ".join(map(str, config.layers))
    if config.control not in ("bias", "off"):
        shape += f": {sum(t.n_rows for t in tables):,} rows of {config.head_width}, "
        shape += f"{sum(t.n_rows * t.bytes_per_row for t in tables) / 1e6:,.1f} MB"
    progress.say(
        f"{shape}; mode {config.mode}, {trained / 1e6:,.1f} M other parameters train, {steps:,} steps"
    )
    return Setup(
        config=config,
        model=model,
        tokenizer=tokenizer,
        base=base,
        corpus=read,
        train=Subset(train_part, range(per_epoch * per_step)),
        held_out=measured,
        held_out_tokens=len(measured) * config.sequence_length if measured else 0,
        steps=steps,
        trained_parameters=trained,
    )


def _split(corpus: Corpus, config: TrainConfig) -> tuple[Blocks, Blocks | None]:
    shape = {
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "held_out_share": config.holdout,
    }
    train_part = pack(corpus, part="train", seed=config.seed, max_tokens=config.tokens, **shape)
    if not config.holdout:
        return train_part, None
    try:
        return train_part, pack(corpus, part="held_out", seed=None, **shape)
    except DataError as error:
        raise DataError(
            f"{config.holdout:g} of the {len(corpus)} documents are held out, too little to measure on ({error}). "
            "Raise --holdout, split texts with --txt-documents, or measure nothing with --holdout 0."
        ) from None


def _with_memory(model: Any, tokenizer: Any, base: Any, config: TrainConfig) -> Any:
    trained_blocks = find_decoder(model).blocks[config.train_from or 0 :]
    model.requires_grad_(config.mode == "all" and config.train_from is None)
    trained_blocks.requires_grad_(config.mode == "all")
    if config.mode == "lora":
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise missing("--mode lora needs peft", "hf") from error
        # before attach: "all-linear" must not wrap the memory's own projection
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear" if config.train_from is None else _linear_in(model, trained_blocks),
            task_type="CAUSAL_LM",
        )
        with quiet_libraries():
            model = get_peft_model(model, adapter)
    return attach(model, tokenizer, config.memory(config.layers), base=base)


def _linear_in(model: Any, blocks: Any) -> list[str]:
    """Names of the matrices in some blocks; with a pattern peft would not take blocks."""
    inside = {id(module) for module in blocks.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (Linear, Conv1D))
    ]


def _tokenising(progress: Progress) -> Any:
    said = time.perf_counter()

    def told(at: Any) -> None:
        nonlocal said
        if time.perf_counter() - said > 5:
            said = time.perf_counter()
            progress.say(f"tokenising: {at.documents:,} documents, {at.tokens:,} tokens, at {at.file.name}")

    return told
