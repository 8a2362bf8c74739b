"""A command, how long it took and how much memory it and its children held at once.

    done = watched([sys.executable, "build.py"])
    done.wall_s, done.peak_bytes, done.peak_own_bytes, done.lines

Memory is sampled 50 times a second: proportional set size of the whole process tree (shared pages once), and the part of it
that is no file (anonymous pages, which only swap can free).
"""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Watched:
    wall_s: float
    peak_bytes: int
    peak_own_bytes: int
    lines: list[str]


def watched(command, *, environment=None):
    """Run it to its end. RuntimeError with what it said where it fails."""
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        peak = own = 0
        while process.poll() is None:
            held = [_held(pid) for pid in _tree(process.pid)]
            peak, own = max(peak, sum(h[0] for h in held)), max(own, sum(h[1] for h in held))
            time.sleep(0.02)
        wall = time.perf_counter() - start
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ... failed:\n{text[-2000:]}")
    return Watched(wall, peak, own, text.splitlines())


def _tree(pid):
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children") as children:
                    waiting += [int(child) for child in children.read().split()]
        except OSError:
            continue  # it has ended
    return found


def _held(pid):
    amounts = {"Pss": 0, "Pss_Anon": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            for line in lines:
                name = line.split(":")[0]
                if name in amounts:
                    amounts[name] = int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return amounts["Pss"], amounts["Pss_Anon"]
