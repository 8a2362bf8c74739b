"""Scoring of answers, quiz files, and the demo's own questions and examples against its documents."""

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from engram_lm.errors import DataError
from engram_lm.serve.demo import Demo, title_of
from engram_lm.serve.examples import EXAMPLES, KINDS, read_examples
from engram_lm.serve.quiz import Quiz, contains


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The dog is called ORLANDO!", "Orlando"),
        ("It is 'K17'.", "k17"),
        ("1,140 crowns", "1140"),
        ("1140 crowns a month", "1,140"),
        ("at 21:40.", "21:40"),
        ("Room:\nHeron-Room", "heron room"),
        ("２３ days", "23"),
        ("办公室的狗名叫奥兰多。", "奥兰多"),
        ("LX–4409", "LX-4409"),
    ],
)
def test_an_answer_is_found_whatever_its_letters_and_marks(text, answer):
    assert contains(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Orlandos", "Orlando"),
        ("in 2023", "23"),
        ("1231 days", "123"),
        ("", "Orlando"),
        ("figs of a basket", "basket of figs"),
        ("at 2:14", "21:4"),
        ("anything", "..."),
    ],
)
def test_other_words_are_no_answer(text, answer):
    assert not contains(text, answer)


def test_a_quiz_file_is_checked(tmp_path):
    path, row = (
        tmp_path / "quiz.json",
        {"id": "a", "kind": "verbatim", "prompt": "The", "document": "d", "answer": ["x"]},
    )
    path.write_text(json.dumps([row]))
    assert Quiz.read(path).question("a").max_tokens == 12
    for wrong in (
        [row, row], [{**row, "kind": "hard"}], [{**row, "answer": "x"}], [{**row, "answer": []}], [{**row, "answer": ["!"]}],
        [{"id": "a"}], {"a": 1}, 5, [5],
    ):  # fmt: skip
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError):
            Quiz.read(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError):
        Quiz.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Quiz.read(tmp_path / "none.json")


@pytest.fixture(scope="module")
def demo():
    return Demo.find()


def test_the_demos_questions_are_answered_by_its_documents(demo):
    quiz = Quiz.read(demo.quiz)
    texts = {path.name: path.read_text(encoding="utf8") for path in demo.documents.glob("*.md")}
    assert 12 <= len(texts) <= 20
    kinds = [question.kind for question in quiz.questions.values()]
    assert kinds.count("verbatim") == kinds.count("paraphrased") == 12
    for question in quiz.questions.values():
        text = texts[question.document]
        assert question.is_answered_by(text), question.id
        if question.kind == "verbatim":
            assert question.prompt in text, question.id
            behind = text.partition(question.prompt)[2][:60]
            assert question.is_answered_by(behind), question.id
        else:
            assert question.prompt not in text


def test_examples_have_the_form_that_the_page_reads(demo):
    for examples in (EXAMPLES, read_examples(demo.examples)):
        assert set(examples) == set(KINDS)
        assert all(set(entry) == {"name", "text"} for entry in examples["look"])
        assert all(set(entry) == {"name", "prompt", "candidates"} for entry in examples["think"])
        assert all(set(entry) - {"chat"} == {"name", "prompt"} for entry in examples["ask"])
        names = [entry["name"] for kind in KINDS for entry in examples[kind]]
        assert all(set(name) == {"en", "zh"} for name in names)


def test_examples_of_another_form_are_refused(tmp_path):
    path = Path(tmp_path / "examples.json")
    path.write_text('{"look": []}')
    with pytest.raises(DataError, match="look, think, ask"):
        read_examples(path)


def test_a_documents_title_is_its_first_line():
    assert title_of("\n# The house\n\nThe tower") == "The house"
