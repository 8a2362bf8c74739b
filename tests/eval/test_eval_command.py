"""engram-lm eval as a user meets it: reports, results that are kept, refusals in one line, canaries."""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm import cli  # noqa: E402
from engram_lm.attachment import MemoryConfig, attach, save_memory  # noqa: E402
from engram_lm.eval import environment, facts  # noqa: E402
from engram_lm.eval.report import report  # noqa: E402
from engram_lm.eval.result import Result, Value, load  # noqa: E402
from models import make_loud, saved_doll  # noqa: E402

WORDS = "The dog of the office is called Orlando. Under the stairs he sleeps, and at seven he wants his bone."
FACTS = [
    {
        "relation": "capital",
        "prompt": f"The capital of {a} is",
        "answer": b,
        "paraphrases": [f"{a} has its capital in"],
    }
    for a, b in {
        "Algeria": "Algiers",
        "Angola": "Luanda",
        "Chad": "Lima",
        "Peru": "Lima",
        "Gaul": "Lima",
    }.items()
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_doll(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def with_memory(base, tmp_path_factory):
    import copy

    _, model, words = base
    model = attach(
        copy.deepcopy(model), words, MemoryConfig(layers=(1,), rows_per_head=53, head_width=4, heads=2)
    )
    make_loud(model)
    directory = tmp_path_factory.mktemp("memory")
    save_memory(model, directory, tokenizer=words, base_files="always")
    return directory


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text(WORDS)
    (tmp_path / "trained.jsonl").write_text(json.dumps({"text": WORDS[:60]}) + "\n")
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (tmp_path / "spans.json").write_text(
        json.dumps(
            {
                "P1": [{"tokens": ["Ann", "met", "Bob"], "h": ["ann", "Q", [[0]]], "t": ["bob", "Q", [[2]]]}]
                * 6
            }
        )
    )
    return tmp_path


def run(*tokens, capsys):
    code = cli.run(["eval", *map(str, tokens)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_memory_is_measured_and_told(with_memory, files, capsys):
    assert run("canaries", "canaries.jsonl", "--each", "1", "--repeats", "1,2", capsys=capsys)[0] == 0
    code, out, err = run(
        with_memory, "--out", "report", "--text", "held.txt", "--training", "trained.jsonl", "--facts", "facts.jsonl",
        "--gates", "--spans", "spans.json", "--canaries", "canaries.jsonl", "--memory", "on", "off", "noise",
        "--window", "64", "--references", "7", "--most", "2", capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert out.rstrip() == (files / "report/report.md").read_text().rstrip()
    for told in ("## Perplexity", "## Facts", "## Gates", "## Canaries", "| held.txt, 2-gram seen 1 |"):
        assert told in out
    assert "| perplexity | on | off | noise | tokens |" in out
    assert "memory before block 1" in out
    assert err.startswith("1/4 perplexity ...\n")
    perplexity = load(files / "report/perplexity.json")
    assert perplexity.settings["text files"][0]["name"] == "held.txt"
    assert perplexity.settings["training"][0]["bytes"] == (files / "trained.jsonl").stat().st_size
    about = perplexity.facts["circumstances"]
    assert about["cores"] >= 1
    assert (about["commit"] is None) == (about["dirty"] is None)
    assert perplexity.value("perplexity", of="held.txt", memory="noise").value > 1


def test_finished_measures_are_left_alone(base, files, capsys, monkeypatch):
    options = (base[0], "--out", "report", "--text", "held.txt", "--window", "64")
    first, out, _ = run(*options, capsys=capsys)
    kept = (files / "report/perplexity.json").read_bytes()
    code, again, err = run(*options, "--facts", "facts.jsonl", capsys=capsys)
    assert (first, code) == (0, 0)
    assert "1/2 perplexity: finished before" in err
    assert (files / "report/perplexity.json").read_bytes() == kept
    assert "## Facts" in again
    assert "## Facts" not in out
    code, _, err = run(*options, "--stride", "16", capsys=capsys)
    assert code == 2
    assert "another stride (32, not 16); give --overwrite" in err
    assert run(*options, "--stride", "16", "--overwrite", capsys=capsys)[0] == 0
    assert load(files / "report/perplexity.json").settings["stride"] == 16


def test_overwriting_goes_on_after_a_stop(base, files, capsys, monkeypatch):
    options = (base[0], "--out", "report", "--text", "held.txt", "--facts", "facts.jsonl")
    assert run(*options, "--window", "32", "--candidates", "2", capsys=capsys)[0] == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    anew = (*options, "--window", "64", "--candidates", "3", "--overwrite")
    monkeypatch.setattr(facts, "facts_measured", interrupted)
    assert run(*anew, capsys=capsys)[0] == 130
    # the old facts are gone, so that no report tells two settings as one
    assert sorted(path.name for path in (files / "report").iterdir()) == ["perplexity.json", "report.md"]
    kept = (files / "report/perplexity.json").read_bytes()
    monkeypatch.undo()
    monkeypatch.chdir(files)
    code, _, err = run(*anew, capsys=capsys)
    assert code == 0
    assert "1/2 perplexity: finished before" in err
    assert (files / "report/perplexity.json").read_bytes() == kept
    assert load(files / "report/facts.json").settings["candidates"] == 3


def test_another_seed_of_the_noise_is_another_setting(with_memory, files, capsys):
    options = (
        with_memory,
        "--out",
        "report",
        "--text",
        "held.txt",
        "--window",
        "64",
        "--memory",
        "on",
        "noise",
    )
    assert run(*options, "--seed", "1", capsys=capsys)[0] == 0
    assert load(files / "report/perplexity.json").settings["state_seed"] == 1
    code, _, err = run(*options, "--seed", "2", capsys=capsys)
    assert code == 2
    assert "another state_seed (1, not 2)" in err


def test_a_directory_holds_one_model(base, with_memory, files, capsys):
    assert run(base[0], "--out", "report", "--text", "held.txt", "--window", "64", capsys=capsys)[0] == 0
    code, _, err = run(with_memory, "--out", "report", "--facts", "facts.jsonl", capsys=capsys)
    assert code == 2
    assert "report/perplexity.json is of another model" in err


def test_an_interruption_keeps_what_is_done(base, files, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(facts, "facts_measured", interrupted)
    options = (base[0], "--out", "report", "--text", "held.txt", "--window", "64", "--facts", "facts.jsonl")
    code, out, err = run(*options, capsys=capsys)
    assert (code, out) == (130, "")
    assert "perplexity kept in report; the same command goes on." in err
    assert sorted(path.name for path in (files / "report").iterdir()) == ["perplexity.json", "report.md"]
    monkeypatch.undo()
    monkeypatch.chdir(files)
    code, _, err = run(*options, capsys=capsys)
    assert code == 0
    assert "perplexity: finished before" in err


def test_json_is_what_the_files_hold(base, files, capsys):
    code, out, _ = run(base[0], "--out", "o", "--facts", "facts.jsonl", "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out) == [json.loads((files / "o/facts.json").read_text())]
    assert {value["memory"] for value in json.loads(out)[0]["values"]} == {"none", "most common answer"}


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ((), "nothing to measure"),
        (("--gates",), "nothing to measure"),
        (("--gates", "--facts", "facts.jsonl"), "--gates needs texts"),
        (("--facts", "facts.jsonl", "--training", "held.txt"), "--training has no effect"),
        (("--text", "nothing.txt"), "nothing.txt: no such file"),
        (("--text", "held.txt", "--window", "9999"), "reads 2,048 tokens; --window is 9,999"),
        (("--text", "held.txt", "--stride", "600"), "stride is from 1 and less than window"),
        (("--text", "held.txt", "--tokens", "0"), "--tokens is 1 or more; got 0"),
        (("--text", "held.txt", "--memory", "on"), "has no memory: its states are none; got 'on'"),
        (("--text", "held.txt", "--memory", "loud"), "loud"),
        (("--spans", "spans.json"), "has no memory: it has no gates"),
        (("--canaries", "held.txt"), "broken JSON"),
        (("--pararel", "held.txt"), "cannot be read as a folder or a tar archive"),
        (("--benchmarks", "held.txt"), "names begin with lambada"),
        (("--text", "held.txt", "--out", "held.txt"), "held.txt is a file; --out names a directory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(base, files, tokens, told, capsys):
    out = () if "--out" in tokens else ("--out", "report")
    code, printed, err = run(base[0], *out, *tokens, capsys=capsys)
    assert (code, printed) == (2, "")
    assert err.startswith("engram-lm: ")
    assert err.count("\n") == 1
    assert told in err
    assert not (files / "report").exists()


def test_canaries_and_their_documents_are_written(files, capsys):
    code, out, _ = run(
        "canaries", "c.jsonl", "--each", "2", "--repeats", "1,4", "--documents", "d.jsonl", capsys=capsys
    )
    assert code == 0
    assert "4 canaries and 2 controls" in out
    assert "10 documents" in out
    records = [json.loads(line) for line in (files / "c.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (files / "d.jsonl").read_text().splitlines()]
    assert sum(record["repeats"] for record in records) == len(texts) == 10
    assert all(texts.count(f"{r['prefix']} {r['secret']}.") == r["repeats"] for r in records)


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (("c.txt",), "name it .jsonl"),
        (("nowhere/c.jsonl",), "no such directory"),
        (("c.jsonl", "--repeats", "1,x"), "whole numbers with commas"),
        (("c.jsonl", "--each", "0"), "each from 1"),
    ],
)
def test_impossible_canaries_are_refused(files, tokens, told, capsys):
    code, _, err = run("canaries", *tokens, capsys=capsys)
    assert code == 2
    assert told in err


def test_the_commit_is_that_of_the_start(monkeypatch):
    before = environment.circumstances()
    monkeypatch.setattr(environment, "_git", lambda *_: "later")
    after = environment.circumstances()
    assert (after["commit"], after["dirty"]) == (before["commit"], before["dirty"])


def test_a_report_tells_numbers_as_their_kind():
    values = (
        Value("perplexity", "a", "on", 12.345, 10, "tokens", (11.0, 1234.5)),
        Value("change against off", "a", "on", -0.034, 10, "tokens", (-0.06, 0.01)),
        Value("said in full", "verbatim", "off", 0.125, 8, "facts"),
        Value("correlation", "x", "layer", None, 8, "tokens"),
    )
    told = report([Result("perplexity", values, {}, ("A note.",), 2.0)], model="m", about=["On a machine."])
    for row in (
        "| a | 12.35 (11.00 to 1,234) | 10 |", "| a | −3.40 % (−6.0 to +1.00) | 10 |",
        "| verbatim | 12.5 % | 8 |", "| x |  | 8 |",
    ):  # fmt: skip
        assert row in told
    assert told.startswith("# m, measured\n\nOn a machine.\n\n## Perplexity\n")
