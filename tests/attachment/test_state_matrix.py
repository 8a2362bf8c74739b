"""The state matrix on Llama: every way of running gives the numbers of a full forward, and notices a broken state.

Other shapes, compiled and real models: test_state_matrix_slow.py. Drawn as a table in docs/state-matrix.md.
"""

import copy
import json

import pytest
import torch

import models
from matrix import WAYS, Outcome, broken, passes, run, text, tolerance, verdict
from places import ROOT

EAGER = [name for name, way in WAYS.items() if not way.compiled]
BREAKS = [(name, how) for name in EAGER for how in WAYS[name].broken_by]
# What the fast set leaves to test_state_matrix_slow.py, which runs everything: variants and the longer ways.
FAST_IN_FLOAT32 = (
    "one token a step",
    "chunks of 7",
    "rows reordered",
    "left padding, cached",
    "right padding, then on",
    "packed documents",
    "static cache",
    "beam search",
    "gradient checkpointing",
)
LONGER = (
    "padded batch, static cache",
    "greedy, prompt in chunks",
    "greedy, cache handed on",
    "greedy, static cache",
    "beam search, static cache",
    "static cache, mask of its length",
    "after an unrelated prompt",
    "cache copied",
    "cache built lazily",
    "chunks of 4",
)
PAGE = ROOT / "docs" / "state-matrix.json"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose by sharing a matrix product between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bare64():
    return models.build("llama", torch.float64)


@pytest.fixture(scope="module")
def model64(bare64):
    return models.give_memory(copy.deepcopy(bare64), "paper")


@pytest.fixture(scope="module")
def bare32():
    return models.build("llama")


@pytest.fixture(scope="module")
def model32(bare32):
    return models.give_memory(copy.deepcopy(bare32), "several")


@pytest.mark.parametrize("name", EAGER)
def test_llama_in_float64(name, bare64, model64):
    """1e-9 in float64: what is left is the order of sums, and nothing of the state is lost."""
    ours, bare = run(WAYS[name], model64, text()), run(WAYS[name], bare64, text())
    assert passes(bare, torch.float64), bare
    assert verdict(ours, bare, torch.float64) == "pass"


@pytest.mark.parametrize("name", FAST_IN_FLOAT32)
def test_llama_in_float32_with_several_memories(name, bare32, model32):
    ours, bare = run(WAYS[name], model32, text()), run(WAYS[name], bare32, text())
    assert passes(bare, torch.float32), bare
    assert verdict(ours, bare, torch.float32) == "pass"


@pytest.mark.parametrize(("name", "how"), [pair for pair in BREAKS if pair[0] not in LONGER])
def test_a_broken_state_shows(name, how, model64):
    with broken(how):
        outcome = run(WAYS[name], model64, text())
    assert outcome.raised is None, outcome.raised
    assert outcome.error > 1e-2


def test_compiled_in_one_graph(bare32):
    """An eager prompt on a static cache, then steps of one compiled graph; compiled once, whatever the length."""
    model = models.give_memory(copy.deepcopy(bare32), "paper")
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours = run(WAYS["compiled, static cache"], model, text())
    assert ours.raised is None, ours.raised
    assert ours.error <= tolerance(ours, Outcome(error=0.0), torch.float32)


def test_verdicts():
    good, bad, fails = Outcome(error=1e-12), Outcome(error=0.5), Outcome(raised=IndexError("x"))
    float64 = torch.float64
    assert verdict(good, good, float64) == "pass"
    assert verdict(bad, good, float64).startswith("WRONG")
    assert verdict(fails, good, float64).startswith("WRONG")
    assert verdict(good, fails, float64).startswith("WRONG")
    assert verdict(bad, bad, float64).startswith("WRONG")
    assert verdict(fails, fails, float64) == "both raise IndexError"
    # an error that says less than the base's
    assert verdict(Outcome(raised=KeyError("x")), fails, float64).startswith("WRONG")


def test_the_published_matrix_has_every_way_and_shape():
    page = json.loads(PAGE.read_text())
    assert page["ways"] == list(WAYS)
    assert set(models.SHAPES) <= set(page["cells"])
    for shape, cells in page["cells"].items():
        wrong = {name: cell["verdict"] for name, cell in cells.items() if "WRONG" in cell["verdict"]}
        assert not wrong, shape
