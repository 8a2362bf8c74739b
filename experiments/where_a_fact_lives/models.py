"""The arms: one small mixture of experts, and what takes the place of 21 % of its sparse parameters.

    arm            the 4 experts' worth of parameters are ...
    none           experts
    memory         rows, 79 % experts and 21 % memory, as in arXiv 2601.07372
    one-row        rows, but every n-gram of a head reads the same one
    shuffled       rows, dealt anew to the n-grams in every forward
    frozen-random  rows, random and never trained
    unigram        rows, addressed by one token alone
    wide           wider experts
    embedding-5x   experts, and the token embedding trains as rows do: 5 times the rate, no decay
    experts-5x     experts, and they train as rows do
    memory-1x      as memory, but rows train at the rate of everything else
    mostly-memory  21 % experts and 79 % memory: the same exchanged

Total parameters are equal to within 1 %, and so are the parameters active for a token (FLOPs): what a memory's projection
costs, an arm without memory gets as a wider FFN in the first block. `account` counts both. Sparse parameters are those of
rows, and of the experts that a token does not visit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from book import BEGIN, PAD, Book
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from engram_lm import MemoryConfig, attach, memories
from engram_lm.ablation.arms import control

RATE = 5.0  # of rows, and of what trains as rows do (arXiv 2601.07372, training recipe)
TOP = 2  # experts a token visits
BLOCKS = 2
MEMORY_BLOCK = 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """hidden: residual width; dense: FFN of the first block; expert: width of an expert; idle: experts a token does not
    visit, in the arm without memory; moved: of these, how many become memory; heads, row: of the memory's table."""

    hidden: int
    dense: int
    expert: int
    idle: int
    moved: int
    attention_heads: int
    heads: int
    row: int

    @property
    def expert_numbers(self) -> int:
        return 3 * self.hidden * self.expert


SHAPES = {
    "quick": Shape(hidden=32, dense=64, expert=16, idle=9, moved=2, attention_heads=2, heads=2, row=8),
    "small": Shape(hidden=64, dense=128, expert=32, idle=19, moved=4, attention_heads=4, heads=2, row=16),
    # the whole book a hundred times, for models with fewer parameters than it has bits: 0.88 and 0.55 for one
    "crowded": Shape(hidden=64, dense=128, expert=32, idle=19, moved=4, attention_heads=4, heads=2, row=16),
    "packed": Shape(hidden=64, dense=64, expert=16, idle=19, moved=4, attention_heads=4, heads=2, row=8),
    "cpu": Shape(hidden=64, dense=128, expert=64, idle=19, moved=4, attention_heads=4, heads=2, row=16),
    "full": Shape(hidden=256, dense=512, expert=320, idle=19, moved=4, attention_heads=8, heads=4, row=32),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """memory: which of `engram_lm.ablation.arms`, or None. experts: more or fewer than the arm without memory has."""

    name: str
    title: str
    memory: str | None = None
    share: str = "none"
    wider: bool = False
    fast: str | None = None
    row_rate: float = RATE


def _with_memory(name: str, title: str) -> Arm:
    return Arm(name=name, title=title, memory=name, share="moved")


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="none", title="no memory"),
        _with_memory("memory", "79/21 memory"),
        _with_memory("one-row", "one row for all n-grams"),
        _with_memory("shuffled", "addresses shuffled"),
        _with_memory("frozen-random", "frozen random rows"),
        _with_memory("unigram", "unigrams alone"),
        Arm(name="wide", title="wider FFN, no memory", wider=True),
        Arm(name="embedding-5x", title="no memory, embedding at 5× rate, no decay", fast="embed_tokens"),
        Arm(name="experts-5x", title="no memory, experts at 5× rate, no decay", fast="mlp.experts"),
        replace(_with_memory("memory", "79/21 memory, rows at 1× rate"), name="memory-1x", row_rate=1.0),
        Arm(name="mostly-memory", title="21/79 mostly memory", memory="memory", share="kept"),
    )
}


def tokenizer_of(book: Book) -> PreTrainedTokenizerFast:
    """One word a token; what `attach` asks which tokens share an address (here: none)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = book.words()
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[PAD]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=words[PAD], eos_token=words[PAD], bos_token=words[BEGIN]
    )


def memory_config(shape: Shape, arm: Arm) -> MemoryConfig:
    """The memory of an arm: orders 2 and 3, rows for as many numbers as the experts that made way for them."""
    orders = (2, 3)
    numbers = moved(shape, arm) * shape.expert_numbers
    columns = len(orders) * shape.heads
    whole = MemoryConfig(
        layers=(MEMORY_BLOCK,),
        orders=orders,
        heads=shape.heads,
        head_width=shape.row,
        # head sizes are the next primes: a little fewer to begin with
        rows_per_head=int(numbers / shape.row / columns * 0.99),
        rule={"name": "row-adam", "rate": arm.row_rate},
    )
    return control(whole, arm.memory)


def moved(shape: Shape, arm: Arm) -> int:
    """How many experts gave their parameters to something else."""
    if arm.wider:
        return shape.moved
    return {"none": 0, "moved": shape.moved, "kept": shape.idle - shape.moved}[arm.share]


def build(book: Book, shape: Shape, arm: Arm, *, seed: int) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The model of an arm, float32, and its tokenizer. The seed draws its weights and nothing else."""
    tokenizer = tokenizer_of(book)
    experts = shape.idle + TOP - moved(shape, arm)
    expert = shape.expert
    if arm.wider:
        # grouped products want rows of a multiple of 16 bytes
        expert = 4 * round(shape.expert * (shape.idle + TOP) / experts / 4)
    dense = shape.dense
    if arm.memory is None:
        # a memory's projection reads orders x heads x row numbers and gives a key and a value
        active = 2 * shape.hidden * (2 * shape.heads * shape.row)
        if arm.wider:
            active -= TOP * 3 * shape.hidden * (expert - shape.expert)
        dense += max(0, round(active / (3 * shape.hidden)))
    config = Qwen3MoeConfig(
        vocab_size=book.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=BLOCKS,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.attention_heads,
        head_dim=shape.hidden // shape.attention_heads,
        intermediate_size=dense,
        moe_intermediate_size=expert,
        num_experts=experts,
        num_experts_per_tok=TOP,
        norm_topk_prob=True,
        mlp_only_layers=list(range(BLOCKS - 1)),  # the first block is dense, as in the paper
        tie_word_embeddings=False,
        max_position_embeddings=64,
        # transformers' 0.02 is made for widths of thousands: at 64 the arms without memory stood still for long
        initializer_range=shape.hidden**-0.5,
        use_cache=False,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        bos_token_id=BEGIN,
        eos_token_id=PAD,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config).float()
        # faster than the plain loop over experts, and the same to rounding: tests/experiments/test_where_a_fact_lives.py
        model.config._experts_implementation = "grouped_mm"
        if arm.memory is not None:
            attach(model, tokenizer, memory_config(shape, arm))
    return model, tokenizer


def groups(model: nn.Module, arm: Arm, *, rate: float, decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, vectors do not; what `arm.fast` names trains at RATE times the rate, undecayed.

    A table's handle is a vector here: its rule has the factor of its own (`Arm.row_rate`) and knows no decay.
    """
    matrices, vectors, fast = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if arm.fast is not None and arm.fast in name:
            fast.append(parameter)
        else:
            (matrices if parameter.dim() > 1 else vectors).append(parameter)
    made = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
        {"params": fast, "lr": RATE * rate, "weight_decay": 0.0},
    ]
    return [group for group in made if group["params"]]


def account(model: nn.Module) -> dict[str, int]:
    """Parameters: total (rows included), sparse (rows, and experts not visited), rows, active; and FLOPs a token.

    FLOPs are those of the matrix products of a forward, 2 a parameter that takes part (the embedding is looked up, not
    multiplied); attention over the few tokens of an entry is the same in all arms and left out.
    """
    total, experts, lookup = 0, 0, 0
    for name, parameter in model.named_parameters():
        if name.endswith(".handle"):
            continue
        total += parameter.numel()
        if "mlp.experts" in name:
            experts += parameter.numel()
        if "embed_tokens" in name:
            lookup += parameter.numel()
    rows = sum(table.n_rows * table.width for memory in memories(model).values() for table in memory.tables)
    n = model.config.num_experts
    idle = experts * (n - TOP) // n
    return {
        "total": total + rows,
        "sparse": rows + idle,
        "rows": rows,
        "experts": experts,
        "active": total - idle,
        "flops_per_token": 2 * (total - idle - lookup),
    }


def describe(shape: Shape, arm: Arm) -> dict[str, Any]:
    """What an arm is, for its result file."""
    config = memory_config(shape, arm).to_json() if arm.memory else None
    return {"arm": asdict(arm), "shape": asdict(shape), "memory": config}
