"""The model as the server holds it: with its tokenizer, its tables, and texts turned into ids that no text can trick.

What a visitor or a document writes never becomes a special token: "<|im_end|>" in it is letters (`library.encoding`).

    loaded = load("my-memory")
    ids = loaded.text_ids("Alexander the Great")
    ids = loaded.chat_ids("Who repairs microscopes?")
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.serve.http_errors import Refusal
from engram_lm.serve.limits import MOST_CHARACTERS_A_TOKEN, Limits

if TYPE_CHECKING:
    from engram_lm.generation.prompts import PromptEncoder
    from engram_lm.library.encoding import TextEncoder

_TITLES = {"smollm2": "SmolLM2-135M-Instruct"}


@dataclass(eq=False, kw_only=True)
class ServedModel:
    """name: as it was asked for. directory: of its run or memory, which may say what a strong share is."""

    name: str
    model: Any
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)
    full_share: float = 1.0
    full_share_why: str = "nothing was measured"

    @cached_property
    def encoder(self) -> TextEncoder:
        from engram_lm.library.encoding import TextEncoder

        return TextEncoder.of(self.tokenizer)

    @cached_property
    def has_tables(self) -> bool:
        from engram_lm.attachment import memories

        return bool(memories(self.model))

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device

    @cached_property
    def prompts(self) -> PromptEncoder:
        from engram_lm.generation.prompts import PromptEncoder

        return PromptEncoder(self.tokenizer, self.encoder)

    def text_ids(self, text: str, what: str = "text") -> list[int]:
        """Ids of a text as it is. Refusal 422 where it is empty, 413 where it is too long."""
        if not text:
            raise Refusal(422, f"The {what} is empty; write something first.")
        self._require_short(text, what)
        return self._require_few(self.prompts.text(text), len(self.prompts.start), what)

    def chat_ids(self, turn: str, what: str = "prompt") -> list[int]:
        """Ids of a user's turn in the chat template. Refusal 422 where the tokenizer has none."""
        if not turn.strip():
            raise Refusal(422, f"The {what} is empty; write something first.")
        if not self.can_chat:
            raise Refusal(422, "This model has no chat template; ask it to go on with a text instead.")
        self._require_short(turn, what)
        return self._require_few(self.prompts.chat(turn), self._n_template, what)

    @property
    def can_chat(self) -> bool:
        return self.prompts.can_chat

    @cached_property
    def _n_template(self) -> int:
        """How many tokens a chat template puts around a turn."""
        return len(self.prompts.chat("a")) - len(self.encoder.encode("a"))

    def _require_short(self, text: str, what: str) -> None:
        most = self.limits.text_tokens
        if len(text) > most * MOST_CHARACTERS_A_TOKEN:
            raise Refusal(
                413, f"The {what} has {len(text):,} characters; at most {most:,} tokens are read here."
            )

    def _require_few(self, ids: list[int], n_around: int, what: str) -> list[int]:
        most, n = self.limits.text_tokens, len(ids) - n_around
        if n > most:
            raise Refusal(413, f"The {what} has {n:,} tokens; at most {most:,} are read here.")
        return ids

    def require_room(self, n_prompt: int, n_new: int) -> None:
        """Refusal 422 where a prompt and what is to follow are more than the model can read."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most and n_prompt + n_new > most:
            raise Refusal(422, f"{n_prompt} tokens of prompt and {n_new} new ones exceed the model's {most}.")

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by their names."""
        return self.encoder.decode(ids)

    def tables(self, wanted: bool) -> contextlib.AbstractContextManager:
        """The model with its tables, or without them."""
        from engram_lm.attachment import memory_off

        return memory_off(self.model) if self.has_tables and not wanted else contextlib.nullcontext()

    def facts(self) -> dict[str, Any]:
        """For GET /api/about: model and tables."""
        from engram_lm.attachment import memories

        own = [parameter for name, parameter in self.model.named_parameters() if ".engram." not in name]
        tables = []
        for memory in memories(self.model).values():
            slots, profile = list(memory.slots), memory.slots[0].scheme.profile
            tables.append(
                {
                    "name": memory.name,
                    "layers": [slot.block for slot in slots],
                    "branches": slots[0].branches,
                    "orders": list(profile.orders),
                    "heads": profile.heads,
                    "rows": sum(slot.table.n_rows for slot in slots),
                    "bytes": sum(slot.table.n_rows * slot.table.bytes_per_row for slot in slots),
                }
            )
        merged = None
        if tables:
            first = tables[0]
            merged = {
                **first,
                "layers": sorted({layer for table in tables for layer in table["layers"]}),
                "rows": sum(table["rows"] for table in tables),
                "bytes": sum(table["bytes"] for table in tables),
                "full_share": self.full_share,
                "full_share_why": self.full_share_why,
                "trained_on": self.trained_on,
            }
        model = {
            "name": self.title,
            "parameters": sum(parameter.numel() for parameter in own),
            "vocab_size": self.encoder.vocab_size,
            "device": str(self.device),
            "chat": self.can_chat,
        }
        return {"model": model, "tables": merged}

    @cached_property
    def title(self) -> str:
        """What a person would call the model: its base, where that is known, and never a path."""
        from engram_lm.attachment import base_of

        base = base_of(self.model).name if self.has_tables else self.name
        return _TITLES.get(base, Path(base).name or base)

    @cached_property
    def trained_on(self) -> str | None:
        """What is known of the tables' training text: the first paragraph of ATTRIBUTION.md beside them."""
        try:
            text = (Path(self.name) / "ATTRIBUTION.md").read_text(encoding="utf8")
        except OSError:
            return None
        told = [part for part in text.split("\n\n") if part.strip() and not part.startswith(("#", "|", "-"))]
        return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(told[0].split())) if told else None


def load(name: str, *, limits: Limits | None = None) -> ServedModel:
    """Load what `engram-lm generate --index` would: a memory directory, a run, smollm2, a path or a hub name."""
    from engram_lm.generation.loading import load_model

    model, tokenizer = load_model(name)
    model.eval()
    return ServedModel(name=name, model=model, tokenizer=tokenizer, limits=limits or Limits())


def measure_share(loaded: ServedModel, texts: list[str]) -> None:
    """What full red means for the tables: what the run measured, else the strongest token of `texts`. One forward a text."""
    import torch

    from engram_lm.attachment import trace
    from engram_lm.generation.strengths import HeatView, full_share

    if not loaded.has_tables:
        return
    strengths = [0.0]
    for text in texts:
        ids = torch.tensor([loaded.text_ids(text)], device=loaded.device)
        with torch.inference_mode(), trace(loaded.model) as records:
            loaded.model(ids, use_cache=False)
        strengths += HeatView().strengths(records).tolist()
    loaded.full_share, loaded.full_share_why = full_share(Path(loaded.name), strengths, of="of the examples")
