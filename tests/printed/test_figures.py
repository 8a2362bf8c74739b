"""Tables in docs that repeat a result say what the result file says."""

import json
import re

import pytest

pytest.importorskip("sybil")

from printed.pages import ROOT

# {what docs/mixing.md calls it: a row of the table in experiments/instant_adaptation/README.md}
ROWS = {
    "perplexity, handbook, pages in the index": "perplexity, handbook indexed",
    "handbook, other pages": "perplexity, handbook unseen",
    "articles, other articles": "perplexity, articles unseen",
    "wikitext-2 beside the handbook": "perplexity, wikitext2-test (index: handbook)",
    "facts in other words": "facts, in other words",
    "questions in a chat (30)": "questions in a chat",
    "prompt tokens added, a text of 320": "prompt tokens added to a text",
}
# The same for the table of README, whose perplexities have a digit less.
ROWS_OF_README = {
    "perplexity, wikitext-2 (handbook in the index)": "perplexity, wikitext2-test (index: handbook)",
    "80 facts completed, in the document's words": "facts, verbatim",
    "the same in other words": "facts, in other words",
    "30 questions in a chat": "questions in a chat",
}
# {(reading, gate) in docs/mixing.md: (count, discount, kind) of a gate in gate-results.json}
READINGS = {
    ("every document counts once (shipped)", "logistic"): ("documents", 0.75, "logistic"),
    ("every occurrence counts", "logistic"): ("tokens", 0.75, "logistic"),
    ("every occurrence, discount 0.5", "logistic"): ("tokens", 0.5, "logistic"),
    ("every occurrence, discount 0.9", "logistic"): ("tokens", 0.9, "logistic"),
    ("every document counts once", "mlp"): ("documents", 0.75, "mlp"),
}


def rows_of(path: str) -> list[list[str]]:
    """The cells of every row of every table of a page."""
    lines = (ROOT / path).read_text(encoding="utf8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


@pytest.fixture(scope="module")
def gates():
    return json.loads((ROOT / "experiments/instant_adaptation/gate-results.json").read_text())


def test_the_example_of_eval_is_an_excerpt_of_its_report():
    report = rows_of("experiments/demo_memory/eval/report.md")
    excerpt = [row for row in rows_of("docs/eval.md") if ".jsonl" in row[0] and len(row) == 6]
    assert len(excerpt) >= 6
    assert [row for row in excerpt if row not in report] == []


def test_arms_beside_retrieval_are_those_of_the_experiment():
    measured = {
        row[0]: row[1:] for row in rows_of("experiments/instant_adaptation/README.md") if len(row) == 6
    }
    found = {row[0]: row[1:] for row in rows_of("docs/mixing.md") if row[0] in ROWS}
    assert found == {name: measured[row] for name, row in ROWS.items()}
    found = {row[0]: row[1:] for row in rows_of("README.md") if row[0] in ROWS_OF_README}
    assert found == {name: [shorter(cell) for cell in measured[row]] for name, row in ROWS_OF_README.items()}


def test_the_shipped_gate_is_told_as_it_was_measured(gates):
    count, discount, kind, weight = gates["shipped"]
    check = gate_of(gates, count, discount, kind, weight)["check"]
    printed = rows_of("docs/mixing.md")
    at = next(n for n, row in enumerate(printed) if row[:2] == ["text", "pages in the index"])
    rows = printed[at + 2 : at + 11]
    names = ["indexed, all", *(f"{kind}, {n}" for kind in ("unseen", "general") for n in (1, 10, 100, "all"))]
    for name, row in zip(names, rows, strict=True):
        alone, mixed = check[name]["perplexity_alone"], check[name]["perplexity_mixed"]
        assert row[2:4] == [f"{alone:.2f}", f"{mixed:.2f}"], name
        assert number(row[4]) == pytest.approx(100 * (mixed / alone - 1), abs=0.0501), name


def test_other_readings_are_told_as_they_were_measured(gates):
    found = {(row[0], row[1]): row[2:] for row in rows_of("docs/mixing.md") if tuple(row[:2]) in READINGS}
    assert set(found) == set(READINGS)
    for name, row in found.items():
        check = gate_of(gates, *READINGS[name], gates["shipped"][3])["check"]
        mixed = [f"{check[group]['perplexity_mixed']:.2f}" for group in ("unseen, all", "indexed, all")]
        general = check["general, all"]
        harm = 100 * (general["perplexity_mixed"] / general["perplexity_alone"] - 1)
        assert row == [*mixed, f"{harm:+.2f} %"], name


def shorter(cell: str) -> str:
    return f"{float(cell):.1f}" if "." in cell else cell


def gate_of(gates, count, discount, kind, weight):
    wanted = {"count": count, "discount": discount, "kind": kind, "general_weight": weight}
    (gate,) = (gate for gate in gates["gates"] if {name: gate[name] for name in wanted} == wanted)
    return gate


def number(text: str) -> float:
    return float(re.sub(r"[^\d.-]", "", text.replace("−", "-")))
