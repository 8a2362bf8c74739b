"""Generation with rows on disk: what a decode step has time to hide, and what it has not.

    python benchmarks/tables_generation.py

A decode step of two random Llamas with one memory layer of 24 columns of 256 numbers in fp8, its rows on disk and in memory,
by the block that the memory enters before and by batch. Arms take turns step by step; a second table in memory shows the
noise, and a disk that is asked only when the layer needs its rows what prefetching gains.

A new file is read through once before; how long the disk takes for a step's rows while no model runs, before and after,
stands beside each row.
Wall time, medians of differences between steps side by side with bootstrap 95 % intervals. The last line is JSON.
"""

import contextlib
import itertools
import json
import mmap
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import timing
import torch
from machine import circumstances
from shape import draw_ids, random_llama, tokenizer_of_words
from transformers import DynamicCache

from engram_lm import MemoryConfig, attach, memories, use_table
from engram_lm.storage import DiskStore, HostStore, TableWriter, open_packed
from engram_lm.tables import ReadOnlyTable

SEED = 0
ADDED_TO_GENERATION = 0.01
CODEC, WIDTH = "fp8_e4m3_e8m0", 256

# hidden, blocks, blocks that the memory enters before, steps at batch 1
MODELS = ((512, 8, (1, 4, 7), 160), (1024, 16, (8,), 60))


def generation(directory, *, models=MODELS, batches=(1, 8, 64), rows_per_head=60_000):
    """Decode steps with one memory layer of 24 columns of 256 numbers in fp8, rows in memory and on disk, in turns."""
    found = []
    for hidden, n_blocks, places, steps in models:
        for block in places:
            model = attach(
                random_llama(hidden=hidden, blocks=n_blocks), tokenizer_of_words(),
                MemoryConfig(layers=(block,), profile="deepseek-v4.1", rows_per_head=rows_per_head),
            )  # fmt: skip
            (slot,) = memories(model)["memory"].slots
            path = Path(directory) / f"generation-{hidden}-{block}.engram"
            write_random_rows(path, slot.table.n_rows)
            arms = generation_arms(path)
            read_through(path)
            for batch in batches:
                alone = alone_ms(path, slot.table.n_rows, batch)
                n = max(12, steps // (1 + batch // 4))
                (ids,) = draw_ids("zipf", batch=batch, tokens=8 + len(arms) * n, count=1)
                row = {"model": f"{hidden} x {n_blocks}", "block": block, "batch": batch}
                row |= shares(decode_seconds(model, block, arms, ids, n), arms)
                row["disk_alone_ms"] = [alone, alone_ms(path, slot.table.n_rows, batch)]
                found.append(row)
                print(told(row), flush=True)
            for table in arms.values():
                table.close()
            path.unlink()
    return {"rows_per_head": rows_per_head, "at_most_added": ADDED_TO_GENERATION, "found": found}


def write_random_rows(path, n_rows):
    rng = np.random.default_rng(SEED)
    with TableWriter(path, n_rows=n_rows, width=WIDTH, codec=CODEC) as writer:
        while writer.rows_done < n_rows:
            n = min(65_536, n_rows - writer.rows_done)
            record = rng.integers(0, 248, (n, 264), dtype=np.uint8)
            record[record == 127] = 0
            record[:, WIDTH:] = 118
            writer.add(record)
        writer.finish()


def generation_arms(path):
    arms = {
        "memory": ReadOnlyTable(HostStore.load(open_packed(path))),
        "memory again": ReadOnlyTable(HostStore.load(open_packed(path))),
        "disk": ReadOnlyTable(DiskStore(open_packed(path))),
        "disk, no prefetch": ReadOnlyTable(DiskStore(open_packed(path))),
    }
    for name, table in arms.items():
        table.fetches_ahead = name == "disk"
    return arms


def read_through(path):
    """Read the file once past the page cache: a virtual disk may answer 3,000 reads a second of what is new to it."""
    os.sync()
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    page = mmap.mmap(-1, 1 << 20)
    at = 0
    while at < os.path.getsize(path):
        at += os.preadv(file, [page], at)
    os.close(file)


def alone_ms(path, n_rows, batch, *, times=60):
    """Median milliseconds that the disk takes for a step's rows while nothing else runs: what prefetching has to hide."""
    rng = np.random.default_rng()
    with contextlib.closing(DiskStore(open_packed(path))) as store:
        seconds = []
        for _ in range(times):
            rows = rng.integers(0, n_rows, 24 * batch)
            start = time.perf_counter()
            store.gather(rows)
            seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def shares(seconds, arms):
    """Step times of every arm, and what each adds to the arm in memory, pair by pair."""
    base = np.array(seconds["memory"])
    row = {"memory": timing.spread(seconds["memory"])}
    for name in list(arms)[1:]:
        added = (np.array(seconds[name]) - base) / np.median(base)
        row[name] = {**timing.spread(seconds[name]), "added_share": interval(added)}
    row["waited_ms_a_step"] = 1e3 * arms["disk"].waited_s / max(1, arms["disk"].tickets_read)
    return row


def told(row):
    def share(name):
        return f"{100 * row[name]['added_share']['median']:+.1f} %"

    low, high = (100 * row["disk"]["added_share"][k] for k in ("low", "high"))
    return (
        f"  generation, {row['model']}, before block {row['block']}, batch {row['batch']:2}: "
        f"{1e3 * row['memory']['median_s']:.1f} ms; from disk {share('disk')} ({low:+.1f} to {high:+.1f}), without prefetch "
        f"{share('disk, no prefetch')}, memory again {share('memory again')}; waited {row['waited_ms_a_step']:.2f} ms; "
        "disk alone " + " and ".join(f"{ms:.1f}" for ms in row["disk_alone_ms"]) + " ms"
    )


@torch.inference_mode()
def decode_seconds(model, block, arms, ids, steps):
    """Wall seconds of every decode step, each arm with a cache of its own; they take turns step by step, in every order."""
    caches = {name: DynamicCache(config=model.config) for name in arms}
    seconds = {name: [] for name in arms}
    for name, table in arms.items():
        use_table(model, block, table)
        for _ in range(2):  # compiles, and fills caches
            model(ids[:, :8], past_key_values=caches[name])
        table.waited_s = table.tickets_read = 0
    orders = list(itertools.permutations(arms))
    np.random.default_rng(SEED).shuffle(orders)
    for step in range(steps):
        for k, name in enumerate(orders[step % len(orders)]):
            use_table(model, block, arms[name])
            at = 8 + k * steps + step
            start = time.perf_counter()
            model(ids[:, at : at + 1], past_key_values=caches[name])
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interval(values, *, draws=2000):
    """Median and its bootstrap 95 % interval."""
    values = np.asarray(values)
    picks = np.random.default_rng(SEED).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = generation(scratch)
    print(
        json.dumps(
            {
                "benchmark": "tables_generation",
                **circumstances("torch", "numpy", "numba"),
                "seed": SEED,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
