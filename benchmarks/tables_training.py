"""What training a 1.5 GB table in host memory adds to a step, and what it keeps: beside a frozen table and torch's Adams.

    python benchmarks/tables_training.py [repeats]

The random Llama 512 x 8 with memory before blocks 1 and 5 (16 heads of 80, 141 k rows a head: 0.72 GB a table, 1.45 GB in
all), batch 4 x 512, AdamW over the model. Arms take turns, one model each would not fit: the same model, its handles
trainable or frozen. Rows train by RowAdam, or by RowAdamMomentum.

Beside it, one table alone (gather, backward, step at the same addresses) as ours, as torch.nn.Embedding(sparse=True) with
SparseAdam, and as a dense Embedding with Adam. CPU time of one thread, medians. The last line is JSON.
"""

import json
import sys

import timing

timing.one_thread()

import torch
from llama import Ours
from machine import circumstances
from shape import HEAD_WIDTH, draw_ids

from engram_lm.tables import DeviceTable, rule_from_json

AT_MOST_ADDED, AT_MOST_STATE = 0.05, 0.05
SEED = 0


def whole_step(*, repeats):
    """Seconds of a training step with rows trained and with rows frozen."""
    ours = Ours()
    model, slots = ours.model, ours.memory.slots
    model.train()
    optimizer = ours.optimizer()
    batches = draw_ids("text", batch=4, tokens=512, count=3)

    def step(number, trained):
        for slot in slots:
            slot.handle.requires_grad_(trained)
        ids = batches[number % 3]
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    arms = {"frozen": lambda n: step(n, False), "trained": lambda n: step(n, True)}
    seconds = timing.alternate(arms, repeats=repeats)
    added = [(a - b) / b for a, b in zip(seconds["trained"], seconds["frozen"], strict=True)]
    tables = ours.memory.tables
    table_bytes = sum(table.n_rows * table.bytes_per_row for table in tables)
    state_bytes = sum(table.state_bytes() for table in tables)
    return {
        "table_bytes": table_bytes, "state_bytes": state_bytes, "state_share": state_bytes / table_bytes,
        "seconds": {name: timing.spread(spent) for name, spent in seconds.items()},
        "added_share": timing.spread(added, "share"), "at_most_added": AT_MOST_ADDED, "at_most_state": AT_MOST_STATE,
    }  # fmt: skip


def one_table(*, n_rows=2_264_076, n_read=32_768, repeats=5):
    """Seconds of gather, backward and step of one table, by ours and by torch's optimizers, and their state bytes."""
    generator = torch.Generator().manual_seed(SEED)
    rank = (n_rows ** torch.rand(4, n_read, generator=generator)).long() % n_rows
    found, weight = {}, torch.randn(n_rows, HEAD_WIDTH, generator=generator)

    def timed(name, read, optimizer, state_bytes):
        def step(number):
            optimizer.zero_grad()
            rows = read(rank[number % 4])
            (rows * rows.detach()).sum().backward()
            optimizer.step()

        seconds = timing.alternate({name: step}, repeats=repeats)[name]
        found[name] = {**timing.spread(seconds), "state_bytes": state_bytes()}

    for rule in ("row-adam", "row-rmsprop", "row-adam-momentum", "row-momentum-sinkhorn"):
        table = DeviceTable(n_rows=n_rows, width=HEAD_WIDTH, rule=rule_from_json(rule))
        table.rows_view().copy_(weight)
        handle = table.gradients.handle
        timed(
            f"engram-lm, {rule}", lambda a, t=table, h=handle: t.read(a, h), torch.optim.SGD([handle], lr=1e-3),
            table.state_bytes,
        )  # fmt: skip
        del table
    for name, sparse in (("torch SparseAdam", True), ("torch dense Adam", False)):
        embedding = torch.nn.Embedding(n_rows, HEAD_WIDTH, sparse=sparse)
        embedding.weight.data.copy_(weight)
        kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
        optimizer = kind(embedding.parameters(), lr=1e-3)
        timed(
            name, embedding, optimizer,
            lambda o=optimizer: sum(t.nbytes for s in o.state.values() for t in s.values() if torch.is_tensor(t)),
        )  # fmt: skip
        del embedding, optimizer
    return {
        "rows": n_rows,
        "width": HEAD_WIDTH,
        "read": n_read,
        "seed": SEED,
        "table_bytes": weight.nbytes,
        "found": found,
    }


def readable(found):
    step = found["step"]
    added = [100 * step["added_share"][f"{name}_share"] for name in ("median", "min", "max")]
    lines = [
        f"training step, tables of {step['table_bytes'] / 1e9:.2f} GB: frozen {step['seconds']['frozen']['median_s']:.2f} s",
        f"  trained {added[0]:+.1f} % ({added[1]:+.1f} to {added[2]:+.1f}; limit 5)",
        f"  state {100 * step['state_share']:.1f} % of the rows (limit 5)",
    ]
    for name, one in found["table"]["found"].items():
        lines.append(
            f"  one table, {name:34}{1e3 * one['median_s']:9.1f} ms a step, state {one['state_bytes'] / 1e6:8.1f} MB"
        )
    return "\n".join(lines)


def run(*, repeats=7):
    found = {"table": one_table(repeats=max(3, repeats // 2)), "step": whole_step(repeats=repeats)}
    print(readable(found), flush=True)
    return found


def main(repeats="7"):
    torch.set_num_threads(1)
    timing.keep_freed_memory()
    found = run(repeats=int(repeats))
    print(json.dumps({"benchmark": "tables_training", **circumstances("torch", "numpy", "numba"), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
