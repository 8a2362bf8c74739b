"""A random Llama with memory, timed against the bare model in the same run; the same code for every implementation.

An implementation is a `Subject`: `llama.py` is ours, `peer_engram_peft.py` the packaged peer. CPU seconds on one thread,
medians after a warm-up, bare and attached in turns (see `timing`). The bare model's work does not depend on the ids, so
it is timed once a repeat, beside an arm for each draw.

    result = measure(subject, bare, options)

malloc is told to keep freed memory, unless --plain-malloc: page faults are no one's arithmetic, but in most processes
they are part of the time, and more of it the more temporaries an implementation makes.

Added times are small differences of large times. Two measurements are steadier: `parts_s` times the pieces of the memory
inside the running model, and `layer_alone` one memory layer, and the hashing for all of them, without the model.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple, Protocol

import torch
from machine import peak_memory_bytes
from shape import DRAWS, HIDDEN, draw_ids
from timing import Parts, alternate, keep_freed_memory, summary

MEASUREMENTS = ["forward", "decode_step", "training_step", "layer_alone"]
LEARNING_RATE = 4e-4


class LayerAlone(NamedTuple):
    """One memory layer: hidden states in, hidden states with what the memory adds out."""

    # for each draw, the addresses int64 [B, T, C] of each batch as rows of the layer's table
    addresses: dict[str, list[torch.Tensor]]
    parameters: list[torch.nn.Parameter]
    # run(hidden, draw, number of the batch)
    run: Any
    # applies the rows' gradients of the last backward
    row_step: Any
    # hash(ids): the addresses of all layers from raw ids
    hash: Any
    # row_state_bytes(): what the rows' optimizer keeps for this one table, once it has stepped
    row_state_bytes: Any


class Subject(Protocol):
    """What an implementation shows."""

    # called as the bare model is
    model: Any

    def set_training(self, training: bool) -> None: ...
    def parts(self) -> Parts: ...
    def optimizer(self) -> Any: ...
    def bare_optimizer(self, parameters: Any) -> torch.optim.Optimizer: ...
    def state_bytes(self, optimizer: Any) -> dict[str, int]: ...
    def layer_alone(self, batches: dict[str, list[torch.Tensor]]) -> LayerAlone: ...


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help="short sequences, few repeats: does it run at all"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--forward-repeats", type=int, default=7)
    parser.add_argument("--training-repeats", type=int, default=3)
    parser.add_argument("--layer-repeats", type=int, default=11)
    parser.add_argument("--decode-steps", type=int, default=128)
    parser.add_argument(
        "--draws", nargs="+", choices=DRAWS, default=["zipf", "text"], help="what ids to draw"
    )
    parser.add_argument(
        "--plain-malloc",
        action="store_true",
        help="as in most processes: freed memory goes back to the kernel",
    )
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS, help="what to time")


def settle_options(options: argparse.Namespace) -> None:
    """Make the run short, and malloc keep freed memory, as asked."""
    if not options.plain_malloc:
        keep_freed_memory()
    if not options.quick:
        return
    options.batch, options.tokens, options.decode_steps = 2, 64, 16
    options.forward_repeats, options.training_repeats, options.layer_repeats = 1, 1, 1


def measure(subject: Subject, bare: Any, options: argparse.Namespace) -> dict:
    """Seconds unless a name says otherwise."""
    batches = {
        draw: draw_ids(draw, batch=options.batch, tokens=options.tokens, count=3) for draw in options.draws
    }
    timings = {
        "forward": lambda: forward_times(subject, bare, batches, repeats=options.forward_repeats),
        "decode_step": lambda: decode_times(
            subject, bare, batches[options.draws[0]][0], draw=options.draws[0], steps=options.decode_steps
        ),
        "training_step": lambda: training_times(subject, bare, batches, repeats=options.training_repeats),
        "layer_alone": lambda: layer_alone_times(subject, batches, repeats=options.layer_repeats),
    }
    out = {}
    for name in MEASUREMENTS:
        if name in options.only:
            started = time.time()
            out[name] = timings[name]()
            out[name]["peak_memory_bytes"] = peak_memory_bytes()
            out[name]["wall_s"] = time.time() - started
    return out


def forward_times(subject: Subject, bare: Any, batches: dict, *, repeats: int) -> dict:
    """All logits of one batch, no gradients, no cache."""

    def run(model, ids):
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    arms = {"bare": lambda r: run(bare, next(iter(batches.values()))[r % 3])}
    for draw, drawn in batches.items():
        arms[draw] = lambda r, drawn=drawn: run(subject.model, drawn[r % 3])
    out = summary(alternate(arms, repeats=repeats))
    for draw, drawn in batches.items():
        parts = subject.parts()
        for r in range(3):
            run(subject.model, drawn[r])
        out[draw]["parts_s"] = parts.per_call(3)
    return out


def decode_times(subject: Subject, bare: Any, ids: torch.Tensor, *, draw: str, steps: int) -> dict:
    """One token a step after a prompt, one sequence, growing cache; and how far that is from the full forward."""
    prompt = ids.shape[1] - steps
    if prompt < 1:
        raise SystemExit(f"decoding {steps} tokens needs more; the batch has {ids.shape[1]}")
    models_of = {"bare": bare, draw: subject.model}
    ids = ids[:1]
    with torch.no_grad():
        caches, logits = {}, {name: [] for name in models_of}
        for name, model in models_of.items():
            caches[name] = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values

        def step(name, r):
            at = prompt + r + 1
            out = models_of[name](input_ids=ids[:, at : at + 1], past_key_values=caches[name], use_cache=True)
            logits[name].append(out.logits[:, -1])

        arms = {name: lambda r, name=name: step(name, r) for name in models_of}
        out = summary(alternate(arms, repeats=steps // 2))
        # The rest of the steps with the parts timed.
        for r in range(steps // 2, steps - 1):
            step("bare", r)
        parts = subject.parts()
        for r in range(steps // 2, steps - 1):
            step(draw, r)
        out[draw]["parts_s"] = parts.per_call(steps - 1 - steps // 2)
        for name, model in models_of.items():
            full = model(input_ids=ids, use_cache=False).logits[:, prompt:]
            out[name]["max_logit_error"] = (torch.stack(logits[name], 1) - full).abs().max().item()
            out[name]["max_logit"] = full.abs().max().item()
    return out


def training_times(subject: Subject, bare: Any, batches: dict, *, repeats: int) -> dict:
    """Forward, backward and optimizer step of everything."""
    bare.train()
    subject.set_training(True)
    bare_optimizer, optimizer = subject.bare_optimizer(bare.parameters()), subject.optimizer()
    arms = {"bare": (bare, bare_optimizer, next(iter(batches.values())))}
    for draw, drawn in batches.items():
        arms[draw] = (subject.model, optimizer, drawn)
    phases = {name: {"forward_backward": [], "optimizer": []} for name in arms}

    def step(name, r):
        model, its_optimizer, drawn = arms[name]
        start = time.process_time()
        model(input_ids=drawn[r % 3], labels=drawn[r % 3], use_cache=False).loss.backward()
        middle = time.process_time()
        its_optimizer.step()
        its_optimizer.zero_grad()
        phases[name]["forward_backward"].append(middle - start)
        phases[name]["optimizer"].append(time.process_time() - middle)

    out = summary(alternate({name: lambda r, name=name: step(name, r) for name in arms}, repeats=repeats))
    for name, phase in phases.items():
        for part, seconds in phase.items():
            out[name][f"{part}_s"] = statistics.median(seconds[1:])
    out["optimizer_state_bytes"] = {
        **subject.state_bytes(optimizer),
        "bare_model": state_bytes(bare_optimizer, list(bare.parameters())),
    }
    bare.eval()
    subject.set_training(False)
    return out


def layer_alone_times(subject: Subject, batches: dict, *, repeats: int) -> dict:
    """One memory layer on random hidden states with its addresses given; and the hashing for all layers."""
    alone = subject.layer_alone(batches)
    first = next(iter(batches.values()))[0]
    hidden = torch.randn(*first.shape, HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_(True)
    out_gradient = torch.randn(*first.shape, HIDDEN, generator=torch.Generator().manual_seed(1))

    def forward(draw, r):
        with torch.no_grad():
            alone.run(hidden, draw, r % 3)

    def forward_backward(draw, r):
        for parameter in [*alone.parameters, hidden]:
            parameter.grad = None
        alone.run(hidden, draw, r % 3).backward(out_gradient)

    out = {"tokens": first.numel()}
    for draw, drawn in batches.items():
        arms = {
            "forward": lambda r, draw=draw: forward(draw, r),
            "forward_backward": lambda r, draw=draw: forward_backward(draw, r),
            "row_step": lambda r: alone.row_step(),
            "hash_all_layers": lambda r, drawn=drawn: alone.hash(drawn[r % 3]),
        }
        out[draw] = summary(alternate(arms, repeats=repeats))
        rows = alone.addresses[draw]
        out[draw]["unique_rows"] = statistics.median(torch.unique(address).numel() for address in rows)
        out[draw]["rows_read"] = rows[0].numel()
    out["row_state_bytes"] = alone.row_state_bytes()
    return out


def state_bytes(optimizer: torch.optim.Optimizer, parameters: list) -> int:
    """Bytes of the tensors an optimizer keeps for these parameters."""
    return sum(
        value.numel() * value.element_size()
        for parameter in parameters
        for value in optimizer.state.get(parameter, {}).values()
        if torch.is_tensor(value)
    )
