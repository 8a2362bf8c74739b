"""Tables on every tier in one run: host memory, disk, generation, training where rows lie; what was wanted stands beside.

    make bench-tables
    python benchmarks/tables.py --only disk --out disk.json

Each part is a script of its own that says how it measures. Half an hour on a quiet machine with 16 GB of memory free
and 10 GB of disk; needs fio. The last line is one JSON object, also written to benchmarks/results/tables.json. Nothing
fails when a limit is missed: `wanted` says which were met.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from machine import circumstances

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "tables.json"
PARTS = ["host", "disk", "generation", "training"]


def wanted(found):
    """Every limit with the median measured: {what, limit, at (least or most), value, met}."""
    rows = []

    def row(what, limit, at, value):
        rows.append(
            {
                "what": what,
                "limit": limit,
                "at": at,
                "value": value,
                "met": bool(value <= limit if at == "most" else value >= limit),
            }
        )

    for case in found.get("host", {}).get("cases", []):
        for draw, measured in case["draws"].items():
            for name, ratio in measured["ratio"].items():
                limit = 0.8 if "copy" in name else 3.0
                if not name.endswith("4 KiB pages"):
                    row(
                        f"{case['codec']} {case['record_bytes']} B, {draw}: {name}",
                        limit,
                        "least",
                        ratio["median_ratio"],
                    )
    disk = found.get("disk")
    if disk:
        row(
            "disk reads over fio's, depth 64",
            disk["rates"]["at_least"],
            "least",
            disk["rates"]["ours_over_fio"]["median_ratio"],
        )
        row(
            "p99 of a token's 24 rows over fio's",
            disk["tickets"]["at_most"],
            "most",
            disk["tickets"]["p99_over_fio"]["median_ratio"],
        )
    generation = found.get("generation", {"found": []})
    for one in generation["found"]:
        what = f"generation from disk, {one['model']}, before block {one['block']}, batch {one['batch']}: added share"
        row(what, generation["at_most_added"], "most", one["disk"]["added_share"]["median"])
    training = found.get("training")
    if training:
        row(
            "training step over frozen rows: added share",
            training["step"]["at_most_added"],
            "most",
            training["step"]["added_share"]["median_share"],
        )
        row("row state over rows", training["step"]["at_most_state"], "most", training["step"]["state_share"])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="where the JSON goes; parts not run keep what it has"
    )
    options = parser.parse_args()
    started = time.time()
    found = {"benchmark": "tables", **circumstances("engram-lm", "torch", "numpy", "numba")}
    if options.out.exists():
        # parts that are not run stay as they were measured; each names its own commit and date
        before = json.loads(options.out.read_text(encoding="utf8"))
        found |= {part: before[part] for part in PARTS if part in before and part not in options.only}
    for part in options.only:
        done = subprocess.run(
            [sys.executable, str(HERE / f"tables_{part}.py")], stdout=subprocess.PIPE, text=True, check=True
        )
        lines = done.stdout.splitlines()
        print("\n".join(lines[:-1]), flush=True)
        found[part] = json.loads(lines[-1])
    found["wanted"] = wanted(found)
    for row in found["wanted"]:
        print(
            f"  {row['what']:72}{row['value']:9.3f}  at {row['at']} {row['limit']}  {'met' if row['met'] else 'MISSED'}"
        )
    found |= {"load_average_end": os.getloadavg()[0], "wall_s": time.time() - started}
    text = json.dumps(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf8")
    print(text)


if __name__ == "__main__":
    main()
