"""The subject of an evaluation: its states, what it says about ids against plain forwards, and that nothing stays behind."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from engram_lm.attachment import MemoryConfig, attach, memories  # noqa: E402
from engram_lm.bases.recipes import byte_tokenizer  # noqa: E402
from engram_lm.errors import ConfigError, DataError, TokenIdError  # noqa: E402
from engram_lm.eval.evaluated_model import EvaluatedModel  # noqa: E402


@pytest.fixture(scope="module")
def loud():
    return EvaluatedModel(models.give_memory(models.build("llama")), models.tokenizer(), name="loud")


@pytest.fixture(scope="module")
def bare():
    return EvaluatedModel(models.build("llama"), models.tokenizer(), name="bare")


def test_log_probs_are_those_of_the_logits(loud):
    ids = loud.encode("Annual leave is thirty days.")
    with loud.state("on"):
        found, tail = loud.log_probs(ids), loud.log_probs(ids, since=9)
        logits = loud.model(torch.from_numpy(ids)[None]).logits[0, :-1].double()
    want = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_allclose(tail, want[8:], rtol=1e-5)
    for since in (0, len(ids)):
        with pytest.raises(TokenIdError, match="after the first"):
            loud.log_probs(ids, since=since)


@pytest.mark.parametrize(
    ("shape", "state"),
    [("llama", state) for state in ("on", "off", "noise", "shuffled")]
    + [(shape, "on") for shape in ("gpt2", "mistral", "qwen3_next", "lfm2")],
)
def test_continuations_from_a_cache_are_those_of_whole_forwards(shape, state):
    subject = EvaluatedModel(models.give_memory(models.build(shape)), models.tokenizer())
    prompt = subject.encode("The capital of Xanadu is")
    continuations = [[40, 50, 60, 70, 80, 90], [41], [40, 51], [99, 98, 97]]
    with subject.state(state):
        # the first continuation that greedy decoding says, found by saying it
        said = prompt
        for _ in range(3):
            said = np.append(said, int(subject.model(torch.from_numpy(said)[None]).logits[0, -1].argmax()))
        continuations.append(said[len(prompt) :].tolist())
        found = subject.continuations(prompt, continuations)
        plain = subject.continuations_plain(prompt, continuations)
    np.testing.assert_allclose([x.log_p for x in found], [x.log_p for x in plain], rtol=2e-4)
    assert [x.greedy for x in found] == [x.greedy for x in plain]
    assert found[-1].greedy
    assert subject.caches


def test_many_continuations_are_read_in_groups(loud):
    prompt = loud.encode("No")
    many = [[i, i + 1] for i in range(2, 150)]
    with loud.state("on"):
        found, some = loud.continuations(prompt, many), loud.continuations(prompt, many[100:])
    np.testing.assert_allclose([x.log_p for x in found[100:]], [x.log_p for x in some], rtol=1e-5)


def test_states_differ_and_leave_no_bit_behind(loud):
    ids = loud.encode("The dog of the office is called Orlando.")
    with loud.state("on"):
        before = loud.log_probs(ids)
    seen = {}
    for state in loud.states:
        with loud.state(state):
            seen[state] = loud.log_probs(ids)
    assert len({x.tobytes() for x in seen.values()}) == 4
    with loud.state("on"):
        assert np.array_equal(loud.log_probs(ids), before)
    with loud.state("noise"):
        assert np.array_equal(loud.log_probs(ids), seen["noise"])


def test_a_state_ends_with_its_block_whatever_happens(loud):
    loud.model.train()
    seen = []
    with pytest.raises(ZeroDivisionError), loud.state("shuffled"):
        seen.append(1 / loud.model.training)  # False: in eval mode
    assert loud.model.training
    assert all(memory.intervention is None for memory in memories(loud.model).values())
    loud.model.eval()


def test_a_model_without_memory_has_one_state(bare):
    assert bare.states == ("none",)
    with pytest.raises(ConfigError, match="bare has no memory"):
        bare.require_states(["none", "on"])
    with pytest.raises(ConfigError, match="'none'"):
        EvaluatedModel(models.give_memory(models.build("llama")), models.tokenizer()).require_states(["none"])
    ids = bare.encode("text")
    with bare.state("none"):
        assert len(bare.log_probs(ids)) == 3


def test_off_is_the_model_without_memory(loud, bare):
    ids = loud.encode("Annual leave")
    with loud.state("off"), bare.state("none"):
        assert np.array_equal(loud.log_probs(ids), bare.log_probs(ids))


def test_states_that_draw_name_their_seed(loud):
    assert loud.drawn(["on", "off"]) == {}
    assert EvaluatedModel(loud.model, loud.tokenizer, seed=7).drawn(["on", "noise"]) == {"state_seed": 7}
    assert loud.drawn(["shuffled"]) == {"state_seed": 0}


def test_facts_change_with_the_memory(loud):
    before = loud.facts()
    memory = memories(loud.model)["memory"]
    rows = memory.slots[0].table.rows_view()
    seen = {before["memory_sha256"]}
    for row in range(len(rows)):
        kept = rows[row].clone()
        rows[row, -1] += 1
        seen.add(loud.facts()["memory_sha256"])
        rows[row] = kept
    assert len(seen) == 1 + len(rows)
    assert loud.facts() == before
    config = memory.config
    memory.config = replace(config, control="shuffled")
    assert loud.facts()["memory_sha256"] not in seen
    memory.config = config
    assert loud.facts() == before
    assert before["tables"]["memory at block 1"]["rows"] == rows.shape[0]


def test_a_pair_is_cut_where_the_prompt_ends(bare):
    prompt, answer = bare.pair("The capital is", "Algiers")
    assert bare.encoder.decode(prompt) == "The capital is"
    assert bare.encoder.decode(answer) == " Algiers"
    prompt, answer = bare.pair("The capital is ", "Algiers")
    assert (bare.encoder.decode(prompt), bare.encoder.decode(answer)) == ("The capital is", " Algiers")
    with pytest.raises(DataError, match="nothing to read or nothing to say"):
        bare.pair("", "Algiers")


def test_what_the_tokenizer_begins_with_stands_first():
    tokenizer = byte_tokenizer()
    assert len(EvaluatedModel(models.build("llama"), tokenizer).prompts.start) == 0

    class Beginning:
        backend_tokenizer = tokenizer.backend_tokenizer

        def __call__(self, text, add_special_tokens=True):
            found = tokenizer(text, add_special_tokens=False)
            found["input_ids"] = [1] * add_special_tokens + found["input_ids"]
            return found

    subject = EvaluatedModel(models.build("llama"), Beginning())
    assert subject.encode("ab").tolist() == [1, *tokenizer("ab").input_ids]


def test_a_control_that_reads_by_its_forward_is_read_whole():
    model = models.build("llama")
    size = {"rows_per_head": 53, "head_width": 4, "heads": 2}
    attach(model, models.tokenizer(), MemoryConfig(layers=(1,), control="shuffled", **size))
    models.make_loud(model)
    subject = EvaluatedModel(model, models.tokenizer())
    prompt = subject.encode("prompt")
    with subject.state("on"):
        found = subject.continuations(prompt, [[3, 4], [5, 6, 7]])
        assert found == subject.continuations_plain(prompt, [[3, 4], [5, 6, 7]])
    assert subject.caches is False


def test_a_cache_that_gives_another_answer_is_not_used(caplog):
    subject = EvaluatedModel(models.build("llama"), models.tokenizer())
    right = subject._from_cache
    subject._from_cache = lambda *given: [said._replace(log_p=said.log_p - 1) for said in right(*given)]
    prompt = subject.encode("prompt")
    with subject.state("none"):
        found = subject.continuations(prompt, [[3, 4], [5, 6, 7]])
        assert found == subject.continuations_plain(prompt, [[3, 4], [5, 6, 7]])
    assert subject.caches is False
    assert "slower" in caplog.text
