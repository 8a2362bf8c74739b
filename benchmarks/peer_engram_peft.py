"""engram-peft 1.2.7 on the random Llama of `shape`, as a Subject of `against_bare`: timed against the bare model.

Run by a Python 3.12 that has engram-peft; it does not import engram_lm. Two to three minutes:

    python3.12 -m venv peer && peer/bin/pip install torch==2.13.0 engram-peft==1.2.7
    peer/bin/python benchmarks/peer_engram_peft.py --quick

How the peer is run, from its source, for its best time:

- Through `base_model`, as its own `generate` does: its hooks then hash the ids once. Its wrapper's `forward` hashes
  them a second time and drops the first result; `parts_s` holds what one hashing costs.
- Sparse embeddings (its default) and its own `get_optimizer`: SparseAdam for the rows at five times the rate of the
  Adam for all else. The bare model takes Adam, as the peer gives its backbone.
- No telemetry, no shape checks (`ENGRAM_DEBUG_SHAPES` unset), fp32.
- One branch (`hc_mult=1`): on a model with one residual stream its default of four only adds work (`--branches 4`).
- Value projection and conv drawn from a normal instead of zero: the same work, and the memory's answer is not 0.

The last line printed is one JSON object; seconds unless a name says otherwise.
"""

import argparse
import json
import os
import time

import timing

timing.one_thread()
os.environ.pop("ENGRAM_DEBUG_SHAPES", None)
# A process that believes it is one of several gets dense embeddings from the peer.
os.environ.pop("WORLD_SIZE", None)

import torch
from against_bare import LEARNING_RATE, LayerAlone, add_options, measure, settle_options, state_bytes
from engram_peft import EngramConfig, get_engram_model, get_optimizer
from machine import circumstances, peak_memory_bytes
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


class Peer:
    """The random Llama with the peer's memory."""

    def __init__(self, *, branches: int, train_mode: str) -> None:
        config = EngramConfig(
            # The peer divides this by the heads of the order, then takes the next primes.
            engram_vocab_size_per_ngram=[ROWS_PER_HEAD * HEADS_PER_ORDER] * len(ORDERS),
            ngram_sizes=ORDERS,
            n_head_per_ngram=HEADS_PER_ORDER,
            embedding_dim=len(ORDERS) * HEADS_PER_ORDER * HEAD_WIDTH,
            target_layers=BLOCKS,
            hc_mult=branches,
            conv_zero_init=False,
            gating_zero_init=False,
        )
        wrapped = get_engram_model(random_llama(), config, tokenizer_of_words(), train_mode=train_mode)
        self.wrapped = wrapped.eval()
        self.model = wrapped.base_model

    @property
    def layers(self) -> list:
        return list(self.wrapped.engram_layers.values())

    @property
    def tables(self) -> list:
        return [layer.multi_head_embedding.embedding.weight for layer in self.layers]

    def set_training(self, training: bool) -> None:
        self.wrapped.train(training)

    def parts(self) -> timing.Parts:
        pieces = [
            (self.wrapped.compressor, "compress", "canonical_ids"),
            (self.wrapped.hash_mapping, "hash", "hash"),
        ]
        for layer in self.layers:
            pieces += [
                (layer, "forward", "layers_total"),
                (layer.multi_head_embedding, "forward", "gather_rows"),
                (layer.gating, "forward", "projections_and_gate"),
                (layer.short_conv, "forward", "short_conv"),
            ]
        return timing.Parts(pieces)

    def bare_optimizer(self, parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def optimizer(self):
        return get_optimizer(self.wrapped)

    def state_bytes(self, optimizer) -> dict[str, int]:
        tables = self.tables
        others = [p for p in self.wrapped.adapters.parameters() if all(p is not table for table in tables)]
        return {
            "rows": sum(state_bytes(o, tables) for o in optimizer.optimizers),
            "other_memory": sum(state_bytes(o, others) for o in optimizer.optimizers),
        }

    def layer_alone(self, batches: dict) -> LayerAlone:
        """Addresses given, as its own collator makes them ahead of time."""
        layer, first = self.layers[0], BLOCKS[0]
        embedding = layer.multi_head_embedding
        weight = embedding.embedding.weight
        optimizer = torch.optim.SparseAdam([weight], lr=5 * LEARNING_RATE)

        def hashed(ids):
            return self.wrapped.hash_mapping.hash(self.wrapped.compressor.compress(ids))

        given = {
            draw: [torch.from_numpy(hashed(ids)[first]) for ids in drawn] for draw, drawn in batches.items()
        }
        addresses = {draw: [rows + embedding.offsets for rows in drawn] for draw, drawn in given.items()}

        def run(hidden, draw, number):
            return layer(hidden_states=hidden, engram_hash_indices=given[draw][number])

        return LayerAlone(
            addresses,
            list(layer.parameters()),
            run,
            optimizer.step,
            hashed,
            lambda: state_bytes(optimizer, [weight]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--branches", type=int, default=1, help="hc_mult of the peer; its default is 4")
    parser.add_argument("--train-mode", choices=["full_finetune", "engram_only"], default="full_finetune")
    options = parser.parse_args()
    settle_options(options)

    torch.set_num_threads(1)
    started = time.time()
    bare, peer = random_llama(), Peer(branches=options.branches, train_mode=options.train_mode)
    tables = peer.tables
    primes = {block: peer.wrapped.hash_mapping.prime_tables[block] for block in BLOCKS}
    result = {
        "benchmark": "peer_engram_peft",
        "quick": options.quick,
        "plain_malloc": options.plain_malloc,
        **circumstances("engram-peft", "torch", "transformers", "numpy"),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shape": {
            "model": MODEL,
            "batch": options.batch,
            "tokens": options.tokens,
            "blocks": BLOCKS,
            "branches": options.branches,
            "heads": len(ORDERS) * HEADS_PER_ORDER,
            "head_width": tables[0].shape[1],
            "rows_per_head_least_and_most": {
                b: [min(map(min, p)), max(map(max, p))] for b, p in primes.items()
            },
            "rows_per_table": [table.shape[0] for table in tables],
            "table_bytes": sum(table.numel() * table.element_size() for table in tables),
            "compressed_vocab": peer.wrapped.hash_mapping.compressed_vocab_size,
            "train_mode": options.train_mode,
        },
        **measure(peer, bare, options),
    }
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["wall_s"] = time.time() - started
    print(json.dumps(result))


if __name__ == "__main__":
    main()
