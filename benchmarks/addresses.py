"""Nanoseconds per row address on one CPU thread: the NumPy twin, the numba kernel, torch; and one decode call.

    python benchmarks/addresses.py [tokens] [repeats]

Both memory layers of deepseek-v4.1 (24 columns each), random canonical ids, CPU time of the thread, medians with least
and most. The paths take turns within each repeat, so that a busy machine slows all of them.

- "numba" is `scheme.addresses(ids)`, wherever malloc finds its output; "into out" writes to the same array every time,
  "fresh pages" to memory that the kernel has to map and zero first: the difference is the price of new output.
- "storing zeros" shows how much of the time, and of a busy machine's noise, is the memory's.

The last line is JSON.
"""

import json
import mmap
import sys
import time

import timing

timing.one_thread()

import numpy as np
import torch
from machine import circumstances

from engram_lm.addressing import PROFILES, SHIPPED, plain, resolve
from engram_lm.addressing.device import DeviceAddresses

PROFILE = "deepseek-v4.1"
LIMIT_NS = 1.5
SEED = 0


def measure(*, tokens: int = 16_384, repeats: int = 41, decode_calls: int = 2000) -> dict:
    """Nanoseconds an address of every path, each over the NumPy twin within a repeat, and microseconds a decode call."""
    facts = SHIPPED[PROFILE]
    schemes = resolve(
        PROFILES[PROFILE], vocab_size=facts.vocab_size, layers=facts.layers, fill_id=facts.pad_id
    )
    on_torch = [DeviceAddresses(scheme) for scheme in schemes]
    ids_BT = np.random.default_rng(SEED).integers(0, facts.vocab_size, (1, tokens))
    tensor_BT = torch.from_numpy(ids_BT)
    outs = [np.empty((1, tokens, scheme.columns), dtype=np.int64) for scheme in schemes]
    paths = {
        "numpy": lambda _: [plain.addresses(scheme, ids_BT) for scheme in schemes],
        "numba": lambda _: [scheme.addresses(ids_BT) for scheme in schemes],
        "numba into out": lambda _: [
            scheme.addresses(ids_BT, out_BTC=out) for scheme, out in zip(schemes, outs, strict=True)
        ],
        "numba into fresh pages": lambda _: [
            scheme.addresses(ids_BT, out_BTC=_fresh((1, tokens, scheme.columns))) for scheme in schemes
        ],
        "torch": lambda _: [addresses(tensor_BT) for addresses in on_torch],
    }
    answers = {name: np.stack([np.asarray(part) for part in path(0)]) for name, path in paths.items()}
    if not all((answers["numpy"] == answer).all() for answer in answers.values()):
        raise SystemExit("the paths give different addresses; run the tests")
    del answers

    # What no path can be faster than, and what other work on the machine slows as well.
    paths["storing zeros into out"] = lambda _: [out.fill(0) for out in outs]
    seconds = timing.alternate(paths, repeats=repeats, warm_up=2, settle=3, clock=time.thread_time)
    count = tokens * sum(scheme.columns for scheme in schemes)
    one, previous = ids_BT[:, :1].copy(), ids_BT[:, 1:4].copy()
    decode = timing.alternate(
        {"decode": lambda _: schemes[0].addresses(one, previous_BP=previous)},
        repeats=decode_calls,
        clock=time.thread_time,
    )
    out = {
        "profile": PROFILE,
        "tokens": tokens,
        "columns": [scheme.columns for scheme in schemes],
        "seed": SEED,
        "limit_ns": LIMIT_NS,
        "paths": {
            name: {
                **timing.spread([s / count * 1e9 for s in spent], "ns"),
                "times_faster_than_numpy": timing.ratio(seconds, "numpy", name)["median_ratio"],
            }
            for name, spent in seconds.items()
        },
        "decode": timing.spread([s * 1e6 for s in decode["decode"]], "us"),
    }
    paths = out["paths"]
    out["fresh_output_ns"] = (
        paths["numba into fresh pages"]["median_ns"] - paths["numba into out"]["median_ns"]
    )
    return out


def readable(found: dict) -> str:
    """What `measure` found, to be read."""
    lines = [f"addresses of {found['tokens']:,} tokens, {found['profile']}, limit {found['limit_ns']} ns"]
    for name, ns in found["paths"].items():
        lines.append(
            f"  {name:24}{ns['median_ns']:7.2f} ns  ({ns['min_ns']:.2f} to {ns['max_ns']:.2f})"
            f"{ns['times_faster_than_numpy']:7.1f} x the NumPy twin"
        )
    lines.append(f"  new output memory costs {found['fresh_output_ns']:.2f} ns an address")
    lines.append(f"  one token of one layer: {found['decode']['median_us']:.1f} us a call")
    return "\n".join(lines)


def _fresh(shape: tuple[int, ...]) -> np.ndarray:
    """An int64 array in pages that no one has touched."""
    pages = mmap.mmap(-1, int(np.prod(shape)) * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=np.int64).reshape(shape)


def main(tokens: int = 16_384, repeats: int = 41) -> None:
    torch.set_num_threads(1)
    found = measure(tokens=tokens, repeats=repeats)
    print(readable(found))
    print(json.dumps({"benchmark": "addresses", **circumstances("torch", "numpy", "numba"), **found}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
