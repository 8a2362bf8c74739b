"""Files that are there whole or as they were: writing, renaming and locking, with processes that die in between."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest

from engram_lm import durable
from engram_lm.errors import CheckpointError


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a file"
    for data in ("first ä", b"second"):
        durable.write_atomic(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [each.name for each in tmp_path.iterdir()] == ["a file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()


def _umask():
    before = os.umask(0)
    os.umask(before)
    return before


def _fill(file):
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("shared", [False, True])
def test_what_fails_leaves_the_old_file_and_no_other(tmp_path, shared):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), durable.replacing_file(path, shared=shared) as file:
        _fill(file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_synced_before_the_name_is_given_and_the_name_after(tmp_path, monkeypatch):
    told = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (told.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (told.append("rename"), replace(old, new)))
    durable.write_atomic(tmp_path / "a", "text")
    assert told == [str(tmp_path / ".a"), "rename", str(tmp_path)]


def test_a_new_file_does_not_touch_one_that_is_there(tmp_path):
    os.close(durable.write_new(tmp_path / "a", b"first"))
    with pytest.raises(CheckpointError, match="a cannot be written: File exists"):
        durable.write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_lock_is_had_by_one_process_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys\nfrom engram_lm import durable\nfile = open(sys.argv[1], 'a')\n"
        "print(durable.try_lock(file), flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other, open(path, "a") as file:
        assert other.stdout.readline() == "True\n"
        assert not durable.try_lock(file)
        other.send_signal(signal.SIGKILL)
        other.wait()
        durable.lock(file)
        assert durable.try_lock(file)
