"""One training run in one directory, from options to a memory that `engram_lm.from_pretrained(DIR)` reads.

    DIR/train.json       the options, resolved            DIR/metrics.jsonl    what was measured, step by step
    DIR/run.json         base, text, state, results       DIR/loss.png         the same as a picture
    DIR/checkpoints/     to go on from; the last few      DIR/memory.json …    the trained memory, when the run is over

The same options on the same text go on where the run was cut off; on a CPU the result is then bit for bit that of an
uninterrupted run. Everything is loaded and checked before the first byte is written, so a refusal leaves DIR as it was.

    outcome = train(TrainConfig(base="scratch:tiny", data=("a.txt",)), out="runs/first")
"""

from __future__ import annotations

import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Subset

from engram_lm import __version__
from engram_lm.attachment import memories, save_memory
from engram_lm.bases.base import quiet_libraries
from engram_lm.corpus.text import require_documents
from engram_lm.errors import ConfigError, DataError, IdentityError
from engram_lm.training.callback import RunCallback, interruptible, trainer_of
from engram_lm.training.config import TrainConfig, first_difference
from engram_lm.training.directory import (
    CHECKPOINTS,
    FACTS,
    FORMAT,
    METRICS,
    OPTIONS,
    PICTURE,
    VERSION,
    alone_in,
    begun_run,
    clear,
    drop_unfinished,
    read_json,
    write_json,
)
from engram_lm.training.measure import held_out_shares
from engram_lm.training.metrics import Metrics
from engram_lm.training.plot import draw_losses
from engram_lm.training.progress import Progress, Quiet
from engram_lm.training.setup import Setup, prepare
from engram_lm.training.trainer import last_checkpoint

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
    begun = begun_run(out, earlier)
    require_documents(config.data, field=config.field)
    checkpoint = last_checkpoint(out / CHECKPOINTS) if begun else None
    prepared = prepare(config, checkpoint, progress, corpus=begun["corpus"] if begun else None)
    config = prepared.config
    if begun:
        _require_same(out, begun, prepared)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out, "train"):
        if earlier == "overwrite":
            clear(out)
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
        write_json(out / FACTS, facts)
        write_json(out / OPTIONS, config.to_json())
        drop_unfinished(out / CHECKPOINTS, keep=checkpoint)
        metrics = Metrics(out / METRICS)
        metrics.begin(step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else None)
        conductor = RunCallback(prepared, metrics, progress, begin_s=begin_s)
        with quiet_libraries():
            trainer = trainer_of(prepared, out / CHECKPOINTS, conductor)
            conductor.model = trainer.model
            if begun:
                where = (
                    f"from step {metrics.records[-1]['step']:,}"
                    if checkpoint
                    else "from the start: no checkpoint yet"
                )
                progress.say(f"{out}: going on {where}")
            with interruptible(conductor, progress):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        state = "finished" if step == prepared.steps else conductor.stop_reason
        results = {"step": step, "tokens": step * config.tokens_per_step}
        if state != "interrupted":
            results |= _measure(prepared, conductor)
            prepared.model.config.use_cache = trainer.own_use_cache
            save_memory(prepared.model, out, tokenizer=prepared.tokenizer)
        draw_losses(metrics.records, out / PICTURE, title=_title(prepared), mode=config.mode)
        write_json(out / FACTS, facts | {"state": state, "results": results})
    return Outcome(directory=out, state=state, step=step, steps=prepared.steps, results=results)


def told(outcome: Outcome) -> list[str]:
    """What a person wants to know of an outcome, in lines."""
    results, out, typed = outcome.results, outcome.directory, shlex.quote(str(outcome.directory))
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
            f'{out} holds the memory, {METRICS} and {PICTURE}. Try: engram-lm generate {typed} "Once upon a time"'
        )
    if outcome.state != "finished":
        lines.append(f"go on with: engram-lm train --resume --out {typed}")
    return lines


def _require_same(out: Path, facts: dict[str, Any], prepared: Setup) -> None:
    stored = TrainConfig.from_json(read_json(out / OPTIONS))
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


# ---- when it is over -------------------------------------------------------------------------------------------------


def _measure(prepared: Setup, conductor: RunCallback) -> dict[str, Any]:
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


def _title(prepared: Setup) -> str:
    config = prepared.config
    what = {"memory": "memory on a frozen", "lora": "memory and LoRA on", "all": "memory and all of"}[
        config.mode
    ]
    blocks = ", ".join(map(str, config.layers))
    if config.control:
        what = f"control {config.control}, mode {config.mode}, on"
    return f"{what} {Path(config.base).name if config.base.startswith('/') else config.base}, blocks {blocks}"
