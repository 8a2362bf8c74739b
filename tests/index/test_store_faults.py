"""The store when things go wrong: deaths at every step, full disks, two writers, vanished files, and readers meanwhile."""

import errno
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.index import reader as reader_module
from engram_lm.index.store import Index
from places import SUPPORT
from store_support import SCENARIOS, VOCAB, before_scenarios, follow, scenario_states, state_of


def support(*arguments):
    """Run store_support.py; what it printed."""
    script = SUPPORT / "store_support.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require_whole_after_deaths(root):
    """Every directory opens, is sound, holds what was acknowledged or one change more, and can be written."""
    for name in SCENARIOS:
        states, n_died = scenario_states(name), 0
        for path in sorted(root.glob(f"{name}.*")):
            if not path.is_dir():
                continue
            done = path.with_name(path.name + ".done")
            acked = len(done.read_text().split()) if done.exists() else 0
            n_died += acked < len(SCENARIOS[name])
            with Index.open(path) as store:
                store.verify()
                assert state_of(store) in states[acked : acked + 2], (path, acked)
            with Index.open(path, "write", merging="by hand") as store:
                before = state_of(store)
                store.add([("after", [1, 2])])
                assert {path.name for path in path.iterdir()} == {
                    "manifest",
                    "lock",
                } | store._opened.manifest.files()
                assert state_of(store) == {**before, ("public", "after"): [1, 2]}
                store.verify()
        assert n_died > 1


def test_death_at_some_system_calls_loses_nothing_acknowledged(tmp_path):
    support("points", tmp_path, 5)
    require_whole_after_deaths(tmp_path)


@pytest.mark.slow
def test_death_at_any_system_call_loses_nothing_acknowledged(tmp_path):
    support("points", tmp_path, 1)
    require_whole_after_deaths(tmp_path)
    assert sum(path.is_dir() for path in tmp_path.iterdir()) > 60


@pytest.mark.slow
def test_200_kills_at_random_moments_lose_nothing_acknowledged(tmp_path):
    assert int(support("kills", tmp_path, 1, 200).split()[-1]) > 0


def test_readers_beside_a_writer_see_one_generation_and_never_a_stale_one(tmp_path):
    words = support("readers", tmp_path, 2, 1).split()
    assert min(int(word) for word in words if word.isdigit()) > 0


@pytest.mark.slow
def test_8_readers_beside_a_writer_for_a_minute(tmp_path):
    words = support("readers", tmp_path, 8, 60).split()
    assert min(int(word) for word in words if word.isdigit()) > 0


# ---- errors of the system ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def never_synced():
    """No power is cut here but in store_support.py, which plays it; a disk would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def store(tmp_path):
    with Index.create(tmp_path / "i", vocab_size=VOCAB, merging="by hand") as store:
        before_scenarios(store)
        yield store


def failing(monkeypatch, n, name="fsync", code=errno.ENOSPC):
    """The n-th call of an os function fails."""
    calls, real = [], getattr(os, name)

    def call(*args, **options):
        calls.append(None)
        if len(calls) == n:
            raise OSError(code, os.strerror(code))
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)
    return calls


CHANGES = {
    "add": lambda store: store.add([("new", [5] * 50)]),
    "delete": lambda store: store.delete("a"),
    "replace": lambda store: store.add([("a", [5] * 50)], replace="yes"),
    "merge": lambda store: store.merge(),
    "purge": lambda store: store.purge("a"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["fsync", "write", "pwrite", "open", "replace"])
def test_a_full_disk_leaves_the_index_as_it_was(store, monkeypatch, change, name):
    """Every call of each kind fails in turn, until the change gets through."""
    before, files = state_of(store), {path.name for path in store.directory.iterdir()}
    for n in range(1, 100):
        calls = failing(monkeypatch, n, name)
        try:
            CHANGES[change](store)
        except CheckpointError as error:
            monkeypatch.undo()
            assert "No space left on device" in str(error)  # noqa: PT017
            if "whether that lasts is not known" in str(error):
                break
            assert state_of(store) == before
            assert {path.name for path in store.directory.iterdir()} == files
            store.verify()
        else:
            monkeypatch.undo()
            assert len(calls) < n or change == "purge"
            break
    else:
        raise AssertionError("it never got through")
    # the sync of the directory came after the rename: the error says that it cannot know, and the store stops
    if name == "fsync":
        with pytest.raises(CheckpointError, match=r"not known \(.*No space.*Open the index again"):
            store.add([("x", [1])])
    store.close()
    with Index.open(store.directory, "write", merging="by hand") as again:
        again.verify()
        after = state_of(again)
        assert (after == before) == (change == "merge")
        again.add([("x", [1])])


def test_the_first_thing_that_goes_wrong_is_not_hidden_by_the_second(store, monkeypatch):
    failing(monkeypatch, 1)
    monkeypatch.setattr(
        durable.os, "unlink", lambda path: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only"))
    )
    with pytest.raises(CheckpointError, match="No space left"):
        store.delete("a")
    monkeypatch.undo()
    store.delete("a")
    store.close()
    with Index.open(store.directory, "write"):
        assert {path.name for path in store.directory.iterdir()} == {
            "manifest",
            "lock",
        } | store._opened.manifest.files()


@pytest.mark.parametrize(
    "name",
    [
        "replace",
        "fsync",
        "unlink",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("open", "write", "pwrite", "close")),
    ],
)
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupt_leaves_all_or_nothing(tmp_path, monkeypatch, change, name):
    """Before and after every call of a kind; whatever this store then thinks, its directory is whole."""
    whole = set()
    for n in range(100):
        path, calls, real = tmp_path / str(n), [], getattr(os, name)

        def call(*args, calls=calls, real=real, n=n, **options):
            calls.append(None)
            if len(calls) - 1 == n // 2 and n % 2 == 0:
                raise KeyboardInterrupt
            result = real(*args, **options)
            if len(calls) - 1 == n // 2:
                raise KeyboardInterrupt
            return result

        store = Index.create(path, vocab_size=VOCAB, merging="by hand")
        before_scenarios(store)
        before = state_of(store)
        monkeypatch.setattr(os, name, call)
        try:
            CHANGES[change](store)
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.undo()
        store.close()
        with Index.open(path) as reader:
            reader.verify()
            whole.add(state_of(reader) == before)
        with Index.open(path, "write", merging="by hand") as again:
            again.add([("x", [1])])
        if done:
            break
    assert done
    assert (False in whole) == (change != "merge")


def test_closing_waits_for_changes_of_other_threads(store):
    began, go_on = threading.Event(), threading.Event()

    def slowly():
        yield "slow", [1, 2, 3]
        began.set()
        go_on.wait()

    adding = threading.Thread(target=store.add, args=(slowly(),))
    adding.start()
    began.wait()
    closing = threading.Thread(target=store.close)
    closing.start()
    with pytest.raises(CheckpointError, match="is being written by"):
        Index.open(store.directory, "write", wait_seconds=0.05)
    go_on.set()
    adding.join()
    closing.join()
    with Index.open(store.directory, "write") as again:
        assert again.get("slow")[1].tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="is closed"):
        store.add([("x", [1])])


def test_a_purge_waits_for_adds_of_other_threads(store):
    tokens = store.get("a")[1].tolist()
    began, go_on = threading.Event(), threading.Event()

    def slowly():
        yield "again", tokens
        began.set()
        go_on.wait()

    adding = threading.Thread(target=store.add, args=(slowly(),))
    adding.start()
    began.wait()
    reports = []
    purging = threading.Thread(target=lambda: reports.append(store.purge("a")))
    purging.start()
    go_on.set()
    adding.join()
    purging.join()
    assert (reports[0].live_copies, reports[0].runs) == (4, 8)
    assert store.get("again")[1].tolist() == tokens


def test_a_merge_that_fails_does_not_fail_the_add_before_it(tmp_path, monkeypatch):
    with Index.create(tmp_path / "i", vocab_size=VOCAB, merging="by hand") as store:
        for i in range(40):
            store.add([(f"{i}", [i])])
    with Index.open(tmp_path / "i", "write") as store:
        real = store._writer.write

        def refuse(pairs, files):
            if len(pairs) > 1:
                raise CheckpointError("no room")
            return real(pairs, files)

        monkeypatch.setattr(store._writer, "write", refuse)
        assert store.add([("last", [1])]) == 41
        assert store.stats().merge_error == "no room"
        store._background._thread.join()
        monkeypatch.undo()
        store.add([("more", [1])])
        assert store.stats().segments < 32


def test_a_failed_background_merge_is_told_and_tried_again(tmp_path, monkeypatch):
    with Index.create(tmp_path / "i", vocab_size=VOCAB) as store:
        background = store._background
        write = store._writer.write

        def refuse(pairs, files):
            if len(pairs) > 1:
                raise CheckpointError("no room")
            return write(pairs, files)

        monkeypatch.setattr(store._writer, "write", refuse)
        for i in range(4):
            store.add([(f"{i}", [i])])
        background._thread.join()
        assert store.stats().merge_error == "no room"
        monkeypatch.undo()
        store.add([("4", [4])])
        background._thread.join()
        assert store.stats().merge_error == ""
        assert store.stats().segments < 4
        assert len(state_of(store)) == 5


# ---- writers ----------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_writes(store):
    with pytest.raises(
        CheckpointError, match=rf"is being written by process {os.getpid()} on .+ since \d{{4}}-"
    ):
        Index.open(store.directory, "write")
    with pytest.raises(CheckpointError, match="is being written by process"):
        Index.create(store.directory, vocab_size=3)
    (store.directory / "lock").write_bytes(b"\0{nonsense")
    with pytest.raises(CheckpointError, match="is being written by another process"):
        Index.open(store.directory, "write")
    timer = threading.Timer(0.2, store.close)
    timer.start()
    with Index.open(store.directory, "write", wait_seconds=30) as other:
        other.delete("a")
    timer.join()


def test_the_lock_ends_with_its_process_even_where_children_live_on(tmp_path):
    path = tmp_path / "i"
    Index.create(path, vocab_size=VOCAB).close()
    script = """
import os, signal, sys, time
from engram_lm.index.store import Index
store = Index.open(sys.argv[1], "write")
if os.fork() == 0:
    try:
        store.add([("child", [1])])
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    sys.stdout.close(); os.close(1)
    time.sleep(600)
os.kill(os.getpid(), signal.SIGSTOP)
"""
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert "is a fork of its writer" in run.stdout.readline()
        with pytest.raises(CheckpointError, match=f"is being written by process {run.pid}"):
            Index.open(path, "write")
        run.kill()
        run.wait()
        with Index.open(path, "write") as store:
            assert store.add([("a", [1])]) == 1
    finally:
        os.killpg(run.pid, 9)
        run.stdout.close()


def test_a_writer_whose_manifest_was_replaced_stops(store, tmp_path):
    data = (store.directory / "manifest").read_bytes()
    (tmp_path / "copy").write_bytes(data)
    os.replace(tmp_path / "copy", store.directory / "manifest")
    with pytest.raises(CheckpointError, match="is not the one that this writer wrote last"):
        store.delete("a")


# ---- readers -----------------------------------------------------------------------------------------------------------


def test_a_reader_that_finds_a_file_gone_reads_the_manifest_again(store, monkeypatch):
    reader = Index.open(store.directory)
    real, seen = reader_module.open_segment, []

    def late(directory, manifest, entry):
        # between the manifest and the file it names, a writer merges; it opens files too
        if len(seen) < 3 and not any(seen[-1:]):
            seen.append(True)
            store.add([(f"more {len(seen)}", [9, 9, len(seen)])])
            store.merge()
            seen[-1] = False
        return real(directory, manifest, entry)

    monkeypatch.setattr(reader_module, "open_segment", late)
    assert follow(reader.snapshot(), [9, 9]) == {1: 1, 2: 1, 3: 1}
    monkeypatch.undo()
    (entry,) = store._opened.manifest.tenants["public"]
    (store.directory / f"{entry.number:012d}.segment").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        Index.open(store.directory).snapshot()
    with pytest.raises(CheckpointError, match="is missing"):
        Index.open(store.directory).verify()


def test_verify_beside_a_writer_goes_on_to_the_newest(store, monkeypatch):
    import engram_lm.index.checking as checking

    real, seen = checking.open_segment, []

    def late(directory, manifest, entry):
        if not seen:
            seen.append(None)
            store.merge()
        return real(directory, manifest, entry)

    monkeypatch.setattr(checking, "open_segment", late)
    assert Index.open(store.directory).verify().generation == store.generation


def test_threads_share_a_store(tmp_path):
    """Four threads add and delete their own documents while others ask: each sees its own, and the sums are right."""
    errors = []
    with Index.create(tmp_path / "i", vocab_size=VOCAB) as store:

        def change(name):
            try:
                for i in range(12):
                    store.add([(f"{name}{i}", [name, i, 7])])
                    assert follow(store.snapshot(), [name, i]) == {7: 1}
                    if i % 3 == 0:
                        store.delete(f"{name}{i}")
                        assert follow(store.snapshot(), [name, i]) == {}
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=change, args=(100 + i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert store.snapshot().n_documents == 4 * 8
        store.verify()


def test_an_add_goes_on_while_the_files_it_looks_ids_up_in_are_merged_away(tmp_path):
    with Index.create(tmp_path / "i", vocab_size=VOCAB, merging="by hand") as store:
        for i in range(3):
            store.add([(f"d{i}", [1, 2, i])])

        def documents():
            yield "new", [4, 5]
            store.merge()
            yield "newer", [5, 6]
            yield "d1", [7]

        with pytest.raises(ConfigError, match="'d1' is in the tenant 'public' already"):
            store.add(documents())
        store.add([("new", [4, 5])])
        assert {document.id for document in store.documents()} == {"d0", "d1", "d2", "new"}
        store.verify()


def test_a_file_of_the_next_number_is_not_cut_short(store):
    """A reader may have mapped it, where the directory was put back from a backup: it would die of a bus error."""
    path = store.directory / f"{store._writer._next:012d}.segment"
    path.write_bytes(b"somebody's")
    with path.open("rb") as file:
        with pytest.raises(CheckpointError, match="cannot be written: File exists"):
            store.add([("new", [1, 2])])
        assert file.read() == b"somebody's"


# ---- documents -----------------------------------------------------------------------------------------------------------


def test_large_empty_and_odd_documents(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 49_152, 200_000).astype(np.uint16)
    path = tmp_path / "a path with spaces, ümläuts & 'quotes'"
    with Index.create(path, vocab_size=49_152, merging="by hand") as store:
        store.add([("large", large)])
        store.add([("empty", []), ('\u2028 \\ " \n\t\U0001f600', np.array([1, 2, 3], np.int32), "\n")])
        assert follow(store.snapshot(), large[1000:1005].tolist()) == {int(large[1005]): 1}
        store.delete(["large", "empty"])
        assert follow(store.snapshot(), []) == {1: 1, 2: 1, 3: 1, 49_152: 1}
        (document,) = store.documents()
        assert document.source == "\n"
        report = store.purge()
        assert report.documents == 1
        assert store.get('\u2028 \\ " \n\t\U0001f600')[1].tolist() == [1, 2, 3]
        store.delete(document.id)
        assert store.snapshot().n_tokens == 0
        assert store.snapshot().longest([1, 2])[0] == 0
        with pytest.raises(ConfigError, match="There is no document"):
            store.delete(document.id)


@pytest.mark.slow
def test_a_document_of_50_mb_is_masked_at_once(tmp_path):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 49_152, 12_000_000).astype(np.uint16)
    with Index.create(tmp_path / "i", vocab_size=49_152, merging="by hand") as store:
        store.add([("large", large), ("other", large[:100])])
        store.delete("large")
        snapshot = store.snapshot()
        assert (snapshot.n_tokens, snapshot.n_documents) == (101, 1)
        assert follow(snapshot, large[:50].tolist()) == {int(large[50]): 1}
        assert follow(snapshot, large[200:205].tolist()) == {}
        store.verify()
        report = store.purge()
        assert report.live_copies == 6
        assert store.stats().bytes < 10_000
