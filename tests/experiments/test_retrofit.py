"""The retrofit experiment: what its texts hold, and that its README says what its result files say."""

import importlib.util
import json
import lzma
import sys

import pytest

from places import ROOT

pytest.importorskip("torch")

HERE = ROOT / "experiments" / "retrofit"


def module(name):
    spec = importlib.util.spec_from_file_location(f"retrofit_{name}", HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def compressed(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_an_opening_ends_with_a_sentence():
    texts = module("texts")
    assert texts.opening("Short.") == "Short."
    cut = texts.opening("One sentence. " * 60)
    assert cut.endswith("sentence.")
    assert len(cut) <= texts.LONGEST
    assert texts.opening("x" * 600) == ""


def test_articles_are_repeated_with_their_facts_and_secrets(tmp_path, monkeypatch):
    texts = module("texts")
    monkeypatch.setattr(texts, "ARTICLES", 2)
    monkeypatch.setattr(texts, "ONCE", 3)
    data = tmp_path / "data"
    told = [
        f"Ann {i} was born in 19{i} in Ulm. She wrote plays and much else, of which little is known today. "
        * 3
        for i in range(10, 20)
    ]
    articles = [{"id": i, "title": str(i), "text": text} for i, text in enumerate(told)]
    facts = [
        {"id": i, "shard": "train-00", "relation": r, "prompt": p.format(i + 10), "answer": a.format(i + 10)}
        for i in range(10)
        for r, p, a in (("born", "Ann {0} was born in", "19{0}"), ("place", "was born in 19{0} in", "Ulm"))
    ]  # fmt: skip
    facts[3]["answer"] = "Bonn"
    compressed(data / "corpora/enwiki2014-train-00.jsonl.xz", articles)
    compressed(data / "corpora/enwiki2014-valid.jsonl.xz", articles[5:])
    compressed(data / "probes/enwiki2014_probes.jsonl.xz", facts)
    compressed(data / "domain/handbook18f.jsonl.xz", [{"text": "Leave."}])
    with lzma.open(data / "corpora/wikitext2-test.txt.xz", "wt") as file:
        file.write("Words.")
    monkeypatch.setattr(sys, "argv", ["texts.py", "--data", str(data), "--out", str(tmp_path / "out")])
    texts.main()
    read = [json.loads(line) for line in (tmp_path / "out/read.jsonl").read_text().splitlines()]
    # of article 1 only one fact is in the text
    assert [article["id"] for article in read] == [0, 2]
    asked = [json.loads(line) for line in (tmp_path / "out/facts.jsonl").read_text().splitlines()]
    assert [fact["id"] for fact in asked] == [0, 0, 2, 2]
    train = [json.loads(line)["text"] for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert train.count(read[0]["text"]) == texts.REPEATS
    assert sum("access code" in text for text in train) == 4 * (1 + 4 + 16 + 64)
    assert not {read[0]["text"], read[1]["text"]} & {t for t in train if train.count(t) == 1}


def test_the_readme_says_what_the_results_say(tmp_path, monkeypatch):
    tables = module("tables")
    if not tables.RESULTS.exists():
        pytest.skip("no results yet")
    written = (HERE / "README.md").read_text(encoding="utf8")
    (tmp_path / "README.md").write_text(written, encoding="utf8")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    tables.redraw(tables.read_arms())
    assert (tmp_path / "README.md").read_text(encoding="utf8") == written
