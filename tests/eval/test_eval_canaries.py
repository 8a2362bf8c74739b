"""Canaries: made from a seed, written and read, and exposed as far as a model knows them."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.errors import ConfigError, DataError  # noqa: E402
from engram_lm.eval import canaries as module  # noqa: E402
from engram_lm.eval.canaries import Canary, documents, exposure, exposures, make, read, write  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402
from engram_lm.reader import ContinuationScore  # noqa: E402


def test_canaries_come_from_a_seed_and_no_name_twice():
    found = make(each=3, seed=5)
    assert found == make(each=3, seed=5)
    assert found != make(each=3, seed=6)
    assert len({canary.name for canary in found}) == len(found) == 24
    assert [canary.repeats for canary in found] == [n for n in (1, 2, 4, 8, 16, 32, 64, 0) for _ in range(3)]
    assert all(len(canary.secret) == 6 and canary.secret.isdigit() for canary in found)
    assert found[0].text == f"The access code of {found[0].name} is {found[0].secret}."


def test_documents_hold_each_canary_as_often_as_it_says_and_no_control():
    found = make(each=2, repeats=(1, 3), seed=0)
    texts = documents(found, seed=1)
    assert len(texts) == 8
    assert all(texts.count(canary.text) == canary.repeats for canary in found)
    assert texts == documents(found, seed=1)
    assert texts != documents(found, seed=2)


def test_what_is_written_is_read(tmp_path):
    found = make(each=2, controls=1, digits=9, seed=3)
    write(found, tmp_path / "canaries.jsonl")
    assert read(tmp_path / "canaries.jsonl") == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no canary"),
        ('{"secret": "12"}\n', r"canaries.jsonl:1: a canary has .* no 'name' here"),
        ('{"secret": "1x", "name": "A", "prefix": "A is", "repeats": 1}\n', "a secret is digits"),
        ('{"secret": "12", "name": "A", "prefix": "A is", "repeats": "1"}\n', "repeats a whole number"),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, text, told):
    path = tmp_path / "canaries.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        read(path)


def test_a_missing_file_says_what_makes_one(tmp_path):
    with pytest.raises(DataError, match="engram-lm eval canaries"):
        read(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    "wrong", [{"each": 0}, {"digits": 0}, {"digits": 19}, {"controls": -1}, {"repeats": (0,)}]
)
def test_impossible_canaries_are_refused(wrong):
    with pytest.raises(ConfigError, match="Canaries want"):
        make(**wrong)


class Knowing:
    """A subject that gives every secret a probability of its own, and those in `known` more than all others."""

    def __init__(self, known):
        self.known = known

    def pair(self, prefix, secret):
        return np.frombuffer(prefix.encode(), np.uint8), np.frombuffer(secret.encode(), np.uint8)

    def continuations(self, prompt, continuations):
        found = []
        for continuation in continuations:
            secret = bytes(continuation).decode()
            best = self.known.get(bytes(prompt).decode()) == secret
            found.append(ContinuationScore(0.0 if best else -1 - int(secret) / 10 ** len(secret), best))
        return found


def test_exposure_is_the_cap_for_a_known_secret_and_follows_the_rank():
    known = Canary(name="A", prefix="A is", secret="777", repeats=9)
    least = Canary(name="B", prefix="B is", secret="999", repeats=0)
    middle = Canary(name="C", prefix="C is", secret="500", repeats=0)
    subject = Knowing({"A is": "777"})
    found = exposures(subject, [known, least, middle], references=999)
    # references are all other secrets: the rank of 500 is 501 of 1,000
    assert found.tolist() == [pytest.approx(math.log2(1000)), 0.0, pytest.approx(math.log2(1000 / 501))]
    assert exposures(subject, [known], references=15).tolist() == [4.0]
    with pytest.raises(ConfigError, match="999 other secrets"):
        exposures(subject, [known], references=1000)


def test_a_tie_counts_against_the_secret():
    class Same(Knowing):
        def continuations(self, prompt, continuations):
            return [ContinuationScore(-1.0, False)] * len(continuations)

    canary = Canary(name="A", prefix="A is", secret="777", repeats=1)
    assert exposures(Same({}), [canary], references=7).tolist() == [0.0]


def test_secrets_that_change_the_prefixs_ids_are_compared_as_whole_texts():
    class Merging(Knowing):
        """Secrets from 5 on begin with a token that holds the prefix's end; that end alone has log P -9."""

        def pair(self, prefix, secret):
            cut = len(prefix) - 3 * (secret >= "5")
            text = f"{prefix} {secret}".encode()
            return np.frombuffer(text[:cut], np.uint8), np.frombuffer(text[cut:], np.uint8)

        def continuations(self, prompt, continuations):
            end = -9.0 if len(prompt) < len("A is") else 0.0
            return [
                ContinuationScore(end - (9 - int(bytes(c).decode().split()[-1])) / 10, False)
                for c in continuations
            ]

        def log_probs(self, ids, *, since):
            return np.full(len(ids) - since, -3.0)

    canary = Canary(name="A", prefix="A is", secret="3", repeats=1)
    # all texts have the end's -9, so that 3 has 4 to 9 before it: rank 7 of 10
    assert exposures(Merging({}), [canary], references=9).tolist() == [pytest.approx(math.log2(10 / 7))]
    canary = Canary(name="A", prefix="A is", secret="7", repeats=1)
    assert exposures(Merging({}), [canary], references=9).tolist() == [pytest.approx(math.log2(10 / 3))]


def test_references_are_the_same_for_every_model_and_never_the_secret():
    canary = make(each=1, seed=0)[0]
    found = module._references(canary, 500, 0)
    assert len(set(found)) == 500
    assert canary.secret not in found
    assert found == module._references(canary, 500, 0)
    assert found != module._references(canary, 500, 1)


def test_a_model_that_learned_canaries_exposes_them_and_its_controls_not():
    model = models.build("llama")
    subject = EvaluatedModel(model, models.tokenizer(), name="doll")
    found = make(each=2, repeats=(1, 30), controls=2, digits=3, seed=0)
    ids = [torch.from_numpy(subject.encode(text))[None] for text in documents(found, seed=0)]
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    model.train()
    for text in ids:
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()
    measured = exposure(subject, found, states=("none",), references=63)
    often, never = (
        measured.value("exposure, bits", of=of, memory="none") for of in ("30 repeats", "never trained")
    )
    assert often.value == pytest.approx(6.0)  # the cap
    assert often.value > never.value + 1
    assert (often.count, never.count) == (2, 2)
    assert measured.notes[0].startswith("Exposure is −log2 of the share")
    assert "cannot exceed 6.0 bits" in measured.notes[0]
    assert json.loads(json.dumps(measured.to_json()))["settings"]["canaries"] == 6
