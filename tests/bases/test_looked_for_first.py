"""What a command names is looked for before anything is loaded: every refusal here comes without torch, and without a hub.

All command lines run in one process, one after the other; after each it is asked whether torch was imported.
"""

import json
import subprocess
import sys

import pytest

from engram_lm.bases.recipes import byte_backend
from engram_lm.library import Library

PROGRAM = """
import contextlib, io, json, sys
from engram_lm import cli
told, heavy = [], {"torch", "transformers"}
for line in json.load(sys.stdin):
    before, error = heavy & set(sys.modules), io.StringIO()
    with contextlib.redirect_stderr(error):
        code = cli.run(line)
    told.append([code, error.getvalue(), sorted(heavy & set(sys.modules) - before)])
json.dump(told, sys.stdout)
"""

TYPO = "Did you mean smollm2?"
NO_FILE = "no such file"
# Command lines in a directory that holds what the fixture lays, and what they are answered.
REFUSED = {
    "train smolm2 --data text.txt --out new": TYPO,
    "train ./modell --data text.txt --out new": "Did you mean model?",
    "train text.txt --data text.txt --out new": "text.txt is a file",
    "train smollm2 --data nothing.txt --out new": NO_FILE,
    "train smollm2 --data text.txt empty.txt --out new": "empty.txt is empty",
    "train smollm2 --data blank.jsonl --out new": "blank.jsonl is empty",
    "train smollm2 --data lines.jsonl --field body --out new": "no field 'body'; there are: 'text'",
    "train smollm2 --data latin.txt --out new": "is not UTF-8",
    "train smollm2 --data cut.txt.xz --out new": "damaged or cut short",
    "train smollm2 --data . --out new": "is a directory",
    "train smollm2 --data text.txt --out text.txt": "is a file; --out names a directory",
    "train smollm2 --data text.txt --out full": "is not empty and holds no run",
    "train --resume --out new": "holds no run to resume",
    "ablate smolm2 --data text.txt --out new": TYPO,
    "ablate smollm2 --data nothing.txt --out new": NO_FILE,
    "ablate smollm2 --data text.txt --texts other=nothing.txt --out new": NO_FILE,
    "ablate smollm2 --data text.txt --out full": "holds no ablation",
    "eval smolm2 --text text.txt --out new": TYPO,
    "eval smollm2 --text nothing.txt --out new": NO_FILE,
    "eval smollm2 --text text.txt --training nothing.txt --out new": NO_FILE,
    "eval smollm2 --text text.txt --out text.txt": "is a file; --out names a directory",
    "adapt smolm2 documents --out new": TYPO,
    "adapt smollm2 nowhere --out new": "no such file or folder",
    "adapt smollm2 documents --out new --general nothing.txt": NO_FILE,
    "adapt smollm2 documents --out new --questions nothing.jsonl": "nothing.jsonl",
    "adapt smollm2 documents --out new --gate nothing.json": "no gate can be read here",
    "adapt smollm2 documents --out text.txt": "is a file; --out names a directory",
    "generate smollm2 text": "smollm2 has no memory yet. Train one: `engram-lm train smollm2",
    "generate smollm2 text ": "To go on without one, mix documents in: --index DIR.",
    "generate model text": "model has no memory yet. Train one: `engram-lm train model",
    "generate ./modell text": "no such directory. Did you mean model?",
    "generate smolm2 text --index notes": TYPO,
    "generate smollm2 text --index nowhere": "nowhere holds no index. Make one: engram-lm index create",
    "generate smollm2 text --index notes --gate nothing.json": "no gate can be read here",
    "generate smollm2 text --index notes --gate text.txt --lam 0.3": "exclude each other",
    "generate smollm2 text --index notes --lam 1.5": "at least 0 and less than 1",
    "trace smollm2 text": "smollm2 has no memory yet",
    "trace nowhere text": "no such directory",
    "demo --memory nowhere": "no such directory",
    "demo --memory smollm2": "smollm2 has no memory yet",
    "gate fit smolm2 --index notes --general text.txt --out gate.json": TYPO,
    "gate fit smollm2 --index nowhere --general text.txt --out gate.json": "holds no index",
    "gate fit smollm2 --index notes --general nothing.txt --out gate.json": NO_FILE,
    "gate fit smollm2 --index notes --general text.txt --out nowhere/gate.json": "nowhere is no directory",
    "gate fit smollm2 --index notes --general text.txt --out g.json --plot nowhere/g.png": "is no directory",
    "gate report nothing.json": "no gate can be read here",
    "serve smolm2": TYPO,
    "serve smollm2 --index nowhere": "holds no index",
    "serve smollm2 --index notes --gate nothing.json": "no gate can be read here",
    "serve smollm2 --index notes --quiz nothing.json": "nothing.json cannot be read",
    "index create notes --model smollm2": "holds an index already. Name another directory, or add to it: engram-lm index add",
    "index create text.txt --model smollm2": "text.txt is a file; an index is a directory",
    "index create new --model smolm2": TYPO,
    "index create new --model tokenizer.json": NO_FILE,
    "index add nowhere text.txt": "holds no index",
    "table simulate --tokens nothing.txt --profile qwen-ple --tokenizer smolm2": NO_FILE,
    "table simulate --tokens text.txt --profile qwen-ple --tokenizer smolm2": TYPO,
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each line is answered: its exit code, what it says, and which of torch and transformers it imports."""
    place = tmp_path_factory.mktemp("work")
    (place / "text.txt").write_text("Annual leave is thirty days.\n")
    (place / "empty.txt").write_text("")
    (place / "blank.jsonl").write_text("\n\n")
    (place / "lines.jsonl").write_text('{"text": "x"}\n')
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "cut.txt.xz").write_bytes(b"\xfd7zXZ\x00\x00")
    for directory in ("model", "full", "documents"):
        (place / directory).mkdir()
    (place / "model" / "config.json").write_text("{}")
    (place / "full" / "somebody's").write_text("x")
    for n in range(2):
        (place / "documents" / f"{n}.md").write_text(f"Page {n}.")
    Library.create(place / "notes", tokenizer=byte_backend()).store.close()
    lines = [line.split() for line in REFUSED]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], input=json.dumps(lines), cwd=place, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = {path.name for path in place.iterdir()}
    assert not left & {"new", "gate.json", "g.json"}
    return dict(zip(REFUSED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_comes_before_anything_is_loaded(line, answers):
    code, told, imported = answers[line]
    assert code == 2
    assert REFUSED[line] in told
    assert told.count("\n") == 1
    assert imported == []
