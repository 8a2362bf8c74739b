"""What a gate looks at: one look-up and one reading of the logits, as numbers of moderate size.

`Evidence` is the raw material, columns [N] over positions or over the rows of a batch; `features` turns it into
float64 [N, len(NAMES)]. Both ways of using memory, decoding and scoring, fill the same record, so lambda does not depend
on the way. A change to a feature or to its place raises VERSION, and gates of another version are refused.

Repetition is no evidence: of a match of three tokens and more, each document counts at most 32 times in `count`. In ordinary
text that changes nothing (0 of 14,000 to 18,000 positions against 10 to 118 documents of a handbook and a textbook; 0.2 %
against one long document of rules), so VERSION stayed; and a sentence said a million times in a document weighs as one said
32 times. Documents are told apart up to 16: where a match stands in more, its count is taken as it is (what stops that is
counting by source, `Snapshot.score(count="sources")`).

A match that reaches into the prompt is evidence that the text is quoting. Where all of it is the model's own (or the
memory's) output, it may only show that memory has been listened to before: `fresh` and `all_generated` tell them apart.

    evidence = Evidence.of(depth=[7], generated=[2], count=[3], ...)
    features(evidence, tokens=126_000)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from engram_lm.kernels.compiled import kernel

VERSION = 1
NAMES = (
    "depth", "depth>=1", "depth>=2", "depth>=3", "depth>=4", "depth>=6", "depth>=9", "depth>=17",
    "count", "count=1", "distinct", "distinct=1", "count below", "distinct below",
    "documents", "documents=1", "memory entropy", "memory top",
    "model entropy", "model top", "model on memory top", "same top", "depth x model entropy", "depth x memory top",
    "tokens", "fresh", "all generated",
)  # fmt: skip
COLUMNS = (
    "depth", "generated", "count", "distinct", "count_below", "distinct_below", "documents", "memory_entropy", "top_p",
    "model_entropy", "model_top_logp", "model_logp_of_top", "same_top",
)  # fmt: skip
_PLACE = {name: place for place, name in enumerate(COLUMNS)}
_STEPS = (1, 2, 3, 4, 6, 9, 17)
_LEAST = math.log(1e-9)
_MOST_DOCUMENTS = 16
_MOST_TIMES, _CAPPED_FROM = 32, 3  # a document counts so often, of matches of so many tokens and more


class Evidence:
    """Columns [N] by name, float64 (`COLUMNS`).

    depth: tokens of the longest match; generated: how many of the last tokens of the context are not of the prompt.
    count, distinct, documents, memory_entropy, top_p: of that match, as in `index.snapshot.Found`; count_below,
    distinct_below: of the match without its first token.
    model_entropy, nats; model_top_logp: log P of the model's own first choice; model_logp_of_top: its log P of memory's;
    same_top: whether they agree.
    """

    def __init__(self, n: int) -> None:
        self.columns_CN = np.empty((len(COLUMNS), n))

    @classmethod
    def of(cls, **columns: Any) -> Evidence:
        """From numbers or arrays [N], all of them named."""
        if set(columns) != set(COLUMNS):
            raise TypeError(f"Evidence has {', '.join(COLUMNS)}; got {', '.join(columns)}.")
        self = cls(len(np.atleast_1d(columns["depth"])))
        for name, values in columns.items():
            self[name] = values
        return self

    def __setitem__(self, name: str, values: Any) -> None:
        self.columns_CN[_PLACE[name]] = values

    def __len__(self) -> int:
        return self.columns_CN.shape[1]


def features(evidence: Evidence, *, tokens: int) -> np.ndarray:
    """float64 [N, F]. tokens: of the index, live ones."""
    out_NF = np.empty((len(evidence), len(NAMES)))
    _fill(evidence.columns_CN, math.log1p(tokens), out_NF)
    return out_NF


@kernel
def _fill(columns_CN, log_tokens, out_NF):
    for n in range(out_NF.shape[0]):
        depth, generated, count, distinct = (
            columns_CN[0, n],
            columns_CN[1, n],
            columns_CN[2, n],
            columns_CN[3, n],
        )
        count_below, distinct_below, documents = columns_CN[4, n], columns_CN[5, n], columns_CN[6, n]
        memory_entropy, top_p, model_entropy = columns_CN[7, n], columns_CN[8, n], columns_CN[9, n]
        log_depth = math.log2(1 + depth)
        p = min(max(top_p, 1e-6), 1 - 1e-6)
        top = math.log(p) - math.log1p(-p)
        generated = min(generated, depth)
        counted = count
        # documents are known up to 16: where there are so many, it is not one that repeats itself
        if depth >= _CAPPED_FROM and documents < _MOST_DOCUMENTS:
            counted = min(count, _MOST_TIMES * max(documents, 1.0))
        row_F = out_NF[n]
        row_F[0] = log_depth
        for i in range(len(_STEPS)):
            row_F[1 + i] = depth >= _STEPS[i]
        row_F[8] = math.log1p(counted)
        row_F[9] = count == 1
        row_F[10] = math.log1p(distinct)
        row_F[11] = distinct == 1
        row_F[12] = math.log1p(count_below)
        row_F[13] = math.log1p(distinct_below)
        row_F[14] = math.log1p(min(documents, _MOST_DOCUMENTS))
        row_F[15] = documents == 1
        row_F[16] = memory_entropy
        row_F[17] = top
        row_F[18] = model_entropy
        row_F[19] = max(columns_CN[10, n], _LEAST)
        row_F[20] = max(columns_CN[11, n], _LEAST)
        row_F[21] = columns_CN[12, n]
        row_F[22] = log_depth * model_entropy
        row_F[23] = log_depth * top
        row_F[24] = log_tokens
        row_F[25] = log_depth - math.log2(1 + depth - generated)
        row_F[26] = depth > 0 and generated >= depth
