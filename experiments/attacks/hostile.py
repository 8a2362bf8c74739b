"""Files of segments that were damaged, and files with right checksums that were made to hurt, asked in a process of its own.

    hostile_segments()                    # {"damaged": {...}, "made to hurt": {...}}
    python experiments/attacks/hostile.py damaged 7     # one seed; what the process that is watched runs

A segment of more than 1 MiB is not read whole when it is opened, so that what is wrong in it meets the queries themselves.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from engram_lm.errors import EngramError
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot

SEEDS, EACH, VOCAB = 2, 60, 500
LARGE = ("tokens", "order", "next", "before")


def hostile_segments():
    """Of every kind: files, how many were refused when opened, how many answered, and how many killed the process."""
    found = {}
    for kind in ("damaged", "made to hurt"):
        rows = []
        for seed in range(SEEDS):
            done = subprocess.run(
                [sys.executable, __file__, kind, str(seed)], capture_output=True, text=True, check=False
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"died": 1})
        names = ("refused", "answered", "answers outside", "died")
        found[kind] = {"files": SEEDS * EACH} | {
            name: sum(row.get(name, 0) for row in rows) for name in names
        }
    return found


def one_seed(kind, seed):
    rng = np.random.default_rng(seed)
    documents = [np.minimum(rng.zipf(1.3, 70_000) - 1, VOCAB - 1) for _ in range(4)]
    segment = Segment.build(documents, vocab_size=VOCAB, heavy=64, wide=16)
    counts = {"refused": 0, "answered": 0, "answers outside": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.segment"
        data = bytearray(segment.save(path, sync="none").read_bytes())
        for n in range(EACH):
            if kind == "damaged":
                hurt = bytearray(data)
                for at in rng.integers(0, len(hurt), 200):
                    hurt[at] ^= int(rng.integers(1, 256))
                path.write_bytes(hurt)
            else:
                save_hostile(segment, path, rng, n)
            try:
                ask(path, documents[0], counts)
                counts["answered"] += 1
            except (EngramError, ValueError, IndexError):
                counts["refused"] += 1
    return counts


def save_hostile(segment, path, rng, n):
    """The same documents, with numbers that point anywhere; checksums are those of what is written."""
    arrays = {name: array.copy() for name, array in segment.arrays.items() if name != "first"}
    names = [*LARGE, *(name for name in arrays if name.startswith("node"))]
    for name in (names[n % len(names)], LARGE[n % len(LARGE)]):
        array = arrays[name]
        at = rng.integers(0, len(array), max(len(array) // 8, 1))
        array[at] = rng.integers(0, np.iinfo(array.dtype).max, len(at), dtype=array.dtype)
    made = Segment(arrays, vocab_size=segment.vocab_size, heavy=segment.heavy, wide=segment.wide)
    made.save(path, sync="none")


def ask(path, document, counts):
    snapshot = Snapshot([LiveSegment(Segment.open(path))], vocab_size=VOCAB)
    for count in ("tokens", "documents", "sources"):
        snapshot.score(document[:80], count=count)
        p = snapshot.distribution(document[:40], count=count).p
        # not a number, or more than there is
        counts["answers outside"] += not (np.isfinite(p).all() and (p >= -1e-6).all() and (p <= 1.5).all())
        snapshot.longest(document[10:60])


if __name__ == "__main__":
    print(json.dumps(one_seed(sys.argv[1], int(sys.argv[2]))))
