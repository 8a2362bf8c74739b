"""Many ways to answer one question, decoded side by side: what they have said alike is computed once.

Ways that share a prompt share its keys and values; at every step each distinct beginning of an answer is one row of a
batch, so twenty ways that say the same cost as much as one. Prompts of several lengths are padded on the left. Greedy.

    start = prefill(model, ids)                                     # or prefill(model, more_ids, after=start)
    answers = decode(model, [start], {"alone": (0, argmax), ...}, most=24, ends={2})
"""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from engram_lm.generation import caches

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
    model: Any, starts: list[Start], ways: dict[str, tuple[int, Chooser]], *, most: int, ends: set[int]
) -> dict[str, Answer]:
    """ways: name -> (number of its start, chooser)."""
    said: dict[str, list[int]] = {name: [] for name in ways}
    spent, going = dict.fromkeys(ways, 0.0), set(ways)
    # (start, answer so far) -> row
    rows = {(n, ()): n for n in range(len(starts))}
    logits_RV, (cache, mask_RL) = np.stack([start.logits_V for start in starts]), _together(starts)
    lengths = torch.tensor([len(start.ids) for start in starts])
    for step in range(most):
        parents, following = [], {}
        for name in [name for name in ways if name in going]:
            start, way = ways[name]
            row = rows[start, tuple(said[name])]
            begun = time.perf_counter()
            token = way(said[name], logits_RV[row])
            spent[name] += time.perf_counter() - begun
            if token in ends:
                going.discard(name)
                continue
            said[name].append(token)
            if (start, tuple(said[name])) not in following:
                following[start, tuple(said[name])] = len(parents)
                parents.append(row)
        if not following or step == most - 1:
            break
        if parents != list(range(len(rows))):
            cache, mask_RL = caches.take(cache, parents), mask_RL[parents]
        rows = following
        mask_RL = torch.cat([mask_RL, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        tokens = torch.tensor([[answer[-1]] for _, answer in rows])
        positions = torch.stack([lengths[n] + step for n, _ in rows])[:, None]
        output = model(
            tokens, past_key_values=cache, attention_mask=mask_RL, position_ids=positions, use_cache=True
        )
        logits_RV = output.logits[:, -1].numpy()
    return {name: Answer(said[name], spent[name]) for name in ways}


def _together(starts: list[Start]) -> tuple[Any, torch.Tensor]:
    """One cache of several prompts, padded on the left, and its attention mask."""
    longest = max(len(start.ids) for start in starts)
    pads = [longest - len(start.ids) for start in starts]
    mask_RL = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()
    return caches.join([start.cache for start in starts], pads), mask_RL
