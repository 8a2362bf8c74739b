"""Living documents: thousands of additions, replacements and deletions of an index that merges in the background.

    python benchmarks/index_updates.py                       # 10,000 changes of about 2,000 documents
    python benchmarks/index_updates.py --updates 800 --documents 200 --out /tmp/updates.json

Documents are made up: words with the frequencies of a language, 20 to 2,000 tokens, and at the beginning of each its number
and version, so that an answer that is not of the newest version shows. A change is one document (one in ten: eight).

change    milliseconds until it is durable, wall time, by kind; those that had to wait for a merge are among them
bytes     of all files in the directory over those that the live documents take alone in one new segment, looked at every
          2 ms and after every change: the most at any moment
answers   after every change what follows the number of the changed document and of another one, in a reader that is open
          all the time; every 250 changes 20 wordings counted in all documents by hand, and how many documents and tokens
          there are

The last line is one JSON object, also written to benchmarks/results/index-updates.json.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import timing

timing.one_thread()
os.environ.pop("NUMBA_NUM_THREADS")

import numpy as np
from machine import circumstances

from engram_lm.index import Index, Segment

RESULT = Path(__file__).resolve().parent / "results" / "index-updates.json"
VOCAB, WORDS = 49_152, 40_000
PART = VOCAB - WORDS
SEED = 0
MOST_BYTES = 3.0


# ---- documents ------------------------------------------------------------------------------------------------------------


def document(number, version, rng):
    """Four tokens that say which one it is, then words."""
    head = [WORDS + number % PART, WORDS + number // PART, version % WORDS, version // WORDS]
    n = int(np.exp(rng.uniform(np.log(16), np.log(2000))))
    return np.concatenate([head, np.minimum(rng.zipf(1.2, n) - 1, WORDS - 1)]).astype(np.uint16)


class World:
    """What should be in the index: tokens by id. A new document gets a number that no other ever had."""

    def __init__(self, wanted):
        self.draw, self.rng = random.Random(SEED), np.random.default_rng(SEED)
        self.wanted, self.live, self.numbers, self.next, self.version = wanted, {}, [], 0, 0

    def change(self):
        """(kind, documents to add, ids to delete); the world is as it will be then."""
        n = 8 if self.draw.random() < 0.1 else 1
        # back to the wanted number, in the long run
        more = self.draw.random() < (0.75 if len(self.live) < self.wanted else 0.25)
        kind = "replace" if self.draw.random() < 0.4 and len(self.live) > 8 else "add" if more else "delete"
        if len(self.live) <= 8:
            kind = "add"
        if kind == "add":
            ids = [str(self.next + i) for i in range(n)]
            self.next += n
        else:
            ids = self.draw.sample(self.numbers, n)
        add = []
        for name in ids:
            if kind == "delete":
                del self.live[name]
            else:
                self.version += 1
                self.live[name] = document(int(name), self.version, self.rng)
                add.append((name, self.live[name]))
        if kind != "replace":
            self.numbers = list(self.live)
        return kind, add, ids if kind == "delete" else [], ids


# ---- bytes ----------------------------------------------------------------------------------------------------------------


class Watcher(threading.Thread):
    """Bytes of a directory over those of its live documents, every few milliseconds."""

    def __init__(self, directory):
        super().__init__(daemon=True)
        self.directory, self.live_bytes, self.most, self.looks, self.done = directory, None, 0.0, 0, False
        self.at_most = {}

    def look(self):
        total, files = 0, []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    size = entry.stat().st_size
                except FileNotFoundError:
                    continue
                total += size
                files.append((entry.name, size))
        live = self.live_bytes
        if live:
            self.looks += 1
            if total / live > self.most:
                self.most = total / live
                self.at_most = {"bytes": total, "live_bytes": int(live), "files": len(files),
                                "being written": sum(size for name, size in files if name.startswith("."))}  # fmt: skip

    def run(self):
        while not self.done:
            self.look()
            time.sleep(0.002)


def fresh_bytes(world):
    """Bytes a token that the live documents take in one new segment."""
    with tempfile.TemporaryDirectory() as folder:
        segment = Segment.build(world.live.values(), vocab_size=VOCAB)
        return segment.save(Path(folder) / "one.segment", sync="none").stat().st_size / len(segment)


# ---- answers --------------------------------------------------------------------------------------------------------------


def follow(snapshot, context):
    match = snapshot.match(context)
    if match.depth < len(context):
        return {}
    return dict(zip(*(part.tolist() for part in snapshot.continuations(match, match.depth)), strict=True))


def stale(snapshot, world, name):
    """Whether the index says of a document anything but its newest version."""
    number = int(name)
    head, tokens = [WORDS + number % PART, WORDS + number // PART], world.live.get(name)
    if tokens is None:
        return bool(follow(snapshot, head))
    # the first two tokens of a document alone: the numbers of others stand in no other place
    wanted = {int(tokens[2]): 1}
    last = tokens[-40:].tolist()
    return follow(snapshot, head) != wanted or follow(snapshot, last).get(VOCAB, 0) < 1


def miscounted(snapshot, world, n=20):
    """Of n wordings of live documents, how many have another count than by hand; and sizes that are not right."""
    stream = np.concatenate([np.append(tokens.astype(np.int64), VOCAB) for tokens in world.live.values()])
    wrong = int(snapshot.n_tokens != len(stream)) + int(snapshot.n_documents != len(world.live))
    for _ in range(n):
        size = world.draw.randrange(1, 6)
        tokens = world.live[world.draw.choice(world.numbers)]
        at = world.draw.randrange(len(tokens))
        gram = tokens[at : at + size].astype(np.int64)
        here = np.ones(len(stream) - len(gram), bool)
        for k, token in enumerate(gram):
            here &= stream[k : len(stream) - len(gram) + k] == token
        after = stream[len(gram) :][here]
        wanted = dict(zip(*(part.tolist() for part in np.unique(after, return_counts=True)), strict=True))
        wrong += follow(snapshot, gram.tolist()) != wanted
    return wrong


# ---- the run --------------------------------------------------------------------------------------------------------------


def updates(directory, options):
    world, spent, looked, wrong, segments = World(options.documents), {}, 0, 0, []
    watcher = Watcher(directory)
    with Index.create(directory, vocab_size=VOCAB) as store, Index.open(directory) as reader:
        while len(world.live) < options.documents:
            name = str(world.next)
            world.next, world.version = world.next + 1, world.version + 1
            world.live[name] = document(int(name), world.version, world.rng)
        world.numbers = list(world.live)
        store.add(list(world.live.items()))
        stale(reader.snapshot(), world, world.numbers[0])  # compiled
        a_token = fresh_bytes(world)
        n_tokens = sum(len(tokens) + 1 for tokens in world.live.values())
        watcher.live_bytes = n_tokens * a_token
        watcher.start()
        began = time.perf_counter()
        for i in range(options.updates):
            old = n_tokens
            kind, add, delete, changed = world.change()
            start = time.perf_counter()
            store.update(add=add, delete=delete, replace="yes")
            spent.setdefault(kind, []).append(time.perf_counter() - start)
            n_tokens = reader.snapshot().n_tokens
            # what is live while a change is made is not told apart: the smaller one counts
            watcher.live_bytes = min(old, n_tokens) * a_token
            watcher.look()
            for name in (changed[0], world.draw.choice(world.numbers)):
                looked, wrong = looked + 1, wrong + stale(reader.snapshot(), world, name)
            if i % 250 == 249:
                looked, wrong = looked + 22, wrong + miscounted(reader.snapshot(), world)
                a_token = fresh_bytes(world)
                segments.append(store.stats().segments)
        seconds = time.perf_counter() - began
        error = store.stats().merge_error
    watcher.done = True
    watcher.join()
    with Index.open(directory) as store:
        store.verify()
        end = store.stats()
    every = [value for values in spent.values() for value in values]
    return {
        "updates": options.updates,
        "documents_live": len(world.live),
        "tokens_live": end.tokens,
        "seconds": seconds,
        "change": {kind: quantiles(values) for kind, values in sorted(spent.items())} | {"all": quantiles(every)},
        "bytes": {"most_over_live": watcher.most, "looks": watcher.looks, "at_most": watcher.at_most,
                  "bytes_a_live_token_in_one_segment": a_token, "at_the_end_over_live": end.bytes / (end.tokens * a_token)},
        "segments": {"median": float(np.median(segments)), "most": max(segments)} if segments else None,
        "answers": {"looked_at": looked, "wrong": wrong},
        "merge_error": error,
    }  # fmt: skip


def quantiles(seconds):
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    # a shared machine that stops a process for minutes shows in the most, and in how many took longer than any merge
    over = sum(value > 10 for value in seconds)
    return {
        "p50_ms": 1e3 * p50,
        "p99_ms": 1e3 * p99,
        "most_ms": 1e3 * max(seconds),
        "over_10_s": over,
        "n": len(seconds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=2_000, help="about how many are live")
    parser.add_argument(
        "--directory", type=Path, help="a new one, on the disk to be measured; a temporary one by default"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args()
    found = {"benchmark": "index_updates", **circumstances("engram-lm", "numpy", "numba"), "seed": SEED}
    with tempfile.TemporaryDirectory(prefix="engram-updates-") as temporary:
        found |= updates(options.directory or Path(temporary) / "index", options)
    most = found["bytes"]["most_over_live"]
    found["wanted"] = [
        {
            "what": "bytes on disk over live bytes, most",
            "limit": MOST_BYTES,
            "value": most,
            "met": most <= MOST_BYTES,
        },
        {
            "what": "wrong answers",
            "limit": 0,
            "value": found["answers"]["wrong"],
            "met": found["answers"]["wrong"] == 0,
        },
    ]
    found["load_average_end"] = os.getloadavg()[0]
    text = json.dumps(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf8")
    print(text)


if __name__ == "__main__":
    main()
