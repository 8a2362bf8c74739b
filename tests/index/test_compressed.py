"""The channel of compressed contexts against counting by hand, alone and averaged with the exact one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.index import plain
from engram_lm.index.compressed import BlendedSnapshot, bytes_of, compressed
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.mixing import FixedLambda, SessionMemory
from engram_lm.mixing.gate import LookupConfig
from engram_lm.mixing.lookups import read_next, read_text
from engram_lm.mixing.mix import TokenRules
from engram_lm.vocab import TokenMap

V = 6
# 0 and 3 are one word, 2, 4 and 5 another
MAP = TokenMap(np.array([0, 1, 2, 0, 2, 2]), "compressed", "t")


def a_snapshot(segments, dead=(), nodes=(1024, 256)):
    views = [
        LiveSegment(
            Segment.build(documents, vocab_size=V, heavy=nodes[0], wide=nodes[1]),
            dead_documents=[i for t, i in dead if t == s],
        )
        for s, documents in enumerate(segments)
    ]
    return Snapshot(views, vocab_size=V)


def canonical(ids):
    return [int(MAP.canonical[i]) if 0 <= i < V else i for i in ids]


def plain_compressed(documents, context, *, cap=0, most=64, discount=0.75):
    """`plain.distribution` with contexts compared by canonical ids and raw tokens behind them."""
    events = {}
    for number, document in enumerate(documents):
        stream = [*document, V]
        for p, token in enumerate(stream):
            events.setdefault(number, []).append((canonical(document[:p]), token))
    p, context = [1 / (V + 1)] * (V + 1), canonical(context)
    for n in range(min(len(context), most) + 1):
        gram, counts, seen = context[len(context) - n :], {}, {}
        for number, found in events.items():
            for before, token in found:
                if len(before) >= n and before[len(before) - n :] == gram:
                    seen[number, token] = seen.get((number, token), 0) + 1
                    if not cap or not n or seen[number, token] <= cap:
                        counts[token] = counts.get(token, 0) + 1
        total = sum(counts.values())
        if not total:
            return p if n else [0.0] * (V + 1)
        rest = discount * len(counts) / total
        p = [max(counts.get(x, 0) - discount, 0) / total + rest * p[x] for x in range(V + 1)]
    return p


documents = st.lists(st.lists(st.integers(0, V - 1), max_size=9), min_size=1, max_size=5)
ways = st.sampled_from([{}, {"count": "documents"}, {"count": "documents", "cap": 2}])


@settings(max_examples=60, deadline=None)
@given(
    documents, documents, st.lists(st.integers(0, V + 1), max_size=9), ways, st.booleans(),
    st.sampled_from([(1, 1), (3, 2), (1024, 256)]), st.sampled_from([0.25, 0.5]),
)  # fmt: skip
def test_both_channels_are_counted_and_averaged(first, second, context, way, delete, nodes, share):
    first = [*first, first[0] * 3]
    dead = [(0, 0)] if delete else []
    snapshot = a_snapshot([first, second], dead, nodes)
    both, live = BlendedSnapshot(snapshot, MAP, share=share), [*first[delete:], *second]
    cap = way.get("cap", 1 if "count" in way else 0)
    for query in (context, first[-1][:5], [*second[-1], 9]):
        alone = plain_compressed(live, query, cap=cap)
        exact = plain.distribution(live, query, end=V, cap=cap)
        wanted = (1 - share) * np.array(exact) + share * np.array(alone)
        found, of_exact = both.distribution(query, **way), snapshot.distribution(query, **way)
        np.testing.assert_allclose(found.p, wanted, rtol=1e-5, atol=1e-7)
        # what a gate looks at is of the exact channel
        assert (found.depth, found.top, found.entropy, found.documents) == (
            of_exact.depth, of_exact.top, of_exact.entropy, of_exact.documents,
        )  # fmt: skip
    ids = [*first[-1], V, *context]
    scores, of_exact = both.score(ids, **way), snapshot.score(ids, **way)
    for t, token in enumerate(ids):
        p = both.distribution(ids[:t], **way).p[token] if token <= V else 0
        np.testing.assert_allclose(scores.p[t], p, rtol=1e-5, atol=1e-7)
    assert np.array_equal(scores.top_p, of_exact.top_p)


def test_a_wording_in_capitals_is_found():
    both = BlendedSnapshot(a_snapshot([[[0, 1, 2, 1]]]), MAP)
    assert both.longest([3, 1, 4])[0] == 0
    exact = a_snapshot([[[0, 1, 2, 1]]]).distribution([3, 1, 4]).p
    assert both.distribution([3, 1, 4]).p[1] > 1.5 * exact[1]


def test_segments_are_compressed_once_and_told_in_bytes():
    snapshot = a_snapshot([[[0, 1, 2, 3] * 50], [[4, 5]]])
    first = compressed(snapshot.views[0].segment, MAP)
    assert compressed(snapshot.views[0].segment, MAP) is first
    # tokens, order and next, and where first tokens begin
    assert bytes_of(snapshot, MAP) >= 8 * snapshot.n_tokens
    assert first.tokens.max() == V
    assert np.array_equal(np.sort(first.next), np.sort(snapshot.views[0].segment.next))


def test_restricted_hidden_and_extended_snapshots_keep_both_channels():
    both = BlendedSnapshot(a_snapshot([[[0, 1, 2, 1], [3, 1, 5]]]), MAP, share=0.4)
    for made, live in (
        (both.restricted(["1"]), [[3, 1, 5]]),
        (both.without("0"), [[3, 1, 5]]),
    ):
        assert made.share == 0.4
        wanted = 0.6 * np.array(plain.distribution(live, [0, 1], end=V)) + 0.4 * np.array(
            plain_compressed(live, [0, 1])
        )
        np.testing.assert_allclose(made.distribution([0, 1]).p, wanted, rtol=1e-5)
    said = np.array([1, 1, 4, 1, 1])
    seen = SessionMemory(both, 64, given=len(said)).extended(said)
    assert isinstance(seen, BlendedSnapshot)
    # the place where the conversation stops is no event in either channel
    plain_one = SessionMemory(a_snapshot([[[0, 1, 2, 1], [3, 1, 5]]]), 64, given=len(said)).extended(said)
    assert seen.distribution(said).p[V] < plain_one.distribution(said).p[V] + 0.2
    assert seen.other.n_tokens == seen.n_tokens == plain_one.n_tokens


def test_decoding_and_scoring_say_the_same():
    both = BlendedSnapshot(a_snapshot([[[0, 1, 2, 1, 4, 4, 1]], [[3, 1, 5]]]), MAP)
    rules, ids = TokenRules(n_tokens=V, n_logits=V), np.array([3, 1, 2, 1, 4])
    reading = FixedLambda(0.5, reading=LookupConfig(count="documents")).reading
    text = read_text(both, ids, rules, reading)
    for t in range(1, len(ids)):
        q, row = read_next(both, ids[:t], rules, reading, out=np.empty(V + 1, np.float32))
        assert text.p[t] == pytest.approx(q[ids[t]], rel=1e-5)
        assert (text.depth[t], text.top_p[t]) == (row.depth[0], pytest.approx(row.top_p[0], rel=1e-5))


def test_refusals():
    snapshot = a_snapshot([[[0, 1]]])
    for share in (0, 1, -0.5):
        with pytest.raises(ConfigError, match="more than 0 and less than 1"):
            BlendedSnapshot(snapshot, MAP, share=share)
    small = TokenMap(np.array([0, 1]), "compressed", "t")
    with pytest.raises(ConfigError, match="map of 2 ids cannot compress a vocabulary of 6"):
        BlendedSnapshot(snapshot, small)
