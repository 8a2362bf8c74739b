"""Perplexity against plain sums, windows that score every token once, n-gram counts against a plain count, buckets."""

import json
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.errors import ConfigError, DataError  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402
from engram_lm.eval.frequency import BUCKETS, Frequencies, bucket_of  # noqa: E402
from engram_lm.eval.intervals import interval, mean_interval, ratio_draws, share_interval  # noqa: E402
from engram_lm.eval.perplexity import losses, perplexity, windows  # noqa: E402
from engram_lm.eval.result import Result, Value, finished, load, save  # noqa: E402
from engram_lm.eval.texts import STRETCH, Text, read_texts, stretches  # noqa: E402

WORDS = "The dog of the office is called Orlando. Under the stairs he sleeps, and at seven he wants his bone."


@pytest.fixture(scope="module")
def loud():
    return EvaluatedModel(models.give_memory(models.build("llama")), models.tokenizer(), name="loud")


def texts_of(subject, **named):
    return [Text(file, subject.encode(text)) for file, found in named.items() for text in found]


@pytest.mark.parametrize(
    ("n", "window", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (100, 8, 3), (100, 8, 7), (17, 8, 1)]
)
def test_windows_score_every_token_once_with_enough_before_it(n, window, stride):
    scored = []
    for begin, end, first in windows(n, window=window, stride=stride):
        assert end - begin <= window
        assert begin % stride == 0
        assert first == 1 or first - begin >= window - stride
        scored += range(first, end)
    assert scored == list(range(1, n))


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    with pytest.raises(ConfigError, match="stride is from 1 and less than window"):
        list(windows(20, window=8, stride=stride))


def test_losses_are_those_of_each_window(loud):
    ids = loud.encode(WORDS)[:40]
    with loud.state("on"):
        found = losses(loud, ids, window=16, stride=8)
        whole = losses(loud, ids, window=40, stride=20)
        want = []
        for t in range(1, 40):
            begin = 0 if t < 16 else (t - 16) // 8 * 8 + 8
            logits = loud.model(torch.from_numpy(ids[begin:t])[None]).logits[0, -1].double()
            want.append(-float(logits.log_softmax(-1)[ids[t]]))
        plain = -loud.log_probs(ids)
    np.testing.assert_allclose(found, want, rtol=2e-4)
    assert np.array_equal(whole, plain)


def test_perplexity_is_the_exponential_of_the_mean(loud):
    texts = texts_of(loud, a=[WORDS, "Parrots bite!"], b=["Visitors sign here."])
    measured = perplexity(loud, texts, states=("on", "off", "noise"), window=64, stride=32)
    for state in ("on", "off", "noise"):
        with loud.state(state):
            both = np.concatenate([losses(loud, text.ids, window=64, stride=32) for text in texts[:2]])
        value = measured.value("perplexity", of="a", memory=state)
        assert value.value == pytest.approx(np.exp(both.mean()))
        assert value.count == len(both)
    on, off = (measured.value("perplexity", of="b", memory=state).value for state in ("on", "off"))
    assert measured.value("change against off", of="b").value == pytest.approx(on / off - 1)
    assert measured.value("perplexity", of="b").interval is None  # of one document
    with pytest.raises(KeyError):
        measured.value("change against off", of="b", memory="off")


def test_buckets_part_the_tokens_by_the_gram_before_them(loud):
    text = texts_of(loud, a=["abcabd"])
    a, b, c = loud.encode("abc")
    training = [np.array([a] * 300), np.array([a, b, c, a, b]), np.array([b, c])]
    measured = perplexity(loud, text, states=("on", "off"), window=64, stride=32, training=training)
    with loud.state("on"):
        loss = losses(loud, text[0].ids, window=64, stride=32)
    # a b c a b d: predicted are b c a b d, after a b c a b; a was seen 302 times, b three times, c twice
    for bucket, places in (("256 and more", [0, 3]), ("2–3", [1, 2, 4])):
        value = measured.value("perplexity", of=f"a, 1-gram seen {bucket}")
        assert (value.count, value.value) == (len(places), pytest.approx(np.exp(loss[places].mean())))
    # the 2-gram before c is ab, seen twice; before a bc, twice; before b ca, once; before d ab
    assert measured.value("perplexity", of="a, 2-gram seen 2–3").count == 3
    assert measured.value("perplexity", of="a, 2-gram seen 1").count == 1
    # before a abc, once; before b bca, once; before d cab, once
    assert measured.value("perplexity", of="a, 3-gram seen 1").count == 3
    assert (
        sum(
            v.count
            for v in measured.values
            if "3-gram" in v.of and v.name == "perplexity" and v.memory == "on"
        )
        == 3
    )


def test_frequencies_agree_with_a_plain_count():
    random = np.random.default_rng(0)
    training = [random.integers(0, 50, random.integers(0, 60)) for _ in range(40)]
    training.append(np.array([70_000, 1, 2, 70_000]))  # ids that no document holds
    documents = [random.integers(0, 40, 30), np.array([39, 0, 1]), np.array([5]), np.array([], int)]
    seen = Frequencies.count(documents, training)
    for order in (1, 2, 3):
        counted = Counter(
            tuple(ids[t : t + order].tolist()) for ids in training for t in range(len(ids) - order + 1)
        )
        for ids in documents:
            want = [
                -1 if t + 1 < order else counted[tuple(ids[t + 1 - order : t + 1].tolist())]
                for t in range(len(ids))
            ]
            assert seen.of(ids, order=order).tolist() == want


def test_frequencies_refuse_what_they_cannot_count():
    with pytest.raises(ConfigError, match="up to 2 with ids of 22 bits"):
        Frequencies.count([np.array([1 << 21])], [])
    seen = Frequencies.count([np.array([1, 2, 3])], [])
    with pytest.raises(ConfigError, match="not among the documents"):
        seen.of(np.array([3, 2, 1]), order=2)


def test_buckets_hold_what_their_names_say():
    counts = np.array([-1, 0, 1, 2, 3, 4, 15, 16, 255, 256, 10_000])
    assert bucket_of(counts).tolist() == [-1, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len(BUCKETS) == 6


def test_texts_are_read_up_to_a_number_of_tokens(tmp_path, loud):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": WORDS}) + "\n" for _ in range(3)))
    (tmp_path / "b.txt").write_text(WORDS * 50)
    texts = read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"], loud.encode, tokens=150)
    lengths = [("a.jsonl", len(WORDS)), ("a.jsonl", 150 - len(WORDS)), ("b.txt", 150)]
    assert [(text.file, len(text.ids)) for text in texts] == lengths
    assert np.array_equal(texts[2].ids, loud.encode(WORDS * 2)[:150])
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(DataError, match="no text of two tokens"):
        read_texts([tmp_path / "c.txt"], loud.encode, tokens=9)
    with pytest.raises(ConfigError, match="from 2 on"):
        read_texts([tmp_path / "b.txt"], loud.encode, tokens=1)
    (tmp_path / "below").mkdir()
    (tmp_path / "below/b.txt").write_text(WORDS)
    with pytest.raises(ConfigError, match="the same name"):
        read_texts([tmp_path / "b.txt", tmp_path / "below/b.txt"], loud.encode, tokens=9)


def test_stretches_cut_long_documents():
    texts = [Text("a", np.arange(5)), Text("a", np.arange(STRETCH + 3)), Text("b", np.arange(2))]
    found = stretches(texts)
    assert len(found) == 4 + STRETCH + 2 + 1
    assert np.bincount(found).tolist() == [4, STRETCH, 2, 1]


def test_intervals_hold_the_middle_of_the_draws():
    assert mean_interval([1.0, 0.0, 1.0, 1.0])[1] is None
    mean, ends = mean_interval([1.0] * 30 + [0.0] * 70)
    assert mean == 0.3
    assert ends[0] == pytest.approx(0.3 - 1.96 * np.sqrt(0.21 / 100), abs=0.02)
    assert ends[1] == pytest.approx(0.3 + 1.96 * np.sqrt(0.21 / 100), abs=0.02)
    assert interval(np.array([1.0, np.nan]), 10) is None
    # Wilson's, by hand: z²/(n + z²) = 3.8415 / 83.8415
    assert share_interval([0.0] * 80) == (0.0, (0.0, pytest.approx(0.045818, abs=1e-6)))
    assert share_interval([1.0] * 80) == (1.0, (pytest.approx(1 - 0.045818, abs=1e-6), 1.0))
    assert share_interval([1.0] * 30 + [0.0] * 70)[1] == pytest.approx((0.218949, 0.395849), abs=1e-6)
    assert share_interval([0.0, 1.0])[1] is None
    halves = [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.5]
    assert share_interval(halves) == mean_interval(halves)
    draws = ratio_draws(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    assert np.all(draws == 2)


def test_a_window_beyond_the_model_is_refused(loud):
    with pytest.raises(ConfigError, match="reads 128 tokens; got a window of 512"):
        perplexity(loud, texts_of(loud, a=[WORDS]), states=("on",))


def test_results_are_kept_and_other_settings_refused(tmp_path):
    measured = Result(
        "perplexity",
        (Value("perplexity", "a", "on", 2.5, 10, "tokens", (2.0, 3.0)), Value("x", "", "off", None, 0, "facts")),
        {"window": 8, "states": ["on"]}, ("A note.",), 1.5, {"more": [1]},
    )  # fmt: skip
    path = save(measured, tmp_path / "out")
    assert load(path) == measured
    assert finished("perplexity", {"window": 8, "states": ("on",)}, tmp_path / "out") == measured
    assert finished("facts", {}, tmp_path / "out") is None
    with pytest.raises(ConfigError, match=r"another window \(8, not 9\); give --overwrite"):
        finished("perplexity", {"window": 9, "states": ["on"]}, tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(DataError, match="no result of engram-lm eval"):
        load(path)
