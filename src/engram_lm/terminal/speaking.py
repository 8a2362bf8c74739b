"""Generation one token at a time, with what memory added at each: the source of every heat picture.

A token's strength is known once the model has read it, so the newest token is read before it is handed out. The last one
costs one more forward than generation alone would.

    for token in speak(model, tokenizer, ids, max_new_tokens=40):
        token.id, token.strength, token.is_prompt
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from engram_lm.attachment import memories, memory_off, trace
from engram_lm.errors import ConfigError
from engram_lm.kvcache import cache_of, with_cache
from engram_lm.traces import LayerTrace

if TYPE_CHECKING:
    from engram_lm.mixing.processor import MemoryProcessor
    from engram_lm.mixing.trace import MemoryStep


class Token(NamedTuple):
    """One token as it was read. strength: in the view's quantity; 0 with memory off.

    With an index, strength is the part of the token's probability that the index gave, and step says how. share: what the
    tables added against the hidden state, with an index too.
    """

    id: int
    strength: float
    is_prompt: bool
    step: MemoryStep | None = None
    share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class HeatView:
    """Which memory layers and branches are looked at, None for all, and which of their quantities. The largest counts."""

    quantity: str = "share"
    block: int | None = None
    branch: int | None = None

    def strengths(self, records: Sequence[LayerTrace]) -> np.ndarray:
        """float [T] of the first sequence; ConfigError for a block or branch that has no memory."""
        chosen = self.of(records)
        columns = [getattr(record, self.quantity)[0] for record in chosen]
        if self.branch is not None:
            branches = columns[0].shape[-1]
            if not 0 <= self.branch < branches:
                raise ConfigError(f"There are branches 0 to {branches - 1}; got --branch {self.branch}.")
            columns = [column[:, self.branch : self.branch + 1] for column in columns]
        return np.max([column.max(-1) for column in columns], axis=0)

    def of(self, records: Sequence[LayerTrace]) -> list[LayerTrace]:
        """The records of the chosen block."""
        chosen = [record for record in records if self.block in (None, record.block)]
        if not chosen:
            blocks = sorted({record.block for record in records})
            raise ConfigError(
                f"Memory is before blocks {', '.join(map(str, blocks))}; got --block {self.block}."
            )
        return chosen

    @property
    def told(self) -> str:
        where = "strongest block" if self.block is None else f"block {self.block}"
        return where if self.branch is None else f"{where}, branch {self.branch}"


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """The ids of a prompt, as it is or as a user's turn in the tokenizer's chat template."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("The tokenizer has no chat template; leave --chat out.")
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = tokenizer(prompt).input_ids
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError("The prompt is empty and the tokenizer has no token to begin with.")
        ids = [start]
    return ids


def speak(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    view: HeatView | None = None,
    memory: str = "on",
    processor: MemoryProcessor | None = None,
) -> Iterator[Token]:
    """Every token of the prompt, then those generated, as they come. Greedy at temperature 0; ends before an end token.

    processor: of an index (`mixing.memory_processor` of these ids); strengths are its then.
    """
    view = view or HeatView()
    ends = end_ids(model, tokenizer)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and len(ids) + max_new_tokens > longest:
        raise ConfigError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones exceed the model's {longest}."
        )
    device = next(model.parameters()).device
    last_alone = last_logits_alone(model)
    random = torch.Generator().manual_seed(seed)
    chunk, cache, left = list(ids), None, max_new_tokens
    steps: list[MemoryStep | None] = [None] * len(chunk)
    said = list(ids)
    while True:
        with torch.no_grad(), _traced(model) as records, memory_switch(model, memory):
            output = model(
                torch.tensor([chunk], device=device), use_cache=True, **with_cache(model, cache), **last_alone
            )
        cache = cache_of(output)
        shares = replace(view, quantity="share").strengths(records) if records else np.zeros(len(chunk))
        if processor is not None:
            strengths = [(step.responsibility or 0.0) if step else 0.0 for step in steps]
        else:
            strengths = shares if view.quantity == "share" or not records else view.strengths(records)
        for token, strength, step, share in zip(chunk, strengths, steps, shares, strict=True):
            yield Token(token, float(strength), left == max_new_tokens, step, float(share))
        if left == 0:
            return
        logits_V = output.logits[0, -1].float().cpu()
        if processor is not None:
            logits_V = processor(torch.tensor([said]), logits_V[None])[0]
        following = _choose(logits_V, temperature, random)
        if following in ends:
            return
        steps = [None if processor is None else processor.step_of(following)]
        said.append(following)
        chunk, left = [following], left - 1


def last_logits_alone(model: Any) -> dict[str, int]:
    """The keyword that spares a prompt the logits of all tokens but the last, where a model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _choose(logits_V: torch.Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1, generator=random))


def _traced(model: Any) -> contextlib.AbstractContextManager:
    """Records of the model's tables, where it has any."""
    return trace(model) if memories(model) else contextlib.nullcontext(())


def memory_switch(model: Any, memory: str) -> contextlib.AbstractContextManager:
    """Without the model's tables while memory is "off"."""
    return memory_off(model) if memory == "off" else contextlib.nullcontext()


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list | tuple) else {configured}
    return (ends | {tokenizer.eos_token_id}) - {None}
