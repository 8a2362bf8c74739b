"""One training run in one directory, from options to a memory that `engram_lm.from_pretrained(DIR)` reads.

    DIR/train.json       the options, resolved            DIR/metrics.jsonl    what was measured, step by step
    DIR/run.json         base, text, state, results       DIR/loss.png         the same as a picture
    DIR/checkpoints/     to go on from; the last few      DIR/memory.json …    the trained memory, when the run is over

The same options on the same text go on where the run was cut off; on a CPU the result is then bit for bit that of an
uninterrupted run. Everything is loaded and checked before the first byte is written, so a refusal leaves DIR as it was.

    outcome = train(TrainConfig(base="scratch:tiny", data=("a.txt",)), out="runs/first")
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch.nn import Linear
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainingArguments, default_data_collator, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

from engram_lm import __version__
from engram_lm.attachment import attach, memories, save_memory
from engram_lm.attachment.structure import find_decoder
from engram_lm.errors import CheckpointError, ConfigError, DataError, IdentityError, MissingExtraError
from engram_lm.runs.config import TrainConfig, first_difference
from engram_lm.runs.measure import held_out_loss, held_out_shares
from engram_lm.runs.metrics import Metrics, write_whole
from engram_lm.runs.picture import draw_losses
from engram_lm.runs.progress import Progress, Quiet
from engram_lm.runs.trainer import MemoryTrainer, last_checkpoint
from engram_lm.train.base import load_base, quiet_libraries
from engram_lm.train.corpus import Corpus, tokenise
from engram_lm.train.data import Blocks, pack

OPTIONS, FACTS, METRICS, PICTURE, CHECKPOINTS = (
    "train.json",
    "run.json",
    "metrics.jsonl",
    "loss.png",
    "checkpoints",
)
FORMAT, VERSION = "engram-lm run", 1

# Held-out sequences that the shares are taken from.
_SHARE_SEQUENCES = 32


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended. `results` is what run.json keeps."""

    directory: Path
    state: Literal["finished", "interrupted", "out of time"]
    step: int
    steps: int
    results: dict[str, Any]


def train(
    config: TrainConfig,
    *,
    out: str | Path,
    earlier: Literal["continue", "require", "overwrite"] = "continue",
    progress: Progress | None = None,
) -> Outcome:
    """Run, or go on with, one training run.

    earlier: what to do about a run that `out` holds: go on with it, require that there is one, or replace it. A finished
        run is only ever replaced.
    """
    progress, out = progress or Quiet(), Path(out)
    begin_s = time.perf_counter()
    begun = _begun(out, earlier)
    checkpoint = last_checkpoint(out / CHECKPOINTS) if begun else None
    prepared = _prepare(config, checkpoint, progress)
    config = prepared.config
    if begun:
        _require_same(out, begun, prepared)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out, "train"):
        if earlier == "overwrite":
            _clear(out)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "engram_lm": __version__,
            "base": asdict(prepared.base),
            "corpus": prepared.corpus.fingerprint,
            "steps": prepared.steps,
            "state": "begun",
            "results": {},
        }
        _write_json(out / FACTS, facts)
        _write_json(out / OPTIONS, config.to_json())
        _drop_unfinished(out / CHECKPOINTS, keep=checkpoint)
        metrics = Metrics(out / METRICS)
        metrics.begin(step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else None)
        conductor = _Conductor(prepared, metrics, progress, begin_s=begin_s)
        with quiet_libraries():
            trainer = _trainer(prepared, out, conductor)
            conductor.model = trainer.model
            if begun:
                where = (
                    f"from step {metrics.records[-1]['step']:,}"
                    if checkpoint
                    else "from the start: no checkpoint yet"
                )
                progress.say(f"{out}: going on {where}")
            with _interruptible(conductor, progress):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        state = "finished" if step == prepared.steps else conductor.stop_reason
        results = {"step": step, "tokens": step * config.tokens_per_step}
        if state != "interrupted":
            results |= _measure(prepared, conductor)
            prepared.model.config.use_cache = trainer.own_use_cache
            save_memory(prepared.model, out, tokenizer=prepared.tokenizer)
        draw_losses(metrics.records, out / PICTURE, title=_title(prepared), mode=config.mode)
        _write_json(out / FACTS, facts | {"state": state, "results": results})
    return Outcome(directory=out, state=state, step=step, steps=prepared.steps, results=results)


def told(outcome: Outcome) -> list[str]:
    """What a person wants to know of an outcome, in lines."""
    results, out = outcome.results, outcome.directory
    lines = []
    if outcome.state != "finished":
        why = {"interrupted": "interrupted", "out of time": "out of time"}[outcome.state]
        lines.append(f"{why} after step {outcome.step:,} of {outcome.steps:,}; the checkpoint is written")
    if "loss_on" in results:
        on, off = results["loss_on"], results["loss_off"]
        off_name = "memory off, the base" if results["mode"] == "memory" else "memory off"
        lines.append(
            f"held-out loss {on:.4f} with memory (perplexity {math.exp(on):.2f}), {off:.4f} with {off_name} "
            f"({math.exp(off):.2f}), {results['loss_base']:.4f} before training; {results['held_out_tokens']:,} tokens"
        )
        if share := results.get("share"):
            lines.append(
                f"memory moves a hidden state by {100 * share['p50']:.1f} % at the median held-out token, "
                f"{100 * share['p99']:.1f} % at one in a hundred"
            )
    if "tables_mb" in results:
        lines.append(f"trained on {results['tokens']:,} tokens; tables of {results['tables_mb']:,.1f} MB")
        lines.append(
            f'{out} holds the memory, {METRICS} and {PICTURE}. Try: engram-lm generate {out} "Once upon a time"'
        )
    if outcome.state != "finished":
        lines.append(f"go on with: engram-lm train --resume --out {out}")
    return lines


# ---- before the first byte is written --------------------------------------------------------------------------------


class _Prepared(NamedTuple):
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


def _begun(out: Path, earlier: str) -> dict[str, Any] | None:
    """run.json of a run that `out` holds and that shall go on; None for a new run."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; --out names a directory.")
    facts = None
    if (out / OPTIONS).exists() and (out / FACTS).exists():
        facts = _read_json(out / FACTS)
        if facts.get("format") != FORMAT or facts.get("version") != VERSION:
            raise CheckpointError(
                f"{out / FACTS} has format {facts.get('format')!r} version {facts.get('version')}; this build reads "
                f"{FORMAT!r} version {VERSION}. Name another --out."
            )
    ours = {OPTIONS, FACTS, ".lock", f".{OPTIONS}", f".{FACTS}"}
    if facts is None and out.is_dir() and any(path.name not in ours for path in out.iterdir()):
        raise CheckpointError(f"{out} is not empty and holds no run of engram-lm train; name another --out.")
    if earlier == "overwrite":
        return None
    if facts is None:
        if earlier == "require":
            raise CheckpointError(f"{out} holds no run to resume.")
        return None
    if facts["state"] == "finished":
        raise CheckpointError(
            f"{out} holds a finished run; name another --out, or add --overwrite to replace it."
        )
    return facts


def _prepare(config: TrainConfig, checkpoint: Path | None, progress: Progress) -> _Prepared:
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
    corpus = tokenise(
        list(config.data),
        tokenizer=tokenizer,
        field=config.field,
        txt_documents=config.txt_documents,
        progress=_tokenising(progress),
    )
    train_part, held_out = _split(corpus, config)
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
        f"text: {corpus.tokens:,} tokens in {len(corpus):,} documents; "
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
    return _Prepared(
        config=config,
        model=model,
        tokenizer=tokenizer,
        base=base,
        corpus=corpus,
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
            raise MissingExtraError('--mode lora needs peft: pip install "engram-lm[hf]"') from error
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


def _require_same(out: Path, facts: dict[str, Any], prepared: _Prepared) -> None:
    stored = TrainConfig.from_json(_read_json(out / OPTIONS))
    advice = "Use the same, or another --out, or --overwrite."
    if facts["base"]["sha256"] != prepared.base.sha256:
        raise IdentityError(
            f"{out} was begun on the base {facts['base']['name']!r} with weights {facts['base']['sha256'][:12]}; "
            f"{prepared.base.name!r} has {prepared.base.sha256[:12]}. {advice}"
        )
    name = first_difference(stored, prepared.config)
    if name is not None:
        was, now = getattr(stored, name), getattr(prepared.config, name)
        raise ConfigError(f"{out} was begun with {name} {was!r}; this command says {now!r}. {advice}")
    if facts["corpus"] != prepared.corpus.fingerprint:
        raise DataError(f"{out} was begun on other text than --data holds now. {advice}")


def _tokenising(progress: Progress) -> Any:
    said = time.perf_counter()

    def told(at: Any) -> None:
        nonlocal said
        if time.perf_counter() - said > 5:
            said = time.perf_counter()
            progress.say(f"tokenising: {at.documents:,} documents, {at.tokens:,} tokens, at {at.file.name}")

    return told


# ---- the directory ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone_in(out: Path, command: str) -> Iterator[None]:
    """No other `engram-lm COMMAND` works in a directory; the lock dies with its process."""
    with open(out / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"Another engram-lm {command} is at work in {out}.") from None
        yield


def _clear(out: Path) -> None:
    """Remove a run's files, run.json last; anything else stays."""
    names = [METRICS, PICTURE, "memory.json", "memory.safetensors", "README.md", OPTIONS, FACTS]
    names[:0] = [path.name for pattern in ("rows-*", "state-*", "tokens-*.bin") for path in out.glob(pattern)]
    for folder in (CHECKPOINTS, "base", "adapter"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name in names:
        (out / name).unlink(missing_ok=True)


def _drop_unfinished(checkpoints: Path, *, keep: Path | None) -> None:
    last = int(keep.name.rpartition("-")[2]) if keep else -1
    for path in checkpoints.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if not number.isdigit() or int(number) > last:
            shutil.rmtree(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, json.dumps(data, indent=1) + "\n")


# ---- while it runs ---------------------------------------------------------------------------------------------------


def _trainer(prepared: _Prepared, out: Path, conductor: _Conductor) -> MemoryTrainer:
    config = prepared.config
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    args = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=prepared.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(config.warmup * prepared.steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        save_total_limit=config.keep_checkpoints,
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = MemoryTrainer(
        prepared.model,
        args,
        train_dataset=prepared.train,
        processing_class=prepared.tokenizer,
        # Trainer's own choice would add a mask, and with a mask transformers does not keep documents apart
        data_collator=default_data_collator,
        callbacks=[conductor],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.embedding_rate = config.embedding_rate
    return trainer


class _Conductor(TrainerCallback):
    """Decides at every step what is logged, measured and saved, and when to stop early."""

    def __init__(self, prepared: _Prepared, metrics: Metrics, progress: Progress, *, begin_s: float) -> None:
        self.prepared, self.metrics, self.progress = prepared, metrics, progress
        self.config = prepared.config
        self.begin_s = begin_s
        self.model: Any = prepared.model
        self.stop_reason: Any = None
        self.off: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.first = state.global_step
        self.train_begin_s = time.perf_counter()
        for record in self.metrics.records:
            self.off = record.get("eval_loss_off", self.off)
        if not self.metrics.records and self.prepared.held_out is not None:
            self.measure(0)
        self.train_begin_s = time.perf_counter()
        self.progress.begin(
            step=state.global_step, steps=self.prepared.steps, tokens_per_step=self.config.tokens_per_step
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        step, config = state.global_step, self.config
        if config.minutes and time.perf_counter() - self.begin_s > 60 * config.minutes:
            self.stop_reason = self.stop_reason or "out of time"
        last = step == self.prepared.steps
        control.should_save = last or bool(self.stop_reason) or step % config.save_every == 0
        control.should_log = control.should_save or step % config.log_every == 0
        if self.stop_reason:
            control.should_training_stop = True
        due = last or step % config.eval_every == 0 or self.stop_reason == "out of time"
        if due and self.stop_reason != "interrupted" and self.prepared.held_out is not None:
            self.measure(step)
        self.progress.advance(step, loss=None)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step = state.global_step
        seconds = time.perf_counter() - self.train_begin_s
        self.metrics.add(
            step=step,
            tokens=step * self.config.tokens_per_step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens_per_second=round((step - self.first) * self.config.tokens_per_step / seconds, 1),
        )
        self.progress.advance(step, loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.progress.end()

    def measure(self, step: int) -> None:
        """Held-out losses at `step`; the base's own is measured once where it does not train."""
        sequences, size = self.prepared.held_out, self.config.batch_size
        on = held_out_loss(self.model, sequences, batch_size=size)
        if self.config.mode != "memory" or self.off is None:
            self.off = held_out_loss(self.model, sequences, batch_size=size, memory="off")
        self.metrics.add(
            step=step,
            tokens=step * self.config.tokens_per_step,
            eval_loss=on,
            eval_loss_off=self.off,
            eval_perplexity=math.exp(min(on, 700)),
            eval_tokens=self.prepared.held_out_tokens,
        )
        self.progress.say(f"step {step:,}: held-out loss {on:.4f} with memory, {self.off:.4f} without")


@contextlib.contextmanager
def _interruptible(conductor: _Conductor, progress: Progress) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM asks for a checkpoint after this step; the second one is Python's own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        conductor.stop_reason = "interrupted"
        for each, handler in before.items():
            signal.signal(each, handler)
        progress.say("stopping after this step, with a checkpoint; once more to stop at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- when it is over -------------------------------------------------------------------------------------------------


def _measure(prepared: _Prepared, conductor: _Conductor) -> dict[str, Any]:
    tables = [table for memory in memories(prepared.model).values() for table in memory.tables]
    results: dict[str, Any] = {"mode": prepared.config.mode, "control": prepared.config.control}
    results["trained_parameters"] = prepared.trained_parameters
    results["tables_mb"] = round(sum(t.n_rows * t.bytes_per_row for t in tables) / 1e6, 3)
    measured = [record for record in conductor.metrics.records if "eval_loss" in record]
    if not measured:
        return results
    results |= {
        "loss_on": measured[-1]["eval_loss"],
        "loss_off": measured[-1]["eval_loss_off"],
        "loss_base": measured[0]["eval_loss_off"],
        "held_out_tokens": prepared.held_out_tokens,
    }
    if prepared.config.control in ("bias", "off"):
        return results
    sequences = Subset(prepared.held_out, range(min(len(prepared.held_out), _SHARE_SEQUENCES)))
    return results | {
        "share": held_out_shares(conductor.model, sequences, batch_size=prepared.config.batch_size)
    }


def _title(prepared: _Prepared) -> str:
    config = prepared.config
    what = {"memory": "memory on a frozen", "lora": "memory and LoRA on", "all": "memory and all of"}[
        config.mode
    ]
    blocks = ", ".join(map(str, config.layers))
    if config.control:
        what = f"control {config.control}, mode {config.mode}, on"
    return f"{what} {Path(config.base).name if config.base.startswith('/') else config.base}, blocks {blocks}"
