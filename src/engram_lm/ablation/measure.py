"""The loss of every block of a text, so that arms can be compared block by block.

    losses_of(model, blocks)      BlockLosses(sums=[...], counts=[...]): nats and predicted tokens of each block

A block is `sequence_length` ids of one stream of documents (see `engram_lm.corpus.blocks`); it does not see the one before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from engram_lm.ablation.plan import HELD_OUT
from engram_lm.corpus.blocks import Blocks, pack
from engram_lm.corpus.tokenised import tokenise
from engram_lm.errors import DataError
from engram_lm.reader import token_losses
from engram_lm.training.config import TrainConfig


class BlockLosses(NamedTuple):
    """sums: nats over each block, float64. counts: tokens that were predicted in it."""

    sums: list[float]
    counts: list[int]


def texts_of(config: TrainConfig, texts: Mapping[str, str], tokenizer: Any) -> dict[str, Blocks]:
    """The held-out side of the data and the further texts as blocks, at most `eval_tokens` of each."""
    shape = {"sequence_length": config.sequence_length, "packing": config.packing, "seed": None}
    read = {"tokenizer": tokenizer, "field": config.field, "txt_documents": config.txt_documents}
    found = {}
    if config.holdout:
        corpus = tokenise(list(config.data), **read)
        found[HELD_OUT] = pack(corpus, part="held_out", held_out_share=config.holdout, **shape)
    for name, files in texts.items():
        found[name] = pack(tokenise(files, **read), part="all", **shape)
    most = max(1, config.eval_tokens // config.sequence_length)
    for name, blocks in found.items():
        if not len(blocks):
            raise DataError(f"{name} holds no whole block of {config.sequence_length} tokens.")
    return {
        name: Blocks(
            blocks.corpus, blocks.documents, blocks.sequence_length, blocks.packing,
            min(len(blocks), most) * config.sequence_length,
        )
        for name, blocks in found.items()
    }  # fmt: skip


@torch.no_grad()
def losses_of(model: nn.Module, blocks: Blocks) -> BlockLosses:
    """Block by block, in float32, as the model stands (its memory on or off). No cache."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums, counts = [], []
    for number in range(len(blocks)):
        item = {name: tensor[None].to(device) for name, tensor in blocks[number].items()}
        labels_T = item.pop("labels")[0, 1:]
        logits_TV = model(**item, use_cache=False).logits[0, :-1]
        sums.append(float(token_losses(logits_TV, labels_T).sum()))
        counts.append(int((labels_T != -100).sum()))
    model.train(was_training)
    return BlockLosses(sums, counts)


def load_arm(directory: Path) -> tuple[Any, Any]:
    """(model, tokenizer) that a run of one arm wrote."""
    from transformers import AutoTokenizer

    from engram_lm.attachment import from_pretrained

    return from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
