"""vLLM's two logits-processor interfaces over one `Live` memory (vLLM 0.32: vllm/v1/sample/logits_processor and
vllm/v1/worker/gpu/sample/logits_processor).

Both model runners look for processors in one entry-point group, so one class answers for both and tells them apart by how
it is made: version 1 gives (config, device, pinning), version 2 (config, request states).

    version 1   `update_state` says which request is in which row, with lists of its tokens that grow by themselves;
                rows are requests. Without Triton (on CPUs), and where version 2 lacks a feature.
    version 2   requests have slots; tokens are on the device; rows are requests or, under speculative decoding, drafts.

Inert without settings: version 1 then counts it among the processors that do not change the greedy choice, version 2 is
told at each request that it has no part in it.
"""

from __future__ import annotations

import importlib
import weakref
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError, StateError
from engram_lm.extras import missing
from engram_lm.vllm.options import options_of, settings_of

if TYPE_CHECKING:
    import torch

    from engram_lm.vllm.live import Live, Part

_INTERFACES = (
    "vllm.v1.worker.gpu.sample.logits_processor.interface",
    "vllm.v1.sample.logits_processor.interface",
)


def _bases() -> tuple[type, ...]:
    """The interfaces that this vLLM has; none without vLLM, so that loading an installed entry point never fails."""
    found = []
    for name in _INTERFACES:
        try:
            found.append(importlib.import_module(name).LogitsProcessor)
        except (ImportError, AttributeError):
            continue
    return tuple(found)


class _Request:
    """A request of version 1. `output` is vLLM's own list, which it extends after every step."""

    def __init__(self, prompt: list[int] | None, output: list[int], part: Part) -> None:
        self.prompt, self.output, self.part = prompt or [], output, part

    def last(self, n: int) -> Any:
        import numpy as np

        tokens = self.output[-n:]
        if len(tokens) < n and len(self.output) < n:
            tokens = self.prompt[-(n - len(tokens)) :] + tokens
        return np.array(tokens, np.int64)


class MemoryLogitsProcessor(*_bases()):  # type: ignore[misc]
    """See the module. Made by vLLM."""

    def __init__(self, vllm_config: Any, *given: Any) -> None:
        self._requests: dict[int, _Request] = {}
        self._slots: dict[int, Part] = {}
        self._states = given[0] if len(given) == 1 else None
        settings = settings_of(getattr(vllm_config, "additional_config", None))
        self._live: Live | None = None
        if settings is None or _made_before(vllm_config, self):
            return
        if not _bases():
            raise missing("Memory in vLLM needs vLLM, in an environment of its own", "vllm")
        _require_supported(vllm_config, version=1 if self._states is None else 2)
        self._live = _live_of(settings, vllm_config)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError where a request says what it may not; vLLM answers HTTP 400.

        vLLM gives no settings here: tokens are checked where the server has them in the environment.
        """
        options = options_of(getattr(sampling_params, "extra_args", None))
        if options.token is not None and (settings := settings_of(None)) is not None:
            settings.tenants_for(options)

    # ---- version 1 ----------------------------------------------------------------------------------------------------

    def is_argmax_invariant(self) -> bool:
        """Whether greedy choices stay as they are: only without memory."""
        return self._live is None

    def update_state(self, batch_update: Any) -> None:
        """Follow which request is in which row: removals, additions, moves, in this order."""
        if self._live is None or batch_update is None:
            return
        requests = self._requests
        for at in batch_update.removed:
            requests.pop(at, None)
        for at, params, prompt, output in batch_update.added:
            requests.pop(at, None)
            part = self._live.part(options_of(params.extra_args))
            if part is not None:
                requests[at] = _Request(prompt, output, part)
        for a, b, direction in batch_update.moved:
            moved, replaced = requests.pop(a, None), requests.pop(b, None)
            if moved is not None:
                requests[b] = moved
            if replaced is not None and direction.name == "SWAP":
                requests[a] = replaced

    # ---- version 2 ----------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot; whether memory has a part in it."""
        self._slots.pop(req_idx, None)
        if self._live is None:
            return False
        part = self._live.part(options_of(sampling_params.extra_args))
        if part is not None:
            self._slots[req_idx] = part
        return part is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    # ---- both ---------------------------------------------------------------------------------------------------------

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Mix memory into the rows of requests that have one; in place. ctx: version 2's batch layout."""
        if self._live is None:
            return logits
        if logits.shape[-1] != self._live.rules.n_logits:
            raise StateError(
                f"vLLM gives {logits.shape[-1]:,} logits where its model has {self._live.rules.n_logits:,} tokens."
            )
        rows = self._rows_1(logits.shape[0]) if ctx is None else self._rows_2(ctx)
        self._live.step(logits, rows)
        return logits

    def _rows_1(self, n_rows: int) -> list[Any]:
        from engram_lm.vllm.live import Row

        rows = []
        for at, request in self._requests.items():
            if at >= n_rows:
                continue
            if request.output and request.output[-1] < 0:
                # would be looked up as if nothing had been said yet
                raise StateError(_ASYNC)
            last = request.last(self._live.max_order)
            rows.append(Row(at=at, last=last, generated=len(request.output), part=request.part))
        return rows

    def _rows_2(self, ctx: Any) -> list[Any]:
        if not any(int(slot) in self._slots for slot in ctx.idx_mapping_np):
            return []
        from engram_lm.vllm.slots import rows_of

        return rows_of(self._states, ctx, self._slots, max_order=self._live.max_order)


_ASYNC = (
    "vLLM schedules asynchronously and keeps output tokens from processors it found by itself: start it with "
    "--no-async-scheduling, or with --logits-processors engram_lm.vllm:MemoryLogitsProcessor."
)


def _require_supported(vllm_config: Any, *, version: int) -> None:
    """ConfigError for what would give wrong answers, when the server starts."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1:
        raise ConfigError(
            f"Memory in vLLM runs with one device a replica; tensor_parallel_size is {parallel.tensor_parallel_size}. Each "
            "device would follow the index by itself and might see another generation. Use data parallelism."
        )
    if (
        version == 1
        and vllm_config.scheduler_config.async_scheduling
        and not vllm_config.model_config.logits_processors
    ):
        raise ConfigError(_ASYNC)


def _made_before(vllm_config: Any, processor: Any) -> bool:
    """Whether this engine has one already: named by --logits-processors, the class comes twice, and would mix twice."""
    _MADE[:] = [(made, config) for made, config in _MADE if made() is not None and config() is not None]
    if any(config() is vllm_config for _, config in _MADE):
        return True
    _MADE.append((weakref.ref(processor), weakref.ref(vllm_config)))
    return False


_MADE: list[tuple[Any, Any]] = []


def _live_of(settings: Any, vllm_config: Any) -> Live:
    from vllm.tokenizers import cached_tokenizer_from_config

    from engram_lm.vllm.live import Live
    from engram_lm.vllm.weights import fingerprint_of_checkpoint

    model = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(model)
    if tokenizer is None:
        raise ConfigError("Memory needs the tokenizer: start vLLM without --skip-tokenizer-init.")
    eos = model.try_get_generation_config().get("eos_token_id")
    eos = eos[0] if isinstance(eos, list | tuple) else eos
    return Live(
        settings,
        tokenizer=tokenizer,
        n_logits=model.get_vocab_size(),
        eos_id=getattr(tokenizer, "eos_token_id", None) if eos is None else eos,
        model=lambda: fingerprint_of_checkpoint(model.model, revision=model.revision),
    )
