"""The command line as a user meets it: start-up, refusals in one line, exit codes."""

import json
import os
import resource
import subprocess
import sys

import pytest

from engram_lm import __version__ as engram_lm_version
from engram_lm import cli
from engram_lm.errors import IdentityError
from places import GOLDEN


def engram_lm(*tokens: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "engram_lm.cli", *tokens],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cpu_seconds_of_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "engram_lm.cli", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_lists_the_commands():
    done = engram_lm("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("addresses", "version"):
        assert command in done.stdout


def test_help_answers_within_four_tenths_of_a_second():
    # CPU time, the best of three: what the command costs, not how busy the machine is.
    assert min(cpu_seconds_of_help() for _ in range(3)) < 0.4


@pytest.mark.parametrize("tokens", [["--help"], ["addresses", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(tokens):
    program = (
        "import sys\n"
        "from engram_lm import cli\n"
        f"code = cli.run({tokens!r})\n"
        "heavy = {'torch', 'numba', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["engram_lm", "engram_lm.cli"])
def test_the_version_is_printed_with_the_name(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"engram-lm {engram_lm_version}\n"


def test_version_names_the_libraries(capsys):
    assert cli.run(["version"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("engram-lm ")
    assert "\nnumpy " in printed


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["nothing"], 'Unknown command "nothing"'),
        (["addresses", "--profile", "paper"], "--layer"),
        (["addresses", "--profile", "paper", "--layer", "one", "--ids", "1"], '"one"'),
        (["version", "--colour"], "--colour"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(tokens, told, capsys):
    assert cli.run(tokens) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("engram-lm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.fixture(scope="module")
def dead_example() -> dict:
    """Published rows of deepseek-v4.1, layer 1, for ids with a dead token among them."""
    return json.loads((GOLDEN / "addresses.json").read_text())["deepseek_v41"]["dead_example"]


DEEPSEEK = ["addresses", "--profile", "deepseek-v4.1", "--layer", "1", "--canonical"]


def test_addresses_prints_the_published_rows(dead_example, capsys):
    ids = ",".join(map(str, dead_example["ids"]))
    assert cli.run([*DEEPSEEK, "--ids", ids, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == dead_example["hash_L1"]


def test_a_list_of_ids_may_begin_with_a_dead_token(dead_example, capsys):
    assert cli.run([*DEEPSEEK, "--ids", "-1,0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == dead_example["hash_L1"][dead_example["ids"].index(-1)]


def test_addresses_prints_a_table(capsys):
    command = ["addresses", "--profile", "longcat", "--layer", "0", "--ids", "5,6,7"]
    assert cli.run(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", "5", "6", "7"]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (["addresses", "--profile", "nobody", "--layer", "1", "--ids", "1"], "'nobody'"),
        ([*DEEPSEEK, "--ids", "1,x"], "'1,x'"),
        ([*DEEPSEEK, "--ids", "99092"], "99092"),
        (["addresses", "--profile", "deepseek-v4.1", "--layer", "1", "--ids", "1"], "--canonical"),
    ],
)
def test_addresses_refuses_in_one_line(tokens, told, capsys):
    assert cli.run(tokens) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("engram-lm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.fixture
def failing_command():
    """Adds commands that fail in the ways a command can; removes them afterwards."""
    failures = {
        "fails-with-ours": IdentityError("rows.tbl has identity a1,\n  the model wants b2"),
        "fails-with-interrupt": KeyboardInterrupt(),
        "fails-with-bug": ZeroDivisionError("a bug"),
    }

    def command_raising(failure):
        def command() -> None:
            raise failure

        return command

    for name, failure in failures.items():
        cli.app.command(command_raising(failure), name=name)
    yield
    for name in failures:
        del cli.app[name]


@pytest.mark.usefixtures("failing_command")
def test_our_errors_are_one_line(capsys):
    assert cli.run(["fails-with-ours"]) == 2
    assert capsys.readouterr().err == "engram-lm: rows.tbl has identity a1, the model wants b2\n"


@pytest.mark.usefixtures("failing_command")
def test_interrupt_is_130():
    assert cli.run(["fails-with-interrupt"]) == 130


@pytest.mark.usefixtures("failing_command")
def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(["fails-with-bug"])


def test_a_reader_that_goes_away_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "engram_lm.cli", "version"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""
