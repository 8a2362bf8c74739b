"""Perplexity of texts, memory on and off, also by how often the n-gram before a token was seen in training text.

    perplexity = exp(mean of -ln P(token | the tokens before it in its window)), over all tokens but each document's first

A document longer than `window` is read in windows that begin every `stride` tokens; each token is scored once, in the first
window that holds it, so all but a document's first `window` have window - stride or more tokens before them.

    measured = perplexity(subject, texts, states=("on", "off"), window=512, stride=256, training=iterator_of_ids)
    measured.value("perplexity", of="wiki.txt", memory="on").value

By frequency: the token at t is put into the bucket of the n-gram that **ends at t - 1**, which is what a memory of that order
reads before it predicts t; raw token ids, orders 1 to 3, counted exactly (`frequency`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.eval.frequency import BUCKETS, Frequencies, bucket_of
from engram_lm.eval.intervals import interval, ratio_draws
from engram_lm.eval.result import Result, Value
from engram_lm.eval.texts import STRETCH, Text, stretches

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel
    from engram_lm.progress import Progress

ORDERS = (1, 2, 3)


def windows(n: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first token that is scored) of a text of n tokens; every token from 1 on is scored once."""
    if not 1 <= stride < window:
        raise ConfigError(f"stride is from 1 and less than window; got stride {stride}, window {window}.")
    begin, scored = 0, 1
    while scored < n:
        end = min(begin + window, n)
        yield begin, end, scored
        begin, scored = begin + stride, end


def losses(subject: EvaluatedModel, ids: np.ndarray, *, window: int, stride: int) -> np.ndarray:
    """float64 [T - 1], nats: the loss of ids[1:], in the subject's present state."""
    found = [
        -subject.log_probs(ids[begin:end], since=scored - begin)
        for begin, end, scored in windows(len(ids), window=window, stride=stride)
    ]
    return np.concatenate(found)


def settings(
    texts: Sequence[Text], *, states: Sequence[str], window: int, stride: int, trained_on: Any = None
) -> dict[str, Any]:
    """What `perplexity` depends on beside the model."""
    return {
        "texts": {
            name: {"documents": sum(t.file == name for t in texts),
                   "tokens": sum(len(t.ids) for t in texts if t.file == name), "sha256": _digest(texts, name)}
            for name in dict.fromkeys(text.file for text in texts)
        },
        "states": list(states), "window": window, "stride": stride, "training": trained_on,
    }  # fmt: skip


def perplexity(
    subject: EvaluatedModel, texts: Sequence[Text], *, states: Sequence[str], window: int = 512, stride: int = 256,
    training: Iterable[np.ndarray] | None = None, trained_on: Any = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Perplexity of every file in every state, its change against memory off, and both by frequency.

    training: ids of each training document. trained_on: which they were, plain data for the settings.
    """
    subject.require_states(states)
    if subject.context is not None and window > subject.context:
        raise ConfigError(f"{subject.name} reads {subject.context:,} tokens; got a window of {window:,}.")
    begun = time.perf_counter()
    tokens_N = np.concatenate([np.full(len(text.ids) - 1, n) for n, text in enumerate(texts)])
    loss_SN = np.empty((len(states), len(tokens_N)))
    for s, state in enumerate(states):
        with subject.state(state):
            parts = []
            for n, text in enumerate(texts):
                parts.append(losses(subject, text.ids, window=window, stride=stride))
                if progress:
                    progress(s * len(texts) + n + 1, len(states) * len(texts))
        loss_SN[s] = np.concatenate(parts)
    files = list(dict.fromkeys(text.file for text in texts))
    file_N = np.array([files.index(text.file) for text in texts])[tokens_N]
    groups = {name: file_N == i for i, name in enumerate(files)}
    if training is not None:
        seen = Frequencies.count([text.ids for text in texts], training, orders=ORDERS)
        for order in ORDERS:
            # of the n-gram that ends at the token before
            bucket_N = bucket_of(np.concatenate([seen.of(text.ids, order=order)[:-1] for text in texts]))
            for i, name in enumerate(files):
                for b, bucket in enumerate(BUCKETS):
                    chosen = (file_N == i) & (bucket_N == b)
                    if chosen.any():
                        groups[f"{name}, {order}-gram seen {bucket}"] = chosen
    unit_N = stretches(texts)
    values = [
        value for name, chosen in groups.items() for value in _values(name, states, loss_SN, unit_N, chosen)
    ]
    notes = [
        f"Windows of {window} tokens that begin every {stride}; every token but a document's first counts. Intervals: 1,000 "
        f"draws of documents (of {STRETCH} tokens where they are longer); changes from the same draws.",
    ]  # fmt: skip
    if training is not None:
        notes.append(
            "n-gram seen: how often the n raw tokens before the predicted one stand in the training text."
        )
    return Result(
        "perplexity", tuple(values),
        settings(texts, states=states, window=window, stride=stride, trained_on=trained_on) | subject.drawn(states),
        tuple(notes),
        round(time.perf_counter() - begun, 2),
    )  # fmt: skip


def _values(
    of: str, states: Sequence[str], loss_SN: np.ndarray, unit_N: np.ndarray, chosen_N: np.ndarray
) -> Iterator[Value]:
    units, inverse = np.unique(unit_N[chosen_N], return_inverse=True)
    count_U = np.bincount(inverse, minlength=len(units)).astype(float)
    sum_SU = np.stack([np.bincount(inverse, loss_N[chosen_N], len(units)) for loss_N in loss_SN])
    mean_S, draws_SD = sum_SU.sum(1) / count_U.sum(), [ratio_draws(sum_U, count_U) for sum_U in sum_SU]
    count = int(count_U.sum())
    for s, state in enumerate(states):
        ends = interval(np.exp(draws_SD[s]), len(units))
        yield Value("perplexity", of, state, float(np.exp(mean_S[s])), count, "tokens", ends)
    if "off" in states:
        off = list(states).index("off")
        for s, state in enumerate(states):
            if s != off:
                change = float(np.exp(mean_S[s] - mean_S[off]) - 1)
                ends = interval(np.exp(draws_SD[s] - draws_SD[off]) - 1, len(units))
                yield Value("change against off", of, state, change, count, "tokens", ends)


def _digest(texts: Sequence[Text], file: str) -> str:
    import hashlib

    digest = hashlib.sha256()
    for text in texts:
        if text.file == file:
            digest.update(len(text.ids).to_bytes(8, "little") + text.ids.astype("<i8").tobytes())
    return digest.hexdigest()[:16]
