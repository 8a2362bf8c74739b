"""What runs the pages is tested itself: what does not come out as it is printed fails, and says where."""

import sys

import pytest

pytest.importorskip("sybil")

from printed.pages import PageError, blocks_of, unfenced_code
from printed.story import Story, commands_of, empty_home, masked


@pytest.fixture
def told(tmp_path):
    """Runs a page and returns what went wrong, block by block."""

    def told(text, **options):
        path = tmp_path / "page.md"
        path.write_text(text)
        with Story(tmp_path, empty_home(tmp_path), **options) as story:
            return [story.run(block) for block in blocks_of(path) if block.is_run]

    return told


def console(*lines):
    return "\n".join(["```console", *lines, "```\n"])


def python(*lines):
    return "\n".join(["```python", *lines, "```\n"])


def test_a_page_is_one_story(told):
    page = (
        console("$ NAME=Orlando", "$ echo found > bone")
        + python("from pathlib import Path", "bone = Path('bone').read_text()")
        + console(
            "$ echo $NAME \\",
            "    and his bone    # two lines",
            "Orlando and his bone",
            "$ cat bone",
            "found",
        )
        + python("assert bone == 'found\\n'")
    )
    assert told(page) == [None] * 4


def test_what_does_not_come_out_is_told_with_its_line(told):
    (failed,) = told("A page.\n\n" + console("$ echo 17 of 20 in 3 ms", "17 of 21 in 5 s"))
    assert failed.startswith("page.md:4: $ echo 17 of 20 in 3 ms\nprinted on the page:\n17 of 21")
    assert "came out:\n17 of 20" in failed
    assert told(console("$ echo 17 of 20 in 3 ms", "17 of 20 in 5 s")) == [None]
    # more than is printed is another output too
    assert told(console("$ printf 'a\\nb\\n'", "a")) != [None]


def test_a_command_that_prints_nothing_on_the_page_still_has_to_succeed(told):
    (failed,) = told(console("$ echo noise", "$ sh -c 'echo reason >&2; exit 3'"))
    assert "exit code 3, wanted 0" in failed
    assert "reason" in failed
    assert told(console("$ sh -c 'exit 3'"), codes={"sh -c 'exit 3'": 3}) == [None]
    assert told(console("$ true"), codes={"true": 1}) != [None]


def test_a_small_run_stands_in_for_a_printed_one(told):
    assert told(console("$ sleep 1000"), instead={"sleep 1000": "sleep 0"}) == [None]


def test_a_python_block_that_raises_is_told_with_the_page_line(told):
    failed = told("A page.\n\n" + python("x = 1", "x.missing"))[0]
    assert 'File "page.md", line 5' in failed
    assert "x.missing" in failed
    assert "AttributeError" in failed


def test_a_shell_or_interpreter_that_ends_fails_the_block(told):
    assert "exit code -1" in told(console("$ exit 0"))[0]
    assert "the interpreter ended" in told(python("import os", "os._exit(0)"))[0]


def test_only_times_sizes_and_hashes_are_masked():
    text = "465 tokens, λ 0.30, 12.5 % in 1,234.5 ms; 3.2 GB; 18.5 bytes a token; records 67437447beed3ec8; 20481024; faced"
    assert masked(text) == "465 tokens, λ 0.30, 12.5 % in •; •; 18.5 bytes a token; records •; •; faced"
    assert masked("\na  \n b\n\n") == "a\n b"


def test_nothing_of_an_earlier_run_is_found(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "ENGRAM_CACHE", "ENGRAM_INDEX"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "kept")
    environment = empty_home(tmp_path)
    assert environment["HOME"] == str(tmp_path)
    assert environment["PIP_INDEX_URL"] == "kept"
    assert not {"XDG_CACHE_HOME", "ENGRAM_CACHE", "ENGRAM_INDEX"} & set(environment)
    assert environment["PATH"].startswith(sys.prefix)


def test_a_block_is_exempt_by_the_comment_on_the_line_above(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    page = "<!-- not run: starts a server -->\n" + console("$ serve") + "\n" + console("$ true")
    path.write_text(page + "<!-- not run without SOME_VARIABLE: wants much -->\n" + python("x"))
    blocks = blocks_of(path)
    assert [block.reason for block in blocks] == ["starts a server", None, "wants much"]
    assert [block.is_run for block in blocks] == [False, True, False]
    monkeypatch.setenv("SOME_VARIABLE", "1")
    assert [block.is_run for block in blocks] == [False, True, True]
    assert [block.line for block in blocks] == [2, 6, 10]


@pytest.mark.parametrize(
    ("page", "told"),
    [
        (
            "<!-- not run: starts a server -->\n\n" + console("$ serve"),
            "page.md:2: no fenced block begins below",
        ),
        ("<!-- not run: -->\n" + console("$ serve"), "without a reason"),
        ("```bash\nserve\n```\n", "page.md:1: a fenced block is console, python, json; got 'bash'"),
        ("```\nserve\n```\n", "got ''"),
    ],
)
def test_a_page_that_would_escape_is_refused(page, told, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(PageError, match=told):
        blocks_of(path)


def test_a_console_block_begins_with_a_command(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(console("echo 1", "$ echo 2"))
    (block,) = blocks_of(path)
    with pytest.raises(PageError, match="begins with “\\$ ” and a command"):
        commands_of(block)


def test_code_in_an_indented_block_is_found(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "So:\n\n    P(x) = (1 − λ) P_model\n\nand\n\n    snapshot = Snapshot([], vocab_size=4)\n    engram-lm eval\n"
    )
    assert unfenced_code(path) == ["snapshot = Snapshot([], vocab_size=4)", "engram-lm eval"]
