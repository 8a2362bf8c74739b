"""Writers of table files that are killed, hindered or met by another: the old file stays, and a later writer goes on."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from alone import run_alone, started
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.kernels import checksums
from engram_lm.storage import format as packed
from engram_lm.storage.format import MAGIC, PAGE, read_header, verify
from engram_lm.storage.writer import TableWriter

OLD = b"the file that was there"
# 2 records a page, 30 pages
N_ROWS, OPTIONS = 60, {"width": 700, "codec": "bf16"}
PIECES = (7, 1, 20, 2, 30)


def records(n_rows: int = N_ROWS, n_bytes: int = 1400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_rows, n_bytes), dtype=np.uint8)


def write_on(path: Path, record_NR: np.ndarray | None = None, **options) -> int:
    """Go on from where the file is, to the end, in uneven pieces. Returns the row that it went on with."""
    record_NR = records() if record_NR is None else record_NR
    with TableWriter(path, n_rows=len(record_NR), **(OPTIONS | options)) as writer:
        start = writer.rows_done
        for piece in np.split(record_NR[start:], np.cumsum(PIECES)):
            writer.add(piece)
        writer.finish()
    return start


@pytest.fixture
def whole(tmp_path) -> bytes:
    """What an uninterrupted writer writes."""
    path = tmp_path / "whole"
    write_on(path)
    assert verify(path).n_rows == N_ROWS
    return path.read_bytes()


def left_behind(path: Path, n_rows: int) -> TableWriter:
    """A closed writer that added `n_rows` rows."""
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:n_rows])
    return writer


# ---- killed ------------------------------------------------------------------------------------------------------------

# Runs alone in its process, which has one thread: it may fork. A child counts the lines of the writer that it passes
# and kills itself before line number `moment`; then the parent goes on with what is left.
KILL = """
import json, os, signal, sys
from pathlib import Path
import test_table_writer as t
from engram_lm.storage import format as packed
from engram_lm.storage import writer as written

path, step = Path(sys.argv[1]), int(sys.argv[2])
whole, sources = Path(sys.argv[3]).read_bytes(), (written.__file__, packed.__file__)
found = {"moments": 0, "old": 0, "new": 0, "finals": 0, "starts": []}
moment = 0
while True:
    for leftover in path.parent.glob("t*"):
        leftover.unlink()
    path.write_bytes(t.OLD)
    child = os.fork()
    if child == 0:
        count, name = 0, ""
        def tracer(frame, event, argument):
            global count, name
            if frame.f_code.co_filename not in sources:
                return None
            if event == "line":
                count += 1
                if count > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            return tracer
        sys.settrace(tracer)
        t.write_on(path)
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    data, partial = path.read_bytes(), path.with_name("t.partial")
    assert data in (t.OLD, whole), moment
    found["old" if data == t.OLD else "new"] += 1
    if partial.exists() and partial.read_bytes()[:8] == packed.MAGIC:
        found["finals"] += 1
    found["starts"].append(t.write_on(path))
    assert path.read_bytes() == whole, moment
    assert not partial.exists(), moment
    found["moments"] += 1
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    moment += step
print(json.dumps(found))
"""


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_line_the_old_file_stays_and_the_next_writer_ends_with_the_same_bytes(
    step, whole, tmp_path
):
    found = json.loads(run_alone(KILL, tmp_path / "t", step, tmp_path / "whole"))
    assert found["moments"] > 400 // step
    assert found["old"] > 0
    assert found["new"] > 0
    # rows were taken over from the killed one, from none to all of them
    assert found["starts"][0] == 0
    assert max(found["starts"]) == N_ROWS
    if step == 1:
        # between the final header and the rename
        assert found["finals"] > 0


def test_killed_between_the_final_header_and_the_rename(whole, tmp_path, monkeypatch):
    path = tmp_path / "t"

    def die(*_):
        raise KeyboardInterrupt

    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records())
        monkeypatch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    monkeypatch.undo()
    assert writer.partial.read_bytes() == whole
    assert not path.exists()
    assert write_on(path) == N_ROWS
    assert path.read_bytes() == whole


def test_a_final_header_of_which_one_page_arrived_is_continued(tmp_path):
    """A header of two pages is two writes to the disk: begun, final, and either mixture."""
    path, identity = tmp_path / "t", {"moduli": list(range(1000))}
    write_on(path, identity=identity)
    whole, header = path.read_bytes(), read_header(path)
    assert header.pages_at == 2 * PAGE
    begun = header.__class__(n_rows=N_ROWS, identity=identity, made_by="engram-lm", **OPTIONS).to_bytes(
        packed.PARTIAL_MAGIC
    )
    sums = packed.read_checksums(path, header).astype("<u4").tobytes()
    final = whole[: 2 * PAGE]
    for first, second in ((begun, begun), (final, final), (final, begun), (begun, final)):
        path.unlink()
        head = first[:PAGE] + second[PAGE:]
        (tmp_path / "t.partial").write_bytes(head + whole[2 * PAGE :])
        (tmp_path / "t.partial.sums").write_bytes(sums)
        assert write_on(path, identity=identity) == N_ROWS
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_killed_at_random_times(tmp_path):
    """From outside, while 60 MB are written."""
    code = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from engram_lm.storage.writer import TableWriter

path, rng = Path(sys.argv[1]), random.Random(0)
rows = np.random.default_rng(0).integers(0, 256, (60_000, 1024), dtype=np.uint8)
def go():
    with TableWriter(path, n_rows=len(rows), width=1024, codec="fp8_e4m3") as writer:
        start = writer.rows_done
        for first in range(start, len(rows), 977):
            writer.add(rows[first : first + 977])
        writer.finish()
    return start
go()
whole = path.read_bytes()
partly = 0
for trial in range(25):
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        go()
        os._exit(0)
    time.sleep(rng.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() in (b"old", whole)
    partly += 0 < go() < len(rows)
    assert path.read_bytes() == whole
print(partly)
"""
    assert int(run_alone(code, tmp_path / "t")) > 0


# ---- what is left is only taken over where it is right ---------------------------------------------------------------


def test_every_length_of_the_partial_file_is_continued(whole, tmp_path):
    path = tmp_path / "t"
    writer = left_behind(path, 41)
    partial, sums = writer.partial.read_bytes(), writer.partial_sums.read_bytes()
    assert len(partial) == 21 * PAGE
    assert len(sums) == 20 * 4
    lengths = [0, 7, 136, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 9 * PAGE + 3, len(partial)]
    for length in lengths:
        for kept_sums in (0, 3, 4, 41, len(sums)):
            writer.partial.write_bytes(partial[:length])
            writer.partial_sums.write_bytes(sums[:kept_sums])
            pages = max(0, min((length - PAGE) // PAGE, kept_sums // 4))
            assert write_on(path) == 2 * pages
            assert path.read_bytes() == whole
    writer.partial.write_bytes(partial + b"more")
    writer.partial_sums.write_bytes(sums + b"more than pages")
    assert write_on(path) == 40
    assert path.read_bytes() == whole


@pytest.mark.parametrize("page", [0, 5, 19])
@pytest.mark.parametrize("where", ["page", "sum"])
def test_a_page_that_did_not_reach_the_disk_is_written_anew(page, where, whole, tmp_path):
    path = tmp_path / "t"
    writer = left_behind(path, 40)
    file, at = (writer.partial, PAGE * (1 + page)) if where == "page" else (writer.partial_sums, 4 * page)
    data = bytearray(file.read_bytes())
    data[at : at + 4] = bytes(4)
    file.write_bytes(data)
    assert write_on(path) == 2 * page
    assert path.read_bytes() == whole


def test_records_of_several_pages_are_taken_over_whole(tmp_path):
    """Three pages a record: a record of which one page is wrong is written anew."""
    path, rows = tmp_path / "t", records(12, 9000)
    options = {"n_rows": 12, "width": 9000, "codec": "fp8_e4m3"}
    with TableWriter(path, **options) as writer:
        writer.add(rows[:7])
    data = bytearray(writer.partial.read_bytes())
    data[PAGE * (1 + 5 * 3 + 1)] ^= 1
    writer.partial.write_bytes(data)
    with TableWriter(path, **options) as writer:
        assert writer.rows_done == 5
        writer.add(rows[5:])
        writer.finish()
    assert np.array_equal(verified_rows(path, 9000, 3), rows)


def verified_rows(path: Path, n_bytes: int, pages_per_record: int) -> np.ndarray:
    header = verify(path)
    data = np.fromfile(path, np.uint8)[header.pages_at : header.checksums_at]
    return data.reshape(header.n_rows, pages_per_record * PAGE)[:, :n_bytes]


@pytest.mark.parametrize(
    "other", [{"width": 699}, {"codec": "fp8_e4m3", "width": 1400}, {"identity": {"layer": 2}}, {"note": "x"}]
)
@pytest.mark.parametrize("finished", [False, True])
def test_the_partial_file_of_another_table_is_refused_and_kept(other, finished, tmp_path, monkeypatch):
    """Also one whose pages are the same and that only lacked its rename: its identity is another."""
    path = tmp_path / "t"

    def die(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[: N_ROWS if finished else 20])
        if finished:
            monkeypatch.setattr(os, "replace", die)
            writer.finish()
    monkeypatch.undo()
    before = writer.partial.read_bytes()
    assert (before[:8] == MAGIC) == finished
    with pytest.raises(
        CheckpointError, match=r"t.partial holds part of another table\. Finish that one, or remove"
    ):
        TableWriter(path, n_rows=N_ROWS, **(OPTIONS | other))
    assert writer.partial.read_bytes() == before
    # and its lock was given back
    assert write_on(path) == (N_ROWS if finished else 20)


def test_checksums_without_their_file_are_of_no_use(whole, tmp_path):
    path = tmp_path / "t"
    (tmp_path / "t.partial.sums").write_bytes(b"left by a kill between rename and removal")
    assert write_on(path) == 0
    assert path.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t", "whole"]


# ---- two writers -----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_harms_nothing(whole, tmp_path):
    path = tmp_path / "t"
    n_files = len(os.listdir("/proc/self/fd"))
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:31])
        with pytest.raises(CheckpointError, match=r"t\.partial is being written by another writer"):
            TableWriter(path, n_rows=N_ROWS, **OPTIONS)
        writer.add(records()[31:])
        writer.finish()
    assert path.read_bytes() == whole
    assert len(os.listdir("/proc/self/fd")) == n_files


def test_of_writers_that_begin_at_once_one_writes(whole, tmp_path):
    """The file is made, locked and found in whatever order: it is never cut under the one that has it."""
    path = tmp_path / "t"
    for _ in range(30):
        path.unlink(missing_ok=True)
        gate, opened, refused = threading.Barrier(4), [], []

        def begin(gate=gate, opened=opened, refused=refused) -> None:
            gate.wait()
            try:
                writer = TableWriter(path, n_rows=N_ROWS, **OPTIONS)
                writer.add(records()[:50])
                opened.append(writer)
            except CheckpointError:
                refused.append(None)

        threads = [threading.Thread(target=begin) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(opened), len(refused)) == (1, 3)
        opened[0].add(records()[50:])
        opened[0].finish()
        assert path.read_bytes() == whole


def test_the_lock_dies_with_its_process(whole, tmp_path):
    path = tmp_path / "t"
    code = """
import sys
import test_table_writer as t
writer = t.TableWriter(t.Path(sys.argv[1]), n_rows=t.N_ROWS, **t.OPTIONS)
writer.add(t.records()[:21])
print("locked", flush=True)
sys.stdin.read()
"""
    with started(code, path, stdin=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="is being written by another writer"):
            TableWriter(path, n_rows=N_ROWS, **OPTIONS)
        other.send_signal(signal.SIGKILL)
        assert other.wait() == -signal.SIGKILL
    write_on(path)
    assert path.read_bytes() == whole


# ---- given up --------------------------------------------------------------------------------------------------------


def test_discard_removes_what_was_written_and_nothing_else(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(OLD)
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:40])
        writer.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert path.read_bytes() == OLD
    # also after it was closed, as by an error
    writer = left_behind(path, 40)
    writer.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    # but never another writer's
    writer = left_behind(path, 40)
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as second:
        with pytest.raises(CheckpointError, match="is being written by another writer"):
            writer.discard()
        assert second.partial.exists()


def test_a_writer_that_is_left_keeps_its_file(tmp_path):
    path = tmp_path / "t"
    with contextlib.suppress(ZeroDivisionError), TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:40])
        1 / 0  # noqa: B018
    assert write_on(path) == 40


# ---- hindered --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def room_for(n_bytes: int):
    """No file of this process may grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "n_bytes", [0, 10, PAGE, PAGE + 5, 2 * PAGE, 11 * PAGE + 1000, 31 * PAGE - 1, 31 * PAGE, 32 * PAGE - 1]
)
def test_a_full_disk_leaves_the_old_file_and_is_named(n_bytes, whole, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(OLD)
    assert len(whole) == 32 * PAGE
    with (
        room_for(n_bytes),
        pytest.raises(CheckpointError, match=r"t\.partial cannot be written: File too large"),
    ):
        write_on(path)
    assert path.read_bytes() == OLD
    start = write_on(path)
    # what found room was not written twice
    found_room = 2 * min(30, max(0, n_bytes // PAGE - 1))
    assert start <= found_room
    assert start >= 8 or found_room < 20
    assert path.read_bytes() == whole


def test_after_a_failed_write_nothing_follows(tmp_path):
    """Rows added behind a page that was written by half would be other rows."""
    path = tmp_path / "t"
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:10])
        with room_for(3 * PAGE), pytest.raises(CheckpointError, match="cannot be written"):
            writer.add(records()[10:30])
        for call in (lambda: writer.add(records()[30:]), writer.finish):
            with pytest.raises(CheckpointError, match="this writer was closed, or failed before"):
                call()
        writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_at_the_end_leaves_the_old_file(name, whole, tmp_path, monkeypatch):
    path = tmp_path / "t"
    path.write_bytes(OLD)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match=r"t\.partial cannot be written: No space left on device"):
            write_on(path)
    assert path.read_bytes() == OLD
    assert write_on(path) == N_ROWS
    assert path.read_bytes() == whole


def test_an_interrupted_write_is_continued(whole, tmp_path, monkeypatch):
    path, calls = tmp_path / "t", []
    sums = checksums.page_sums

    def interrupted(data, out):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        sums(data, out)

    with monkeypatch.context() as patch:
        patch.setattr(checksums, "page_sums", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_on(path)
    assert 0 < write_on(path) < N_ROWS
    assert path.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"none/t\.partial cannot be written: No such file or directory"
    ):
        TableWriter(tmp_path / "none" / "t", n_rows=N_ROWS, **OPTIONS)
    (tmp_path / "t.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"t\.partial cannot be written: Is a directory"):
        TableWriter(tmp_path / "t", n_rows=N_ROWS, **OPTIONS)


@pytest.mark.slow
def test_memory_stays_small_however_large_the_table(tmp_path):
    """256 MB in pieces of 4 MB, and once half of it continued: 24 MB more than before at the most."""
    code = """
import resource, sys
import numpy as np
from engram_lm.storage import TableWriter, verify
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def go(path, n, stop):
    with TableWriter(path, n_rows=n, width=264, codec="fp8_e4m3") as writer:
        while writer.rows_done < stop:
            writer.add(piece[: stop - writer.rows_done])
        if stop == n:
            writer.finish()
piece = np.random.default_rng(0).integers(0, 256, (16_000, 264), dtype=np.uint8)
go(sys.argv[1] + "small", 20_000, 20_000)
verify(sys.argv[1] + "small")
before = peak()
go(sys.argv[1], 1_000_000, 500_000)
go(sys.argv[1], 1_000_000, 1_000_000)
verify(sys.argv[1])
print((peak() - before) // 1024)
"""
    assert int(run_alone(code, tmp_path / "t")) <= 24


def test_missing_rows_and_too_many_change_nothing(whole, tmp_path):
    path = tmp_path / "t"
    with TableWriter(path, n_rows=N_ROWS, **OPTIONS) as writer:
        writer.add(records()[:59])
        with pytest.raises(ConfigError, match="wants 60 rows; 59 were added"):
            writer.finish()
        with pytest.raises(ConfigError, match="has 60 rows; 61 were added"):
            writer.add(records()[:2])
        writer.add(records()[59:])
        writer.finish()
    assert path.read_bytes() == whole
