"""Every `engram-lm ...` that is printed anywhere parses: in pages, help texts, docstrings and errors. Nothing is run.

Three kinds, told apart by what follows the command's name: a whole line is parsed; options alone (`engram-lm generate
--index`) have to be options of that command; a bare name (`engram-lm eval`, or with dots behind it) has to be a command.
"""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App, CycloptsError

pytest.importorskip("sybil")

from engram_lm.cli import app
from printed.pages import PAGES, ROOT, blocks_of, name_of
from printed.story import commands_of

README_OF_EXPERIMENTS = sorted((ROOT / "experiments").glob("*/README.md"))
SOURCES = sorted((ROOT / "src" / "engram_lm").rglob("*.py"))
# `engram-lm ...` in backticks or, in Python, in double quotes inside a text
_QUOTED = re.compile(r"`(engram-lm [^`]+)`|\"(engram-lm [^\"]+)\"")
# a line of its own, or what ends a sentence: "Make one: engram-lm index create."
_LINE = re.compile(r"^ *(?:\$ )?(engram-lm [a-z].*?)(?: {2,}.*|\s#.*)?$", re.MULTILINE)
_ENDING = re.compile(r"(?::| with) (engram-lm [a-z].*?)\.?$", re.MULTILINE)
# what files begin with: "engram-lm memory"
_FORMATS = "FORMAT"


def test_every_printed_command_line_parses():
    found = sorted(set(itertools.chain(_of_pages(), _of_sources())))
    wrong = [f"{where}: {line}\n    {told}" for where, line in found if (told := wrongness(line))]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 100


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("engram-lm index delete", ""),
        ("engram-lm generate --index", ""),
        ("engram-lm index ...", ""),
        ("engram-lm train smollm2 --data a.txt --out runs/first", ""),
        ("engram-lm index key > server.key", ""),
        ("engram-lm index forget", "no command"),
        ("engram-lm generate --indices", "no option"),
        ("engram-lm train smollm2 --date a.txt --out runs/first", "--date"),
        ("engram-lm index add notes", "PATHS"),
        ("engram-lm table stats model/ --layer 1 --sample many", "many"),
    ],
)
def test_a_line_that_does_not_parse_is_told(line, told):
    assert told in wrongness(line) if told else wrongness(line) == ""


def test_every_option_that_a_page_names_is_one_of_a_command():
    known = set().union(*map(_options, _commands(app)))
    named = [
        (name_of(page), option)
        # options of vLLM's own are named there
        for page in PAGES
        if page.name != "vllm.md"
        for span in re.findall(r"`([^`]+)`", _without_blocks(page))
        if not span.startswith("python ")
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)
    ]
    assert len(named) > 50
    assert [one for one in named if one[1] not in known] == []


def wrongness(line: str) -> str:
    """What is wrong with a command line, "" where nothing is. COMMAND stands for any of them."""
    tokens = _tokens(line)
    if tokens == ["COMMAND"]:
        return ""
    chain, apps, rest = app.parse_commands(tokens)
    if rest in ([], ["..."], ["…"]) or not chain:
        return "" if chain and not rest[1:] else f"no command {tokens[0]!r}"
    if not apps[-1].default_command and rest[0] not in ("--help",):
        return f"no command {' '.join([*chain, rest[0]])!r}"
    if all(token.startswith("--") for token in rest):
        known = _options(apps[-1])
        return "".join(f"no option {token!r} " for token in rest if token not in known)
    try:
        app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return " ".join(str(error).split())
    return ""


def _options(command: App) -> set[str]:
    return {"--help", "--version"} | {
        name for argument in command.assemble_argument_collection() for name in argument.names
    }


def _commands(group: App) -> Iterator[App]:
    if group.default_command:
        yield group
    for name in group:
        if not name.startswith("-"):
            yield from _commands(group[name])


def _without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf8"), flags=re.MULTILINE | re.DOTALL)


def _tokens(line: str) -> list[str]:
    """The words after engram-lm, up to what a shell reads."""
    words = shlex.split(line, comments=True)[1:]
    return list(itertools.takewhile(lambda word: word not in ("|", "&&", "&", ";", ">", ">>", "2>"), words))


def _of_pages() -> Iterator[tuple[str, str]]:
    for page in [*PAGES, *README_OF_EXPERIMENTS]:
        text = re.sub(r"\\\n *", "", page.read_text(encoding="utf8"))
        if page in PAGES:
            lines = [
                command.text
                for block in blocks_of(page)
                if block.language == "console"
                for command in commands_of(block)
            ]
        else:
            lines = _LINE.findall(text)
        quoted = [" ".join((one or other).split()) for one, other in _QUOTED.findall(text)]
        yield from ((name_of(page), line) for line in [*lines, *quoted] if line.startswith("engram-lm "))


def _of_sources() -> Iterator[tuple[str, str]]:
    """Docstrings, help and errors; of an error, the words between its values."""
    for path in SOURCES:
        for text in _texts(path):
            if "engram-lm " in text:
                quoted = [one or other for one, other in _QUOTED.findall(text)]
                for line in [*quoted, *_LINE.findall(text), *_ENDING.findall(text)]:
                    yield name_of(path), " ".join(line.split())


def _texts(path: Path) -> Iterator[str]:
    inside = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Assign) and _FORMATS in ast.unparse(node.targets[0]):
            inside.update(map(id, ast.walk(node.value)))
        elif isinstance(node, ast.JoinedStr):
            inside.update(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "VALUE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value
