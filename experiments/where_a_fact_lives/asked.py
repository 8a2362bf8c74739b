"""How much of the book a model knows: bits recalled of each entry, and entries said in full.

    bits of an entry = sum over its 10 answer tokens of (5 + log2 p(token | question, answer so far))

50 where every token is certain, 0 where nothing is known; p runs over the whole vocabulary. Their sum over the book is the
lower bound on what the parameters hold of Allen-Zhu and Li (arXiv 2404.05405, its term for values: N K log2(D / e^loss)),
given the names: no token of a name is predicted here. It can be negative, for a model that is sure and wrong, and is
reported as it is. An entry is said in full when each of its 10 tokens is the likeliest, which is what greedy decoding says.

    bits_N, full_N = recall(model, book, form="plain", device=device)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from book import ANSWER, BITS, BITS_PER_TOKEN, FILLER, FORMS, PLAIN, REWORDED, Book, questions
from torch import nn

# (key, form, filler tokens): 8 are more than training ever shows
QUESTIONS = ((PLAIN, PLAIN, 0), (FILLER, FILLER, 4), ("filler-8", FILLER, 8), (REWORDED, REWORDED, 0))
RESAMPLES = 1_000


def bits_of(logits_BAV: torch.Tensor, answer_BA: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(bits float64 [B], said in full bool [B]) from the logits at the answer's places."""
    logarithm = torch.log_softmax(logits_BAV.double(), -1).gather(-1, answer_BA[..., None])[..., 0]
    bits_BA = BITS_PER_TOKEN + logarithm / math.log(2)
    full_B = (logits_BAV.argmax(-1) == answer_BA).all(-1)
    return bits_BA.sum(-1).cpu().numpy(), full_B.cpu().numpy()


@torch.no_grad()
def recall(
    model: nn.Module,
    book: Book,
    *,
    form: str,
    device: torch.device,
    filler: int = 4,
    entries: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(bits [N], said in full [N]) of the entries (default all), in their order, asked in one form."""
    entries = np.arange(len(book)) if entries is None else np.asarray(entries)
    place = {int(entry): i for i, entry in enumerate(entries)}
    bits_N, full_N = np.empty(len(entries)), np.empty(len(entries), dtype=bool)
    for which, rows in questions(book, entries, form=form, filler=filler):
        ids_BT = torch.from_numpy(rows).to(device)
        logits = model(input_ids=ids_BT[:, :-1], logits_to_keep=ANSWER).logits
        at = [place[int(entry)] for entry in which]
        bits_N[at], full_N[at] = bits_of(logits, ids_BT[:, -ANSWER:])
    return bits_N, full_N


def ask_all(model: nn.Module, book: Book, *, device: torch.device) -> dict[str, Any]:
    """Every question, over all entries and over those read in that form in training and never."""
    out = {}
    for key, form, filler in QUESTIONS:
        bits_N, full_N = recall(model, book, form=form, device=device, filler=filler)
        out[key] = {"all": summary(bits_N, full_N)}
        if form != PLAIN:
            seen_N = book.form_N == FORMS.index(form)
            out[key]["read so"] = summary(bits_N[seen_N], full_N[seen_N])
            out[key]["never read so"] = summary(bits_N[~seen_N], full_N[~seen_N])
    return out


def summary(bits_N: np.ndarray, full_N: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Bits an entry (of 50) and the share said in full, each with a 95 % interval: a bootstrap over entries."""
    return {
        "entries": len(bits_N),
        "bits": round(float(bits_N.mean()), 4),
        "bits_interval": interval(bits_N, seed=seed),
        "full": round(float(full_N.mean()), 5),
        "full_interval": interval(full_N.astype(float), seed=seed),
        "most_bits": BITS,
    }


def interval(values_N: np.ndarray, *, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean, entries drawn with replacement."""
    draw = np.random.default_rng(seed)
    means = [values_N[draw.integers(len(values_N), size=len(values_N))].mean() for _ in range(RESAMPLES)]
    return [round(float(end), 5) for end in np.percentile(means, [2.5, 97.5])]
