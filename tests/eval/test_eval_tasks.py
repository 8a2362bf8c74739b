"""Benchmarks: both layouts of every file, tasks for the harness, and the harness against a computation of our own."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.errors import ConfigError, DataError, MissingExtraError  # noqa: E402
from engram_lm.eval.benchmarks import benchmarks, plain_choices, require_harness  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402
from engram_lm.eval.tasks import BENCHMARKS, Item, find_benchmarks, read_items, write_task  # noqa: E402

LABELLED = {"text": ["sun", "moon"], "label": ["A", "B"]}
LAYOUTS = {
    "lambada": (
        {"context": "In my palm is a clear", "continuation": "stone"},
        {"text": "In my palm is a clear stone"},
        Item(("In my palm is a clear",), ("stone",), 0),
    ),
    "arc_easy": (
        {"query": "Question: What is hot?", "choices": ["sun", "moon"], "gold": 0},
        {"question": "What is hot?", "choices": LABELLED, "answerKey": "A"},
        Item(("Question: What is hot?\nAnswer:",), ("sun", "moon"), 0),
    ),
    "arc_challenge": (
        {"query": "Question: What is cold?", "choices": ["sun", "moon"], "gold": 1},
        {"question": "What is cold?", "choices": LABELLED, "answerKey": "B"},
        Item(("Question: What is cold?\nAnswer:",), ("sun", "moon"), 1),
    ),
    "openbookqa": (
        {"query": "At noon shines", "choices": ["sun", "moon"], "gold": 0},
        {"question_stem": "At noon shines", "choices": LABELLED, "answerKey": "A "},
        Item(("At noon shines",), ("sun", "moon"), 0),
    ),
    "piqa": (
        {"query": "Question: To warm up\n", "choices": ["sit in the sun", "sit in the moon"], "gold": 0},
        {"goal": "To warm up", "sol1": "sit in the sun", "sol2": "sit in the moon", "label": 0},
        Item(("Question: To warm up\nAnswer:",), ("sit in the sun", "sit in the moon"), 0),
    ),
    "winogrande": (
        {"context_options": ["Ann waved so Ann", "Ann waved so Bob"], "continuation": "came.", "gold": 1},
        {"sentence": "Ann waved so _ came.", "option1": "Ann", "option2": "Bob", "answer": "2"},
        Item(("Ann waved so Ann", "Ann waved so Bob"), ("came.",), 1),
    ),
}  # fmt: skip


def test_every_benchmark_has_two_layouts():
    assert tuple(LAYOUTS) == ("lambada", "arc_easy", "arc_challenge", "openbookqa", "piqa", "winogrande")
    assert set(LAYOUTS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_layouts_give_the_same_item(tmp_path, name):
    local, hub, want = LAYOUTS[name]
    path = tmp_path / f"{name}_of_mine.jsonl"
    path.write_text(json.dumps(local) + "\n\n" + json.dumps(hub) + "\n")
    assert read_items(path) == [want, want]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("lambada", {"context": "x"}),
        ("lambada", {"text": "word"}),
        ("arc_easy", {"query": "q", "choices": ["a"], "gold": 1}),
        ("arc_easy", {"question": "q", "choices": LABELLED, "answerKey": "Z"}),
        ("winogrande", {"sentence": "no place", "option1": "a", "option2": "b", "answer": "1"}),
        ("piqa", {"query": "q", "choices": ["a", " "], "gold": 0}),
        ("piqa", ["a list"]),
    ],
)
def test_a_line_of_neither_layout_is_named(tmp_path, name, record):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=rf"{name}.jsonl:1: no item of {name} in either layout"):
        read_items(path)


def test_files_are_found_by_their_names(tmp_path):
    for name in ("openbook_qa.jsonl", "arc_easy_test.jsonl", "notes.txt", "arc_easy.txt"):
        (tmp_path / name).write_text(json.dumps(LAYOUTS["arc_easy"][0]) + "\n")
    assert {k: v.name for k, v in find_benchmarks([tmp_path]).items()} == {
        "arc_easy": "arc_easy_test.jsonl", "openbookqa": "openbook_qa.jsonl",
    }  # fmt: skip
    (tmp_path / "arc_easy_2.jsonl").write_text("")
    with pytest.raises(DataError, match="arc_easy is both"):
        find_benchmarks([tmp_path])
    with pytest.raises(DataError, match="names begin with"):
        find_benchmarks([tmp_path / "notes.txt"])
    with pytest.raises(DataError, match="no such file or folder"):
        find_benchmarks([tmp_path / "nowhere"])


def test_some_items_are_drawn(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text("".join(json.dumps({**LAYOUTS["piqa"][1], "goal": f"g{n}"}) + "\n" for n in range(20)))
    found = read_items(path, most=7, seed=1)
    assert len(found) == 7
    assert found == read_items(path, most=7, seed=1) != read_items(path, most=7, seed=2)
    with pytest.raises(ConfigError, match="1 or more"):
        read_items(path, most=0)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no item"):
        read_items(path)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r'the extra "eval".* install "lm-eval'):
        require_harness()


def test_a_task_is_a_file_beside_its_items(tmp_path):
    for name, (_, _, item) in LAYOUTS.items():
        write_task(name, [item], tmp_path)
        config = json.loads((tmp_path / f"{name}.yaml").read_text())
        assert config["dataset_path"] == "json"
        assert config["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / f"{name}.jsonl")
        assert json.loads((tmp_path / f"{name}.jsonl").read_text())["gold"] == item.gold


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness and what it stands on
def test_the_harness_agrees_with_a_computation_of_our_own():
    pytest.importorskip("lm_eval")
    subject = EvaluatedModel(models.give_memory(models.build("llama")), models.tokenizer(), name="loud")
    random = np.random.default_rng(0)
    words = ["sun", "moon", "water", "stone", "leaf", "iron", "glass", "wool"]

    def some(n):
        return " ".join(random.choice(words, n))

    tasks = {
        "lambada": [Item((some(5),), (some(1),), 0) for _ in range(50)],
        "arc_easy": [
            Item((f"Question: {some(4)}?\nAnswer:",), tuple(dict.fromkeys(some(2) for _ in range(4))), 0)
            for _ in range(50)
        ],
        "winogrande": [Item((f"{some(3)} Ann", f"{some(3)} Bob"), (some(3),), n % 2) for n in range(50)],
    }
    measured = benchmarks(subject, tasks, states=("on", "off", "shuffled"))
    for state in ("on", "off", "shuffled"):
        for name in ("arc_easy", "winogrande"):
            with subject.state(state):
                right = plain_choices(subject, tasks[name]) == [item.gold for item in tasks[name]]
            assert measured.value("acc", of=name, memory=state).value == pytest.approx(right.mean())
        with subject.state(state):
            log_p = []
            for item in tasks["lambada"]:
                before, rest = subject.pair(*item.pairs[0])
                log_p.append(subject.continuations_plain(before, [rest])[0].log_p)
        found = measured.value("perplexity", of="lambada", memory=state)
        assert found.value == pytest.approx(np.exp(-np.mean(log_p)), rel=1e-4)
    on, off = (measured.value("perplexity", of="lambada", memory=state).value for state in ("on", "off"))
    assert abs(on / off - 1) > 0.01  # the memory was there
    assert measured.value("acc", of="arc_easy", memory="chance").value == pytest.approx(
        np.mean([1 / len(item.ends) for item in tasks["arc_easy"]])
    )
