"""Processes that change an index and die, or read it while another changes it; run by test_store_faults.py.

    python store_support.py points DIR                   # one dead process a system call, each with a directory of its own
    python store_support.py kills DIR SEED TRIALS        # one directory, killed again and again at random moments
    python store_support.py readers DIR READERS SECONDS  # prints what readers saw

Processes are forked from one that has loaded everything: a trial takes milliseconds.
"""

import itertools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from engram_lm.index.store import Index

VOCAB = 1000
TENANTS = ("public", "second")


def open_to_write(path, merging="by hand"):
    return Index.open(path, "write", merging=merging, wait_seconds=10)


# ---- operations: a fixed list, each worked out from the state after those before it --------------------------------------


def operations(seed):
    """(what, tenant, arguments) and the state after it, {(tenant, id): tokens}, without end."""
    draw, state = random.Random(seed), {}
    for i in itertools.count():
        tenant = draw.choice(TENANTS)
        there = sorted(id for name, id in state if name == tenant)
        what = draw.choice(["add", "add", "add", "replace", "delete", "both", "merge", "purge"])
        gone = draw.sample(there, min(len(there), draw.randrange(1, 4))) if what in ("delete", "both") else []
        names = {"add": [f"{i}.{n}" for n in range(draw.randrange(3))], "both": [f"{i}"]}.get(what, [])
        if what == "replace":
            names = draw.sample(there, min(len(there), 2))
        new = [(name, [draw.randrange(VOCAB) for _ in range(draw.choice([0, 3, 40, 900]))]) for name in names]
        for id in gone:
            del state[tenant, id]
        state.update({(tenant, name): tokens for name, tokens in new})
        yield (what, tenant, gone, new), dict(state)


def apply(store, operation):
    what, tenant, gone, new = operation
    if what == "merge":
        store.merge()
    elif what == "purge":
        store.purge(tenant=tenant)
    else:
        store.update(add=new, delete=gone, tenant=tenant, replace="yes")


def state_of(store):
    return {
        (tenant, document.id): store.get(document.id, tenant)[1].tolist()
        for tenant in store.tenants
        for document in store.documents(tenant)
    }


def state_after(seed, n):
    return {} if n == 0 else next(itertools.islice(operations(seed), n - 1, None))[1]


# ---- dying -----------------------------------------------------------------------------------------------------------


class Death:
    """Dies at the n-th system call that changes files; then, as after a power cut, what was not synced is lost.

    Files written and not synced keep half of their bytes; a manifest whose directory was not synced is the old one.
    """

    def __init__(self, directory, n, power_cut):
        self.directory, self.n, self.power_cut = Path(directory), n, power_cut
        self.calls, self.dirty = 0, set()
        self.old = self.directory.with_name(self.directory.name + ".old")
        self.renamed = False
        self.real = {name: getattr(os, name) for name in CALLS}
        for name in CALLS:
            setattr(os, name, lambda *args, name=name, **options: self.call(name, *args, **options))

    def call(self, name, *args, **options):
        if name == "open" and not args[1] & os.O_CREAT:
            return self.real[name](*args, **options)
        self.calls += 1
        if self.calls == self.n:
            if name in ("write", "pwrite"):
                self.dirty.add(os.fstat(args[0]).st_ino)
                self.real[name](args[0], args[1][: len(args[1]) // 2], *args[2:])
            self.die()
        if name in ("write", "pwrite"):
            self.dirty.add(os.fstat(args[0]).st_ino)
        if name == "replace" and Path(args[1]).name == "manifest":
            shutil.copyfile(args[1], self.old)
            self.renamed = True
        result = self.real[name](*args, **options)
        if name == "fsync":
            self.dirty.discard(os.fstat(args[0]).st_ino)
            self.renamed &= os.fstat(args[0]).st_ino != os.stat(self.directory).st_ino
        return result

    def die(self):
        if self.power_cut:
            for path in self.directory.iterdir():
                if path.stat().st_ino in self.dirty:
                    self.real["truncate"](path, path.stat().st_size // 2)
            if self.renamed:
                self.real["replace"](self.old, self.directory / "manifest")
        os.kill(os.getpid(), signal.SIGKILL)


CALLS = ("open", "write", "pwrite", "fsync", "replace", "unlink", "truncate")


def forked(act):
    """Run in a child; True where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def ended(child):
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WIFEXITED(status)


def acknowledge(path, n):
    with open(path, "a") as file:
        file.write(f"{n}\n")


SCENARIOS = {
    "add": [("add", "public", [], [("new", [5] * 50)])],
    "both": [("both", "public", ["b"], [("a", [7] * 300), ("n", [])]), ("delete", "public", ["c", "n"], [])],
    "merge": [("delete", "public", ["c"], []), ("merge", "public", [], [])],
    "purge": [("purge", "public", [], []), ("delete", "second", ["s"], [])],
}


def before_scenarios(store):
    rng = np.random.default_rng(0)
    store.add([(name, rng.integers(0, VOCAB, 60)) for name in "abc"])
    store.add([(name, rng.integers(0, VOCAB, 60)) for name in "de"])
    store.add([("s", [1, 2, 3])], tenant="second")
    store.delete("d")


def scenario_states(name):
    """States after 0, 1, ... operations of a scenario; made with the store itself, in one process, without dying."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Index.create(Path(folder) / "i", vocab_size=VOCAB, merging="by hand") as store,
    ):
        before_scenarios(store)
        states = [state_of(store)]
        for operation in SCENARIOS[name]:
            apply(store, operation)
            states.append(state_of(store))
    return states


def points(root, every):
    base = root / "base"
    with Index.create(base, vocab_size=VOCAB, merging="by hand") as store:
        before_scenarios(store)

    def run(path, name, n):
        with open_to_write(path) as store:
            Death(path, n, power_cut=n % 2)
            for i, operation in enumerate(SCENARIOS[name]):
                apply(store, operation)
                acknowledge(path.with_name(path.name + ".done"), i)

    for name in SCENARIOS:
        for n in range(1, 10**6, every):
            path = root / f"{name}.{n}"
            shutil.copytree(base, path)
            if ended(forked(lambda path=path, name=name, n=n: run(path, name, n))):
                break


def kills(root, seed, trials):
    path, done = root / "i", root / "done"
    Index.create(path, vocab_size=VOCAB).close()
    draw, n = random.Random(seed), 0

    def run():
        with open_to_write(path, "background") as store:
            for i, (operation, _) in enumerate(operations(seed)):
                if i >= n:
                    apply(store, operation)
                    acknowledge(done, i + 1)

    for _ in range(trials):
        child = forked(run)
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        ended(child)
        acked = int(done.read_text().split()[-1]) if done.exists() else 0
        with Index.open(path) as store:
            store.verify()
            found = state_of(store)
        # what was acknowledged is there; the one change under way is, or is not
        n = acked if found == state_after(seed, acked) else acked + 1
        assert found == state_after(seed, n), (acked, n)
        acknowledge(done, n)
    print("changes", n)


# ---- readers beside a writer -------------------------------------------------------------------------------------------

PAIRS = 40
GONE = 3  # every fourth version of a pair is its absence


def pair(k, version):
    """Two documents that say which pair and version they are: k, two tokens of version, side, body."""
    rng = np.random.default_rng([k, version])
    head = [k, 100 + version % 100, 200 + version // 100 % 100]
    body = rng.integers(400, VOCAB, 5 + 7 * (version % 9)).tolist()
    return [*head, 300, *body], [*head, 301, *body]


def write_pairs(path, shared, until):
    draw = random.Random(0)
    with open_to_write(path, "background") as store:
        n = 0
        while time.monotonic() < until:
            k = draw.randrange(PAIRS)
            version = int(shared[k]) + 1
            shared[PAIRS + k] = version
            names = [f"{k}/left", f"{k}/right"]
            if version % 4 == GONE:
                store.delete(names)
            else:
                store.add(list(zip(names, pair(k, version), strict=True)), replace="yes")
            shared[k] = version
            n += 1
            if n % 50 == 0:
                store.purge()
        shared[2 * PAIRS] = n


def read_pairs(path, shared, place, until):
    checked = 0
    with Index.open(path) as store:
        while time.monotonic() < until:
            least = shared[:PAIRS].copy()
            snapshot = store.snapshot()
            most = shared[PAIRS : 2 * PAIRS].copy()
            tokens = 0
            for k in range(PAIRS):
                found = follow(snapshot, [k])
                possible = set(range(int(least[k]), int(most[k]) + 1))
                if not found:
                    assert any(v == 0 or v % 4 == GONE for v in possible), (k, possible)
                    continue
                ((low, count),) = found.items()
                assert count == 2, (k, found)
                ((high, count),) = follow(snapshot, [k, low]).items()
                assert count == 2, (k, low, high, count)
                version = low - 100 + 100 * (high - 200)
                assert version in possible, (k, version, possible)
                assert version % 4 != GONE
                left, right = pair(k, version)
                assert follow(snapshot, left[:3]) == {300: 1, 301: 1}
                for document in (left, right):
                    assert follow(snapshot, document) == {VOCAB: 1}
                    assert follow(snapshot, document[:-1]) == {document[-1]: 1}
                tokens += 2 * len(left) + 2
            assert snapshot.n_tokens == tokens
            checked += 1
            shared[place] = checked


def follow(snapshot, context):
    context = context[-64:]
    match = snapshot.match(context)
    if match.depth < len(context):
        return {}
    return dict(zip(*(part.tolist() for part in snapshot.continuations(match, len(context))), strict=True))


def readers(root, n_readers, seconds):
    path = root / "i"
    Index.create(path, vocab_size=VOCAB).close()
    shared = np.frombuffer(mmap.mmap(-1, 8 * (2 * PAIRS + 1 + n_readers)), np.int64)
    until = time.monotonic() + seconds
    children = [
        forked(lambda i=i: read_pairs(path, shared, 2 * PAIRS + 1 + i, until)) for i in range(n_readers)
    ]
    children.append(forked(lambda: write_pairs(path, shared, until)))
    for child in children:
        assert ended(child)
    with Index.open(path) as store:
        store.verify()
    print("changes", shared[2 * PAIRS], "looks", *shared[2 * PAIRS + 1 :])


def warm(root):
    """Load what is compiled, in the process that the others are forked from."""
    with Index.create(root / "warm", vocab_size=VOCAB, merging="by hand") as store:
        before_scenarios(store)
        for operations in SCENARIOS.values():
            for operation in operations:
                apply(store, (operation[0], operation[1], [], operation[3]))
        store.purge("b")
        follow(store.snapshot(), [1, 2])
        store.verify()
        state_of(store)


if __name__ == "__main__":
    what, root, *numbers = sys.argv[1:]
    # a killed process loses nothing of what it wrote; Death plays what a power cut would
    os.fsync = lambda file: None
    warm(Path(root))
    {"points": points, "kills": kills, "readers": readers}[what](Path(root), *map(int, numbers))
