"""What is measured: a model, its tokenizer and a state of its memory, and what it says about token ids.

    subject = Subject.load("my-memory")
    with subject.state("off"):
        subject.log_probs(ids)                          # float64 [T - 1], nats: log P of ids[1:]
        subject.continuations(prompt, [[12, 7], [9]])   # of each: log P, and whether greedy decoding says it

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
import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F

from engram_lm.attachment import NoiseRows, OtherRows, memories, memory_off, reading
from engram_lm.errors import ConfigError, DataError, ModelError, TokenIdError
from engram_lm.generation.loading import load_model
from engram_lm.identity import fingerprint_of
from engram_lm.kvcache import cache_of, with_cache
from engram_lm.library.encoding import TextEncoder

logger = logging.getLogger(__name__)

State = Literal["none", "on", "off", "noise", "shuffled"]
STATES: tuple[State, ...] = get_args(State)

# Controls without lookups: see `attachment.controls`.
_LOOKS_NOTHING_UP = ("bias", "off")

# Continuations that are read together: their logits are as many rows as they have tokens.
_TOGETHER = 64

# Rows of a table that are hashed at once.
_ROWS = 1 << 16


class Said(NamedTuple):
    """log_p: nats of a whole continuation. greedy: whether the arg max at each of its tokens is that token."""

    log_p: float
    greedy: bool


class EvaluatedModel:
    """See the module. name: how results call it. seed: of the noise and of the exchanged rows."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "model", seed: int = 0) -> None:
        self.model, self.tokenizer, self.name, self.seed = model, tokenizer, name, seed
        self.encoder = TextEncoder.of(tokenizer)
        self.start = _start_ids(tokenizer)
        found = memories(model)
        self.controls = {name: memory.config.control for name, memory in found.items()}
        self.states: tuple[State, ...] = _states_of(self.controls.values())
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # None: to be found out. A control may read by what the forward begins with; then a prefix is no forward of its own
        self.caches: bool | None
        self.caches = False if any(memory.intervention for memory in found.values()) else None

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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None where it does not say."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(config, "max_position_embeddings", None)

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

    # ---- text ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a text, behind those that the tokenizer begins texts with. Special tokens spelled out are letters."""
        return np.concatenate([self.start, self.encoder.encode(text)])

    def pair(self, prompt: str, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """The text `prompt answer` (a space between) as ids of the prompt and of the rest.

        Cut where the prompt's own ids end; earlier where they differ from those of the whole text.
        """
        between = "" if not prompt or prompt[-1].isspace() else " "
        whole = self.encode(f"{prompt}{between}{answer}")
        alone = self.encode(prompt.rstrip() if between == "" else prompt)
        n = min(len(whole), len(alone))
        same = whole[:n] == alone[:n]
        cut = n if same.all() else int(same.argmin())
        if cut == 0 or cut == len(whole):
            raise DataError(
                f"The prompt {prompt!r} and the answer {answer!r} leave nothing to read or nothing to say."
            )
        return whole[:cut], whole[cut:]

    # ---- what it says -------------------------------------------------------------------------------------------

    def log_probs(self, ids: np.ndarray, *, since: int = 1) -> np.ndarray:
        """float64 [T - since], nats: log P of ids[since:], each after all ids before it. since is 1 or more."""
        if since < 1 or len(ids) <= since:
            raise TokenIdError(f"Log P is of the tokens after the first; got {len(ids)} ids from {since} on.")
        kept = {"logits_to_keep": len(ids) - since + 1} if self._keeps else {}
        ids_T = torch.as_tensor(np.ascontiguousarray(ids), dtype=torch.int64, device=self.device)
        logits_TV = self.model(ids_T[None], use_cache=False, **kept).logits[0]
        logits_TV = logits_TV[-(len(ids) - since + 1) : -1]
        return -_losses(logits_TV, ids_T[since:])

    def continuations(self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]) -> list[Said]:
        """Each continuation after `prompt`: its log P, and whether greedy decoding says it.

        The prompt is read once, then the continuations beside each other from its cache; twin: `continuations_plain`.
        """
        if self.caches is None:
            self.caches = self._same_from_cache(prompt, continuations)
        said = self._from_cache(prompt, continuations) if self.caches else None
        return self.continuations_plain(prompt, continuations) if said is None else said

    def _from_cache(self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]) -> list[Said] | None:
        """None where the model keeps no cache that can be dealt out to several continuations."""
        prompt_T = torch.as_tensor(np.ascontiguousarray(prompt), dtype=torch.int64, device=self.device)
        output = self.model(prompt_T[None], use_cache=True)
        cache = cache_of(output)
        if not hasattr(cache, "reorder_cache"):
            return None
        first_V = output.logits[:, -1:]
        said: list[Said] = []
        for at in range(0, len(continuations), _TOGETHER):
            group = [torch.as_tensor(list(c), device=self.device) for c in continuations[at : at + _TOGETHER]]
            longest = max(len(c) for c in group)
            logits_NTV = first_V.expand(len(group), 1, -1)
            if longest > 1:
                read_NT = torch.stack([F.pad(c[:-1], (0, longest - len(c))) for c in group])
                mine = copy.deepcopy(cache)
                mine.reorder_cache(torch.zeros(len(group), dtype=torch.int64, device=self.device))
                more_NTV = self.model(read_NT, use_cache=True, **with_cache(self.model, mine)).logits
                logits_NTV = torch.cat([logits_NTV, more_NTV], 1)
            for c, logits_TV in zip(group, logits_NTV, strict=True):
                said.append(_said(logits_TV[: len(c)], c))
        return said

    def _same_from_cache(self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]) -> bool:
        """Whether the longest continuation is as probable from a cache: some recurrent layers take single tokens only."""
        longest = max(continuations, key=len)
        found = self._from_cache(prompt, [longest, longest])
        plain = self.continuations_plain(prompt, [longest])[0].log_p
        rounding = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 2e-2
        same = found is not None and abs(found[1].log_p - plain) <= rounding * (1 + abs(plain))
        if not same:
            logger.warning(
                "%s cannot continue several ways from one cache: slower, prompts are read each time.",
                self.name,
            )
        return same

    def continuations_plain(self, prompt: np.ndarray, continuations: Sequence[Sequence[int]]) -> list[Said]:
        """`continuations`, each read with the whole prompt before it."""
        said = []
        for continuation in continuations:
            ids = np.concatenate([prompt, np.asarray(continuation, np.int64)])
            ids_T = torch.as_tensor(ids, device=self.device)
            logits_TV = self.model(ids_T[None], use_cache=False).logits[0]
            said.append(_said(logits_TV[len(prompt) - 1 : -1], ids_T[len(prompt) :]))
        return said


def _states_of(controls: Iterable[str | None]) -> tuple[State, ...]:
    """The states of a model with memories of these controls; one of control "bias" has no rows to exchange."""
    read = [control for control in controls if control != "off"]
    if not read:
        return ("none",)
    return ("on", "off") if set(read) == {"bias"} else ("on", "off", "noise", "shuffled")


def _losses(logits_TV: torch.Tensor, target_T: torch.Tensor) -> np.ndarray:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), target_T, reduction="none").double().cpu().numpy()


def _said(logits_TV: torch.Tensor, target_T: torch.Tensor) -> Said:
    return Said(-float(_losses(logits_TV, target_T).sum()), bool((logits_TV.argmax(-1) == target_T).all()))


def _start_ids(tokenizer: Any) -> np.ndarray:
    """The ids that the tokenizer itself puts before a text, such as <bos>."""
    with_start = list(tokenizer("a").input_ids)
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    n = next((i for i in range(len(with_start)) if with_start[i : i + len(bare)] == bare), 0)
    return np.array(with_start[:n], np.int64)


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
