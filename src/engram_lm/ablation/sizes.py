"""How large the parts of a model with memory are, so that arms without memory can be given as many parameters.

    sizes = sizes_of(config)
    sizes.lora_rank(3)                the rank whose adapter is nearest to the memory's weights (rows left out)
    sizes.ffn_width                   the feed-forward width that holds as many parameters as memory and rows together

A LoRA adapter of rank r on a matrix [n, m] has r (n + m) parameters. A feed-forward layer of width f has 3 f d in the
scratch recipes (gate, up, down).
"""

from dataclasses import asdict, dataclass
from typing import Any

from engram_lm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of parameters. layers: the blocks before which memory enters."""

    blocks: int
    layers: tuple[int, ...]
    base: int
    memory_weights: int
    rows: int
    row_bytes: int
    lora_of_rank_1: int
    hidden_size: int
    ffn_width_of_base: int | None

    @property
    def lora_rank(self) -> int:
        """At least 1."""
        return max(1, round(self.memory_weights / self.lora_of_rank_1))

    @property
    def ffn_width(self) -> int | None:
        """Of a scratch recipe: the base's width and what the memory's parameters are worth in it."""
        if self.ffn_width_of_base is None:
            return None
        more = (self.memory_weights + self.rows) / (3 * self.hidden_size * self.blocks)
        return self.ffn_width_of_base + round(more)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Sizes":
        return cls(**{**data, "layers": tuple(data["layers"])})


def sizes_of(config: TrainConfig, *, train_from: int | None = None) -> Sizes:
    """Load the base, put the memory of `config` on it, and count. train_from: the first block that gets an adapter."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    from engram_lm.attachment import attach, memories
    from engram_lm.attachment.structure import find_decoder
    from engram_lm.bases.base import load_base

    own = {"text_files": list(config.data), "seed": config.seed} if config.is_scratch else {}
    model, tokenizer, ref = load_base(config.base, dtype="float32", report=lambda line: None, **own)
    decoder = find_decoder(model)
    config = config.resolved(n_blocks=len(decoder.blocks), steps=1)
    base = sum(p.numel() for p in model.parameters())
    adapted = [
        module
        for block in decoder.blocks[train_from or 0 :]
        for module in block.modules()
        if isinstance(module, (Linear, Conv1D))
    ]
    attach(model, tokenizer, config.memory(config.layers), base=ref)
    (memory,) = memories(model).values()
    handles = len(memory.slots)
    return Sizes(
        blocks=len(decoder.blocks),
        layers=config.layers,
        base=base,
        memory_weights=sum(p.numel() for p in memory.slots.parameters()) - handles,
        rows=sum(table.n_rows * table.width for table in memory.tables),
        row_bytes=sum(table.n_rows * table.bytes_per_row for table in memory.tables),
        lora_of_rank_1=max(1, sum(sum(module.weight.shape) for module in adapted)),
        hidden_size=decoder.hidden_size,
        ffn_width_of_base=getattr(model.config, "intermediate_size", None) if config.is_scratch else None,
    )
