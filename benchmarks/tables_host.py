"""Rows from host memory, decoded: nanoseconds a row beside a bare copy loop and torch's own embedding.

    python benchmarks/tables_host.py [GB] [repeats]

Tables of at least 6 GB, twice: on huge pages and on 4 KiB pages. The arms take turns within each repeat:

- "fp32", "bf16": `HostStore.gather` into a given array, addresses checked, rows decoded.
- "bare copy": a loop with prefetch on huge pages that copies as many bytes a row as the fp32 (bf16) rows have, and does
  nothing else; what it reads comes from the same records, again where a row is longer than its record.
- "embedding": torch.nn.functional.embedding over the records on 4 KiB pages, without decoding (index_select for fp8).

The last line is JSON.
"""

import json
import sys
import time

import timing

timing.one_thread()

import numpy as np
import torch
from machine import circumstances
from numba import njit
from shape import draw_ids

from engram_lm.addressing import PROFILES, resolve
from engram_lm.storage import HostStore
from engram_lm.storage.kernels.rows import CACHE_LINE, PREFETCH_ROWS, _copy_bytes, _prefetch

CASES = [("fp32", 16), ("bf16", 64), ("bf16", 80), ("fp32", 64), ("fp8_e4m3", 160), ("fp8_e4m3_e8m0", 256)]
ROWS_READ = 1 << 17
TOKENS = 6_144
SEED = 0
AT_LEAST_OF_COPY, TIMES_EMBEDDING = 0.8, 3.0


@njit(nogil=True)
def bare_copy(base, address_N, out, record_bytes, row_bytes):
    """Copy row_bytes from each record, repeating the record where it is shorter."""
    n = address_N.shape[0]
    for i in range(n):
        if i + PREFETCH_ROWS < n:
            ahead = base + np.uint64(address_N[i + PREFETCH_ROWS]) * np.uint64(record_bytes)
            for line in range(0, record_bytes, CACHE_LINE):
                _prefetch(ahead + np.uint64(line))
        source = base + np.uint64(address_N[i]) * np.uint64(record_bytes)
        target = out + np.uint64(i) * np.uint64(row_bytes)
        done = 0
        while done < row_bytes:
            n_bytes = min(record_bytes, row_bytes - done)
            _copy_bytes(target + np.uint64(done), source, n_bytes)
            done += n_bytes


def aligned(shape, dtype):
    """An array on a cache line, as torch's allocator gives them."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def addresses(draw, n_rows):
    """ROWS_READ addresses in [0, n_rows): uniform, or those of a text under the V4.1 rules, cut to that many rows."""
    if draw == "uniform":
        return np.random.default_rng(SEED).integers(0, n_rows, ROWS_READ)
    (ids,) = draw_ids("text", batch=1, tokens=TOKENS, count=1)
    profile = PROFILES["deepseek-v4.1"].replace(rows_per_head=n_rows // 24 - 2000)
    (scheme,) = resolve(profile, vocab_size=32_000, layers=(1,), fill_id=0)
    found = scheme.addresses(ids.numpy()).reshape(-1)
    assert found.max() < n_rows
    return np.resize(found, ROWS_READ)


def arms_of(stores, weight, address_N, out):
    """Every way to read the rows at address_N."""
    record_bytes, address, arms = stores[True].record_bytes, torch.from_numpy(address_N), {}
    for name in ("fp32", "bf16"):
        for huge, store in stores.items():
            arms[name if huge else f"{name}, 4 KiB pages"] = lambda _, n=name, s=store: s.gather(
                address_N, out=out[n], dtype=n
            )
        arms[f"bare copy of {name} rows"] = lambda _, n=name: bare_copy(
            stores[True].record_RB.ctypes.data, address_N, out[n].ctypes.data, record_bytes, out[n].strides[0]
        )
    if weight.dtype == torch.uint8:
        arms["embedding"] = lambda _: torch.index_select(weight, 0, address)
    else:
        arms["embedding"] = lambda _: torch.nn.functional.embedding(address, weight)
    return arms


def measure(codec, width, *, n_bytes, repeats):
    """Nanoseconds a row of every arm, for uniform and for a text's addresses, and the two ratios."""
    record_bytes = HostStore(n_rows=1, width=width, codec=codec).record_bytes
    n_rows = n_bytes // record_bytes
    stores = {
        huge: HostStore(n_rows=n_rows, width=width, codec=codec, huge_pages=huge) for huge in (True, False)
    }
    pattern = np.random.default_rng(SEED).integers(0, 120, (1 << 14, record_bytes), dtype=np.uint8)
    if codec == "fp8_e4m3_e8m0":
        pattern[:, width:] = np.random.default_rng(1).integers(112, 124, pattern[:, width:].shape)
    for store in stores.values():
        for start in range(0, n_rows, len(pattern)):
            part = store.record_RB[start : start + len(pattern)]
            part[:] = pattern[: len(part)]
    flat = stores[False].record_RB
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(codec, torch.uint8)
    weight = torch.from_numpy(flat).view(dtype)
    out = {"fp32": aligned((ROWS_READ, width), np.float32), "bf16": aligned((ROWS_READ, width), np.uint16)}
    found = {
        "codec": codec,
        "width": width,
        "record_bytes": record_bytes,
        "rows": n_rows,
        "seed": SEED,
        "draws": {},
    }
    for draw in ("uniform", "text"):
        address_N = addresses(draw, n_rows)
        arms = arms_of(stores, weight, address_N, out)
        seconds = timing.alternate(arms, repeats=repeats, clock=time.thread_time)
        ns = {
            name: timing.spread([s / ROWS_READ * 1e9 for s in spent], "ns") for name, spent in seconds.items()
        }
        ratios = {}
        for name in ("fp32", "bf16"):
            ratios[f"{name}, of a bare copy"] = timing.ratio(seconds, f"bare copy of {name} rows", name)
            ratios[f"{name}, times embedding"] = timing.ratio(seconds, "embedding", name)
            ratios[f"{name}, times embedding, 4 KiB pages"] = timing.ratio(
                seconds, "embedding", f"{name}, 4 KiB pages"
            )
        found["draws"][draw] = {"unique_rows": len(np.unique(address_N)), "ns_a_row": ns, "ratio": ratios}
    return found


def readable(found):
    lines = [
        f"host gather: {found['codec']} x {found['width']}, {found['record_bytes']} B, {found['rows']:,} rows"
    ]
    for draw, measured in found["draws"].items():
        for name, ns in measured["ns_a_row"].items():
            lines.append(
                f"  {draw:8}{name:26}{ns['median_ns']:8.1f} ns  ({ns['min_ns']:.1f} to {ns['max_ns']:.1f})"
            )
        for name, ratio in measured["ratio"].items():
            lines.append(
                f"  {draw:8}{name:38}{ratio['median_ratio']:6.2f} x  ({ratio['min_ratio']:.2f} to {ratio['max_ratio']:.2f})"
            )
    return "\n".join(lines)


def run(*, gigabytes=6.1, repeats=9, cases=CASES):
    found = []
    for codec, width in cases:
        found.append(measure(codec, width, n_bytes=int(gigabytes * 1e9), repeats=repeats))
        print(readable(found[-1]), flush=True)
    return found


def main(gigabytes="6.1", repeats="9"):
    torch.set_num_threads(1)
    found = run(gigabytes=float(gigabytes), repeats=int(repeats))
    print(
        json.dumps({"benchmark": "tables_host", **circumstances("torch", "numpy", "numba"), "cases": found})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
