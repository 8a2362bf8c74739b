"""What the gates let in: by how often the n-gram was seen in training, inside and outside entities, and what for.

    measured = gates(subject, texts=texts, marked={"fewrel.json": marked}, training=iterator_of_ids)

For every memory layer and every token t but a document's last, in windows as `perplexity` reads them (here one window a
text, cut at `window` tokens, since a gate needs no stride):

    gate       the layer's gate at t, mean over branches, in (0, 1): it weighs the value of the n-grams that end at t
    share      |what the layer added at t| / |hidden state|, its largest over branches: a gate near 1 over rows of zero
               adds nothing, so read the two together
    seen       how often the n-gram that ends at t stands in the training text (raw ids; bucket and order as in perplexity)
    saved      loss of token t + 1 with memory off less its loss with memory on, nats

Correlations are Spearman's (ranks, ties shared). Percentiles are 5, 25, 50, 75, 95. Intervals: 1,000 draws of texts; those
of correlations keep the ranks of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.eval.frequency import BUCKETS, Frequencies, bucket_of
from engram_lm.eval.intervals import drawn, interval, ratio_draws
from engram_lm.eval.result import Result, Value
from engram_lm.eval.spans import OUTSIDE, PLACES, Marked, place_tokens
from engram_lm.eval.texts import Text

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel
    from engram_lm.progress import Progress

ORDERS = (1, 2, 3)
PERCENTILES = (5, 25, 50, 75, 95)
UNMARKED = -1


def settings(
    texts: Sequence[Text], marked: Mapping[str, Sequence[Marked]], *, window: int, trained_on: Any = None
) -> dict[str, Any]:
    """What `gates` depends on beside the model."""
    import hashlib

    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.ids.astype("<i8").tobytes())
    for name, found in marked.items():
        digest.update(f"{name} {[(one.text, one.spans) for one in found]}".encode())
    return {
        "texts": {name: sum(text.file == name for text in texts) for name in dict.fromkeys(t.file for t in texts)},
        "marked": {name: len(found) for name, found in marked.items()}, "sha256": digest.hexdigest()[:16],
        "window": window, "training": trained_on,
    }  # fmt: skip


def gates(
    subject: EvaluatedModel, *, texts: Sequence[Text] = (), marked: Mapping[str, Sequence[Marked]] | None = None,
    window: int = 512, training: Iterable[np.ndarray] | None = None, trained_on: Any = None,
    progress: Progress | None = None,
) -> Result:  # fmt: skip
    """Gates of every memory layer over texts, and over texts with marked entities."""
    marked = marked or {}
    subject.require_gates()
    if not texts and not marked:
        raise ConfigError("Gates are measured over texts: give some, or some with marked entities.")
    begun = time.perf_counter()
    read = [
        (text.file, text.ids[:window], np.full(min(len(text.ids), window), UNMARKED, np.int8))
        for text in texts
    ]
    for name, found in marked.items():
        read += [(name, *(x[:window] for x in place_tokens(subject, one))) for one in found]
    read = [one for one in read if len(one[1]) > 1]
    tokens = _Tokens.of(subject, read, progress)
    groups: dict[str, np.ndarray] = {"all tokens": np.ones(len(tokens.text), bool)}
    for p, place in enumerate(PLACES):
        groups[f"{place} (marked texts)"] = tokens.place == p
    seen: dict[int, np.ndarray] = {}
    if training is not None:
        counted = Frequencies.count([ids for _, ids, _ in read], training, orders=ORDERS)
        for order in ORDERS:
            seen[order] = np.concatenate([counted.of(ids, order=order)[:-1] for _, ids, _ in read])
            for b, bucket in enumerate(BUCKETS):
                groups[f"{order}-gram seen {bucket}"] = bucket_of(seen[order]) == b
    values = []
    for layer, name in enumerate(tokens.layers):
        for group, chosen in groups.items():
            if chosen.any():
                for what, all_N in (("gate", tokens.gate[layer]), ("share", tokens.share[layer])):
                    values.append(_mean(what, group, name, all_N[chosen], tokens.text[chosen]))
        pairs = {"loss saved at the next token": (tokens.saved, np.ones(len(tokens.text), bool))}
        for order, counts in seen.items():
            pairs[f"how often the {order}-gram was seen"] = (counts, counts >= 0)
        for what, (other, chosen) in pairs.items():
            for kind, of_layer in (("gate", tokens.gate[layer]), ("share", tokens.share[layer])):
                values.append(_correlation(f"{kind} and {what}", name, of_layer, other, tokens.text, chosen))
    percentiles = {
        name: {
            group: [round(float(x), 4) for x in np.percentile(tokens.gate[layer][chosen], PERCENTILES)]
            for group, chosen in groups.items()
            if chosen.any()
        }
        for layer, name in enumerate(tokens.layers)
    }
    for group, chosen in groups.items():
        if chosen.any():
            values.append(_mean("loss saved, nats", group, "on", tokens.saved[chosen], tokens.text[chosen]))
    return Result(
        "gates", tuple(values), settings(texts, marked, window=window, trained_on=trained_on),
        notes=(
            f"{len(read):,} texts, {len(tokens.text):,} tokens. gate: mean over branches; share: what the layer added "
            "against the hidden state. A group is that of the n-gram that ends at the token. Loss saved is that of the next "
            "token, memory off less on, nats. Correlations are of ranks (Spearman).",
        ),
        seconds=round(time.perf_counter() - begun, 2),
        facts={"gate_percentiles": {"of": list(PERCENTILES), **percentiles}},
    )  # fmt: skip


class _Tokens:
    """All tokens of all texts but each last one. gate, share: float [L, N]; saved: float [N]; text, place: int [N]."""

    def __init__(self, layers: list[str], columns: list[tuple[np.ndarray, ...]]) -> None:
        self.layers = layers
        gate, share, saved, place = zip(*columns, strict=True)
        self.gate, self.share = np.concatenate(gate, 1), np.concatenate(share, 1)
        self.saved, self.place = np.concatenate(saved), np.concatenate(place)
        self.text = np.repeat(np.arange(len(saved)), [len(one) for one in saved])

    @classmethod
    def of(
        cls,
        subject: EvaluatedModel,
        read: list[tuple[str, np.ndarray, np.ndarray]],
        progress: Progress | None,
    ) -> _Tokens:
        from engram_lm.attachment import trace

        layers, columns = [], []
        for n, (_, ids, place) in enumerate(read):
            with subject.state("on"), trace(subject.model) as records:
                on = subject.log_probs(ids)
            with subject.state("off"):
                off = subject.log_probs(ids)
            layers = [f"{record.memory} before block {record.block}" for record in records]
            gate = np.stack([record.gate[0, :-1].mean(-1) for record in records])
            share = np.stack([record.share[0, :-1].max(-1) for record in records])
            columns.append((gate, share, on - off, place[:-1]))
            if progress:
                progress(n + 1, len(read))
        return cls(layers, columns)


def _mean(name: str, of: str, layer: str, values_N: np.ndarray, text_N: np.ndarray) -> Value:
    units, inverse = np.unique(text_N, return_inverse=True)
    sums, counts = np.bincount(inverse, values_N), np.bincount(inverse).astype(float)
    ends = interval(ratio_draws(sums, counts), len(units))
    return Value(name, of, layer, float(values_N.mean()), len(values_N), "tokens", ends)


def _correlation(
    of: str, layer: str, a_N: np.ndarray, b_N: np.ndarray, text_N: np.ndarray, chosen: np.ndarray
) -> Value:
    """Spearman's; None where one of the two never changes."""
    a, b, text = ranks(a_N[chosen]), ranks(b_N[chosen]), text_N[chosen]
    units, inverse = np.unique(text, return_inverse=True)
    sums_U6 = np.stack([np.bincount(inverse, x) for x in (np.ones(len(a)), a, b, a * a, b * b, a * b)], 1)
    whole = _pearson(sums_U6.sum(0)[None])[0]
    ends = interval(_pearson(sums_U6[drawn(len(units))].sum(1)), len(units))
    value = float(whole) if np.isfinite(whole) else None
    return Value("correlation", of, layer, value, len(a), "tokens", ends)


def _pearson(sums_D6: np.ndarray) -> np.ndarray:
    n, a, b, aa, bb, ab = sums_D6.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ab / n - a / n * b / n) / np.sqrt((aa / n - (a / n) ** 2) * (bb / n - (b / n) ** 2))


def ranks(values_N: np.ndarray) -> np.ndarray:
    """float64 [N] in (-0.5, 0.5): ranks, the mean of them where values are equal, around 0."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[inverse] - (len(values_N) + 1) / 2) / max(len(values_N), 1)


__all__ = ["OUTSIDE", "PERCENTILES", "gates", "ranks", "settings"]
