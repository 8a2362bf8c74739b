"""What a run measures on held-out text: loss with memory and without, and how much memory moved the hidden states.

Losses are nats a token, summed in float64 over every predicted token, so they do not depend on the batch size.
Perplexity is exp(loss). `share` is |what memory added| / |hidden state| (see `engram_lm.traces`), its largest value over
blocks and branches at each token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from engram_lm.attachment import memory_off, trace
from engram_lm.reader import token_losses
from engram_lm.traces import LayerTrace


def held_out_loss(model: nn.Module, sequences: Any, *, batch_size: int, memory: str = "on") -> float:
    """Mean loss in nats over the predicted tokens of `sequences`, a dataset as `corpus.blocks.Blocks`."""
    total, count = 0.0, 0
    with _evaluating(model), contextlib.nullcontext() if memory == "on" else memory_off(model):
        for batch in _batches(model, sequences, batch_size):
            labels_BT = batch.pop("labels")[:, 1:]
            logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
            total += float(token_losses(logits_BTV.flatten(0, 1), labels_BT.flatten()).sum())
            count += int((labels_BT != -100).sum())
    return total / count


def held_out_shares(model: nn.Module, sequences: Any, *, batch_size: int) -> dict[str, float]:
    """Quantiles of `strongest_share` over the tokens of `sequences`: p50, p95 and p99."""
    shares = []
    with _evaluating(model):
        for batch in _batches(model, sequences, batch_size):
            batch.pop("labels")
            with trace(model) as records:
                model(**batch, use_cache=False)
            shares.append(strongest_share(records).ravel())
    values = np.concatenate(shares)
    return {f"p{q}": round(float(np.quantile(values, q / 100)), 6) for q in (50, 95, 99)}


def strongest_share(records: Sequence[LayerTrace]) -> np.ndarray:
    """float32 [B, T]: the largest share over the memory layers and branches of one forward."""
    return np.max([record.share.max(-1) for record in records], axis=0)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _batches(model: nn.Module, sequences: Any, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    device = next(model.parameters()).device
    for first in range(0, len(sequences), batch_size):
        items = [sequences[i] for i in range(first, min(first + batch_size, len(sequences)))]
        yield {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
