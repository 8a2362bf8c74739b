"""What a gate looks at: one look-up and one reading of the logits, as numbers of moderate size.

`Evidence` is the raw material, arrays [N] over positions or over the rows of a batch; `features` turns it into
float64 [N, len(NAMES)]. Both ways of using memory, decoding and scoring, fill the same record, so lambda does not depend
on the way. A change to a feature or to its place raises VERSION, and gates of another version are refused.

Repetition is no evidence: of a match of three tokens and more, each document counts at most 32 times in `count`. In ordinary
text that changes nothing (0 of 14,000 to 18,000 positions against 10 to 118 documents of a handbook and a textbook; 0.2 %
against one long document of rules), so VERSION stayed; and a sentence said a million times in a document weighs as one said
32 times. Documents are told apart up to 16: where a match stands in more, its count is taken as it is (what stops that is
counting by source, `Snapshot.score(count="sources")`).

A match that reaches into the prompt is evidence that the text is quoting. Where all of it is the model's own (or the
memory's) output, it may only show that memory has been listened to before: `fresh` and `all_generated` tell them apart.

    evidence = Evidence(depth=[7], generated=[2], count=[3], ...)
    features(evidence, tokens=126_000, documents=118)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

VERSION = 1
NAMES = (
    "depth", "depth>=1", "depth>=2", "depth>=3", "depth>=4", "depth>=6", "depth>=9", "depth>=17",
    "count", "count=1", "distinct", "distinct=1", "count below", "distinct below",
    "documents", "documents=1", "memory entropy", "memory top",
    "model entropy", "model top", "model on memory top", "same top", "depth x model entropy", "depth x memory top",
    "tokens", "fresh", "all generated",
)  # fmt: skip
_STEPS = (1, 2, 3, 4, 6, 9, 17)
_LEAST = np.log(1e-9)
_MOST_DOCUMENTS = 16
_MOST_TIMES, _CAPPED_FROM = 32, 3  # a document counts so often, of matches of so many tokens and more


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Arrays [N].

    depth: tokens of the longest match; generated: how many of the last tokens of the context are not of the prompt.
    count, distinct, documents, memory_entropy, top_p: of that match, as in `index.snapshot.Found`; count_below,
    distinct_below: of the match without its first token.
    model_entropy, nats; model_top_logp: log P of the model's own first choice; model_logp_of_top: its log P of memory's;
    same_top: whether they agree.
    """

    depth: np.ndarray
    generated: np.ndarray
    count: np.ndarray
    distinct: np.ndarray
    count_below: np.ndarray
    distinct_below: np.ndarray
    documents: np.ndarray
    memory_entropy: np.ndarray
    top_p: np.ndarray
    model_entropy: np.ndarray
    model_top_logp: np.ndarray
    model_logp_of_top: np.ndarray
    same_top: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), np.float64))

    def __len__(self) -> int:
        return len(self.depth)


def features(evidence: Evidence, *, tokens: int) -> np.ndarray:
    """float64 [N, F]. tokens: of the index, live ones."""
    e = evidence
    log_depth = np.log2(1 + e.depth)
    top = np.log(np.clip(e.top_p, 1e-6, 1 - 1e-6)) - np.log1p(-np.clip(e.top_p, 1e-6, 1 - 1e-6))
    generated = np.minimum(e.generated, e.depth)
    # documents are known up to 16: where there are so many, it is not one that repeats itself
    capped = (e.depth >= _CAPPED_FROM) & (e.documents < _MOST_DOCUMENTS)
    count = np.where(capped, np.minimum(e.count, _MOST_TIMES * np.maximum(e.documents, 1)), e.count)
    columns = [
        log_depth,
        *(e.depth >= step for step in _STEPS),
        np.log1p(count),
        e.count == 1,
        np.log1p(e.distinct),
        e.distinct == 1,
        np.log1p(e.count_below),
        np.log1p(e.distinct_below),
        np.log1p(np.minimum(e.documents, _MOST_DOCUMENTS)),
        e.documents == 1,
        e.memory_entropy,
        top,
        e.model_entropy,
        np.maximum(e.model_top_logp, _LEAST),
        np.maximum(e.model_logp_of_top, _LEAST),
        e.same_top,
        log_depth * e.model_entropy,
        log_depth * top,
        np.full(len(e), np.log1p(tokens)),
        log_depth - np.log2(1 + e.depth - generated),
        (e.depth > 0) & (generated >= e.depth),
    ]
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def features_of_one(
    *, tokens: int, depth: int, generated: int, count: int, distinct: int, count_below: int, distinct_below: int,
    documents: int, memory_entropy: float, top_p: float, model_entropy: float, model_top_logp: float,
    model_logp_of_top: float, same_top: bool,
) -> np.ndarray:  # fmt: skip
    """The same for one row, float64 [1, F], in plain numbers: beside a model that has emptied the caches, sixty small calls
    of NumPy take a third of a millisecond."""
    log_depth = math.log2(1 + depth)
    p = min(max(top_p, 1e-6), 1 - 1e-6)
    top = math.log(p) - math.log1p(-p)
    generated = min(generated, depth)
    counted = count
    if depth >= _CAPPED_FROM and documents < _MOST_DOCUMENTS:
        counted = min(count, _MOST_TIMES * max(documents, 1))
    row = (
        log_depth, *[float(depth >= step) for step in _STEPS],
        math.log1p(counted), float(count == 1), math.log1p(distinct), float(distinct == 1), math.log1p(count_below),
        math.log1p(distinct_below), math.log1p(min(documents, _MOST_DOCUMENTS)), float(documents == 1), memory_entropy, top,
        model_entropy, max(model_top_logp, _LEAST), max(model_logp_of_top, _LEAST), float(same_top),
        log_depth * model_entropy, log_depth * top, math.log1p(tokens), log_depth - math.log2(1 + depth - generated),
        float(depth > 0 and generated >= depth),
    )  # fmt: skip
    return np.array([row])
