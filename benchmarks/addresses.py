"""Nanoseconds per row address on one CPU thread: the NumPy twin, the numba kernel, torch; and one decode call.

    python benchmarks/addresses.py [tokens] [repeats]

Both memory layers of deepseek-v4.1 (24 columns each), random canonical ids, medians with the 5th and 95th percentile.
The paths take turns within each repeat, so that a busy machine slows all of them. The last line is JSON.
"""

import json
import os
import platform
import sys
import time
from datetime import UTC, datetime

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from engram_lm.addressing import PROFILES, SHIPPED, plain, resolve
from engram_lm.addressing.device import DeviceAddresses


def cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        return next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )


def main(tokens: int = 16_384, repeats: int = 41) -> None:
    torch.set_num_threads(1)
    facts = SHIPPED["deepseek-v4.1"]
    schemes = resolve(
        PROFILES["deepseek-v4.1"], vocab_size=facts.vocab_size, layers=facts.layers, fill_id=facts.pad_id
    )
    on_torch = [DeviceAddresses(scheme) for scheme in schemes]
    ids_BT = np.random.default_rng(0).integers(0, facts.vocab_size, (1, tokens))
    tensor_BT = torch.from_numpy(ids_BT)
    outs = [np.empty((1, tokens, scheme.columns), dtype=np.int64) for scheme in schemes]
    one, previous = ids_BT[:, :1].copy(), ids_BT[:, 1:4].copy()
    paths = {
        "numpy": lambda: [plain.addresses(scheme, ids_BT) for scheme in schemes],
        "numba": lambda: [scheme.addresses(ids_BT) for scheme in schemes],
        "numba into out": lambda: [
            scheme.addresses(ids_BT, out_BTC=out) for scheme, out in zip(schemes, outs, strict=True)
        ],
        "torch": lambda: [addresses(tensor_BT) for addresses in on_torch],
    }
    answers = {name: np.stack([np.asarray(part) for part in path()]) for name, path in paths.items()}
    assert all((answers["numpy"] == answer).all() for answer in answers.values())

    seconds = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            started = time.perf_counter()
            path()
            seconds[name].append(time.perf_counter() - started)
    decode = []
    for _ in range(2000):
        started = time.perf_counter()
        schemes[0].addresses(one, previous_BP=previous)
        decode.append(time.perf_counter() - started)

    count = tokens * sum(scheme.columns for scheme in schemes)
    ns = {name: np.percentile(times, [50, 5, 95]) / count * 1e9 for name, times in seconds.items()}
    for name, (median, low, high) in ns.items():
        ratio = ns["numpy"][0] / median
        print(f"{name:14} {median:7.2f} ns/address  ({low:.2f} to {high:.2f})  {ratio:5.1f} x the NumPy twin")
    print(f"decode         {np.median(decode) * 1e6:7.1f} us for one token of one layer")
    report = {
        "benchmark": "addresses",
        "tokens": tokens,
        "repeats": repeats,
        "columns": [scheme.columns for scheme in schemes],
        "ns_per_address": {name: round(float(median), 3) for name, (median, _, _) in ns.items()},
        "ratio_to_numpy": {
            name: round(float(ns["numpy"][0] / median), 2) for name, (median, _, _) in ns.items()
        },
        "decode_us": round(float(np.median(decode) * 1e6), 2),
        "cpu": cpu(),
        "load_average": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
