"""From-scratch bases: small Llama-shaped models and the byte-level BPE that goes with them.

A recipe is a shape, not a training plan. Parameters with tied embeddings and a full vocabulary:

    tiny     4 layers × 128,   1,024 ids    0.9 M    tests: seconds on a CPU
    small   10 layers × 256,   8,192 ids   10.0 M    first experiments
    base    12 layers × 512,  16,384 ids   46.2 M    ablations

The tokenizer is trained on the caller's text; the same text gives the same tokenizer, the same seed the same
weights. `byte_tokenizer()` needs no text: the 256 bytes and two special tokens.

    tokenizer = train_tokenizer(texts, vocab_size=RECIPES["small"].vocab_size)
    model = build_model(RECIPES["small"], tokenizer=tokenizer, seed=0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError, DataError
from engram_lm.extras import missing

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EOS_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
# 256 bytes, end, pad: no byte-level vocabulary is smaller.
MIN_VOCAB_SIZE = 258


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The shape of a Llama model. `vocab_size` is what the tokenizer is trained to, at most."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate_size: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and not value > 0:
                raise ConfigError(f"recipe {self.name!r}: {field.name} is {value}, wanted more than 0")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"recipe {self.name!r}: vocab_size {self.vocab_size}, wanted at least {MIN_VOCAB_SIZE}"
            )
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"recipe {self.name!r}: hidden_size {self.hidden_size} does not give {self.heads} heads of even width"
            )
        if self.heads % self.key_value_heads:
            raise ConfigError(
                f"recipe {self.name!r}: {self.heads} heads cannot share {self.key_value_heads} key-value heads evenly"
            )

    def parameters(self, *, vocab_size: int | None = None) -> int:
        """Parameters of the model, embeddings counted once (they are tied)."""
        d = self.hidden_size
        attention = 2 * d * d + 2 * d * (d // self.heads * self.key_value_heads)
        layer = attention + 3 * d * self.intermediate_size + 2 * d
        return (vocab_size or self.vocab_size) * d + self.layers * layer + d


def _recipe(name: str, vocab_size: int, d: int, layers: int, heads: int, kv_heads: int, ffn: int) -> Recipe:
    return Recipe(
        name=name,
        vocab_size=vocab_size,
        hidden_size=d,
        layers=layers,
        heads=heads,
        key_value_heads=kv_heads,
        intermediate_size=ffn,
    )


RECIPES: dict[str, Recipe] = {
    "tiny": _recipe("tiny", 1024, 128, 4, 4, 2, 384),
    "small": _recipe("small", 8192, 256, 10, 4, 2, 768),
    "base": _recipe("base", 16384, 512, 12, 8, 4, 1536),
}


def recipe_named(name: str) -> Recipe:
    """The recipe, or ConfigError with the names there are."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe is named {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]


def build_model(recipe: Recipe, *, tokenizer: Any, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised float32 model with one embedding row a token of `tokenizer`, in eval mode."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise missing("From-scratch models need torch and transformers", "hf") from error

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The caller's generators stay where they are.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` ids (fewer where the text has no more pairs to merge); digits stay single.

    Ids: 0 end, 1 pad, 2 … 257 the bytes, then merges by falling frequency.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {vocab_size}, wanted at least {MIN_VOCAB_SIZE}: 256 bytes, end and pad"
        )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer = _wrapped(_train(counted(), vocab_size))
    if not seen:
        raise DataError("a tokenizer cannot be trained on no text: every document is empty")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, end and pad: the tokenizer that needs no text."""
    return _wrapped(byte_backend())


def byte_backend() -> Tokenizer:
    """`byte_tokenizer()` as the tokenizers library has it, without transformers."""
    return _train((), MIN_VOCAB_SIZE)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise missing("From-scratch tokenizers need transformers", "hf") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, clean_up_tokenization_spaces=False
    )


def _train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    return backend
