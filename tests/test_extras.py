"""The sentence about an extra that is not installed: its command is right for a clone, a wheel and an sdist."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from engram_lm import extras

ROOT = Path(__file__).parents[1]
METADATA = [
    "numpy>=1.26",
    'torch>=2.13; extra == "hf"',
    "markitdown[docx,pdf]>=0.1; extra == 'documents'",
    "bm25s>=0.2 ; extra == 'serve'",
    "hfx; extra == 'hf-of-another'",
    "only-there; (extra == 'hf') and python_version < '3'",
]


def test_the_command_names_the_libraries_of_that_extra(monkeypatch):
    monkeypatch.setattr(extras, "requires", lambda name: METADATA)
    monkeypatch.setattr(extras, "_pip", lambda: "pip")
    assert extras.install_command("hf") == 'pip install "torch>=2.13"'
    assert extras.install_command("documents") == 'pip install "markitdown[docx,pdf]>=0.1"'
    error = extras.missing("The page needs bm25s", "serve")
    assert str(error) == (
        'The page needs bm25s, the extra "serve" of engram-lm. Install it: pip install "bm25s>=0.2"'
    )


def test_a_source_that_is_not_installed_is_told_so(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    assert extras.requirements_of("hf") == []
    assert extras.install_command("hf") == 'install engram-lm, not its source alone, with the extra "hf"'


def test_pip_is_the_one_of_this_python(tmp_path, monkeypatch):
    mine, other = tmp_path / "my env" / "bin", tmp_path / "other" / "bin"
    for directory in (mine, other):
        directory.mkdir(parents=True)
        (directory / "pip").write_text("#!/bin/sh\n")
        (directory / "pip").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(mine / "python"))
    monkeypatch.setenv("PATH", str(mine))
    assert extras._pip() == "pip"
    monkeypatch.setenv("PATH", str(other))
    assert extras._pip() == f"'{mine}/python' -m pip"


def extras_named_in_source():
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "missing"
                and len(node.args) == 2
            ):
                yield path.name, node.args[1].value


def test_every_extra_that_a_message_names_is_one():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"][
        "optional-dependencies"
    ]
    named = list(extras_named_in_source())
    assert {extra for _, extra in named} == {"hf", "serve", "documents", "retrieval", "eval", "vllm"}
    assert [(file, extra) for file, extra in named if extra not in known] == []


@pytest.mark.parametrize("pattern", ["README.md", "docs/*.md", "src/**/*.py"])
def test_nothing_says_that_an_index_has_engram_lm(pattern):
    """The distribution is on no package index: what says so sends people to an error, or to somebody else's package."""
    said = re.compile(r"pip install\b[^\n`#]*(?<![\w./])engram-lm\b(?!\.git)")
    found = [
        f"{path.name}: {match[0]}"
        for path in sorted(ROOT.glob(pattern))
        for match in said.finditer(path.read_text(encoding="utf8"))
        if ".whl" not in match[0]
    ]
    assert found == []
