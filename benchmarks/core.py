"""The core's timings in one run: addresses, one layer, a random Llama with memory; what was wanted stands beside them.

    make bench-core
    ENGRAM_PEFT_PYTHON=peer/bin/python make bench-core      # with the packaged peer, see peer_engram_peft.py
    python benchmarks/core.py --quick                       # does it run at all; its numbers mean nothing

CPU time of one thread, float32, medians with least and most. Three minutes on a quiet core, with the peer six. The peer
is timed by its own interpreter right before ours, with the same code (`against_bare`) and its own bare model. What is
compared are absolute times, and times over that process's own bare model, which a drift of the machine leaves alone.

The last line is one JSON object, also written to benchmarks/results/core.json. Nothing fails when a limit is missed:
`wanted` says which were met.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import timing

timing.one_thread()

import addresses
import layer
import llama
import torch
from against_bare import add_options, settle_options
from machine import circumstances

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "core.json"
PEER_PYTHON = "ENGRAM_PEFT_PYTHON"
ADDRESS_TOKENS = [2_048, 8_192, 16_384]
# peer over ours at least; ours over the peer's at most
LESS_ADDED_TIME = 2.2
STATE_SHARE = 0.1


def peer_timings(options: argparse.Namespace) -> dict | None:
    """What peer_engram_peft.py prints, run by the interpreter that ENGRAM_PEFT_PYTHON names; None without one."""
    python = os.environ.get(PEER_PYTHON)
    if not python:
        return None
    command = [
        python,
        str(HERE / "peer_engram_peft.py"),
        "--draws",
        *options.draws,
        "--only",
        *options.peer_only,
    ]
    # shape and settings must be ours
    for name in ("batch", "tokens", "forward_repeats", "training_repeats", "layer_repeats", "decode_steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    asked = {"--quick": options.quick, "--plain-malloc": options.plain_malloc}
    command += ["--branches", str(options.peer_branches), *(flag for flag, yes in asked.items() if yes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{PEER_PYTHON}={python}: the peer's benchmark failed.\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_layers_s(timings: dict, draw: str, *, hashing: bool) -> float | None:
    """Seconds a forward that both memory layers take alone; with the hashing from raw ids, or addresses given."""
    alone = timings.get("layer_alone")
    if alone is None:
        return None
    seconds = 2 * alone[draw]["forward"]["median_s"]
    return seconds + alone[draw]["hash_all_layers"]["median_s"] * hashing


def inside_forward_s(timings: dict, draw: str) -> float | None:
    """Seconds of a forward that are spent in the memory's own pieces, hashing included."""
    forward = timings.get("forward")
    if forward is None:
        return None
    parts = forward[draw]["parts_s"]
    hashing = parts.get("canonical_ids_and_hash")
    return parts["layers_total"] + (parts["canonical_ids"] + parts["hash"] if hashing is None else hashing)


def layer_training_s(timings: dict, draw: str) -> float | None:
    """Seconds of one memory layer alone, forward, backward and its rows' optimizer."""
    alone = timings.get("layer_alone")
    return alone and alone[draw]["forward_backward"]["median_s"] + alone[draw]["row_step"]["median_s"]


def over(a: float | None, b: float | None) -> float | None:
    """a / b; None where one is missing, or is an added time that noise made negative."""
    return None if a is None or b is None or a <= 0 or b <= 0 else a / b


def compared(ours: dict, peer: dict | None, draws: list[str]) -> dict:
    """Peer over ours; None where there is none. `forward_added` is a small difference: its spread tells what it is worth."""
    theirs = peer or {}

    def get(timings, *keys):
        for key in keys:
            timings = None if timings is None else timings.get(key)
        return timings

    out: dict = {}
    for draw in draws:
        ratios = out[draw] = {}
        for hashing in (False, True):
            name = "layers_alone_with_hashing" if hashing else "layers_alone"
            ratios[name] = over(
                memory_layers_s(theirs, draw, hashing=hashing), memory_layers_s(ours, draw, hashing=hashing)
            )
        ratios["inside_forward"] = over(inside_forward_s(theirs, draw), inside_forward_s(ours, draw))
        ratios["layer_alone_training"] = over(layer_training_s(theirs, draw), layer_training_s(ours, draw))
        for measurement in ("forward", "decode_step", "training_step"):
            keys = (measurement, draw, "added_s")
            ratios[f"{measurement}_added"] = over(get(theirs, *keys), get(ours, *keys))
        bare = over(get(theirs, "forward", "bare", "median_s"), get(ours, "forward", "bare", "median_s"))
        for name in ("layers_alone_with_hashing", "forward_added"):
            ratios[f"{name}_each_over_its_bare_forward"] = over(ratios[name], bare)
    # All of the memory's state where the peer trained; otherwise that of one table's rows, nearly all of it.
    states = [get(timings, "training_step", "optimizer_state_bytes") for timings in (ours, theirs)]
    if all(states):
        sizes = [state["rows"] + state["other_memory"] for state in states]
    else:
        sizes = [get(timings, "layer_alone", "row_state_bytes") for timings in (ours, theirs)]
    out["optimizer_state_ours_over_peer"] = over(*sizes)
    return out


def wanted(found: dict, draws: list[str]) -> list[dict]:
    """Every limit with the median measured: {what, limit, at (least or most), value, met}; None where not measured."""
    rows = []

    def row(what, limit, at, value):
        met = None if value is None else bool(value <= limit if at == "most" else value >= limit)
        rows.append({"what": what, "limit": limit, "at": at, "value": value, "met": met})

    for measured in found["addresses"]:
        for path in ("numba", "numba into out"):
            value = measured["paths"][path]["median_ns"]
            row(f"ns an address, {path}, {measured['tokens']:,} tokens", measured["limit_ns"], "most", value)
    for draw, timings in found["layer"].items():
        for name, ratio in timings["ratio"].items():
            row(f"layer {name} over its products, {draw}", ratio["limit"], "most", ratio["median_ratio"])
    for draw in draws:
        for name in ("layers_alone", "layers_alone_with_hashing", "inside_forward", "forward_added"):
            value = found["peer_over_ours"][draw][name]
            row(f"peer over ours, {name}, {draw}", LESS_ADDED_TIME, "least", value)
    value = found["peer_over_ours"]["optimizer_state_ours_over_peer"]
    row("optimizer state, ours over the peer's", STATE_SHARE, "most", value)
    return rows


def readable_llama(who: str, timings: dict, draws: list[str]) -> str:
    """One implementation's timings, to be read; milliseconds."""
    lines = [who]
    for measurement in ("forward", "training_step", "decode_step"):
        timed = timings.get(measurement, {})
        for draw, t in ((draw, timed[draw]) for draw in draws if draw in timed):
            bare, whole, added, least, most = (
                1e3 * seconds
                for seconds in (
                    timed["bare"]["median_s"],
                    t["median_s"],
                    t["added_s"],
                    t["added_min_s"],
                    t["added_max_s"],
                )
            )
            lines.append(
                f"  {measurement:14}{draw:6}{whole:10.1f} ms, bare {bare:.1f}, added {added:.2f} ({least:.2f} to {most:.2f})"
            )
            if "parts_s" in t:
                lines.append("    inside: " + _milliseconds(t["parts_s"]))
    alone = timings.get("layer_alone", {})
    for draw in (draw for draw in draws if draw in alone):
        medians = {name: t["median_s"] for name, t in alone[draw].items() if isinstance(t, dict)}
        lines.append(f"  layer alone   {draw:6} " + _milliseconds(medians))
    state = timings.get("training_step", {}).get("optimizer_state_bytes", {})
    if state:
        lines.append(
            "  optimizer state, MB: " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in state.items())
        )
    peak = max(
        t["peak_memory_bytes"] for t in timings.values() if isinstance(t, dict) and "peak_memory_bytes" in t
    )
    lines.append(f"  peak memory of the process, both models in it: {peak / 1e9:.2f} GB")
    return "\n".join(lines)


def _milliseconds(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument(
        "--full", action="store_true", help="time the peer's training as well, two minutes more"
    )
    parser.add_argument("--peer-branches", type=int, default=1, help="hc_mult of the peer; its default is 4")
    parser.add_argument(
        "--out", type=Path, help=f"where the JSON goes; default {RESULT.relative_to(HERE.parent)}"
    )
    options = parser.parse_args()
    options.peer_only = [name for name in options.only if options.full or name != "training_step"]

    started = time.time()
    torch.set_num_threads(1)
    found: dict = {"benchmark": "core", "quick": options.quick, "plain_malloc": options.plain_malloc}
    found |= circumstances("engram-lm", "torch", "transformers", "numpy", "numba")
    found |= {"threads": 1, "dtype": "float32", "clock": "CPU time", "command": " ".join(sys.argv)}

    # Before malloc is told to keep memory: callers of `addresses` have not told theirs.
    few = {"repeats": 3, "decode_calls": 10} if options.quick else {}
    found["addresses"] = [addresses.measure(tokens=tokens, **few) for tokens in ADDRESS_TOKENS]
    for measured in found["addresses"]:
        print(addresses.readable(measured), flush=True)

    settle_options(options)
    few = {"repeats": 1, "rows_per_head": 10_007} if options.quick else {}
    found["layer"] = {draw: layer.measure(draw=draw, **few) for draw in options.draws}
    for draw, measured in found["layer"].items():
        print(layer.readable(draw, measured), flush=True)

    peer = found["peer"] = peer_timings(options)
    if peer is None:
        print(f"engram-peft: not timed. {PEER_PYTHON} names no Python that has it.", flush=True)
    else:
        print(readable_llama("Llama with engram-peft's memory", peer, options.draws), flush=True)
    found["llama"] = llama.benchmark(options)
    print(readable_llama("Llama with engram-lm's memory", found["llama"], options.draws), flush=True)

    found["peer_over_ours"] = compared(found["llama"], peer, options.draws)
    found["wanted"] = wanted(found, options.draws)
    for row in found["wanted"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        print(f"  {row['what']:60} {value:>12}  at {row['at']} {row['limit']}  {verdict}")
    found["load_average_end"] = os.getloadavg()[0]
    found["wall_s"] = time.time() - started
    text = json.dumps(found)
    # a smoke test is no result
    path = options.out or (None if options.quick else RESULT)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf8")
    print(text)


if __name__ == "__main__":
    main()
