"""Training of one arm: the same entries in the same order for every arm of a seed. A plain loop over the library.

    loss = cross entropy of the 10 answer tokens, given the question and the answer so far, + 0.01 x load balance of experts

AdamW (0.9, 0.98), gradients clipped to norm 1, the rate rising over 2 % of the steps and falling as a cosine to 2 %. Rows
train by the library's row rule at 5 times the rate without decay; everything else as `models.groups` says.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from book import ANSWER, Book, batches
from torch import nn

from models import Arm, groups

WARM, LAST = 0.02, 0.02


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """rate: of the matrices; decay: their weight decay; batch: entries a step, at most."""

    rate: float
    decay: float = 0.1
    batch: int = 128


def keep_freed_memory() -> None:
    """glibc gives large blocks back at once, and page faults then cost more than the products (Linux alone)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def factor(done: float) -> float:
    """Of the rate, after the share `done` of all steps."""
    if done < WARM:
        return max(done / WARM, 1e-3)
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))


def answer_loss(model: nn.Module, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross entropy of the answer in nats a token, load-balance loss)."""
    out = model(input_ids=ids_BT[:, :-1], logits_to_keep=ANSWER)
    return F.cross_entropy(out.logits.flatten(0, 1), ids_BT[:, -ANSWER:].flatten()), out.aux_loss


def learn(
    model: nn.Module,
    book: Book,
    arm: Arm,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    report: Callable[[int, int, float], None] = lambda step, of, loss: None,
    exposures: int | None = None,
) -> dict[str, Any]:
    """Train in place; returns steps, tokens, seconds and the mean loss (nats a token) of twenty parts of the run."""
    exposures = exposures or book.size.exposures
    model.train()
    made = groups(model, arm, rate=recipe.rate, decay=recipe.decay)
    optimizer = torch.optim.AdamW(made, betas=(0.9, 0.98), fused=True)
    for group in optimizer.param_groups:
        group["rate"] = group["lr"]
    trained = [parameter for group in made for parameter in group["params"]]
    weight = model.config.router_aux_loss_coef
    order = [batch for epoch in range(exposures) for batch in batches_of(book, epoch, recipe, seed)]
    torch.manual_seed(seed)  # the shuffled arm draws from it
    losses, tokens = [], 0
    begun, cpu = time.monotonic(), time.process_time()
    for step, batch in enumerate(order):
        ids_BT = torch.from_numpy(batch).to(device)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor(step / len(order))
        optimizer.zero_grad()
        loss, balance = answer_loss(model, ids_BT)
        (loss + weight * balance).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        tokens += ids_BT.numel() - len(ids_BT)
        if step % 50 == 49 or step + 1 == len(order):
            report(step + 1, len(order), float(torch.stack(losses[-50:]).mean()))
    model.eval()
    parts = torch.stack(losses).cpu().tensor_split(min(20, len(losses)))
    return {
        "steps": len(order),
        "tokens": tokens,
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "loss": [round(float(part.mean()), 4) for part in parts],
    }


def batches_of(book: Book, epoch: int, recipe: Recipe, seed: int) -> list[Any]:
    return list(batches(book, epoch=epoch, size=recipe.batch, seed=seed))
