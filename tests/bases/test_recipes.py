"""From-scratch recipes: shapes, parameter counts, and a tokenizer that is the same every time."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.bases.recipes import (  # noqa: E402
    RECIPES,
    Recipe,
    build_model,
    byte_tokenizer,
    recipe_named,
    train_tokenizer,
)
from engram_lm.errors import ConfigError, DataError  # noqa: E402
from engram_lm.identity import tokenizer_fingerprint  # noqa: E402
from engram_lm.vocab import TokenMap  # noqa: E402

TEXTS = [
    "The cat sat on the mat in 1984.",
    "the dog sat on the log.\u2028Ünïcode: 日本語 🦊",
    "",
    "the the the",
]


def test_sizes_are_the_documented_ones():
    assert {name: round(recipe.parameters() / 1e6, 1) for name, recipe in RECIPES.items()} == {
        "tiny": 0.9,
        "small": 10.0,
        "base": 46.2,
    }


def test_parameter_count_is_the_model_s():
    tokenizer = byte_tokenizer()
    model = build_model(RECIPES["tiny"], tokenizer=tokenizer)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted == RECIPES["tiny"].parameters(vocab_size=len(tokenizer)) == 820_608


def test_model_belongs_to_its_tokenizer():
    tokenizer = byte_tokenizer()
    model = build_model(RECIPES["tiny"], tokenizer=tokenizer)
    assert model.config.vocab_size == len(tokenizer) == 258
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (0, 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    ids = torch.tensor([tokenizer.encode("hello")])
    # Untrained: every next id about as likely as any other.
    assert abs(model(ids, labels=ids).loss.item() - torch.log(torch.tensor(258.0)).item()) < 0.5


def test_same_seed_same_weights_and_the_caller_s_generator_stays():
    tokenizer = byte_tokenizer()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, two, three = (build_model(RECIPES["tiny"], tokenizer=tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    weights = [model.model.layers[2].mlp.up_proj.weight for model in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bytes_come_first_and_every_text_comes_back():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (0, 1, 300)
    for text in [*TEXTS, "never seen: žluťoučký\t\r\n  kůň \x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the")) == ["the"]


def test_digits_stay_single():
    tokenizer = train_tokenizer(["1984 1984 1984 1984"] * 50, vocab_size=400)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1984")) == ["1", "9", "8", "4"]
    # Nothing else could be merged, so the vocabulary is smaller than asked for, and says so.
    assert len(tokenizer) == 258


def test_training_is_deterministic():
    prints = {tokenizer_fingerprint(train_tokenizer(iter(TEXTS), vocab_size=290)) for _ in range(3)}
    assert prints == {"d189ee5b8e71ba32051aa702531ff5964702f9a37b61c3988ee0a50161441636"}
    assert (
        tokenizer_fingerprint(byte_tokenizer())
        == "15513497c7f46bab4d24346e920dfa8962a56f0355079a3b9d79be55a90156a0"
    )


def test_saved_tokenizer_is_the_same(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, vocab_size=290)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert TokenMap.from_tokenizer(again) == TokenMap.from_tokenizer(tokenizer)
    assert (again.eos_token_id, again.pad_token_id) == (0, 1)


def test_refusals():
    with pytest.raises(ConfigError, match="no recipe is named 'huge'; there are: tiny, small, base"):
        recipe_named("huge")
    with pytest.raises(ConfigError, match="vocab_size 257, wanted at least 258"):
        train_tokenizer(TEXTS, vocab_size=257)
    with pytest.raises(DataError, match="every document is empty"):
        train_tokenizer(["", ""], vocab_size=300)
    shape = {
        "name": "x",
        "vocab_size": 300,
        "hidden_size": 64,
        "layers": 1,
        "heads": 4,
        "intermediate_size": 64,
    }
    for change, message in (
        ({"key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ({"key_value_heads": 2, "hidden_size": 36}, "hidden_size 36 does not give 4 heads of even width"),
        ({"key_value_heads": 2, "layers": 0}, "layers is 0, wanted more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe(**shape | change)
