"""The model and the tokens that memories are timed on: a random Llama, two memory layers, drawn and real ids.

Imports no memory implementation, so that each is run by its own interpreter on the same numbers.

    bare, ids = random_llama(), draw_ids("zipf", batch=4, tokens=512, count=3)

Ids are never one repeated id. "zipf" has the repetitions of text, "uniform" hardly any, "text" are the words of this
repository's own documents and then its sources.
"""

import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 32_000
HIDDEN = 512
BLOCKS = [1, 5]
ORDERS = [2, 3]
HEADS_PER_ORDER = 8
HEAD_WIDTH = 80
ROWS_PER_HEAD = 141_400
DRAWS = ["zipf", "text", "uniform"]
SEED = 0
MODEL = "Llama, random weights: hidden 512, 8 blocks, 8 heads, intermediate 1536, vocabulary 32,000"
# Ids below are special tokens.
_FIRST_WORD = 4


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """Token maps are built from a tokenizer: 32,000 words, a third differing only in case."""
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    stem = 0
    while len(words) < VOCAB:
        words += [f"w{stem}", f"W{stem}", f"x{stem}"]
        stem += 1
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:VOCAB])}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_llama(*, hidden: int = HIDDEN, blocks: int = 8) -> LlamaForCausalLM:
    """Heads of 64, an intermediate size of three times the hidden one."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        intermediate_size=3 * hidden,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


def draw_ids(draw: str, *, batch: int, tokens: int, count: int) -> list[torch.Tensor]:
    """`count` different batches of ids [batch, tokens] int64 in [4, VOCAB)."""
    generator = np.random.default_rng(SEED)
    shape = (count, batch, tokens)
    ids_of_rank = generator.permutation(np.arange(_FIRST_WORD, VOCAB))
    if draw == "zipf":
        # rank r with probability ~ 1/r over the whole vocabulary, ranks scattered over the ids
        weight = 1.0 / np.arange(1, len(ids_of_rank) + 1)
        drawn = ids_of_rank[generator.choice(len(ids_of_rank), size=shape, p=weight / weight.sum())]
    elif draw == "text":
        drawn = ids_of_rank[_words(count * batch * tokens)].reshape(shape)
    else:
        drawn = generator.integers(_FIRST_WORD, VOCAB, size=shape)
    return [torch.from_numpy(ids.astype(np.int64)) for ids in drawn]


def _words(count: int) -> np.ndarray:
    """The first `count` words and signs of the repository's text, each as the number of words that appeared before it."""
    root = Path(__file__).resolve().parent.parent
    files = [*sorted(root.glob("*.md")), *sorted(root.glob("docs/*.md")), *sorted(root.glob("src/**/*.py"))]
    number_of: dict[str, int] = {}
    words: list[int] = []
    for file in files:
        for word in re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf8")):
            words.append(number_of.setdefault(word, len(number_of)))
        if len(words) >= count:
            return np.array(words[:count])
    raise SystemExit(f"the repository's text has {len(words)} words; {count} are needed")
