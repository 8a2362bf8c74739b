"""The sentence about an extra that is not installed: its command is right for a clone, a wheel and an sdist."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError

import pytest

from engram_lm import extras
from places import ROOT

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
        text = path.read_text(encoding="utf8")
        for node in ast.walk(ast.parse(text)) if "missing(" in text else ():
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


BASE_INSTALL = """
import contextlib, io, json, os, sys
for name in "torch transformers safetensors gguf peft matplotlib fastapi uvicorn bm25s markitdown".split():
    sys.modules[name] = None
from engram_lm import cli
from engram_lm.bases import smollm2
def fetched(*given, **options):
    raise AssertionError("something was fetched")
smollm2.download_wheel = fetched
told = []
for line in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = cli.run(line)
    told.append([code, error.getvalue().splitlines()])
json.dump(told, sys.stdout)
"""

# Command lines of an installation without extras, and the extra that each is answered with; none: it works.
WITHOUT_EXTRAS = {
    "index create notes --model model": None,
    "index add notes text.txt": None,
    "index search notes leave": None,
    "index add notes paper.pdf": "documents",
    "index create other --model smollm2": "hf",
    "generate MEMORY text": "hf",
    "generate smollm2 text --index notes": "hf",
    "trace MEMORY text": "hf",
    "demo": "hf",
    "train smollm2 --data text.txt --out new": "hf",
    "ablate smollm2 --data text.txt --out new": "hf",
    "eval smollm2 --text text.txt --out new": "hf",
    "adapt smollm2 documents --out new": "hf",
    "gate fit smollm2 --index notes --general text.txt --out gate.json": "hf",
    "table simulate --tokens text.txt --profile qwen-ple --eos-ids 1 --tokenizer model --plot a.png": "hf",
    "serve": "serve",
}


def test_an_installation_without_extras_says_which_one_a_command_needs(tmp_path):
    from engram_lm.bases.recipes import byte_backend
    from engram_lm.demo import memory

    (tmp_path / "model").mkdir()
    byte_backend().save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("Annual leave is thirty days.\n" * 3)
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "documents").mkdir()
    for n in range(2):
        (tmp_path / "documents" / f"{n}.md").write_text(f"Page {n}.")
    lines = [
        [str(memory()) if word == "MEMORY" else word for word in line.split()] for line in WITHOUT_EXTRAS
    ]
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL], input=json.dumps(lines), cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"ENGRAM_CACHE": str(tmp_path / "cache")}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (line, extra), (code, told) in zip(WITHOUT_EXTRAS.items(), json.loads(done.stdout), strict=True):
        assert code == (0 if extra is None else 2), (line, told)
        if extra is not None:
            assert f'the extra "{extra}" of engram-lm. Install it: ' in told[-1], line
            assert told[-1].startswith("engram-lm: ")
