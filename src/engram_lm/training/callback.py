"""What happens beside the steps of a run: logging, measuring, checkpoints, and stopping early.

conductor = Conductor(prepared, metrics, progress, begin_s=time.perf_counter())
trainer = trainer_of(prepared, checkpoints, conductor)
with interruptible(conductor, progress):
    trainer.train()
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from engram_lm.training.measure import held_out_loss
from engram_lm.training.metrics import Metrics
from engram_lm.training.progress import Progress
from engram_lm.training.setup import Setup
from engram_lm.training.trainer import MemoryTrainer


class RunCallback(TrainerCallback):
    """Decides at every step what is logged, measured and saved, and when to stop early."""

    def __init__(self, prepared: Setup, metrics: Metrics, progress: Progress, *, begin_s: float) -> None:
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


def trainer_of(prepared: Setup, checkpoints: Path, conductor: RunCallback) -> MemoryTrainer:
    """A trainer that leaves logging, measuring and checkpoints to the conductor."""
    config = prepared.config
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    args = TrainingArguments(
        output_dir=str(checkpoints),
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


@contextlib.contextmanager
def interruptible(conductor: RunCallback, progress: Progress) -> Iterator[None]:
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
