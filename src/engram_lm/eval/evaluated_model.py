"""What is measured: a model, its tokenizer and a state of its memory, and what it says about token ids.

    model = EvaluatedModel.load("my-memory")
    with model.state("off"):
        model.log_probs(ids)                          # float64 [T - 1], nats: log P of ids[1:]
        model.continuations(prompt, [[12, 7], [9]])   # of each: log P, and whether greedy decoding says it

    state      what the memory's layers read
    none       a model without memory, or with one of control "off", which is never read
    on         their own rows
    off        nothing: the base model
    noise      Gaussian rows of the same norms        (attachment.NoiseRows)
    shuffled   rows of other addresses of the head    (attachment.OtherRows)

A memory of control "bias", which has no rows to read, has only on and off.

A state ends with its block, and leaves no bit behind. All numbers come from float32 logits (or better) of a model in eval
mode, sequence by sequence, without padding before a scored token: they do not depend on a batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from engram_lm.attachment import NoiseRows, OtherRows, memories, memory_off, reading
from engram_lm.errors import ConfigError, ModelError
from engram_lm.generation.loading import load_model
from engram_lm.identity import fingerprint_of
from engram_lm.reader import ModelReader

State = Literal["none", "on", "off", "noise", "shuffled"]
STATES: tuple[State, ...] = get_args(State)

# Controls without lookups: see `memory.controls`.
_LOOKS_NOTHING_UP = ("bias", "off")

# Rows of a table that are hashed at once.
_ROWS = 1 << 16


class EvaluatedModel(ModelReader):
    """See the module. name: how results call it. seed: of the noise and of the exchanged rows."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "model", seed: int = 0) -> None:
        super().__init__(model, tokenizer, name=name)
        self.seed, found = seed, memories(model)
        self.controls = {name: memory.config.control for name, memory in found.items()}
        self.states: tuple[State, ...] = _states_of(self.controls.values())

    @classmethod
    def load(cls, name: str | Path, *, device: str | None = None, seed: int = 0) -> EvaluatedModel:
        """smollm2, a directory of a model or of a memory, a run, or a hub name."""
        model, tokenizer = load_model(name)
        return cls(model if device is None else model.to(device), tokenizer, name=str(name), seed=seed)

    def require_gates(self) -> None:
        """ModelError where no memory looks rows up: only those have gates."""
        if not self.controls:
            raise ModelError(f"{self.name} has no memory: it has no gates to measure.")
        if set(self.controls.values()) <= set(_LOOKS_NOTHING_UP):
            kinds = ", ".join(sorted({repr(control) for control in self.controls.values()}))
            raise ModelError(
                f"The memory of {self.name} is of control {kinds}, which looks nothing up: it has no gates to measure."
            )

    def facts(self) -> dict[str, Any]:
        """Which model: what results depend on."""
        tables = {
            f"{name} at block {slot.block}": {"rows": slot.table.n_rows, "width": slot.table.width,
                                              "updates": slot.table.gradients.updates}
            for name, memory in memories(self.model).items()
            for slot in memory.slots
        }  # fmt: skip
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})
        return {
            "model": self.name, "base_sha256": fingerprint_of(self.model)[:16], "dtype": "/".join(dtypes),
            "memory_sha256": _memory_print(self.model), "tables": tables,
        }  # fmt: skip

    def drawn(self, states: Sequence[str]) -> dict[str, Any]:
        """The seed of the states that draw something, for the settings of a result; empty where none of them does."""
        return {"state_seed": self.seed} if {"noise", "shuffled"} & set(states) else {}

    def require_states(self, wanted: Sequence[str]) -> None:
        """ConfigError for a state that the model cannot be in."""
        for state in wanted:
            if state not in self.states:
                kinds = sorted(
                    {f" of control {c!r}" for c in self.controls.values() if c in _LOOKS_NOTHING_UP}
                )
                has = f"a memory{' and one'.join(kinds)}" if self.controls else "no memory"
                raise ConfigError(
                    f"{self.name} has {has}: its states are {', '.join(self.states)}; got {state!r}."
                )

    @contextlib.contextmanager
    def state(self, state: str) -> Iterator[None]:
        """The model with its memory in `state`, in eval mode and without gradients."""
        self.require_states([state])
        change: Any = contextlib.nullcontext()
        if state == "off":
            change = memory_off(self.model)
        elif state == "noise":
            change = reading(self.model, NoiseRows(seed=self.seed))
        elif state == "shuffled":
            change = reading(self.model, OtherRows(seed=self.seed))
        was_training = self.model.training
        self.model.eval()
        try:
            with change, torch.no_grad():
                yield
        finally:
            self.model.train(was_training)


def _states_of(controls: Iterable[str | None]) -> tuple[State, ...]:
    """The states of a model with memories of these controls; one of control "bias" has no rows to exchange."""
    read = [control for control in controls if control != "off"]
    if not read:
        return ("none",)
    return ("on", "off") if set(read) == {"bias"} else ("on", "off", "noise", "shuffled")


def _memory_print(model: Any) -> str | None:
    """sha256 over all rows, parameters, the token map and the config of every memory; None without one."""
    import hashlib
    import json

    found = memories(model)
    if not found:
        return None
    digest = hashlib.sha256(b"engram memory 2\n")

    def add(what: str, values: torch.Tensor) -> None:
        digest.update(f"{what} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())

    for name, memory in sorted(found.items()):
        digest.update(f"{name} {json.dumps(memory.config.to_json(), sort_keys=True)}\n".encode())
        digest.update(np.ascontiguousarray(memory.token_map.canonical))
        for slot in memory.slots:
            n = slot.table.n_rows
            for at in range(0, n, _ROWS):
                add(f"{slot.block} rows", slot.table.gather(torch.arange(at, min(at + _ROWS, n))))
            for of, parameter in slot.named_parameters():
                add(f"{slot.block} {of}", parameter)
    return digest.hexdigest()[:16]
