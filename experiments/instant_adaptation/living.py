"""Seconds from `add` to a changed probability in a running generator, and the same bits after `delete` (part of run.py).

A generator goes on with a prompt, greedily, and takes the newest snapshot of its index at every step. Another thread adds
a document at a random moment. The document says a word of its own after whatever the generator is about to say (its text is
known from a run before), so that this word's probability rises at the step that first sees it.
"""

import random
import shutil
import threading
import time
from typing import Any

import numpy as np
import torch

from engram_lm.adapt.arms import Arms
from engram_lm.index.store import Index
from engram_lm.mixing import memory_processor
from engram_lm.mixing.lookups import read_next

NEW, BEHIND, STEPS = " Zanzibar", 8, 16


def measure_living(setting: Any, *, times: int) -> dict[str, Any]:
    root = setting.out / "living"
    shutil.rmtree(root, ignore_errors=True)
    domain = setting.domains["handbook"]
    options = {"vocab_size": domain.vocab_size, "tokenizer": setting.encoder.first_print}
    with Index.create(root, **options, merging="by hand") as writer, Index.open(root) as reader:
        writer.add((name, domain.documents[name]) for name in domain.indexed)
        prompts = [
            domain.documents[name][:24].astype(np.int64)
            for name in domain.unseen
            if len(domain.documents[name]) > 64
        ]
        runs = [one_run(setting, writer, reader, prompt, n) for n, prompt in enumerate(prompts[:times])]
        same = after_delete(setting, writer, reader)
    names = ("add_seconds", "seconds_to_changed_step", "seconds_to_changed_if_asked_at_once", "step_seconds")
    spread = {
        name: {
            "median": float(np.median([run[name] for run in runs])),
            "p90": float(np.quantile([run[name] for run in runs], 0.9)),
            "most": max(run[name] for run in runs),
        }
        for name in names
    }
    p = {name: float(np.median([run[name] for run in runs])) for name in ("p_before", "p_after")}
    return {
        "repeats": len(runs),
        **spread,
        "probability of the new word, median": p,
        "after delete": same,
        "runs": runs,
    }


class Generation:
    """Greedy, with a cache; `step` gives the mixed logits before the next token."""

    def __init__(self, setting: Any, reader: Index, prompt: np.ndarray) -> None:
        self.model, self.reader = setting.model, reader
        self.ids, self.chunk, self.cache = prompt.tolist(), prompt.tolist(), None
        self.processor = memory_processor(
            reader.snapshot(), setting.gate, torch.tensor([self.ids]), rules=setting.rules, record="nothing"
        )

    def step(self) -> torch.Tensor:
        with torch.inference_mode():
            output = self.model(
                torch.tensor([self.chunk]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache, self.logits_V = output.past_key_values, output.logits[0, -1]
        return self.mixed()

    def mixed(self) -> torch.Tensor:
        """With what the index holds now."""
        self.processor.snapshot = self.reader.snapshot()
        return self.processor(torch.tensor([self.ids]), self.logits_V.clone()[None])[0]

    def say(self, token: int) -> None:
        self.ids.append(token)
        self.chunk = [token]


def one_run(setting: Any, writer: Index, reader: Index, prompt: np.ndarray, n: int) -> dict[str, float]:
    new = int(setting.encoder.encode(NEW)[0])
    before = Generation(setting, reader, prompt)
    for _ in range(STEPS):
        before.say(int(before.step().argmax()))
    said = before.ids
    pieces = [[*said[at - BEHIND : at], new] for at in range(len(prompt), len(said) + 1)]
    document = f"news {n}", np.array([token for piece in pieces for token in piece])
    added: dict[str, float] = {}
    begin, draw = threading.Event(), random.Random(n)

    def add() -> None:
        begin.wait()
        time.sleep(draw.uniform(0, 0.15))
        added["begun"] = time.perf_counter()
        writer.add([document])
        added["done"] = time.perf_counter()

    thread = threading.Thread(target=add)
    thread.start()
    generation, found, p_before, steps = Generation(setting, reader, prompt), 0.0, 0.0, []
    try:
        for step in range(STEPS):
            begun = time.perf_counter()
            mixed_V = generation.step()
            now = time.perf_counter()
            steps.append(now - begun)
            p = float(torch.softmax(mixed_V.double(), -1)[new])
            if step == 2:
                p_before = p
                begin.set()
            elif step > 2 and p > 10 * p_before:
                found = now
                break
            generation.say(int(mixed_V.argmax()))
    finally:
        begin.set()
        thread.join()
    if not found:
        raise RuntimeError(f"the document added in run {n} was not seen within {STEPS} steps")
    p_after = p
    writer.delete([document[0]])
    generation.mixed()
    # without waiting for the model: the logits are there already
    begun = time.perf_counter()
    writer.add([document])
    changed = float(torch.softmax(generation.mixed().double(), -1)[new])
    at_once = time.perf_counter() - begun
    if changed != p_after:
        raise RuntimeError(
            f"the document added again in run {n} gave another probability: {changed} and {p_after}"
        )
    writer.delete([document[0]])
    return {
        "add_seconds": added["done"] - added["begun"], "seconds_to_changed_step": found - added["begun"],
        "seconds_to_changed_if_asked_at_once": at_once, "step_seconds": float(np.median(steps)),
        "p_before": p_before, "p_after": p_after,
    }  # fmt: skip


def after_delete(setting: Any, writer: Index, reader: Index) -> dict[str, Any]:
    """Log-probabilities of windows before a document is added, while it is there, after its deletion, and after a merge."""
    from domains import general_windows, windows_of

    domain = setting.domains["handbook"]
    arms = Arms(setting.read, setting.encoder, setting.rules, setting.gate)
    unseen, general = windows_of(domain, 4).unseen, general_windows(setting.data, setting.encoder, 4)
    # what was added and deleted above is gone from the directory too
    writer.merge()
    prompts = [domain.documents[window.id][:200].astype(np.int64) for window in unseen]

    def bits() -> list[np.ndarray]:
        snapshot, found = reader.snapshot(), []
        for window in [*unseen, *general]:
            logits_TV, _ = setting.read(window.ids, window.scored)
            found.append(arms.mixed(window.ids, logits_TV, snapshot, setting.gate)[0])
        for ids in prompts:  # and the whole distribution after a prompt
            out = np.empty(snapshot.vocab_size + 1, np.float32)
            found.append(read_next(snapshot, ids, setting.rules, setting.gate.reading, out=out)[0].copy())
        return found

    def differing(one: list[np.ndarray], other: list[np.ndarray]) -> int:
        return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))

    never = bits()
    names = [window.id for window in unseen]
    writer.add((name, domain.documents[name]) for name in names)
    there = bits()
    writer.delete(names)
    gone = bits()
    writer.merge()
    merged = bits()
    found = {
        "documents added and deleted": len(names), "numbers compared": sum(len(one) for one in never),
        "differ while the documents are there": differing(never, there),
        "differ after delete": differing(never, gone), "differ after a merge": differing(never, merged),
    }  # fmt: skip
    if (
        found["differ after delete"]
        or found["differ after a merge"]
        or not found["differ while the documents are there"]
    ):
        raise RuntimeError(f"deleted documents leave a trace, or were never seen: {found}")
    return found
