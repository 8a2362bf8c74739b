"""Many ways to answer one question, decoded side by side: what they have said alike is computed once.

All ways share the prompt's keys and values; at every step each distinct beginning of an answer is one row of a batch, so
twenty ways that say the same cost as much as one. Greedy. No padding: all rows are as long as each other.

    start = prefill(model, ids)                                     # or prefill(model, more_ids, after=start)
    answers = decode(model, start, {"alone": argmax, ...}, most=28, ends={2})
"""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# (answer so far, logits float32 [V]) -> next token
Chooser = Callable[[list[int], np.ndarray], int]


class Start(NamedTuple):
    """A prompt that has been read. seconds: what that took, earlier parts included."""

    ids: list[int]
    cache: Any
    logits_V: np.ndarray
    seconds: float


class Answer(NamedTuple):
    """ids: without the end token. seconds: spent by the chooser."""

    ids: list[int]
    seconds: float


def argmax(said: list[int], logits_V: np.ndarray) -> int:
    return int(logits_V.argmax())


@torch.inference_mode()
def prefill(model: Any, ids: list[int], *, after: Start | None = None) -> Start:
    begun = time.perf_counter()
    cache = None if after is None else copy.deepcopy(after.cache)
    output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - begun + (0.0 if after is None else after.seconds)
    before = [] if after is None else after.ids
    return Start(before + ids, output.past_key_values, output.logits[0, -1].numpy().copy(), seconds)


@torch.inference_mode()
def decode(
    model: Any, start: Start, ways: dict[str, Chooser], *, most: int, ends: set[int]
) -> dict[str, Answer]:
    said: dict[str, list[int]] = {name: [] for name in ways}
    spent, going = dict.fromkeys(ways, 0.0), set(ways)
    rows, logits_RV, cache = {(): 0}, start.logits_V[None], copy.deepcopy(start.cache)
    for step in range(most):
        parents, following = [], {}
        for name in [name for name in ways if name in going]:
            row = rows[tuple(said[name])]
            begun = time.perf_counter()
            token = ways[name](said[name], logits_RV[row])
            spent[name] += time.perf_counter() - begun
            if token in ends:
                going.discard(name)
                continue
            said[name].append(token)
            if tuple(said[name]) not in following:
                following[tuple(said[name])] = len(parents)
                parents.append(row)
        if not following or step == most - 1:
            break
        rows = following
        cache.reorder_cache(torch.tensor(parents))
        tokens = torch.tensor([[answer[-1]] for answer in rows])
        logits_RV = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].numpy()
    return {name: Answer(said[name], spent[name]) for name in ways}
