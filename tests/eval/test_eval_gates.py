"""Marked texts aligned with tokens, and gates by frequency, place and what they save, against plain loops."""

import json
import lzma
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.attachment import MemoryConfig, attach, trace  # noqa: E402
from engram_lm.errors import ConfigError, DataError, ModelError  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402
from engram_lm.eval.gates import gates, ranks  # noqa: E402
from engram_lm.eval.spans import INSIDE, LAST, OUTSIDE, Marked, place_tokens, read_spans  # noqa: E402
from engram_lm.eval.texts import Text  # noqa: E402

FEWREL = {
    "P177": [
        {"tokens": ["The", "Cape", "Girardeau", "Bridge", "crosses", "the", "Mississippi", "."],
         "h": ["cape girardeau bridge", "Q1", [[1, 2, 3]]], "t": ["mississippi", "Q2", [[6]]]},
    ]
}  # fmt: skip
DOCRED = [
    {"title": "W", "sents": [["Willi", "Schneider", "raced", "."], ["In", "1992", "he", "won", "."]],
     "vertexSet": [[{"sent_id": 0, "pos": [0, 2], "name": "Willi Schneider", "type": "PER"}],
                   [{"sent_id": 1, "pos": [1, 2], "name": "1992", "type": "TIME"}]], "labels": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def loud():
    return EvaluatedModel(
        models.give_memory(models.build("llama"), "several"), models.tokenizer(), name="loud"
    )


def test_both_layouts_give_texts_and_character_spans(tmp_path):
    (tmp_path / "fewrel.json").write_text(json.dumps(FEWREL))
    with lzma.open(tmp_path / "docred.json.xz", "wt", encoding="utf8") as file:
        json.dump(DOCRED, file)
    (fewrel,) = read_spans(tmp_path / "fewrel.json")
    assert fewrel.text == "The Cape Girardeau Bridge crosses the Mississippi ."
    assert [fewrel.text[a:b] for a, b in fewrel.spans] == ["Cape Girardeau Bridge", "Mississippi"]
    (docred,) = read_spans(tmp_path / "docred.json.xz")
    assert docred.text == "Willi Schneider raced . In 1992 he won ."
    assert [docred.text[a:b] for a, b in docred.spans] == ["Willi Schneider", "1992"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing", "cannot be read as JSON"),
        ("[]", "no text with a marked entity"),
        ('[{"sents": [["a"]]}]', "neither as FewRel nor as Re-DocRED"),
        (
            '{"P1": [{"tokens": ["a"], "h": ["a", "Q", [[3]]], "t": ["a", "Q", [[0]]]}]}',
            "an entity at words 3 to 4 of 1",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=told):
        read_spans(tmp_path / "x.json")


def test_some_are_drawn(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"P": FEWREL["P177"] * 9}))
    assert len(read_spans(tmp_path / "x.json", most=4)) == 4
    with pytest.raises(ConfigError, match="1 or more"):
        read_spans(tmp_path / "x.json", most=0)


def test_tokens_of_bytes_are_placed_by_their_characters(loud):
    text = "In 1992 Åsa won"
    ids, place = place_tokens(loud, Marked(text, ((3, 7), (8, 11))))
    assert np.array_equal(ids, loud.encode(text))
    # Å is two bytes, so two tokens
    want = [OUTSIDE] * 3 + [INSIDE] * 3 + [LAST] + [OUTSIDE] + [INSIDE] * 3 + [LAST] + [OUTSIDE] * 4
    assert place.tolist() == want


def test_a_token_that_begins_with_a_space_is_inside_by_its_letters():
    class Backend:
        class Encoded:
            ids = (0, 1, 2, 3)
            offsets = ((0, 2), (2, 7), (7, 8), (8, 12))  # "In", " 1992", " ", "Åsa "

        def encode(self, text, add_special_tokens):
            return self.Encoded

    class Fake:
        prompts = SimpleNamespace(start=[9])

        class encoder:
            backend = Backend()

    ids, place = place_tokens(Fake, Marked("In 1992 Åsa ", ((3, 7), (8, 11))))
    assert ids.tolist() == [9, 0, 1, 2, 3]
    assert place.tolist() == [OUTSIDE, OUTSIDE, LAST, OUTSIDE, LAST]


def test_gates_are_those_of_the_trace_in_every_group(loud):
    texts = [Text("a", loud.encode("abab cdcd abab")), Text("a", loud.encode("xyz abab"))]
    marked = [Marked("Peter saw Bob.", ((0, 5), (10, 13)))]
    training = [loud.encode("ab ab ab ab"), loud.encode("cd")]
    measured = gates(loud, texts=texts, marked={"m": marked}, training=training)
    gate, share, saved, count, place = [], [], [], [], []
    for ids, where in [(t.ids, None) for t in texts] + [place_tokens(loud, marked[0])]:
        with torch.no_grad(), trace(loud.model) as records:
            logits = loud.model(torch.from_numpy(ids)[None]).logits[0]
        with torch.no_grad():
            off = loud.model(torch.from_numpy(ids)[None], memory="off").logits[0]
        loss = [-x.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]] for x in (logits[:-1], off[:-1])]
        saved += (loss[1] - loss[0]).tolist()
        gate += records[1].gate[0, :-1].mean(-1).tolist()
        share += records[1].share[0, :-1].max(-1).tolist()
        text = loud.encoder.decode(ids)
        for t in range(len(ids) - 1):
            gram = text[t - 1 : t + 1] if t else ""
            count.append(
                sum(("ab ab ab ab"[i:].startswith(gram)) + ("cd"[i:].startswith(gram)) for i in range(11))
                if gram
                else -1
            )
            place.append(-1 if where is None else where[t])
    gate, saved, count, place = map(np.array, (gate, saved, count, place))
    name = f"{records[1].memory} before block {records[1].block}"

    def value(what, of):
        return measured.value(what, of=of, memory="on" if what.startswith("loss") else name)

    assert value("gate", "all tokens").value == pytest.approx(gate.mean())
    assert value("share", "all tokens").value == pytest.approx(np.mean(share))
    assert value("loss saved, nats", "all tokens").value == pytest.approx(saved.mean(), rel=1e-4)
    for p, of in enumerate(("outside", "inside, not last", "last of an entity")):
        found = value("gate", f"{of} (marked texts)")
        assert (found.value, found.count) == (pytest.approx(gate[place == p].mean()), (place == p).sum())
    for low, high, bucket in ((0, 1, "0"), (2, 4, "2–3"), (4, 16, "4–15")):
        chosen = (count >= low) & (count < high)
        assert value("gate", f"2-gram seen {bucket}").value == pytest.approx(gate[chosen].mean())
        assert value("loss saved, nats", f"2-gram seen {bucket}").count == chosen.sum()
    known = count >= 0
    found = value("correlation", "gate and how often the 2-gram was seen")
    assert found.value == pytest.approx(plain_spearman(gate[known], count[known]))
    found = value("correlation", "gate and loss saved at the next token")
    assert found.value == pytest.approx(plain_spearman(gate, saved), abs=1e-3)
    percentiles = measured.facts["gate_percentiles"]
    assert percentiles["of"] == [5, 25, 50, 75, 95]
    assert percentiles[name]["all tokens"][2] == pytest.approx(np.median(gate), abs=1e-4)


def plain_spearman(a, b):
    def rank(x):
        return np.array([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x])

    return np.corrcoef(rank(a), rank(b))[0, 1]


def test_ranks_share_ties_and_stand_around_zero():
    found = ranks(np.array([3.0, 1.0, 3.0, 2.0]))
    np.testing.assert_allclose(found * 4 + 2.5, [3.5, 1, 3.5, 2])


def test_a_correlation_with_what_never_changes_is_none(loud):
    measured = gates(loud, texts=[Text("a", loud.encode("abcdef"))], training=[loud.encode("zz")])
    found = [v for v in measured.values if v.name == "correlation" and "1-gram" in v.of]
    assert found
    assert all(v.value is None for v in found)


def test_what_has_no_gates_is_refused(loud):
    with pytest.raises(ModelError, match="no gates to measure"):
        gates(EvaluatedModel(models.build("llama"), models.tokenizer()), texts=[Text("a", np.arange(2, 9))])
    with pytest.raises(ConfigError, match="give some"):
        gates(loud)


@pytest.mark.parametrize(("control", "states"), [("bias", ("on", "off")), ("off", ("none",))])
def test_a_control_without_lookups_has_no_gates_and_fewer_states(control, states):
    model = models.build("llama")
    size = {"rows_per_head": 53, "head_width": 4, "heads": 2}
    attach(model, models.tokenizer(), MemoryConfig(layers=(1,), control=control, **size))
    subject = EvaluatedModel(model, models.tokenizer())
    assert subject.states == states
    with pytest.raises(ConfigError, match=f"a memory of control '{control}': its states are"):
        subject.require_states(["noise"])
    with pytest.raises(ModelError, match=f"control '{control}', which looks nothing up: it has no gates"):
        gates(subject, texts=[Text("a", np.arange(2, 9))])
    with subject.state(states[0]):
        assert len(subject.log_probs(np.arange(2, 9))) == 6
