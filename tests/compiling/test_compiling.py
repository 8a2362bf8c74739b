"""Kernels compiled beforehand, and what the command line says when it has to compile some."""

import io
import json
import os
import subprocess
import sys

import pytest

from engram_lm import cli
from engram_lm.compiling import command, line
from engram_lm.compiling.command import Compiled
from engram_lm.compiling.line import CompilingLine
from engram_lm.library import Library, Text
from serve_support import words

PLACE = "/somewhere/kernels"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """clock[0]: the seconds that it is."""
    now = [100.0]
    monkeypatch.setattr(line.time, "monotonic", lambda: now[0])
    return now


def after(clock, seconds: float, call, **options) -> None:
    clock[0] += seconds
    call(**options)


# ---- the line ----------------------------------------------------------------------------------------------------------


def test_one_line_is_said_when_compiling_takes_half_a_second(clock):
    stream = io.StringIO()
    told = CompilingLine(stream)
    told.begins()
    after(clock, 0.4, told.begins)
    after(clock, 0.0, told.ends, place=PLACE)
    assert stream.getvalue() == ""
    after(clock, 0.2, told.begins)
    assert stream.getvalue() == line._FIRST + "\n"
    for _ in range(2):
        after(clock, 5.0, told.ends, place=PLACE)
    told.begins()
    after(clock, 5.0, told.ends, place=PLACE)
    assert stream.getvalue() == line._FIRST + "\n"


def test_only_time_spent_compiling_counts(clock):
    stream = io.StringIO()
    told = CompilingLine(stream)
    for _ in range(4):
        after(clock, 60.0, told.begins)
        after(clock, 0.1, told.ends, place=PLACE)
    assert stream.getvalue() == ""
    after(clock, 60.0, told.begins)
    after(clock, 0.1, told.ends, place=PLACE)
    assert stream.getvalue() == line._FIRST + "\n"


def test_a_terminal_has_a_second_line_that_goes_away(clock):
    stream = Terminal()
    told = CompilingLine(stream)
    told.begins()
    after(clock, 2.0, told.begins)
    after(clock, 1.0, told.ends, place=PLACE)
    assert stream.getvalue().endswith("\r\x1b[K1 compiled, 3 s")
    told.ends(place=PLACE)
    assert stream.getvalue().endswith("\r\x1b[K2 compiled, 3 s\r\x1b[K")


def test_kernels_that_cannot_be_kept_are_said_once(clock):
    stream = io.StringIO()
    told = CompilingLine(stream)
    for _ in range(2):
        told.begins()
        told.ends(place=None)
    assert stream.getvalue() == line._LOST + "\n"


# ---- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch, clock):
    """parts[name]: (exit code, the places of what that part compiles), instead of processes that compile."""
    found = {"indexes": (0, []), "tables": (0, [])}

    def do(part, compiled_one):
        code, places = found[part]
        for place in places:
            compiled_one(place)
        return code

    monkeypatch.setattr(command, "_do", do)
    return found


def test_the_command_counts_what_all_parts_compiled(parts, capsys):
    parts.update(indexes=(0, [PLACE] * 3), tables=(0, [PLACE]))
    assert cli.run(["compile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kernels": 4, "seconds": 0.0, "directory": PLACE}
    assert cli.run(["compile"]) == 0
    assert capsys.readouterr().out == f"compiled 4 kernels in 0 s, into {PLACE}\n"


def test_the_command_says_so_where_nothing_was_left_to_compile(parts, capsys):
    assert command.compile_kernels() == Compiled(kernels=0, seconds=0.0, directory=None)
    assert cli.run(["compile"]) == 0
    assert capsys.readouterr().out == "all kernels were compiled before\n"


def test_the_command_is_refused_where_nothing_can_be_kept(parts, capsys):
    parts["tables"] = (0, [PLACE, ""])
    assert cli.run(["compile"]) == 2
    assert "no directory for them can be written. Set ENGRAM_CACHE" in capsys.readouterr().err


def test_a_part_that_fails_is_a_failure(parts):
    parts["tables"] = (1, [PLACE])
    with pytest.raises(RuntimeError, match="has failed"):
        command.compile_kernels()


# ---- in processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path):
    directory = tmp_path / "notes"
    with Library.create(directory, tokenizer=words(), merging="by hand") as library:
        library.add([Text(id="dogs", text="The office dog is called Orlando.")])
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("what", ["search", "explain"])
def test_the_first_search_on_a_machine_says_why_it_takes_so_long_and_the_next_is_silent(
    what, notes, tmp_path
):
    asked = [sys.executable, "-m", "engram_lm.cli", "index", what, str(notes), "The office dog", "--json"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    for wanted in (line._FIRST + "\n", ""):
        done = subprocess.run(asked, capture_output=True, text=True, env=environment, check=True)
        json.loads(done.stdout)
        assert done.stderr == wanted


COMMANDS = """
import json, sys
from numba.core import event
from engram_lm import cli
notes, file = sys.argv[1:]
commands = [
    ["index", "add", notes, file],
    ["index", "search", notes, "the office dog"],
    ["index", "explain", notes, "the office dog is"],
    ["index", "verbatim", notes, file],
    ["index", "delete", notes, "dogs"],
    ["index", "explain", notes, "the office dog is"],
    ["index", "purge", notes],
    ["index", "merge", notes],
    ["index", "verify", notes],
    ["addresses", "--profile", "paper", "--layer", "1", "--ids", "0,5,17", "--canonical"],
]
with event.install_recorder("numba:compile") as recorder:
    codes = [cli.run([*command, "--json"]) for command in commands]
names = [e.data["dispatcher"].py_func.__qualname__ for _, e in recorder.buffer if e.is_start]
print(json.dumps({"codes": codes, "compiled": names}))
"""


@pytest.mark.slow
def test_after_compile_no_command_compiles_anything(notes, tmp_path):
    (tmp_path / "more.txt").write_text("The office dog is called Orlando, and the office cat is not. " * 40)
    command.compile_kernels()
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(notes), str(tmp_path / "more.txt")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"codes": [0] * 10, "compiled": []}, done.stderr
