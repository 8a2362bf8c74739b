"""Pointing: beside its plain twin, as a mixture, and as what a model says."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.mixing.mix import TokenRules, mix_plain
from engram_lm.mixing.pointing import Pointing, PointingProcessor, point

V = 12


@dataclass
class Line:
    """Tokens with some of them in words worth naming, each a word of its own but for `joined`."""

    tokens: np.ndarray
    weight: float
    starts: tuple
    inside: np.ndarray


def line(tokens, named, *, weight=1.0, joined=()):
    inside = np.isin(np.arange(len(tokens)), [*named, *joined])
    return Line(np.array(tokens, np.int64), weight, tuple(named), inside)


def going_on_plain(focus, said):
    """Longest last tokens of the answer that stand in a sentence and touch a named word, and the place behind them."""
    for depth in range(len(said), 0, -1):
        for sentence in focus:
            tokens = sentence.tokens.tolist()
            for at in range(depth, len(tokens) + 1):
                if tokens[at - depth : at] == said[-depth:] and sentence.inside[at - depth : at].any():
                    return depth, (tokens[at] if at < len(tokens) else None)
    return 0, None


@st.composite
def drawn_lines(draw):
    tokens = draw(st.lists(st.integers(0, 5), min_size=1, max_size=8))
    named = draw(st.sets(st.integers(0, len(tokens) - 1)))
    return line(tokens, sorted(named), weight=draw(st.sampled_from([1.0, 0.25])))


@given(st.lists(drawn_lines(), max_size=3), st.lists(st.integers(0, 6), max_size=10))
def test_what_follows_is_what_the_plain_twin_finds(focus, said):
    logits = np.linspace(0, 1, V, dtype=np.float32)
    pointed = point(focus, said, logits, Pointing())
    depth, token = going_on_plain(focus, said)
    assert pointed.depth == (depth if token is not None else 0)
    if depth:
        assert pointed.tokens.tolist() == ([] if token is None else [token])
    if pointed.lam:
        assert pointed.p.sum() == pytest.approx(1.0)
        assert (pointed.p >= 0).all()
    else:
        assert not len(pointed.tokens)


def test_words_are_as_likely_as_the_model_finds_them():
    focus = [line([1, 2, 3], [1, 2]), line([4, 5, 2], [0, 2], weight=0.25)]
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    for alpha in (0.0, 0.5, 1.0):
        pointed = point(focus, [], logits, Pointing(alpha=alpha))
        weight = {2: 1.0, 3: 1.0, 4: 0.25}
        wanted = np.array([w * np.exp(alpha * float(logits[t])) for t, w in weight.items()])
        assert dict(zip(pointed.tokens.tolist(), pointed.p, strict=True)) == pytest.approx(
            dict(zip(weight, wanted / wanted.sum(), strict=True))
        )
        assert pointed.lam == Pointing().lam


def test_a_word_that_has_begun_is_gone_through_to_the_sentences_end_and_said_once():
    # 1 | 2 3 (one word) | 4 (no name) | 5
    focus = [line([1, 2, 3, 4, 5], [1, 4], joined=[2]), line([6, 7], [0], weight=0.5)]
    logits, lams = np.zeros(V, np.float32), []
    said = [9, 2]
    for token in (3, 4, 5):
        pointed = point(focus, said, logits, Pointing())
        assert pointed.tokens.tolist() == [token]
        lams.append(pointed.lam)
        said.append(token)
    assert lams == [0.95, 0.7, 0.7]
    assert point(focus, said, logits, Pointing()).lam == 0
    assert point(focus, [*said, 9], logits, Pointing()).lam == 0
    # a word that was said is not proposed again
    assert set(point(focus, [9, 2, 9], logits, Pointing()).tokens.tolist()) == {5, 6}


def test_nothing_to_point_at_leaves_every_bit():
    torch = pytest.importorskip("torch")
    rules = TokenRules(n_tokens=V, n_logits=V)
    scores = torch.randn(2, V)
    for focus in ((), (line([1, 2], []),)):
        out = PointingProcessor(focus, prompt_length=1, rules=rules)(torch.tensor([[1, 2], [1, 3]]), scores)
        assert torch.equal(out, scores)


def test_the_processor_writes_the_mixture_and_tells_its_part():
    torch = pytest.importorskip("torch")
    focus = (line([1, 2, 3], [1, 2]),)
    rules = TokenRules(n_tokens=V, n_logits=V + 2, silent=(3,))
    processor = PointingProcessor(focus, prompt_length=2, rules=rules, pointing=Pointing(lam=0.4))
    scores = torch.randn(1, V + 2, generator=torch.Generator().manual_seed(0))
    out = torch.log_softmax(processor(torch.tensor([[5, 2]]), scores.clone()).double(), -1)[0]
    q = np.zeros(V)
    q[2] = 1.0  # 3 is silent, the prompt's own 2 is no answer
    assert out.numpy() == pytest.approx(mix_plain(scores[0].numpy(), q, lam=0.4), abs=1e-5)
    step = processor.step_of(2)
    assert step.p == pytest.approx(float(out[2].exp()), rel=1e-4)
    assert step.responsibility == pytest.approx(0.4 / step.p, rel=1e-4)
    assert (step.position, step.lam, step.depth) == (2, 0.4, 0)
    assert processor.step_of(7).responsibility == 0
    with pytest.raises(ConfigError, match="prompt of 2 tokens; got 1"):
        processor(torch.tensor([[5]]), scores)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"lam": 1.0}, "lam is"), ({"phrase": -0.1}, "phrase is"), ({"alpha": -1}, "alpha is")],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Pointing(**options)
