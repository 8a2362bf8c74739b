"""Rows from disk: random reads beside fio and a mapped file, and one token's rows.

    python benchmarks/tables_disk.py [GB] [seconds]

- Rate: `DiskStore.gather` of random rows of 264 B (one page each, checked and decoded), fio's io_uring at the same depth,
  4 KiB, direct, on the same file, and a NumPy map of it whose pages were dropped from the cache (posix_fadvise). Reads
  here are direct, so the page cache serves neither; arms take turns. fio is Debian's package.
- One token: 24 rows by `prefetch(...).rows()`, one after the other, beside fio's completion latency at depth 24.

Wall time, medians. The last line is JSON.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timing
import torch
from machine import circumstances

from engram_lm.storage import DiskStore, TableWriter, open_packed
from engram_lm.tables import ReadOnlyTable

DEPTH, TOKEN_ROWS = 64, 24
SEED = 0
AT_LEAST_OF_FIO, TICKET_OVER_FIO = 0.85, 1.5
CODEC, WIDTH = "fp8_e4m3_e8m0", 256


def write_table(path, n_bytes):
    """A packed file of random fp8 records."""
    rng = np.random.default_rng(SEED)
    block = rng.integers(0, 120, (15 << 12, 264), dtype=np.uint8)
    block[:, WIDTH:] = 120
    n_rows = n_bytes // 4096 * 15
    with TableWriter(path, n_rows=n_rows, width=WIDTH, codec=CODEC) as writer:
        while writer.rows_done < n_rows:
            block[:, :8] = rng.integers(0, 120, (len(block), 8), dtype=np.uint8)
            writer.add(block[: n_rows - writer.rows_done])
        writer.finish()


def fio(path, *, depth, seconds):
    """(reads a second, completion latency percentiles in ms) of random direct 4 KiB reads through io_uring."""
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed: apt install fio")
    command = [
        "fio", "--name=rows", f"--filename={path}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=io_uring",
        f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", "--output-format=json", "--readonly",
        "--norandommap", "--randrepeat=0",
    ]  # fmt: skip
    read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["jobs"][0][
        "read"
    ]
    percentile = read["clat_ns"]["percentile"]
    return read["iops"], {"p50_ms": percentile["50.000000"] / 1e6, "p99_ms": percentile["99.000000"] / 1e6}


def drop_pages(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mapped_rate(path, layout, rng, *, reads):
    """Pages a second of reading one record of each of `reads` random pages through a memory map."""
    drop_pages(path)
    mapped = np.memmap(path, np.uint8, "r", offset=layout.pages_at)[: layout.n_rows // 15 * 4096].reshape(
        -1, 4096
    )
    mapped._mmap.madvise(1)  # MADV_RANDOM: the kernel would read ahead what nobody asked for
    page = rng.permutation(len(mapped))[:reads]
    start = time.perf_counter()
    mapped[page, :264].sum()
    return reads / (time.perf_counter() - start)


def rates(path, layout, *, seconds, repeats=5):
    rng = np.random.default_rng(SEED)
    store = DiskStore(layout, depth=DEPTH)
    n_pages = layout.n_rows // 15
    out = np.empty((4096, WIDTH), np.float32)

    def ours():
        start, reads = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            store.gather(15 * rng.integers(0, n_pages, 4096) + rng.integers(0, 15, 4096), out=out)
            reads += 4096
        return reads / (time.perf_counter() - start)

    store.gather(np.arange(64))
    found = {"ours": [], "fio": [], "mapped": []}
    for _ in range(repeats):
        found["fio"].append(fio(path, depth=DEPTH, seconds=seconds)[0])
        found["ours"].append(ours())
        found["mapped"].append(mapped_rate(path, layout, rng, reads=4000))
    ratio = [a / b for a, b in zip(found["ours"], found["fio"], strict=True)]
    return {
        "depth": DEPTH, "direct": store.direct, "reads_a_second": {k: timing.spread(v, "reads") for k, v in found.items()},
        "ours_over_fio": timing.spread(ratio, "ratio"), "at_least": AT_LEAST_OF_FIO,
    }  # fmt: skip


def tickets(path, layout, *, seconds, repeats=5):
    rng = np.random.default_rng(SEED)
    table = ReadOnlyTable(DiskStore(layout, depth=DEPTH))
    table.prefetch(torch.arange(TOKEN_ROWS)).rows()
    found, over = [], []
    for _ in range(repeats):
        _, theirs = fio(path, depth=TOKEN_ROWS, seconds=seconds)
        spent, start = [], time.perf_counter()
        while time.perf_counter() - start < seconds:
            address = torch.from_numpy(rng.integers(0, layout.n_rows, TOKEN_ROWS))
            begin = time.perf_counter()
            table.prefetch(address).rows()
            spent.append(time.perf_counter() - begin)
        ours = {"p50_ms": 1e3 * np.percentile(spent, 50), "p99_ms": 1e3 * np.percentile(spent, 99)}
        found.append({"fio": theirs, "ours": ours, "tickets": len(spent)})
        over.append(ours["p99_ms"] / theirs["p99_ms"])
    return {
        "rows": TOKEN_ROWS,
        "rounds": found,
        "p99_over_fio": timing.spread(over, "ratio"),
        "at_most": TICKET_OVER_FIO,
    }


def readable(found):
    lines = ["random reads of 4 KiB a second, depth 64"]
    for name, spread in found["rates"]["reads_a_second"].items():
        lines.append(
            f"  {name:8}{spread['median_reads']:10,.0f}  ({spread['min_reads']:,.0f} to {spread['max_reads']:,.0f})"
        )
    ratio, over = found["rates"]["ours_over_fio"], found["tickets"]["p99_over_fio"]
    lines.append(
        f"  ours over fio {ratio['median_ratio']:.2f}  ({ratio['min_ratio']:.2f} to {ratio['max_ratio']:.2f})"
    )
    lines.append(
        f"a token's 24 rows: p99 {over['median_ratio']:.2f} times fio's  ({over['min_ratio']:.2f} to {over['max_ratio']:.2f})"
    )
    return "\n".join(lines)


def run(*, gigabytes=8.0, seconds=4, directory=None):
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        path = Path(scratch) / "rows.engram"
        write_table(path, int(gigabytes * 1e9))
        layout = open_packed(path)
        found = {"file_bytes": path.stat().st_size, "seed": SEED}
        found["rates"] = rates(path, layout, seconds=seconds)
        found["tickets"] = tickets(path, layout, seconds=seconds)
        print(readable(found), flush=True)
        path.unlink()
    return found


def main(gigabytes="8", seconds="4"):
    torch.set_num_threads(1)
    found = run(gigabytes=float(gigabytes), seconds=int(seconds))
    print(json.dumps({"benchmark": "tables_disk", **circumstances("torch", "numpy", "numba"), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
