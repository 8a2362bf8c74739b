"""Gates: files, refusals, fitting against a problem whose answer is known, the bound on harm, and the shipped one."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, ConfigError, DataError, IdentityError
from engram_lm.mixing.features import COLUMNS, NAMES, Evidence, features
from engram_lm.mixing.fit import Examples, calibrate, draw_calibration, examples_of, fit_gate, report
from engram_lm.mixing.fit import _objective as objective_of
from engram_lm.mixing.gate import MOST, FixedLambda, Gate, LookupConfig, default_gate
from engram_lm.mixing.lookups import Lookups

DEPTH = NAMES.index("depth")


def some_examples(
    seed=0, N=3000, *, truth=lambda depth: 0.02 + 0.9 * (depth >= 3), general=False, name="a book"
):
    """Text drawn from the mixture itself: with probability truth(depth) the token is memory's."""
    rng = np.random.default_rng(seed)
    depth = rng.integers(0, 6, N)
    lam = truth(depth)
    memorised = rng.random(N) < lam
    p_model = np.where(memorised, 0.01, 0.3)
    p_memory = np.where(memorised, 0.9, 0.001)
    x = np.zeros((N, len(NAMES)))
    x[:, DEPTH] = np.log2(1 + depth)
    for step in (1, 2, 3, 4):
        x[:, NAMES.index(f"depth>={step}")] = depth >= step
    return Examples(
        features=x, log_p_model=np.log(p_model), p_memory=p_memory, found=np.ones(N, bool),
        group=np.zeros(N, np.int64), groups=(name,), general=(general,),
    )  # fmt: skip


def a_gate(**changes):
    F = len(NAMES)
    facts = {
        "kind": "logistic", "mean": np.zeros(F), "scale": np.ones(F), "low": np.full(F, -9.0), "high": np.full(F, 9.0),
        "weights": {"w": np.linspace(-0.1, 0.1, F), "b": np.array(-1.0)}, "tokenizer": "t" * 64, "model": "m" * 64,
        "model_name": "tiny", "reading": LookupConfig(discount=0.5),
    }  # fmt: skip
    return Gate(**{**facts, **changes})


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_a_gate_finds_the_lambda_that_made_the_text(kind):
    gate = fit_gate(some_examples(N=4000), kind=kind, steps=200, decay=0.0)
    test = some_examples(1)
    lam = gate.lambdas(test.features)
    deep = test.features[:, DEPTH] >= 2
    assert lam[deep].mean() == pytest.approx(0.92, abs=0.03)
    assert lam[~deep].mean() == pytest.approx(0.02, abs=0.02)
    rows = report(gate, test)
    assert rows["groups"][0]["perplexity_mixed"] < rows["groups"][0]["perplexity_alone"]
    for row in rows["calibration"]:
        assert row["mean"] == pytest.approx(row["best"], abs=0.08)


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_gradients_are_those_of_the_likelihood(kind):
    rng = np.random.default_rng(0)
    x, ratio, weight = rng.normal(size=(20, 3)), rng.random(20) * 5, rng.random(20)
    shapes = {"logistic": {"w": 3, "b": ()}, "mlp": {"W": (4, 3), "a": 4, "v": 4, "b": ()}}[kind]
    weights = {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def loss(weights):
        return objective_of(kind, weights, x, ratio, weight, 0.1)[0]

    z = x @ weights["w"] + weights["b"] if kind == "logistic" else (
        np.tanh(x @ weights["W"].T + weights["a"]) @ weights["v"] + weights["b"]
    )  # fmt: skip
    decayed = sum((weights[n] ** 2).sum() for n in weights if n in "wWv")
    plain = -(weight * np.log1p(MOST / (1 + np.exp(-z)) * (ratio - 1))).sum() + 0.05 * decayed
    assert loss(weights) == pytest.approx(plain)
    for name, gradient in objective_of(kind, weights, x, ratio, weight, 0.1)[1].items():
        for place in np.ndindex(weights[name].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {n: a.copy() for n, a in weights.items()}
                moved[name][place] += step
                ends.append(loss(moved))
            assert np.asarray(gradient)[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)


def test_the_bound_on_general_text_holds_and_costs_no_more_than_needed():
    domain = some_examples(2)
    general = some_examples(3, truth=lambda depth: 0.0 * depth, general=True, name="prose")
    both = Examples.join([domain, general])
    # fitted on the domain alone, and so too bold on prose
    gate = fit_gate(domain, steps=200)
    harm = {
        row["group"]: row["perplexity_mixed"] / row["perplexity_alone"] - 1
        for row in report(gate, both)["groups"]
    }
    assert harm["prose"] > 0.05
    held = calibrate(gate, both, bound=0.005)
    assert held.shift > 0
    assert 0.0045 < held.measured["worst_general"] <= 0.005
    assert calibrate(held, both, bound=1e3).shift == 0
    with pytest.raises(DataError, match="needs general text"):
        calibrate(gate, domain)
    with pytest.raises(DataError, match="no examples"):
        Examples.join([])


def test_weights_of_groups_do_not_depend_on_their_size():
    large, small = some_examples(4, N=4000, name="large"), some_examples(4, N=400, name="small")
    once, again = (
        fit_gate(Examples.join([large, small]), steps=50),
        fit_gate(Examples.join([large, small, small]), steps=50),
    )
    np.testing.assert_allclose(once.weights["w"], again.weights["w"], atol=0.02)


def test_groups_can_be_taken_out_again():
    parts = [some_examples(n, N=30 + n, name=f"part {n}", general=n == 2) for n in range(3)]
    found = Examples.join(parts).of(["part 2", "part 0"])
    assert (found.groups, found.general, len(found)) == (("part 2", "part 0"), (True, False), 62)
    for n, name in ((2, "part 2"), (0, "part 0")):
        here = found.group == found.groups.index(name)
        np.testing.assert_array_equal(found.p_memory[here], parts[n].p_memory)


def test_files_come_back_and_say_what_they_are_for(tmp_path):
    gate = a_gate()
    loaded = Gate.load(gate.save(tmp_path / "gate.json"))
    x = np.random.default_rng(0).normal(size=(50, len(NAMES)))
    np.testing.assert_allclose(loaded.lambdas(x), gate.lambdas(x), atol=1e-8)
    assert (loaded.reading, loaded.model_name) == (LookupConfig(discount=0.5), "tiny")
    assert Gate.from_json(loaded.to_json()).to_json() == loaded.to_json()
    loaded.require(tokenizer="t" * 64, model=None)
    with pytest.raises(
        IdentityError, match="fitted for tiny with weights mmmmmmmmmmmm, not for nnnnnnnnnnnn"
    ):
        loaded.require(tokenizer="t" * 64, model="n" * 64)
    with pytest.raises(IdentityError, match="fitted for the tokenizer tttttttttttt, not for uuuuuuuuuuuu"):
        loaded.require(tokenizer="u" * 64, model=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["features"].update(version=0), "features of version 0; this build has 1. Fit it again"),
        (lambda f: f.update(format="engram-lm gate 9"), "is no gate of this build"),
        (lambda f: f["weights"].pop("b"), "is no gate of this build: A logistic gate has weights"),
        (lambda f: f.update(extra=1), "is no gate of this build"),
        (lambda f: f["mean"].pop(), "is no gate of this build: mean of a gate has finite numbers"),
        (lambda f: f["weights"].update(b="x"), "is no gate of this build"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = a_gate().save(tmp_path / "gate.json")
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=message):
        Gate.load(path)
    with pytest.raises(CheckpointError, match="no gate can be read here"):
        Gate.load(tmp_path / "none.json")


def test_fixed_lambdas_and_refusals():
    fixed = FixedLambda(0.25)
    assert fixed.lambdas(np.zeros((3, len(NAMES)))).tolist() == [0.25] * 3
    fixed.require(tokenizer="a", model="b")
    for make, message in (
        (lambda: FixedLambda(1.0), "less than 1; got 1.0"),
        (lambda: FixedLambda(0.1, space="sqrt"), "linear or log; got 'sqrt'"),
        (lambda: a_gate(kind="tree"), "logistic or mlp; got 'tree'"),
        (lambda: default_gate("gpt9"), "No gate is shipped for 'gpt9', only for smollm2"),
        (lambda: fit_gate(some_examples(), kind="tree"), "logistic or mlp; got 'tree'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


number = st.integers(0, 10**9) | st.integers(0, 40)
nats = st.floats(0, 30)
rows = st.fixed_dictionaries(
    {
        **dict.fromkeys(("depth", "generated", "count", "distinct", "count_below", "distinct_below"), number),
        "documents": st.integers(0, 16), "memory_entropy": nats, "top_p": st.floats(0, 1), "model_entropy": nats,
        "model_top_logp": nats.map(float.__neg__), "model_logp_of_top": nats.map(float.__neg__) | st.just(-np.inf),
        "same_top": st.booleans(),
    }
)  # fmt: skip


def plain_features(e, *, tokens):
    """The twin: every feature from its definition, in Python numbers."""
    depth, documents = e["depth"], e["documents"]
    p = min(max(e["top_p"], 1e-6), 1 - 1e-6)
    top, log_depth = math.log(p / (1 - p)), math.log2(1 + depth)
    own = min(e["generated"], depth)
    capped = depth >= 3 and documents < 16
    count = min(e["count"], 32 * max(documents, 1)) if capped else e["count"]
    return {
        "depth": log_depth, **{f"depth>={n}": depth >= n for n in (1, 2, 3, 4, 6, 9, 17)},
        "count": math.log1p(count), "count=1": e["count"] == 1,
        "distinct": math.log1p(e["distinct"]), "distinct=1": e["distinct"] == 1,
        "count below": math.log1p(e["count_below"]), "distinct below": math.log1p(e["distinct_below"]),
        "documents": math.log1p(min(documents, 16)), "documents=1": documents == 1,
        "memory entropy": e["memory_entropy"], "memory top": top, "model entropy": e["model_entropy"],
        "model top": max(e["model_top_logp"], math.log(1e-9)),
        "model on memory top": max(e["model_logp_of_top"], math.log(1e-9)), "same top": e["same_top"],
        "depth x model entropy": log_depth * e["model_entropy"], "depth x memory top": log_depth * top,
        "tokens": math.log1p(tokens), "fresh": log_depth - math.log2(1 + depth - own),
        "all generated": depth > 0 and e["generated"] >= depth,
    }  # fmt: skip


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), number)
def test_features_are_what_their_names_say(several, tokens):
    found = features(Evidence.of(**{name: [row[name] for row in several] for name in COLUMNS}), tokens=tokens)
    for row, values in zip(several, found, strict=True):
        wanted = plain_features(row, tokens=tokens)
        assert list(wanted) == list(NAMES)
        np.testing.assert_allclose(values, np.array(list(wanted.values()), float), rtol=1e-9, atol=1e-9)


def test_features_are_moderate_and_tell_fresh_matches_from_copied_ones():
    def row(**changes):
        facts = {
            "depth": 8, "generated": 0, "count": 3, "distinct": 1, "count_below": 4, "distinct_below": 2,
            "documents": 2, "memory_entropy": 0.0, "top_p": 0.8,
            "model_entropy": 2.0, "model_top_logp": -0.5, "model_logp_of_top": -9.0, "same_top": False,
        }  # fmt: skip
        return features(Evidence.of(**{k: [v] for k, v in {**facts, **changes}.items()}), tokens=10**9)[0]

    place = {name: i for i, name in enumerate(NAMES)}
    assert row().shape == (len(NAMES),)
    assert np.abs(row(count=10**9, model_logp_of_top=-np.inf, top_p=1.0, depth=64)).max() < 200
    assert row()[place["fresh"]] == 0
    assert row(generated=5)[place["fresh"]] == pytest.approx(np.log2(9) - np.log2(4))
    assert row(generated=8)[place["all generated"]] == 1
    assert row(generated=100)[place["fresh"]] == pytest.approx(np.log2(9))
    assert row(depth=0, generated=5)[place["all generated"]] == 0


def test_examples_need_the_token_that_came():
    memory = Lookups(
        **dict.fromkeys(
            (
                "depth",
                "count",
                "distinct",
                "count_below",
                "distinct_below",
                "documents",
                "entropy",
                "top",
                "top_p",
            ),
            np.ones(2),
        )
    )
    with pytest.raises(ConfigError, match="P_memory of the token that came"):
        examples_of(memory, np.zeros((2, 6)), tokens=1, group="x", kind="domain")


def test_the_calibration_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = report(fit_gate(some_examples(), steps=50), some_examples(1))["calibration"]
    draw_calibration(rows, tmp_path / "calibration.png", title="made up")
    assert (tmp_path / "calibration.png").read_bytes()[:4] == b"\x89PNG"


def test_arithmetic_and_files_load_without_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import engram_lm.mixing as m\n"
        "from engram_lm.mixing import fit, lookups, session, trace, gate_provenance, onepass, identity\n"
        "m.default_gate; m.Gate; m.TokenRules; m.FixedLambda; m.SessionMemory; m.summary; print(dir(m)[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
