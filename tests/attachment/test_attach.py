"""attach and detach: what they change, what they leave alone, what they refuse. Exactness of state: test_state_matrix.py."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache

import models
from engram_lm.attachment import MemoryConfig, attach, detach, memories, memory_off
from engram_lm.errors import ConfigError, ModelError, StateError, TokenIdError
from matrix import KeepFloat64, full, in_chunks, padded, text

SMALL = {"rows_per_head": 53, "head_width": 4, "heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer()


@pytest.fixture(scope="module")
def bare():
    return models.build("llama", torch.float64)


@pytest.fixture
def loud(bare):
    return models.give_memory(copy.deepcopy(bare))


# ---- the base is left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@torch.no_grad()
def test_new_memory_changes_no_bit(shape, tokenizer):
    for dtype in (torch.float32, torch.bfloat16):
        model = models.build(shape, dtype)
        want = full(model, text())
        attach(model, tokenizer, MemoryConfig(layers=(0, 2), **SMALL))
        assert torch.equal(full(model, text()), want)
        assert torch.equal(in_chunks(model, text(), 20, DynamicCache(config=model.config)), want)


@torch.no_grad()
def test_memory_off_is_the_base(bare, loud):
    want = full(bare, text())
    assert not torch.allclose(full(loud, text()), want, atol=0.1)
    assert torch.equal(loud(text(), memory="off").logits, want)
    with memory_off(loud):
        assert torch.equal(full(loud, text()), want)
        assert torch.equal(
            loud.generate(text()[:1], max_new_tokens=4, do_sample=False),
            bare.generate(text()[:1], max_new_tokens=4, do_sample=False),
        )
    assert not torch.allclose(full(loud, text()), want, atol=0.1)


@torch.no_grad()
def test_one_memory_of_several_off(bare):
    model = models.give_memory(copy.deepcopy(bare), "several")
    alone = copy.deepcopy(model)
    detach(alone, "bare")
    with memory_off(model, "bare"):
        assert torch.equal(full(model, text()), full(alone, text()))
    with pytest.raises(ConfigError, match="'nosuch'"), memory_off(model, "nosuch"):
        pass


@torch.no_grad()
def test_detach_restores_the_model(bare, tokenizer):
    model = copy.deepcopy(bare)
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    models.give_memory(model, "several")
    assert list(model.state_dict()) != keys
    detach(model, "long")
    assert sorted(memories(model)) == ["bare", "short"]
    detach(model)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]
    assert not any(before or after for before, after in hooks)
    assert torch.equal(full(model, text()), full(bare, text()))
    # and can be given memory again
    attach(model, tokenizer, MemoryConfig(layers=(1,), **SMALL))
    assert torch.equal(full(model, text()), full(bare, text()))


@torch.no_grad()
def test_a_deep_copy_is_independent(loud):
    before = full(loud, text())
    twin = copy.deepcopy(loud)
    assert torch.equal(full(twin, text()), before)
    for slot in memories(twin)["memory"].slots:
        slot.table.rows_view().zero_()
        slot.conv_weight.zero_()
    assert torch.equal(full(loud, text()), before)
    assert not torch.allclose(full(twin, text()), before, atol=0.1)
    detach(twin)
    assert torch.equal(full(loud, text()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    model = models.give_memory(models.build("llama"), "several")
    want = full(model, text())
    model = model.to(dtype)
    got = full(model, text())
    assert got.dtype == dtype
    # bfloat16 has 8 bits; logits are near 4, after four blocks
    assert (got.float() - want).abs().mean() < 0.05
    assert in_chunks(model, text(), 6, DynamicCache(config=model.config)).isfinite().all()


# ---- ids and embeddings ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_need_ids(loud):
    embeds = loud.get_input_embeddings()(text())
    with pytest.raises(ModelError, match="memory_ids=ids"):
        loud(inputs_embeds=embeds)
    assert torch.equal(loud(inputs_embeds=embeds, memory_ids=text()).logits, loud(text()).logits)
    assert loud(inputs_embeds=embeds, memory="off").logits.shape == (3, 20, 258)
    with pytest.raises(ModelError, match=r"\(3, 19\).*\(3, 20\)"):
        loud(inputs_embeds=embeds, memory_ids=text()[:, 1:])
    with pytest.raises(ModelError, match="input_ids are the ids already"):
        loud(text(), memory_ids=text())


def test_an_id_outside_the_vocabulary(loud):
    ids = text()
    ids[1, 4] = 258
    with pytest.raises((TokenIdError, IndexError), match=r"258|out of range"):
        loud(ids)


def test_the_switch_has_two_positions(loud):
    with pytest.raises(ConfigError, match="'of'"):
        loud(text(), memory="of")


@torch.no_grad()
def test_small_prompts(loud):
    for ids in (text()[:1, :1], text()[:, :1], text()[:1, :2]):
        want = full(loud, ids)
        assert torch.equal(loud(ids, past_key_values=DynamicCache(config=loud.config)).logits, want)
        assert torch.equal(loud(ids, past_key_values=DynamicCache()).logits, want)


@torch.no_grad()
def test_decoder_called_by_position(loud):
    """Whoever calls the decoder itself may pass mask, positions and cache without names."""
    rows, mask, places = padded(text(), "left")
    want = loud.model(rows, attention_mask=mask, position_ids=places, use_cache=False).last_hidden_state
    cache = DynamicCache(config=loud.config)
    first = loud.model(rows[:, :9], mask[:, :9], places[:, :9], cache).last_hidden_state
    second = loud.model(rows[:, 9:], mask, places[:, 9:], cache).last_hidden_state
    torch.testing.assert_close(torch.cat([first, second], 1)[0], want[0], atol=1e-9, rtol=0)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "long", "float", "4-D bool", "4-D float"])
@torch.no_grad()
def test_kinds_of_mask(kind, loud):
    rows, mask, places = padded(text(), "left")
    want = loud(rows, attention_mask=mask, position_ids=places, use_cache=False).logits[mask.bool()]
    causal = torch.ones(20, 20, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    given = {
        "bool": mask.bool(),
        "long": mask,
        "float": mask.double(),
        "4-D bool": causal,
        "4-D float": torch.zeros(3, 1, 20, 20, dtype=torch.float64).masked_fill(
            ~causal, torch.finfo(torch.float64).min
        ),
    }[kind]
    got = loud(rows, attention_mask=given, position_ids=places, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_documents_by_mask_are_refused(loud):
    """A mask that hides one document from another says so to attention alone."""
    causal = torch.ones(3, 1, 20, 20, dtype=torch.bool).tril()
    causal[:, :, 8:, :8] = False
    with pytest.raises(StateError, match="position_ids that restart"):
        loud(text(), attention_mask=causal, use_cache=False)


def test_documents_that_the_base_would_mix_are_refused(loud):
    places = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for wrong in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(3, 20)}):
        with pytest.raises(StateError, match="position_ids restart"):
            loud(text(), position_ids=places, **wrong)
    loud.config.use_cache = False
    assert loud(text(), position_ids=places).logits.shape[1] == 20


@pytest.mark.parametrize(("which", "meets"), [("paper", True), ("qwen-ple", False)])
@torch.no_grad()
def test_only_some_profiles_stop_at_eos(which, meets, bare):
    """Two texts that differ before an EOS: n-grams that span it differ where the profile lets them."""
    model = models.give_memory(copy.deepcopy(bare), which)
    for slot in memories(model)["memory"].slots:
        slot.conv_weight.zero_()
    seen = []
    model.model.layers[3].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = text()[:1].clone()
    ids[0, 6] = models.EOS
    other = ids.clone()
    other[0, 5] = 99 if int(ids[0, 5]) != 99 else 98
    slot = memories(model)["memory"].slots[0]
    canonical = [memories(model)["memory"].canonical(x) for x in (ids, other)]
    first, second = (slot.scheme.addresses(x) for x in canonical)
    differ = (first != second).any(-1)[0]
    assert differ[5]
    # the EOS itself belongs to the document it ends; the token after it is what profiles disagree on
    assert bool(differ[7]) == meets
    assert not differ[8:].any()


# ---- caches that do not fit ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cache_filled_without_the_memory(loud):
    cache = DynamicCache(config=loud.config)
    loud(text()[:, :5], past_key_values=cache, memory="off")
    with pytest.raises(StateError, match="filled without the memory"):
        loud(text()[:, 5:], past_key_values=cache)


@torch.no_grad()
def test_memory_off_in_between(loud):
    cache = DynamicCache(config=loud.config)
    loud(text()[:, :5], past_key_values=cache)
    loud(text()[:, 5:7], past_key_values=cache, memory="off")
    with pytest.raises(StateError, match="holds 7 tokens but its memory state 5"):
        loud(text()[:, 7:], past_key_values=cache)


@torch.no_grad()
def test_another_set_of_memories(bare):
    """The prefix ran without one of the memories: its conv inputs are missing, and the others' keys differ."""
    model = models.give_memory(copy.deepcopy(bare), "several")
    cache = DynamicCache(config=model.config)
    with memory_off(model, "long"):
        model(text()[:, :5], past_key_values=cache)
    with pytest.raises(
        StateError, match="filled with memories bare, short; this forward runs long, bare, short"
    ):
        model(text()[:, 5:], past_key_values=cache)
    # an emptied cache may start again with any memories
    cache.reset()
    got = in_chunks(model, text(), 7, cache)
    torch.testing.assert_close(got, full(model, text()), atol=1e-9, rtol=0)


@torch.no_grad()
def test_another_batch(loud):
    cache = DynamicCache(config=loud.config)
    loud(text()[:, :5], past_key_values=cache)
    with pytest.raises((StateError, RuntimeError), match="3 sequences; this forward has 2"):
        loud(text()[:2, 5:6], past_key_values=cache)


@torch.no_grad()
def test_a_refused_forward_leaves_the_cache_usable(loud):
    cache = DynamicCache(config=loud.config)
    loud(text()[:, :9], past_key_values=cache)
    with pytest.raises(StateError):
        loud(text()[:, 9:13], past_key_values=cache, position_ids=torch.tensor([[9, 10, 0, 1]]))
    torch.testing.assert_close(
        in_chunks(loud, text(), 3, cache, start=9), full(loud, text())[:, 9:], atol=1e-9, rtol=0
    )


@torch.no_grad()
def test_a_cropped_recurrent_state_is_refused():
    """transformers crops such a cache without a word and leaves the recurrent state as it was."""
    model = models.give_memory(models.build("qwen3_next"))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(text()[:, :9], past_key_values=cache)
    cache.crop(-4)
    with pytest.raises(StateError, match="cannot be taken back"):
        model(text()[:, 5:], past_key_values=cache)


def test_paged_caches_are_refused(loud):
    with pytest.raises(StateError, match="Continuous batching"):
        loud.model(text(), cache=object(), use_cache=False)


# ---- models and configs that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("t5", "encoder-decoder"),
        ("bert", "Found none"),
        ("mamba", "past_key_values"),
        ("mamba2", "past_key_values"),
    ],
)
def test_models_that_do_not_fit(shape, message, tokenizer):
    model = models.build(shape)
    keys = list(model.state_dict())
    with pytest.raises(ModelError, match=message):
        attach(model, tokenizer, MemoryConfig(layers=(1,), **SMALL))
    assert list(model.state_dict()) == keys


def test_configs_that_do_not_fit(bare, tokenizer):
    model = copy.deepcopy(bare)
    with pytest.raises(ConfigError, match="block 4, but the model has blocks 0 to 3"):
        attach(model, tokenizer, MemoryConfig(layers=(4,), **SMALL))
    attach(model, tokenizer, MemoryConfig(layers=(1,), **SMALL))
    with pytest.raises(ConfigError, match="already has a memory named 'memory'"):
        attach(model, tokenizer, MemoryConfig(layers=(2,), **SMALL))
    with pytest.raises(ConfigError, match="no memory named 'other'; it has memory"):
        detach(model, "other")
    with pytest.raises(ModelError, match="needs the model's tokenizer"):
        attach(model, None, MemoryConfig(layers=(2,), name="second", **SMALL))
    with pytest.raises(ConfigError, match="EmbeddingMean"):
        attach(model, tokenizer, MemoryConfig(layers=(2,), name="third", profile="longcat", **SMALL))
    with pytest.raises(ConfigError, match="dead_token_ids names 99999; the tokenizer has ids 0 to"):
        attach(model, tokenizer, MemoryConfig(layers=(2,), name="fourth", dead_token_ids=(99999,), **SMALL))
    assert list(memories(model)) == ["memory"]


# ---- many architectures ----------------------------------------------------------------------------------------------

FITS = """qwen2 mixtral gemma gemma2 phi3 olmo2 smollm3 starcoder2 granite cohere2 gpt_oss deepseek_v3 gpt_neox gptj falcon
opt bloom phi stablelm granitemoehybrid jamba"""


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=() if s in ("falcon", "deepseek_v3") else pytest.mark.slow) for s in FITS.split()],
)
@torch.no_grad()
def test_architecture(shape):
    """Off it is the base; on, cached steps give what a full forward gives, as far as the base's own do."""
    model = models.build(shape, torch.float64)
    ids = text()
    want = full(model, ids)

    def error():
        with KeepFloat64():
            steps = in_chunks(model, ids, 1, DynamicCache(config=model.config))
            return float((steps - full(model, ids)).abs().max())

    assert error() <= 1e-9
    models.give_memory(model)
    assert torch.equal(model(ids, memory="off", use_cache=False).logits, want)
    assert (full(model, ids) - want).abs().max() > 0.1
    assert error() <= 1e-9


@torch.no_grad()
def test_blocks_without_keywords_in_threads():
    """Falcon hands nothing to its blocks; two threads must not see each other's ids."""
    model = models.give_memory(models.build("falcon", torch.float64))
    texts = [text(seed=s) for s in range(4)]
    want, got = [full(model, ids) for ids in texts], [[] for _ in texts]

    def work(i):
        with torch.no_grad():
            for _ in range(4):
                got[i].append(full(model, texts[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, found in enumerate(got):
        assert len(found) == 4
        for logits in found:
            torch.testing.assert_close(logits, want[i], atol=1e-9, rtol=0)


def test_a_block_on_its_own_is_refused():
    model = models.give_memory(models.build("falcon"))
    with pytest.raises(ModelError, match="outside its decoder"):
        model.transformer.h[1](torch.zeros(1, 2, 32))
