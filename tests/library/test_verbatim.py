"""Regurgitation: the longest runs of a text that are a document's own, and a cap on what memory adds to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.library.verbatim import verbatim_runs

V = 50
NAMED = [Document(id="a"), Document(id="b")]


def snapshot_of(documents, *, names=None):
    names = names or [Document(id=str(k)) for k in range(len(documents))]
    return Snapshot([LiveSegment(Segment.build(documents, vocab_size=V, documents=names))], vocab_size=V)


def test_runs_are_found_with_their_documents():
    a, b = list(range(20)), list(range(20, 40))
    snapshot = snapshot_of([a, b], names=NAMED)
    text = [*a[3:15], 45, *b[5:12], 46, 1, 2]
    runs = verbatim_runs(snapshot, np.array(text), shortest=3)
    assert [(run.start, run.length, run.documents[0][0].id) for run in runs] == [(0, 12, "a"), (13, 7, "b")]
    # what stands in the prompt does not count
    assert [(run.start, run.length) for run in verbatim_runs(snapshot, np.array(text), shortest=3, start=9)] == [
        (13, 7), (9, 3),
    ]  # fmt: skip
    assert verbatim_runs(snapshot, np.array([], np.int64)) == []
    with pytest.raises(ConfigError, match="at least 1 token"):
        verbatim_runs(snapshot, np.array(text), shortest=0)


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=3),
    text=st.lists(st.integers(0, 3), max_size=16),
    shortest=st.integers(1, 4),
)
def test_runs_are_what_a_plain_search_finds(documents, text, shortest):
    def occurs(part):
        n = len(part)
        return any(
            document[k : k + n] == part for document in documents for k in range(len(document) - n + 1)
        )

    T = len(text)
    longest = {
        (s, e)
        for s in range(T)
        for e in range(s + shortest, T + 1)
        if occurs(text[s:e])
        and not (e < T and occurs(text[s : e + 1]))
        and not (s > 0 and occurs(text[s - 1 : e]))
    }
    found = verbatim_runs(snapshot_of(documents), np.array(text, np.int64), shortest=shortest, limit=100)
    assert {(run.start, run.start + run.length) for run in found} == longest


def test_memory_is_silent_after_as_many_tokens_of_a_document_as_allowed():
    torch = pytest.importorskip("torch")
    from engram_lm.mixing import FixedLambda, memory_processor
    from engram_lm.mixing.mix import TokenRules

    document = list(range(30))
    rules = TokenRules(n_logits=V, n_tokens=V, eos_id=None)
    snapshot = snapshot_of([document])
    for cap, wanted in ((None, 26), (5, 5), (1, 1)):
        ids = torch.tensor([[0, 1, 2, 3]])
        processor = memory_processor(snapshot, FixedLambda(0.99), ids, rules=rules, most_verbatim=cap)
        flat = torch.zeros(1, V)
        flat[0, 49] = 1.0  # what the model would say
        for _ in range(26):
            logits = processor(ids, flat)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        kept = ids[0, 4:].tolist()
        run = next((k for k in range(26) if kept[k] != 4 + k), 26)
        assert run == wanted
    with pytest.raises(ConfigError, match="at least 1 token"):
        memory_processor(snapshot, FixedLambda(0.5), ids, rules=rules, most_verbatim=0)
