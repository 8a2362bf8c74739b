"""Facts and consistency: against plain computations, with subjects whose answers are known, and files of both layouts."""

import io
import json
import tarfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.errors import ConfigError, DataError  # noqa: E402
from engram_lm.eval.consistency import consistency, prompt_of, read_pararel  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402
from engram_lm.eval.facts import CONSTANT, Fact, facts_measured, others_of, ranked, read_facts  # noqa: E402
from engram_lm.reader import ContinuationScore  # noqa: E402

CAPITALS = {"Algeria": "Algiers", "Angola": "Luanda", "Chad": "N'Djamena", "Peru": "Lima", "Gaul": "Lima"}


@pytest.fixture(scope="module")
def loud():
    return EvaluatedModel(models.give_memory(models.build("llama")), models.tokenizer(), name="loud")


def facts(*, paraphrases=1):
    return [
        Fact(id=land, relation="capital", prompt=f"The capital of {land} is", answer=city,
             paraphrases=tuple(f"{n} times: {land} has its capital in" for n in range(paraphrases)))
        for land, city in CAPITALS.items()
    ]  # fmt: skip


class Answering:
    """A subject whose states give prompts the answers of `says(state, prompt)` and all else in alphabetical order."""

    def __init__(self, says):
        self.says, self.now, self.states = says, None, ("on", "off")

    def require_states(self, wanted):
        assert set(wanted) <= set(self.states)

    def state(self, name):
        import contextlib

        self.now = name
        return contextlib.nullcontext()

    def pair(self, prompt, answer):
        return tuple(np.frombuffer(text.encode(), np.uint8) for text in (prompt, answer))

    def continuations(self, prompt, continuations):
        best = self.says(self.now, bytes(prompt).decode())
        words = [bytes(c).decode() for c in continuations]
        return [
            ContinuationScore(0.0 if word == best else -1.0 - sorted(words).index(word), word == best)
            for word in words
        ]


def test_numbers_follow_the_answers():
    def says(state, prompt):
        land = next(land for land in CAPITALS if land in prompt)
        if state == "off":
            return "Lima"
        return CAPITALS[land] if prompt.startswith(("The capital", "1")) else "nowhere"

    measured = facts_measured(Answering(says), facts(paraphrases=2), states=("on", "off"))
    said = {(v.of, v.memory): v.value for v in measured.values if v.name == "said in full"}
    assert said["verbatim", "on"] == 1.0
    assert said["verbatim", "off"] == said["verbatim", CONSTANT] == 0.4
    assert said["paraphrased", "on"] == 0.5  # the second of two wordings
    first = {(v.of, v.memory): v.value for v in measured.values if v.name == "first among answers"}
    # where it says nothing, the alphabet decides: Algiers is first of Algiers, Lima, Luanda, N'Djamena
    assert first["paraphrased", "on"] == pytest.approx((1 + 4 * 0.5) / 5)
    rank = {(v.of, v.memory): v.value for v in measured.values if v.name == "reciprocal rank"}
    # off: Lima comes first, then Algiers, Luanda, N'Djamena
    assert rank["verbatim", "off"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 + 1) / 5)
    assert measured.facts["relations"]["capital"]["verbatim"] == {"facts": 5, "on": 1.0, "off": 0.4}
    assert "chance 25.0 %" in measured.notes[0]


def test_the_most_common_answer_is_that_of_the_whole_file():
    pool = {"capital": [*CAPITALS.values(), "Luanda", "Luanda", "Kyoto"]}
    measured = facts_measured(Answering(lambda *_: "Lima"), facts(), states=("on",), answers=pool)
    assert measured.value("said in full", of="verbatim", memory=CONSTANT).value == 0.2
    assert "5.0 answers on average" in measured.notes[0]
    assert measured.settings != facts_measured(Answering(lambda *_: "Lima"), facts(), states=("on",)).settings


def test_facts_without_other_words_are_asked_verbatim_alone():
    measured = facts_measured(Answering(lambda *_: "Lima"), facts(paraphrases=0), states=("on",))
    assert {value.of for value in measured.values} == {"verbatim"}


def test_a_tie_is_no_first_place():
    class Same(Answering):
        def continuations(self, prompt, continuations):
            return [ContinuationScore(-1.0, False)] * len(continuations)

    measured = facts_measured(Same(None), facts(), states=("on",))
    assert measured.value("first among answers", of="verbatim").value == 0
    assert measured.value("reciprocal rank", of="verbatim").value == pytest.approx(1 / 4)


def test_ranked_is_the_log_p_of_the_whole_text(loud):
    answers = ["Algiers", "Lima", "N'Djamena"]
    with loud.state("on"):
        log_p, greedy = ranked(loud, "The capital of Peru is", answers)
        prompt = loud.encode("The capital of Peru is")
        for answer, found in zip(answers, log_p, strict=True):
            ids = loud.encode(f"The capital of Peru is {answer}")
            assert found == pytest.approx(loud.log_probs(ids, since=len(prompt)).sum(), rel=1e-4)
    assert greedy == [False] * 3


def test_answers_that_change_the_prompts_ids_are_compared_as_whole_texts(loud, monkeypatch):
    answers = ["Algiers", "Lima"]
    with loud.state("on"):
        want, _ = ranked(loud, "The capital of Peru is", answers)
        pair = loud.pair

        def earlier(prompt, answer):
            before, rest = pair(prompt, answer)
            cut = len(before) - 3 * (answer == "Lima")
            whole = np.concatenate([before, rest])
            return whole[:cut], whole[cut:]

        monkeypatch.setattr(loud, "pair", earlier)
        found, _ = ranked(loud, "The capital of Peru is", answers)
        shared = loud.log_probs(pair("The capital of Peru is", "Lima")[0])[-3:].sum()
    np.testing.assert_allclose(found, want + shared, rtol=1e-4)


def test_other_answers_are_drawn_by_the_key():
    answers = [f"a{n}" for n in range(50)]
    found = others_of(answers, "a7", most=5, key=[0, "r"])
    assert found == others_of(answers[::-1], "a7", most=5, key=[0, "r"])
    assert len(set(found)) == 5
    assert "a7" not in others_of(answers, "a7", most=49, key=[0, "r"])
    assert found != others_of(answers, "a7", most=5, key=[1, "r"])


def test_facts_are_read_and_drawn(tmp_path):
    path = tmp_path / "facts.jsonl"
    lines = [
        {"id": 3, "relation": "capital", "prompt": f"P{n}", "answer": "A", "shard": "x", "subject": "S"}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_facts([path])[2] == Fact(id="3", relation="capital", prompt="P2", answer="A")
    some = read_facts([path], most=4, seed=1)
    assert len(some) == 4
    assert some == read_facts([path], most=4, seed=1) != read_facts([path], most=4, seed=2)
    with pytest.raises(ConfigError, match="1 or more"):
        read_facts([path], most=0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "P", "answer": "A"}', r"facts.jsonl:1: .* relation is None"),
        ('{"prompt": "P", "answer": " ", "relation": "r"}', "answer is ' '"),
        ('{"prompt": "P", "answer": "A", "relation": "r", "paraphrases": "x"}', "a list of prompts"),
        ('{"answer": "A"}', "no field 'prompt'"),
        ("", "no fact"),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, line, told):
    path = tmp_path / "facts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=told):
        read_facts([path])


# ---- consistency -----------------------------------------------------------------------------------------------------


PATTERNS = [
    "[X] was born in [Y].",
    "[X] is originally from [Y] .",
    "[Y] is where [X] is from.",
    "[X] was a [Y]-born person.",
]
PEOPLE = {"Ann": "Paris", "Bob": "Rome", "Eve": "Oslo"}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def pararel(tmp_path):
    folder = tmp_path / "data"
    for kind in ("pattern_data/graphs_json", "trex_lms_vocab"):
        (folder / kind).mkdir(parents=True)
    (folder / "pattern_data/graphs_json/P19.jsonl").write_text(jsonl([{"pattern": p} for p in PATTERNS]))
    (folder / "trex_lms_vocab/P19.jsonl").write_text(
        jsonl([{"sub_label": a, "obj_label": b, "uuid": "u"} for a, b in PEOPLE.items()])
    )
    (folder / "pattern_data/graphs_json/P1.jsonl").write_text(jsonl([{"pattern": PATTERNS[0]}]))
    (folder / "trex_lms_vocab/P1.jsonl").write_text(jsonl([{"sub_label": "x", "obj_label": "y"}]))
    return folder


def test_an_archive_and_its_folder_are_the_same(pararel, tmp_path):
    archive = tmp_path / "pararel.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        file.add(pararel, arcname="data")
    (relation,) = read_pararel(pararel)
    assert read_pararel(archive) == [relation]
    # [Y] at the end, two of four; P1 has one
    assert (relation.name, relation.patterns) == ("P19", tuple(PATTERNS[:2]))
    assert relation.objects == ("Oslo", "Paris", "Rome")
    assert set(relation.pairs) == set(PEOPLE.items())
    assert [prompt_of(p, "Ann") for p in relation.patterns] == ["Ann was born in", "Ann is originally from"]
    assert len(read_pararel(pararel, facts=2)[0].pairs) == 2


def test_consistency_counts_pairs_of_wordings(pararel):
    def says(state, prompt):
        if state == "off":
            return "Rome"
        name = prompt.split()[0]
        return PEOPLE[name] if "born" in prompt or name == "Bob" else "Oslo"

    measured = consistency(Answering(says), read_pararel(pararel), states=("on", "off"))
    # on: Ann gets Paris and Oslo; Bob Rome twice; Eve Oslo twice
    assert measured.value("same answer").value == pytest.approx(2 / 3)
    assert measured.value("right").value == pytest.approx((0.5 + 1 + 1) / 3)
    assert measured.value("right in all wordings").value == pytest.approx(2 / 3)
    assert measured.value("same answer", memory="off").value == 1
    assert measured.value("right", memory="off").value == pytest.approx(1 / 3)
    assert measured.value("right", memory=CONSTANT).value == pytest.approx(1 / 3)
    assert measured.facts["relations"]["P19"]["right"] == {"on": 0.8333, "off": 0.3333}


def test_the_true_object_loses_a_tie(pararel):
    class Same(Answering):
        def continuations(self, prompt, continuations):
            return [ContinuationScore(-1.0, False)] * len(continuations)

    measured = consistency(Same(None), read_pararel(pararel), states=("on",))
    assert measured.value("right").value == 0
    assert measured.value("same answer").value == 1


def test_what_is_no_pararel_is_refused(tmp_path, pararel):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no relation with two patterns"):
        read_pararel(tmp_path / "empty")
    (tmp_path / "file.tar.xz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read as a folder or a tar archive"):
        read_pararel(tmp_path / "file.tar.xz")
    (pararel / "trex_lms_vocab/P19.jsonl").write_text('{"sub_label": "x"}\n')
    with pytest.raises(DataError, match="a line with sub_label, obj_label"):
        read_pararel(pararel)
    with pytest.raises(ConfigError, match="patterns 2 or more"):
        read_pararel(pararel, patterns=1)
    with pytest.raises(DataError, match="cannot be read"):
        read_pararel(tmp_path / "nothing.tar")
    with tarfile.open(tmp_path / "folder.tar", "w") as file:
        entry = tarfile.TarInfo("graphs_json/P19.jsonl")
        entry.size = 2
        file.addfile(entry, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match="no relation"):
        read_pararel(tmp_path / "folder.tar")


def test_a_model_is_asked_in_every_state(loud, pararel):
    states = ("on", "off", "noise", "shuffled")
    found = facts_measured(loud, facts()[:2], states=states)
    assert {value.memory for value in found.values} == {*states, CONSTANT}
    assert found.values == facts_measured(loud, facts()[:2], states=states).values
    assert consistency(loud, read_pararel(pararel, facts=1), states=("on",)).value("right").count == 1
