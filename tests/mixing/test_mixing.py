"""The mixture against its definition, and what memory may never do: speak for special tokens, revive forbidden ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from engram_lm.errors import ConfigError
from engram_lm.mixing import onepass
from engram_lm.mixing.mix import TokenRules, mix, mix_plain, token_rules


def a_row(seed, V=300, *, spread=3.0, forbidden=0):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=V) * spread).astype(np.float32)
    logits[rng.choice(V, forbidden, replace=False)] = -np.inf
    return logits


def a_memory(seed, n=280, *, filled=1.0):
    rng = np.random.default_rng(seed + 1000)
    p = rng.random(n + 1) ** 8 * (rng.random(n + 1) < filled)
    p[5] += 1e-6
    return (p / p.sum()).astype(np.float32)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6), lam=st.floats(0, 0.999), filled=st.sampled_from([0.05, 1.0]),
    forbidden=st.sampled_from([0, 3, 250]), spread=st.sampled_from([0.1, 3.0, 60.0]),
    space=st.sampled_from(["linear", "log"]),
)  # fmt: skip
def test_the_mixture_is_its_definition(seed, lam, filled, forbidden, spread, space):
    logits, p = a_row(seed, spread=spread, forbidden=forbidden), a_memory(seed, filled=filled)
    rules = TokenRules(n_tokens=280, n_logits=300, silent=(0, 1, 17), eos_id=1)
    q = rules.prepare(p)
    out = np.full_like(logits, np.nan)
    mixture = mix(logits, q, lam=lam, out=out, space=space)
    wanted = mix_plain(logits, q, lam=lam, space=space)
    # below e^-87 of the most likely token the kernels count 1e-38
    near = wanted > -80
    np.testing.assert_allclose((out - mixture.lse)[near], wanted[near], atol=3e-5)
    assert np.array_equal(np.isneginf(out), np.isneginf(logits))
    assert np.logaddexp.reduce(out.astype(np.float64)) == pytest.approx(mixture.lse, abs=2e-5)
    in_place = logits.copy()
    mix(in_place, q, lam=lam, out=in_place, space=space)
    np.testing.assert_array_equal(in_place, out)


def test_a_row_without_memory_keeps_its_bits():
    logits, p = a_row(1), a_memory(1)
    out = np.empty_like(logits)
    for q, lam in ((p[:280], 0.0), (np.zeros(280, np.float32), 0.7)):
        assert mix(logits, q, lam=lam, out=out).lam == 0
        assert out.tobytes() == logits.tobytes()
    # all that memory says is forbidden
    q = np.zeros(280, np.float32)
    q[7], logits[7] = 1.0, -np.inf
    assert mix(logits, q, lam=0.5, out=out).lam == 0
    assert out.tobytes() == logits.tobytes()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_without_a_sum_are_left_alone(broken):
    logits, out = a_row(2), np.zeros(300, np.float32)
    logits[50] = broken
    assert mix(logits, a_memory(2)[:280], lam=0.5, out=out).lam == 0
    assert out.tobytes() == logits.tobytes()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_memory_without_a_sum_is_left_out(broken):
    logits, q, out = a_row(2), a_memory(2)[:280].copy(), np.zeros(300, np.float32)
    q[50] = broken
    assert mix(logits, q, lam=0.5, out=out).lam == 0
    assert out.tobytes() == logits.tobytes()


def test_special_tokens_get_nothing_and_end_goes_where_the_rules_say():
    logits = np.zeros(300, np.float32)
    p = np.zeros(281, np.float32)
    p[[0, 1, 17, 40, 280]] = 0.3, 0.1, 0.2, 0.1, 0.3
    for eos, wanted in ((1, {40: 0.25, 1: 0.75}), (None, {40: 1.0})):
        rules = TokenRules(n_tokens=280, n_logits=300, silent=(0, 1, 17), eos_id=eos)
        out = np.empty_like(logits)
        mixture = mix(logits, rules.prepare(p.copy()), lam=0.5, out=out)
        got = np.exp(out.astype(np.float64) - mixture.lse)
        for token in range(300):
            assert got[token] == pytest.approx(0.5 / 300 + 0.5 * wanted.get(token, 0), rel=1e-5)
        assert rules.mute(np.array([0, 1, 17, 40, 280, 281, -1])).tolist() == [
            True, eos is None, True, False, eos is None, True, True,
        ]  # fmt: skip


def test_rules_find_special_tokens_and_chat_markers():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<|im_start|>", "<eos>"])
    tokenizer.add_tokens(
        [AddedToken(t, special=False) for t in ("<tool_call>", "</think>", "    ", "word", "[INST]")]
    )
    rules = token_rules(tokenizer, n_logits=16, eos_id=4)
    assert (rules.n_tokens, rules.n_logits, rules.eos_id) == (10, 16, 4)
    assert rules.silent == (3, 4, 5, 6, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenRules(n_tokens=10, n_logits=9), "10 token ids, the model 9 logits.*another tokenizer"),
        (lambda: TokenRules(n_tokens=10, n_logits=12, eos_id=10), "Token id 10 is outside the index's 10"),
        (lambda: mix(a_row(1), a_memory(1), lam=1.0, out=a_row(1)), "less than 1; got 1.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("V", [1, 7, 1024, 1025, 5000])
def test_one_reading_of_the_logits(V):
    rows = np.stack([a_row(seed, V, spread=spread) for seed, spread in enumerate((0.0, 1.0, 20.0))])
    rows[1, V // 2] = rows[1].max()
    target, other = np.array([0, V - 1, V]), np.array([V - 1, -1, 0])
    got = np.empty((3, 6))
    onepass.survey_rows(rows, target, other, got)
    for t, row in enumerate(rows.astype(np.float64)):
        log_p = row - np.logaddexp.reduce(row)
        assert got[t, 0] == pytest.approx(log_p[target[t]] if target[t] < V else -np.inf, abs=1e-5)
        assert got[t, 1] == pytest.approx(log_p[other[t]] if other[t] >= 0 else -np.inf, abs=1e-5)
        # tokens of less than e^-87 count 1e-38 each
        assert got[t, 2] == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=2e-5)
        assert got[t, 3] == pytest.approx(log_p.max(), abs=1e-5)
        assert got[t, 4] == rows[t].argmax()
        assert got[t, 5] == pytest.approx(np.logaddexp.reduce(row), abs=1e-4)


def test_forbidden_logits_count_for_nothing():
    row = np.full(2000, -np.inf, np.float32)
    row[[3, 900]] = 1.0, 1.0
    at, most, lse, entropy = onepass.survey(row)
    assert (at, most) == (3, 1.0)
    assert (lse, entropy) == (pytest.approx(1 + np.log(2)), pytest.approx(np.log(2), abs=1e-6))
