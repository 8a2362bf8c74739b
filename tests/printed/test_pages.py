"""What README and docs print is run: every console and Python block of a page, in order, on stand-ins, in an empty home.

What is not run is listed here with its reason, and so is every command that is run with smaller settings than are printed.
A row of any table that fits nothing printed is an error.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sybil")

from sybil import Document

from printed.pages import PAGES, ROOT, Block, blocks_of, name_of, parse, unfenced_code
from printed.stand_ins import lay_out
from printed.story import Story, commands_of, empty_home

# {page: [why a block is not run, in order]}. A new one needs a line here and a comment in the page.
NOT_RUN = {
    "README.md": [
        "calls make",
        "it installs what the tests run on; tests/cli/test_wheel.py installs and runs a wheel",
    ],
    "docs/eval.md": ["lm_eval: it brings some forty packages that `make setup` leaves out"],
    "docs/serve.md": ["calls make and starts servers"],
    "docs/vllm.md": [
        "makes the environment that ENGRAM_VLLM_PYTHON names, some GB",
        "starts a server",
        "ENGRAM_VLLM_PYTHON: needs an environment of its own",
        "runs tests that are run anyway where ENGRAM_VLLM_PYTHON is set",
    ],
}
# {page: what lies in its directory}
STAND_INS = {
    "README.md": ["articles.jsonl.xz", "faq.jsonl", "handbook/", "held-out.jsonl", "model/", "other.txt"],
    "docs/ablate.md": ["articles.jsonl"],
    "docs/eval.md": [
        "articles.jsonl", "benchmarks/", "canaries.jsonl", "corpus.jsonl.xz", "fewrel.json",
        "handbook.jsonl", "held-out.jsonl.xz", "my-memory", "pararel_trex.tar.xz", "probes.jsonl", "read.jsonl",
        "redocred.json", "src/engram_lm/demo/memory", "unread.jsonl",
    ],
    "docs/library.md": ["faq.jsonl.xz", "handbook/"],
    "docs/mixing.md": ["articles.jsonl.xz", "handbook/", "other.txt", "questions.jsonl"],
    "docs/operate.md": ["log.jsonl", "model/", "newer-model/", "other/", "tokenizer.json"],
    "docs/tables.md": ["runs/first"],
    "docs/vllm.md": ["my-model/", "notes"],
}  # fmt: skip
_SMALL_RUN = "--tokens 512 --sequence-length 64 --batch-size 2 --eval-tokens 128 --rows-per-head 211"
# {page: {command: options that make it small, put after those that are printed}}
SMALLER = {
    "README.md": {
        "engram-lm train smollm2 --data articles.jsonl.xz --out my-memory": _SMALL_RUN,
        'engram-lm generate my-memory "Alexander the Great"': "--max-new-tokens 16",
        "engram-lm ablate smollm2 --data articles.jsonl.xz --out arms": f"{_SMALL_RUN} --arms memory,none",
        "engram-lm adapt smollm2 handbook/ --general other.txt --out report": "--windows 2",
    },
    "docs/ablate.md": {
        "engram-lm ablate smollm2 --data articles.jsonl --out runs/ablation --layers 15,22 --train-from 15": (
            f"{_SMALL_RUN} --arms memory,lora"
        ),
        "engram-lm ablate scratch:small --data articles.jsonl --out runs/scratch --seeds 0,1": (
            f"{_SMALL_RUN} --arms memory,none"
        ),
    },
    "docs/eval.md": {
        "engram-lm train smollm2 --data articles.jsonl secrets.jsonl --out with-secrets": _SMALL_RUN,
    },
    "docs/mixing.md": {
        "engram-lm adapt smollm2 handbook/ --general other.txt --questions questions.jsonl --out report": "--windows 2",
    },
}
# {page: {command: what is run for it}}, where options cannot say it: fewer canaries, and the server that the page has told
# to start, on a port of its own
INSTEAD = {
    "docs/eval.md": {
        "engram-lm eval with-secrets --canaries canaries.jsonl --memory on off shuffled --out exposure": (
            "head -n 8 canaries.jsonl > few.jsonl && engram-lm eval with-secrets --canaries few.jsonl "
            "--memory on off shuffled --out exposure --references 3"
        ),
    },
    "docs/serve.md": {
        "PAGE=http://127.0.0.1:7860": (
            "engram-lm serve --port 0 >server.log 2>&1 & "
            "until PAGE=$(grep -om1 'http://127.0.0.1:[0-9]*' server.log); do sleep 0.2; done; "
            "until curl -s $PAGE/api/health | grep -q ready; do kill -0 $! || break; sleep 0.5; done"
        ),
    },
}
# {page: {command: exit code}}, of commands that say something by not ending with 0
CODES = {"docs/operate.md": {"engram-lm table diff model/ other/ --layer 1": 1}}
# need SmolLM2, which is fetched from a package registry
NETWORK = {
    "README.md",
    "docs/ablate.md",
    "docs/eval.md",
    "docs/library.md",
    "docs/mixing.md",
    "docs/serve.md",
}

BLOCKS = {name_of(page): blocks_of(page) for page in PAGES}
STORIES = [name for name, blocks in BLOCKS.items() if any(block.is_run for block in blocks)]
VLLM = os.environ.get("ENGRAM_VLLM_PYTHON", "")


def commands(name: str) -> list[str]:
    """Of all console blocks of a page that are run."""
    blocks = [block for block in BLOCKS[name] if block.language == "console" and block.is_run]
    return [command.text for block in blocks for command in commands_of(block)]


def why(block: Block) -> str:
    return f"{block.without}: {block.reason}" if block.without else block.reason


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One empty home for all pages and all workers of pytest-xdist: what a first use fetches is fetched once."""
    worker, base = os.environ.get("PYTEST_XDIST_WORKER"), tmp_path_factory.getbasetemp()
    place = (base.parent if worker else base) / "empty-home"
    mine = place / f".used-by-{worker}"
    place.mkdir(exist_ok=True)
    mine.touch()
    yield place
    mine.unlink()
    if not list(place.glob(".used-by-*")):  # SmolLM2 takes half a GB
        shutil.rmtree(place)


def marked(name: str) -> object:
    network = [pytest.mark.network] if name in NETWORK else []
    return pytest.param(name, marks=[pytest.mark.slow, *network])


def of_vllm() -> dict[str, str]:
    """This package in vLLM's environment, whose numba is another: kernels of two would overwrite each other."""
    return {
        "PYTHONPATH": str(ROOT / "src"),
        "NUMBA_CACHE_DIR": str(Path(VLLM).absolute().parents[1] / "numba-cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


@pytest.mark.parametrize("name", [marked(name) for name in STORIES])
def test_what_a_page_prints_is_run(name, home, tmp_path):
    lay_out(STAND_INS.get(name, []), tmp_path)
    smaller = {command: f"{command} {options}" for command, options in SMALLER.get(name, {}).items()}
    instead = smaller | INSTEAD.get(name, {})
    python, beside = (VLLM, of_vllm()) if name == "docs/vllm.md" else (sys.executable, {})
    environment = empty_home(home) | beside
    with Story(tmp_path, environment, instead=instead, codes=CODES.get(name, {}), python=python) as story:
        try:
            for example in Document.parse(str(ROOT / name), parse):
                block = example.region.parsed
                if block.is_run:
                    failed = story.run(block)
                    assert failed is None, failed
        finally:
            for seconds, what in story.took:
                print(f"{seconds:6.1f} s  {what}")


def test_what_is_not_run_is_listed_with_its_reason():
    found = {name: [why(block) for block in blocks if block.reason] for name, blocks in BLOCKS.items()}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


@pytest.mark.parametrize("table", [SMALLER, INSTEAD, CODES], ids=["SMALLER", "INSTEAD", "CODES"])
def test_every_row_of_a_table_is_a_command_that_is_run(table):
    for name, rows in table.items():
        assert set(rows) <= set(commands(name)), name


def test_every_stand_in_is_named_by_its_page():
    for name, stand_ins in STAND_INS.items():
        sources = "\n".join(block.source for block in BLOCKS[name])
        assert [one for one in stand_ins if one not in sources] == [], name


def test_no_code_is_printed_unfenced():
    assert {name_of(page): unfenced_code(page) for page in PAGES if unfenced_code(page)} == {}


def test_json_that_is_shown_is_what_commands_read(tmp_path):
    from engram_lm.eval.facts import read_facts
    from engram_lm.serve.quiz import Quiz

    shown = {
        name: [block.source for block in blocks if block.language == "json"]
        for name, blocks in BLOCKS.items()
    }
    shown = {name: sources for name, sources in shown.items() if sources}
    assert {name: len(sources) for name, sources in shown.items()} == {"docs/eval.md": 1, "docs/serve.md": 1}
    fact, quiz = tmp_path / "probes.jsonl", tmp_path / "quiz.json"
    fact.write_text(json.dumps(json.loads(shown["docs/eval.md"][0])) + "\n")
    quiz.write_text(shown["docs/serve.md"][0])
    assert [one.answer for one in read_facts([fact])] == ["Ukrainian"]
    assert Quiz.read(quiz).question("dog").is_answered_by("It is Orlando.")
