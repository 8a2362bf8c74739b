"""The logits processor of one prompt: an index mixed in as a gate says, or words of the chosen sentences pointed at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from engram_lm.errors import ConfigError
from engram_lm.mixing.identity import rules_of
from engram_lm.mixing.pointing import PointingProcessor
from engram_lm.mixing.processor import MemoryProcessor, memory_processor

if TYPE_CHECKING:
    from engram_lm.generation.selection import Selection
    from engram_lm.mixing.gate import Lambda


def processor_for(
    selection: Selection,
    gate: Lambda | None,
    ids: list[int],
    *,
    model: Any,
    tokenizer: Any,
    session: int | Literal["off"] = "off",
    most_verbatim: int | None = None,
) -> MemoryProcessor | PointingProcessor:
    """A new processor for a prompt of these ids. gate: not asked where words are pointed at.

    session, most_verbatim: of `mixing.memory_processor`.
    """
    if selection.focus:
        rules = rules_of(tokenizer, model, selection.snapshot)
        return PointingProcessor(selection.focus, prompt_length=len(ids), rules=rules)
    if gate is None:
        raise ConfigError("Documents are mixed in as a gate says; there is none here.")
    return memory_processor(
        selection.snapshot, gate, torch.tensor([ids]), tokenizer=tokenizer, model=model, session=session,
        most_verbatim=most_verbatim,
    )  # fmt: skip
