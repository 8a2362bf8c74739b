"""Memory in any decoder-only transformers model.

    model = attach(model, tokenizer, MemoryConfig(layers=(1, 5), rows_per_head=20_011, head_width=32))
    model(input_ids)                      # exactly the base model's answer while the memory is new
    model(input_ids, memory="off")        # the base model
    with memory_off(model): model.generate(...)
    with trace(model) as records: model(input_ids)
    with reading(model, NoiseRows(seed=0)): model(input_ids)    # other rows than its own, for a control
    detach(model)

Memory enters the residual stream before the named blocks. Rows live beside the model, not in it (see
`engram_lm.tables`); `save_memory` writes them, `from_pretrained` reads them back.
"""

from engram_lm.attachment.attach import (
    attach,
    chosen_memories,
    detach,
    memories,
    memory_off,
    reading,
    trace,
    use_table,
)
from engram_lm.attachment.loading import from_pretrained, load_memory
from engram_lm.attachment.runtime import base_of, tokenizer_of
from engram_lm.attachment.saving import save_memory, save_pretrained
from engram_lm.config import MemoryConfig
from engram_lm.memory.build import profile_of
from engram_lm.memory.interventions import Intervention, NoiseRows, OneRow, OtherRows
from engram_lm.memory.memory import Memory
from engram_lm.memory.placement import open_rows

__all__ = [
    "Intervention",
    "Memory",
    "MemoryConfig",
    "NoiseRows",
    "OneRow",
    "OtherRows",
    "attach",
    "base_of",
    "chosen_memories",
    "detach",
    "from_pretrained",
    "load_memory",
    "memories",
    "memory_off",
    "open_rows",
    "profile_of",
    "reading",
    "save_memory",
    "save_pretrained",
    "tokenizer_of",
    "trace",
    "use_table",
]
