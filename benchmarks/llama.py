"""engram-lm on the random Llama of `shape`, as a Subject of `against_bare`; by itself it prints the timings as JSON.

    python benchmarks/llama.py --quick

Rows are random numbers, so that every page of the tables is in memory and the memory's answer is not zero; so are the
conv's weights. Training takes one AdamW over the model's parameters, the memory's handles among them: through these the
rows train by the default rule, RowAdam.
"""

import argparse
import json

import timing

timing.one_thread()

import torch
from against_bare import LEARNING_RATE, LayerAlone, add_options, measure, settle_options, state_bytes
from machine import circumstances
from shape import (
    BLOCKS,
    HEAD_WIDTH,
    HEADS_PER_ORDER,
    MODEL,
    ORDERS,
    ROWS_PER_HEAD,
    random_llama,
    tokenizer_of_words,
)

from engram_lm import MemoryConfig, attach, memories
from engram_lm.nn import Window

CONFIG = MemoryConfig(
    layers=tuple(BLOCKS),
    orders=tuple(ORDERS),
    heads=HEADS_PER_ORDER,
    rows_per_head=ROWS_PER_HEAD,
    head_width=HEAD_WIDTH,
)


class Ours:
    """The random Llama with memory."""

    def __init__(self) -> None:
        self.model = attach(random_llama(), tokenizer_of_words(), CONFIG)
        (self.memory,) = memories(self.model).values()
        for slot in self.memory.slots:
            slot.table.rows_view().normal_(std=0.1)
            torch.nn.init.normal_(slot.conv_weight, std=0.1)

    def set_training(self, training: bool) -> None:
        self.model.train(training)

    def parts(self) -> timing.Parts:
        runtime = self.model.model.engram_runtime
        pieces = [
            (self.memory, "canonical", "canonical_ids"),
            (self.memory, "addresses", "canonical_ids_and_hash"),
            (runtime, "add_to", "layers_total"),
        ]
        for slot in self.memory.slots:
            pieces += [
                (slot.table, "read", "gather_rows"),
                (slot.projection, "forward", "projections"),
                (slot, "forward", "projections_gate_and_conv"),
            ]
        return timing.Parts(pieces)

    def bare_optimizer(self, parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def optimizer(self) -> torch.optim.Optimizer:
        return self.bare_optimizer(self.model.parameters())

    def state_bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        return {
            "rows": sum(table.state_bytes() for table in self.memory.tables),
            "other_memory": state_bytes(optimizer, list(self.memory.slots.parameters())),
        }

    def layer_alone(self, batches: dict) -> LayerAlone:
        slot = self.memory.slots[0]
        handle = slot.handle
        optimizer = torch.optim.SGD([handle], lr=LEARNING_RATE)

        def hashed(ids):
            return self.memory.addresses(Window.begin(ids, None))

        addresses = {draw: [hashed(ids)[0] for ids in drawn] for draw, drawn in batches.items()}
        windows = {draw: [Window.begin(ids, None) for ids in drawn] for draw, drawn in batches.items()}

        def run(hidden, draw, number):
            rows = slot.table.read(addresses[draw][number], handle).flatten(2)
            return hidden + slot(hidden, rows, windows[draw][number]).delta

        return LayerAlone(
            addresses, list(slot.parameters()), run, optimizer.step, hashed, slot.table.state_bytes
        )


def benchmark(options: argparse.Namespace) -> dict:
    """Model and memory made, then `measure`."""
    bare, ours = random_llama(), Ours()
    tables = ours.memory.tables
    facts = {
        "model": MODEL,
        "memory": ours.memory.config.to_json(),
        "rows_per_table": [table.n_rows for table in tables],
        "table_bytes": sum(table.n_rows * table.bytes_per_row for table in tables),
        "bare_model_bytes": sum(parameter.nbytes for parameter in bare.parameters()),
        "canonical_vocabulary": ours.memory.token_map.size,
        "batch": options.batch,
        "tokens": options.tokens,
    }
    return {"shape": facts, **measure(ours, bare, options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    options = parser.parse_args()
    settle_options(options)
    torch.set_num_threads(1)
    asked = {"quick": options.quick, "plain_malloc": options.plain_malloc}
    found = circumstances("torch", "transformers", "numpy", "numba")
    print(json.dumps({"benchmark": "llama", **asked, **found, **benchmark(options)}))


if __name__ == "__main__":
    main()
