"""One place where look-ups become evidence, for decoding (one context) and for scoring (a whole text). No torch.

    found, row = read_next(snapshot, context, rules, reading, out=buffer)          # row: Memory with N = 1
    memory = read_text(snapshot, ids, rules, reading)                              # N = len(ids), row t given ids[:t]

`Lookups` holds what does not need the logits; `evidence` adds what does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.mixing.features import Evidence
from engram_lm.mixing.gate import LookupConfig
from engram_lm.mixing.mix import TokenRules

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Found, Snapshot


@dataclass(frozen=True, kw_only=True)
class Lookups:
    """Arrays [N]. p: of the token that came (scoring alone, 0 where memory may not speak of it).

    top: the logit that memory's first choice has, -1 where it may not speak of it. The rest as in `index.snapshot`.
    """

    depth: np.ndarray
    count: np.ndarray
    distinct: np.ndarray
    count_below: np.ndarray
    distinct_below: np.ndarray
    documents: np.ndarray
    entropy: np.ndarray
    top: np.ndarray
    top_p: np.ndarray
    p: np.ndarray | None = None


def read_next(
    snapshot: Snapshot, context: np.ndarray, rules: TokenRules, reading: LookupConfig, *, out: np.ndarray
) -> tuple[np.ndarray, Lookups]:
    """(q: P_memory over the logits memory may speak of, inside `out`; Memory of one row). out: float32 [V + 1]."""
    _require_same(snapshot, rules)
    found: Found = snapshot.distribution(
        _with_ends(context[-reading.max_order :], rules, snapshot.end),
        out,
        max_order=reading.max_order,
        discount=reading.discount,
        orders=reading.orders,
        count=reading.count,
        cap=reading.cap,
    )
    token, top_p = found.top
    below = [max(found.depth - 1, 0)]
    row = Lookups(
        depth=np.array([found.depth]),
        count=found.count_D[-1:],
        distinct=found.distinct_D[-1:],
        count_below=found.count_D[below],
        distinct_below=found.distinct_D[below],
        documents=np.array([found.documents]),
        entropy=np.array([found.entropy]),
        top=_as_logit(np.array([token]), rules),
        top_p=np.array([top_p]),
    )
    return rules.prepare(found.p), row


def read_text(snapshot: Snapshot, ids: np.ndarray, rules: TokenRules, reading: LookupConfig) -> Lookups:
    """P_memory of every token of a text given those before it, and what the matches were like."""
    _require_same(snapshot, rules)
    ids = np.asarray(ids, np.int64)
    scores = snapshot.score(
        _with_ends(ids, rules, snapshot.end),
        max_order=reading.max_order,
        discount=reading.discount,
        orders=reading.orders,
        count=reading.count,
        cap=reading.cap,
    )
    return Lookups(
        depth=scores.depth,
        count=scores.count,
        distinct=scores.distinct,
        count_below=scores.count_below,
        distinct_below=scores.distinct_below,
        documents=scores.documents,
        entropy=scores.entropy,
        top=_as_logit(scores.top_token, rules),
        top_p=scores.top_p,
        p=np.where(rules.mute(ids), 0.0, scores.p),
    )


def tail(memory: Lookups) -> Lookups:
    """Without its first row: of a text's first token there are no logits."""
    return Lookups(**{name: getattr(memory, name)[1:] for name in Lookups.__dataclass_fields__})


def evidence(memory: Lookups, survey_N6: np.ndarray, *, generated: np.ndarray | int = 0) -> Evidence:
    """survey: rows of `onepass.survey_rows`, whose `other` was `memory.top`."""
    found = Evidence(len(memory.depth))
    found["depth"], found["generated"] = memory.depth, generated
    found["count"], found["distinct"] = memory.count, memory.distinct
    found["count_below"], found["distinct_below"] = memory.count_below, memory.distinct_below
    found["documents"], found["memory_entropy"], found["top_p"] = (
        memory.documents,
        memory.entropy,
        memory.top_p,
    )
    found["model_entropy"], found["model_top_logp"] = survey_N6[:, 2], survey_N6[:, 3]
    found["model_logp_of_top"], found["same_top"] = survey_N6[:, 1], survey_N6[:, 4] == memory.top
    return found


def _require_same(snapshot: Snapshot, rules: TokenRules) -> None:
    if snapshot.vocab_size != rules.n_tokens:
        raise ConfigError(
            f"The index has {snapshot.vocab_size:,} token ids, the token rules are for {rules.n_tokens:,}. "
            "Make the rules with rules_of(tokenizer, model, snapshot)."
        )


def _with_ends(ids: np.ndarray, rules: TokenRules, end: int) -> np.ndarray:
    """An end-of-text token in a text is the index's END: documents never hold the token itself."""
    ids = np.asarray(ids, np.int64)
    return ids if rules.eos_id is None else np.where(ids == rules.eos_id, end, ids)


def _as_logit(token: np.ndarray, rules: TokenRules) -> np.ndarray:
    muted = rules.mute(token)
    eos = -1 if rules.eos_id is None else rules.eos_id
    return np.where(muted, -1, np.where(token == rules.n_tokens, eos, token))
