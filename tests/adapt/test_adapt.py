"""engram-lm adapt: halves, windows, arms against plain computations, a run that goes on after a stop, refusals."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bm25s")

from engram_lm import cli  # noqa: E402
from engram_lm.adapt import arms as arms_module  # noqa: E402
from engram_lm.adapt.answers import Question, read_questions  # noqa: E402
from engram_lm.adapt.arms import Arms, TimedReader  # noqa: E402
from engram_lm.adapt.kept import ResultRows  # noqa: E402
from engram_lm.adapt.passages import Passages  # noqa: E402
from engram_lm.adapt.report import perplexities  # noqa: E402
from engram_lm.adapt.texts import Window, copied, split, window_of  # noqa: E402
from engram_lm.bases.recipes import byte_tokenizer  # noqa: E402
from engram_lm.errors import ConfigError, DataError  # noqa: E402
from engram_lm.index.segment import Document, Segment  # noqa: E402
from engram_lm.index.snapshot import LiveSegment, Snapshot  # noqa: E402
from engram_lm.library.encoding import TextEncoder  # noqa: E402
from engram_lm.mixing import FixedLambda, rules_of, score  # noqa: E402
from models import saved_doll  # noqa: E402

PAGES = {
    "page0.txt": "The dog of the office is called Orlando. Under the stairs he sleeps, and at seven he wants his bone.",
    "page1.txt": "Annual leave runs to thirty days a year, asked for by letter, five of which move on into January.",
    "page2.txt": "Parrots bite! Cleo lives above our lobby; whoever feeds her must first wash both hands with soap.",
    "page3.txt": "Broken microscopes go into crate nine. Mabel repairs some each Friday; bills are paid by accounts.",
    "page4.txt": "Visitors sign here, get red badges, never walk alone past gate four, nor photograph any furnace.",
    "page5.txt": "Snow closes Turbo Road from November until spring: take buses, or ask Ahab about borrowing skis.",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved_doll(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "my pages"
    directory.mkdir()
    for name, text in PAGES.items():
        (directory / name).write_text(text)
    return directory


def memory_of(encoder, texts):
    segment = Segment.build(
        encoder.encode_all(texts.values()), vocab_size=encoder.vocab_size,
        documents=[Document(id=name) for name in texts],
    )  # fmt: skip
    return Snapshot([LiveSegment(segment)], vocab_size=encoder.vocab_size)


def test_halves_hold_whole_documents_and_every_one_once():
    indexed, unseen = split([f"d{n}" for n in range(7)], seed=3)
    assert (len(indexed), len(unseen)) == (4, 3)
    assert sorted(indexed + unseen) == [f"d{n}" for n in range(7)]
    assert split([f"d{n}" for n in range(7)], seed=3) == (indexed, unseen)
    assert split([f"d{n}" for n in range(7)], seed=4) != (indexed, unseen)


def test_a_window_is_at_one_place_of_its_document():
    ids = np.arange(1000)
    window = window_of(ids, kind="unseen", id="a")
    assert (len(window.ids), window.given, window.scored) == (320, 64, 256)
    assert np.array_equal(window.ids, np.arange(window.ids[0], window.ids[0] + 320))
    assert window_of(ids, kind="unseen", id="a").ids[0] == window.ids[0]
    assert window_of(ids[:100], kind="unseen", id="a").given == 20
    assert window_of(ids[:47], kind="unseen", id="a") is None


def test_copied_counts_runs_of_thirteen_tokens_and_no_shorter_ones():
    encoder = TextEncoder.of(byte_tokenizer())
    snapshot = memory_of(encoder, {"a": "The office dog is called Orlando."})
    # 14 letters, the last of them at the end of the text; then 12
    assert copied(encoder.encode("#### dog is called"), snapshot) == pytest.approx(14 / 18)
    assert copied(encoder.encode("###### is called "), snapshot) == 0.0
    assert copied(encoder.encode("Quantum physics"), snapshot) == 0.0


def test_arms_are_what_plain_computations_give(base):
    _, model, tokenizer = base
    encoder = TextEncoder.of(tokenizer)
    documents = {name: encoder.encode(text) for name, text in PAGES.items()}
    snapshot = memory_of(encoder, PAGES)
    rules = rules_of(tokenizer, model, snapshot)
    gate = FixedLambda(0.6)
    arms = Arms(TimedReader(model, tokenizer), encoder, rules, gate, fixed=0.3)
    window = window_of(documents["page0.txt"], kind="indexed", id="page0.txt")
    passages = Passages(snapshot, documents, encoder)
    rows = {row["arm"]: row for row in arms.score(window, {"6": snapshot}, {"6": passages})}

    def plain(ids, lam):
        scored = score(model, torch.as_tensor(ids), snapshot, FixedLambda(lam), rules=rules)
        return float(scored.log_p[0][-window.scored :].sum())

    with torch.no_grad():
        log_p = model(torch.as_tensor(window.ids)[None]).logits[0].double().log_softmax(-1)
    places = np.arange(window.given, len(window.ids))
    alone = float(log_p[places - 1, window.ids[places]].sum())
    assert rows["alone"]["log_p"] == pytest.approx(alone, abs=1e-3)
    assert rows["memory"]["log_p"] == pytest.approx(plain(window.ids, 0.6), abs=1e-3)
    assert rows["fixed"]["log_p"] == pytest.approx(plain(window.ids, 0.3), abs=1e-3)
    assert rows["memory"]["log_p"] > rows["fixed"]["log_p"] > rows["alone"]["log_p"]
    query = tokenizer.decode(window.ids[: window.given])
    before = np.concatenate([passages.best(query), encoder.encode("\n\n")])
    assert np.array_equal(before[:-2], documents["page0.txt"])
    longer = np.concatenate([before, window.ids])
    assert rows["retrieval"]["log_p"] == pytest.approx(plain(longer, 0.0), abs=1e-3)
    assert rows["both"]["log_p"] == pytest.approx(plain(longer, 0.6), abs=1e-3)
    assert rows["retrieval"]["prompt_tokens"] == rows["both"]["prompt_tokens"] == len(before)
    assert {row["tokens"] for row in rows.values()} == {window.scored}


def test_a_window_that_nothing_is_found_for_is_read_without_a_passage(base):
    _, model, tokenizer = base
    encoder = TextEncoder.of(tokenizer)
    snapshot = memory_of(encoder, {"a": "xylophone"})
    window = Window(encoder.encode("Wholly other words stand here, one and all of them."), 10, "general", "g")
    arms = Arms(
        TimedReader(model, tokenizer), encoder, rules_of(tokenizer, model, snapshot), FixedLambda(0.5)
    )
    passages = Passages(snapshot, {"a": encoder.encode("xylophone")}, encoder)
    rows = {row["arm"]: row for row in arms.score(window, {}, {"1": passages})}
    assert rows["retrieval"]["log_p"] == rows["alone"]["log_p"]
    assert rows["retrieval"]["prompt_tokens"] == 0


def test_rows_are_kept_and_a_torn_line_is_cut_off(tmp_path):
    kept = ResultRows(tmp_path, {"seed": 0})
    kept.add({"arm": "memory", "index": "10", "log_p": -1.0}, key="a\u2028b")
    kept.add({"arm": "memory", "index": "all", "log_p": -2.0}, key="a\u2028b")
    with open(tmp_path / "memory.jsonl", "a") as file:
        file.write('{"key": "torn", "arm": "mem')
    again = ResultRows(tmp_path, {"seed": 0})
    assert again.has("memory", "a\u2028b")
    assert not again.has("memory", "torn")
    assert [row["log_p"] for row in again.rows("memory")] == [-1.0, -2.0]
    again.add({"arm": "memory", "index": "10", "log_p": -3.0}, key="a\u2028b")
    assert sorted(row["log_p"] for row in ResultRows(tmp_path, {"seed": 0}).rows("memory")) == [-3.0, -2.0]
    with pytest.raises(ConfigError, match=r"another seed \(0, not 1\); name another --out"):
        ResultRows(tmp_path, {"seed": 1})


def test_perplexity_is_of_tokens_and_intervals_of_documents():
    def row(log_p, tokens):
        return {
            "domain": "d", "kind": "unseen", "arm": "memory", "index": "all", "tokens": tokens, "log_p": log_p,
            "log_p_alone": 2 * log_p, "mean_lambda": 0.5, "prompt_tokens": 0, "model_seconds": 1.0, "memory_seconds": 0.0,
        }  # fmt: skip

    (group,) = perplexities([row(-10.0, 10), row(-90.0, 30)])
    assert group["perplexity"] == pytest.approx(np.exp(100 / 40))
    assert group["change"] == pytest.approx(np.exp(-100 / 40) - 1)
    assert group["interval"] is None
    (group,) = perplexities([row(-10.0 - n, 10) for n in range(8)])
    low, high = group["interval"]
    assert np.exp(1.0) < low < group["perplexity"] < high < np.exp(1.7)
    low, high = group["change_interval"]
    assert low < group["change"] < high < 0


def test_the_command_reports_and_goes_on_where_it_stopped(base, folder, tmp_path, capsys, monkeypatch):
    general, asked, out = tmp_path / "general.txt", tmp_path / "questions.jsonl", tmp_path / "out"
    general.write_text(
        "Far out in the ocean the water is as blue as the petals of the loveliest cornflower. " * 3
    )
    asked.write_text('{"question": "What is the dog of the office called?", "answer": "Orlando"}\n')
    command = ["adapt", str(base[0]), str(folder), "--out", str(out), "--lam", "0.6"]
    command += ["--general", str(general), "--questions", str(asked)]
    read = TimedReader.__call__
    reads = []

    def stops_after_seven(self, ids, last):
        if len(reads) == 7:
            raise KeyboardInterrupt
        reads.append(len(ids))
        return read(self, ids, last)

    monkeypatch.setattr(arms_module.TimedReader, "__call__", stops_after_seven)
    assert cli.run(command) == cli.INTERRUPTED
    capsys.readouterr()
    monkeypatch.setattr(arms_module.TimedReader, "__call__", lambda *call: reads.append(0) or read(*call))
    assert cli.run(command) == 0
    told = capsys.readouterr().out
    # 6 pages and a general text, each alone and with a passage; what was whole is not read again
    assert len(reads) <= 15
    assert told == (out / "report.md").read_text()
    assert "3 documents in the index" in told
    assert "| documents left out of it |" in told
    assert "| general text |" in told
    results = json.loads((out / "results.json").read_text())
    by = {(group["arm"], group["index"], group["kind"]): group for group in results["perplexity"]}
    assert by["memory", "3", "indexed"]["perplexity"] < 4 < by["alone", "", "indexed"]["perplexity"]
    assert by["memory", "1", "indexed"]["windows"] == 1
    assert {one["arm"]: one["answered"] for one in results["questions"]}["alone"] == 0.0
    reads.clear()
    assert cli.run([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert reads == []
    assert again == results
    # the index is left with all documents, for generate
    assert cli.run(["index", "search", str(out / "index"), "crate nine. Mabel repairs", "--json"]) == 0
    assert "page3.txt" in capsys.readouterr().out
    assert cli.run([*command, "--seed", "5"]) == 2
    assert "holds a run with another seed (0, not 5); name another --out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--windows", "0"], "--windows is 1 or more; got 0."),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--lam", "1.5"], "less than 1; got 1.5."),
        ([], "No gate is shipped for this model"),
    ],
)
def test_what_the_command_refuses(base, folder, tmp_path, capsys, change, message):
    command = ["adapt", str(base[0]), str(folder), "--out", str(tmp_path / "out")]
    assert cli.run([*command, *change]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert message in told


def test_one_document_cannot_be_split(base, tmp_path, capsys):
    (tmp_path / "one.txt").write_text(PAGES["page0.txt"])
    command = [
        "adapt",
        str(base[0]),
        str(tmp_path / "one.txt"),
        "--out",
        str(tmp_path / "out"),
        "--lam",
        "0.5",
    ]
    assert cli.run(command) == 2
    assert "Two documents or more are needed" in capsys.readouterr().err


def test_questions_are_lines_with_an_answer(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Who?", "answer": "Cleo"}\n')
    assert read_questions(path) == [Question("Who?", "Cleo", "1")]
    assert read_questions(path)[0].is_answered_by("It is CLEO, they say.")
    assert not read_questions(path)[0].is_answered_by("Cleopatra")
    path.write_text('{"question": "Who?", "answer": "Cleo"}\n{"question": "Where?"}\n')
    with pytest.raises(DataError, match=r"questions.jsonl:2: a question and an answer are wanted"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no question"):
        read_questions(path)
