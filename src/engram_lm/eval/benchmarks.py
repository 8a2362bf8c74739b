"""LAMBADA, ARC, PIQA, Winogrande and OpenBookQA, by EleutherAI's lm-evaluation-harness on local files.

    measured = benchmarks(subject, {"arc_easy": read_items(path, most=200)}, states=("on", "off"))
    measured.value("acc", of="arc_easy", memory="on").value

The harness gets the model object as it is, memory and its state included; nothing comes from a hub. Zero-shot, its own
prompts (`tasks`). acc: the right choice has the highest log P. acc_norm: the highest log P a character of the choice.
LAMBADA: acc is greedy decoding of the last word, perplexity that of the word. Intervals: Wilson's of accuracies, 1,000 draws
of the items of perplexities. `plain_choices` is the same without the harness.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.eval.intervals import drawn, interval, share_interval
from engram_lm.eval.result import Result, Value
from engram_lm.eval.tasks import Item, write_task
from engram_lm.extras import missing

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel

CHANCE = "chance"


def require_harness() -> str:
    """Its version; MissingExtraError where it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise missing(f"Benchmarks need lm-evaluation-harness ({error})", "eval") from error
    return version("lm_eval")


def settings(tasks: Mapping[str, Sequence[Item]], *, states: Sequence[str], harness: str) -> dict[str, Any]:
    """What `benchmarks` depends on beside the model."""
    return {
        "tasks": {name: {"items": len(items), "sha256": _digest(items)} for name, items in tasks.items()},
        "states": list(states), "lm_eval": harness,
    }  # fmt: skip


def benchmarks(
    subject: EvaluatedModel,
    tasks: Mapping[str, Sequence[Item]],
    *,
    states: Sequence[str],
    batch_size: int = 1,
) -> Result:
    """All tasks in every state. The harness draws its own progress on stderr."""
    harness = require_harness()
    subject.require_states(states)
    begun, values = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="engram-lm-eval-") as folder, _quiet():
        for name, items in tasks.items():
            write_task(name, items, Path(folder))
        results = {state: _run(subject, list(tasks), Path(folder), state, batch_size) for state in states}
    for name, items in tasks.items():
        for metric in [m for m in ("acc", "acc_norm", "perplexity") if m in results[states[0]][name]]:
            for state in states:
                value, ends = results[state][name][metric]
                values.append(Value(metric, name, state, value, len(items), "items", ends))
            if metric != "perplexity" and name != "lambada":
                chance = float(np.mean([1 / len(item.pairs) for item in items]))
                values.append(Value(metric, name, CHANCE, chance, len(items), "items"))
    return Result(
        "benchmarks", tuple(values),
        settings(tasks, states=states, harness=harness) | subject.drawn(states),
        notes=(f"lm-evaluation-harness {harness}, zero-shot, its prompts, local files.",),
        seconds=round(time.perf_counter() - begun, 2),
    )  # fmt: skip


def plain_choices(subject: EvaluatedModel, items: Sequence[Item]) -> np.ndarray:
    """int64 [N]: the choice with the highest log P of each item, in the present state, without the harness."""
    found = []
    for item in items:
        log_p = []
        for context, end in item.pairs:
            before, rest = subject.pair(context, end)
            log_p.append(subject.continuations_plain(before, [rest.tolist()])[0].log_p)
        found.append(int(np.argmax(log_p)))
    return np.array(found)


def _run(
    subject: EvaluatedModel, names: list[str], folder: Path, state: str, batch_size: int
) -> dict[str, dict[str, tuple[float, Any]]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with subject.state(state):
        model = HFLM(
            pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size, device=str(subject.device),
            max_length=subject.context,
        )  # fmt: skip
        done = simple_evaluate(
            model=model, tasks=names, num_fewshot=0, bootstrap_iters=0, log_samples=True,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )  # fmt: skip
    found: dict[str, dict[str, tuple[float, Any]]] = {}
    for name in names:
        rows, place = done["samples"][name], found.setdefault(name, {})
        for metric in ("acc", "acc_norm"):
            if metric in rows[0]:
                place[metric] = share_interval([float(row[metric]) for row in rows])
        if "perplexity" in rows[0]:
            log_p_N = np.array([float(row["perplexity"]) for row in rows])
            draws = np.exp(-log_p_N[drawn(len(log_p_N))].mean(1))
            place["perplexity"] = float(np.exp(-log_p_N.mean())), interval(draws, len(log_p_N))
        for metric, (value, _) in place.items():
            theirs = done["results"][name][f"{metric},none"]
            assert abs(theirs - value) <= 1e-9 * (1 + abs(value)), (name, metric, theirs, value)
    return found


def _digest(items: Sequence[Item]) -> str:
    text = json.dumps([[item.contexts, item.ends, item.gold] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice from the harness, no bars from its data sets; its own progress stays."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before, bars = [one.level for one in loggers], datasets.are_progress_bars_disabled()
    for one in loggers:
        one.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
