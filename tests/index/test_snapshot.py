"""Snapshots of several segments with deleted documents against counting by hand, in every way of counting."""

import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index import live_segment, plain
from engram_lm.index import segment as segment_module
from engram_lm.index import snapshot as snapshot_module
from engram_lm.index.kernels import search
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot, dead_ranks

VOCAB = 5


class Memory:
    """Documents in segments, some deleted; the same as a list of what is live."""

    def __init__(self, segments, deleted=(), *, vocab_size=VOCAB, nodes=(1024, 256), n_sources=2):
        live_segment, self.live, self.sources, number = [], [], [], 0
        for s, documents in enumerate(segments):
            facts = [
                Document(id=str(number + i), source=f"s{i % n_sources}" if i % 3 else "")
                for i in range(len(documents))
            ]
            segment = Segment.build(
                documents, vocab_size=vocab_size, documents=facts, heavy=nodes[0], wide=nodes[1]
            )
            dead = [i for i in range(len(documents)) if number + i in deleted]
            live_segment.append(LiveSegment(segment, dead_documents=dead))
            for i, document in enumerate(documents):
                if i not in dead:
                    self.live.append(list(document))
                    self.sources.append(facts[i].source or (s, i))
            number += len(documents)
        self.end = vocab_size
        self.snapshot = Snapshot(live_segment, vocab_size=vocab_size)

    def plain(self, count, cap):
        """What the plain twin is told about a way of counting."""
        return {"tokens": {}, "documents": {"cap": cap}, "sources": {"cap": cap, "sources": self.sources}}[
            count
        ]


@st.composite
def memories(draw, max_documents=9):
    document = st.lists(st.integers(0, VOCAB - 1), max_size=10)
    documents = draw(st.lists(document, max_size=max_documents))
    # parts of documents again, and one that repeats itself: contexts that are equal for long
    documents += [[*d, *d, *d[1:]] for d in documents[:2]] + [[0, 1] * draw(st.integers(0, 8))]
    cuts = draw(st.lists(st.integers(0, len(documents)), max_size=6).map(sorted))
    segments = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(documents)], strict=True)]
    deleted = draw(st.sets(st.integers(0, len(documents) - 1), max_size=4))
    nodes = draw(st.sampled_from([(1, 1), (3, 2), (9, 2), (1024, 256)]))
    # segments up to this size are walked side by side where they are many, the others by themselves
    small, stride = draw(st.sampled_from([2**18, 8, -1])), draw(st.sampled_from([1, 2, 4, 32]))
    with (
        mock.patch.object(live_segment, "_SMALL", small),
        mock.patch.object(live_segment, "STRIDE", stride),
        mock.patch.object(segment_module, "STRIDE", stride),
    ):
        return Memory(segments, deleted, nodes=nodes), documents


contexts = st.lists(st.integers(-1, VOCAB + 1), max_size=9)
ways = st.sampled_from([("tokens", None), ("documents", 1), ("documents", 2), ("sources", 1)])


def asked(memory, documents, context):
    """Contexts that do occur, beside one that may not."""
    return [context, [7, *context], *(d[:k] for d in documents[-3:] for k in (2, 6)), documents[-1] * 10]


@settings(max_examples=60, deadline=None)
@given(memories(), contexts)
def test_counts_are_of_live_documents_alone(made, context):
    memory, documents = made
    snapshot, live, end = memory.snapshot, memory.live, memory.end
    assert (snapshot.n_documents, snapshot.n_tokens) == (len(live), sum(len(d) + 1 for d in live))
    for query in asked(memory, documents, context):
        match = snapshot.match(query)
        assert match.depth == plain.depth(live, query, end=end, most=64)
        for order in range(match.depth + 1):
            gram = query[len(query) - order :]
            wanted = plain.continuations(live, gram, end=end)
            tokens, counts = snapshot.continuations(match, order)
            assert list(zip(tokens.tolist(), counts.tolist(), strict=True)) == sorted(wanted.items())
            assert match.counts[order] == sum(wanted.values())
            found = snapshot.documents_of(match, order, limit=100)
            assert len(found) == len(plain.holders(live, gram, end=end))
            assert sum(n for _, n in found) == sum(wanted.values())
        depth, tokens, counts = snapshot.longest(query)
        assert depth == match.depth
        assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == dict(wanted)
        shorter = snapshot.match(query, max_order=2)
        assert shorter.depth == min(2, match.depth)


@settings(max_examples=60, deadline=None)
@given(memories(), contexts, ways, st.sampled_from(["all", "longest"]), st.sampled_from([0.75, 0.3]))
def test_distributions_are_the_plain_chain(made, context, way, orders, discount):
    memory, documents = made
    snapshot, live, end = memory.snapshot, memory.live, memory.end
    count, cap = way
    for query in asked(memory, documents, context):
        options = memory.plain(count, cap)
        found = snapshot.distribution(query, discount=discount, orders=orders, count=count, cap=cap)
        wanted = plain.distribution(live, query, end=end, discount=discount, orders=orders, **options)
        # float32 of sums of a few float32
        np.testing.assert_allclose(found.p, wanted, rtol=1e-5, atol=1e-7)
        grams = [query[len(query) - n :] for n in range(found.depth + 1)]
        counted = [plain.continuations(live, gram, end=end) for gram in grams]
        assert found.depth == plain.depth(live, query, end=end, most=64)
        assert found.count_D.tolist() == [sum(c.values()) for c in counted]
        assert found.distinct_D.tolist() == [len(c) for c in counted]
        holders = plain.holders(live, grams[-1], end=end)
        if count == "sources" and found.depth:
            holders = {memory.sources[number] for number in holders}
        assert found.documents == min(len(holders), 16)
        last = plain.continuations(live, grams[-1], end=end, **options)
        if not last:
            assert found.top == (-1, 0.0)
            continue
        top = min(last, key=lambda x: (-last[x], x))
        assert found.top == (top, found.p[top])
        assert found.entropy == pytest.approx(plain.entropy(last), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(memories(), contexts, ways, st.sampled_from(["all", "longest"]), st.sampled_from([3, 64]))
def test_scores_are_distributions_of_every_position(made, context, way, orders, max_order):
    memory, documents = made
    count, cap = way
    options = {"orders": orders, "count": count, "cap": cap, "max_order": max_order}
    for ids in (context, [*documents[0], VOCAB, *documents[-1], *context]):
        scores = memory.snapshot.score(ids, **options)
        for t, token in enumerate(ids):
            found = memory.snapshot.distribution(ids[:t], **options)
            p = found.p[token] if 0 <= token <= VOCAB else 0
            np.testing.assert_allclose(scores.p[t], p, rtol=1e-5, atol=1e-7)
            below = max(found.depth - 1, 0)
            assert (scores.depth[t], scores.count[t], scores.distinct[t]) == (
                found.depth, found.count_D[-1], found.distinct_D[-1],
            )  # fmt: skip
            assert (scores.count_below[t], scores.distinct_below[t]) == (
                found.count_D[below], found.distinct_D[below],
            )  # fmt: skip
            assert (scores.documents[t], scores.top_token[t]) == (found.documents, found.top[0])
            np.testing.assert_allclose(scores.top_p[t], found.top[1], rtol=1e-5, atol=1e-7)
            assert scores.entropy[t] == pytest.approx(found.entropy, abs=1e-6)


@pytest.fixture(scope="module")
def large():
    """Documents over a vocabulary with the frequencies of words: nodes in two of three segments, one document deleted."""
    rng = np.random.default_rng(0)
    documents = [np.minimum(rng.zipf(1.3, n) - 1, 299) for n in (3000, 0, 1200, 400, 2500, 700, 60)]
    documents[3][100:160] = documents[0][500:560]
    return Memory(
        [documents[:3], documents[3:5], documents[5:]], {2, 5}, vocab_size=300, nodes=(50, 10)
    ), documents


@pytest.mark.parametrize("count", ["tokens", "documents", "sources"])
def test_many_nodes_and_deletions_together(large, count):
    memory, documents = large
    ids = np.concatenate([documents[0][490:540], documents[2][:30], [0, 0, 0, 1]])
    scores = memory.snapshot.score(ids, count=count)
    again = memory.snapshot.score(ids, count=count)
    for name, values in vars(scores).items():
        assert np.array_equal(values, vars(again)[name]), name
    for t in range(0, len(ids), 5):
        query = ids[:t].tolist()
        wanted = plain.distribution(
            memory.live, query, end=300, **memory.plain(count, None if count == "tokens" else 1)
        )
        found = memory.snapshot.distribution(query, count=count)
        np.testing.assert_allclose(found.p, wanted, rtol=2e-5, atol=1e-8)
        np.testing.assert_allclose(scores.p[t], wanted[ids[t]], rtol=2e-5, atol=1e-8)
    depth, tokens, counts = memory.snapshot.longest([999])
    assert depth == 0
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == plain.continuations(
        memory.live, [], end=300
    )


@pytest.mark.parametrize("count", ["tokens", "documents", "sources"])
def test_prepared_lists_are_those_worked_out_when_asked_for(large, count):
    documents = large[1]
    split = [documents[:3], documents[3:5], documents[5:]]
    made = [Memory(split, {2, 5}, vocab_size=300, nodes=(50, 10)) for _ in range(3)]
    made[0].snapshot.prepare(count=count)
    with mock.patch.object(snapshot_module, "_RANKS_AT_ONCE", 100):
        made[1].snapshot.prepare(count=count, going=iter([True, False, False, False]).__next__)
    answers = [
        [one.snapshot.distribution(documents[i][:n], count=count).p for i in (0, 2, 4) for n in (1, 2, 5)]
        for one in made
    ]
    np.testing.assert_array_equal(answers[0], answers[2])
    np.testing.assert_array_equal(answers[1], answers[2])


def test_what_is_prepared_is_there_and_what_was_stopped_is_not(large):
    documents = large[1]
    memory = Memory([documents], vocab_size=300, nodes=(50, 10))
    (row,) = memory.snapshot._table("documents", None).rows
    ready = memory.snapshot.views[0]._rows["documents", 1][1][1][: row[search.N_NODES]]
    with mock.patch.object(snapshot_module, "_RANKS_AT_ONCE", 100):
        memory.snapshot.prepare(count="documents", going=iter([True, False]).__next__)
    assert 0 < ready.sum() < len(ready)
    memory.snapshot.prepare(count="documents")
    assert ready.all()


def test_the_top_token_does_not_depend_on_what_came():
    # nodes of more than 2 positions, lists only of more than 100: its count is found where there is no list
    memory = Memory([[[0, 1] * 9 + [0, 2, 0, 1, 3]]], nodes=(100, 2))
    found = memory.snapshot.distribution([0])
    for came in range(VOCAB):
        scores = memory.snapshot.score([0, came])
        assert (scores.top_token[1], scores.top_p[1]) == (1, pytest.approx(found.top[1], rel=1e-6))


def test_tokens_of_four_bytes_and_long_matches():
    rng = np.random.default_rng(3)
    chapter = rng.integers(0, 70_000, 400)
    memory = Memory([[chapter, chapter[:300]], [chapter[100:]]], {1}, vocab_size=70_000)
    match = memory.snapshot.match(chapter[:250], max_order=200)
    assert match.depth == 200
    assert match.counts[[1, 150, 200]].tolist() == [2, 2, 1]
    depth, tokens, counts = memory.snapshot.longest(chapter[:250])
    assert (depth, tokens.tolist(), counts.tolist()) == (64, [chapter[250]], [2])
    found = memory.snapshot.distribution(chapter[:250])
    assert found.p.sum() == pytest.approx(1, abs=1e-5)
    # 64 orders with two occurrences: all but 0.375^64 of the mass
    assert found.p[chapter[250]] == pytest.approx(1)
    assert memory.snapshot.continuations(memory.snapshot.match([]), 0)[1].sum() == memory.snapshot.n_tokens


def test_a_thousand_repeats_in_one_document_count_once():
    said, repeated = [3, 1, 4, 2], [3, 1, 4, 0] * 1000
    memory = Memory([[said, said, repeated]], nodes=(100, 20))
    assert memory.snapshot.distribution([3, 1, 4]).p.argmax() == 0
    found = memory.snapshot.distribution([3, 1, 4], count="documents")
    assert found.p.argmax() == 2
    assert found.count_D[3] == 1002
    assert memory.snapshot.distribution([3, 1, 4], count="documents", cap=5).p.argmax() == 0


def test_leaving_one_out_is_not_having_it(large):
    memory, documents = large
    ids = documents[3][80:200]
    left_out = memory.snapshot.without("3")
    never = Memory([documents[:3], documents[3:5], documents[5:]], {2, 3, 5}, vocab_size=300, nodes=(50, 10))
    for name, values in vars(left_out.score(ids)).items():
        assert np.array_equal(values, vars(never.snapshot.score(ids))[name]), name
    assert memory.snapshot.score(ids).depth.max() == 64
    with pytest.raises(ConfigError, match="no document '3' here"):
        left_out.without("3")
    assert [document.id for document, _ in left_out.documents_of(left_out.match([]), 0)] == [
        "0",
        "4",
        "6",
        "1",
    ]


def test_restricted_memory_knows_these_documents_alone(large):
    memory, documents = large
    found = memory.snapshot.restricted(["3", "6", "3"])
    alone = Memory([[documents[3], documents[6]]], vocab_size=300)
    ids = documents[3][:150]
    assert np.array_equal(found.score(ids).p, alone.snapshot.score(ids).p)
    assert found.documents_of(found.match(ids[:40]), 40)[0][0].id == "3"
    assert memory.snapshot.restricted([]).distribution(ids).p.sum() == 0
    for name in ("5", "x"):
        with pytest.raises(ConfigError, match=f"no document '{name}' here"):
            memory.snapshot.restricted(["3", name])


def test_threads_share_a_snapshot(large):
    memory, documents = large
    parts = [documents[0][i * 200 : i * 200 + 200] for i in range(8)]
    # nodes without deleted documents are counted when they are first asked for: by all at once here
    fresh = memory.snapshot.without("6")
    wanted = [memory.snapshot.without("6").score(part).p for part in parts]
    wrong, barrier = [], threading.Barrier(len(parts))

    def ask(i):
        barrier.wait()
        for _ in range(5):
            same = np.array_equal(fresh.score(parts[i]).p, wanted[i])
            p = fresh.distribution(parts[i][:-1]).p[parts[i][-1]]
            if not same or abs(p - wanted[i][-1]) > 1e-6:
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_dead_ranks_are_found_for_few_and_many_documents():
    rng = np.random.default_rng(4)
    documents = [rng.integers(0, VOCAB, rng.integers(0, 9)) for _ in range(60)]
    segment = Segment.build(documents, vocab_size=VOCAB)
    number_N = np.repeat(np.arange(60), [len(d) + 1 for d in documents])
    for numbers in ([], [0], [59], [4, 5, 6, 9], range(0, 60, 3), range(60)):
        wanted = np.flatnonzero(np.isin(number_N[segment.order], list(numbers)))
        found = dead_ranks(segment, numbers)
        assert found.dtype == np.uint32
        assert np.array_equal(found, wanted)
    with pytest.raises(ConfigError, match="not all here"):
        dead_ranks(segment, [60])


def test_a_damaged_segment_reads_nothing_outside():
    rng = np.random.default_rng(5)
    documents = [np.minimum(rng.zipf(1.3, 500) - 1, 29) for _ in range(3)]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        segment = Segment.build(documents, vocab_size=30, heavy=20, wide=5)
        names = ["first"] + [
            n
            for n in segment.arrays
            if n.startswith(("tokens", "order", "next", "node", "document_at")) and len(segment.arrays[n])
        ]
        for name in ("next", *names[seed % len(names) :][:2])[seed % 2 :]:
            array = (segment.first if name == "first" else segment.arrays[name]).copy()
            at = rng.integers(0, len(array), max(len(array) // 8, 1))
            array[at] = rng.integers(0, np.iinfo(array.dtype).max, len(at), dtype=array.dtype)
            if name == "first":
                segment.first = array
            else:
                segment.arrays[name] = array
        dead = np.unique(rng.integers(0, len(segment), 20, dtype=np.uint32))
        for dead_rank in (None, dead):
            snapshot = Snapshot(
                [LiveSegment(segment, dead_rank), LiveSegment(segment, dead_rank)], vocab_size=30
            )
            for count in ("tokens", "documents"):
                # wrong answers or a refusal
                try:
                    snapshot.score(documents[0][:60], count=count)
                    snapshot.distribution(documents[0][:60], count=count)
                    snapshot.longest(documents[1][:9])
                except CheckpointError as error:
                    assert "damaged" in str(error)  # noqa: PT017
        # what was counted with is zero again
        plain_one = Snapshot([LiveSegment(Segment.build([[1, 2]], vocab_size=30))], vocab_size=30)
        assert plain_one.longest([1])[1].tolist() == [2]


def test_what_cannot_be_is_refused():
    snapshot = Memory([[[1, 2]]]).snapshot
    empty = Snapshot([], vocab_size=VOCAB)
    found = empty.distribution([1])
    assert (found.depth, found.count_D.tolist(), found.top, found.p.sum()) == (0, [0], (-1, 0.0), 0)
    assert empty.score([1, 2]).p.tolist() == [0, 0]
    assert [part.tolist() if part.__class__ is np.ndarray else part for part in empty.longest([1])] == [
        0,
        [],
        [],
    ]
    for ranks in ([3], [1, 0], [1, 1]):
        with pytest.raises(CheckpointError, match="does not belong to it"):
            LiveSegment(snapshot.views[0].segment, ranks)
    with pytest.raises(ConfigError, match="cannot stand beside"):
        Snapshot(snapshot.views, vocab_size=9)
    with pytest.raises(TokenIdError, match="whole numbers; got float64"):
        snapshot.match([1.5])
    with pytest.raises(TokenIdError, match=r"one row; got an array of shape \(1, 2\)"):
        snapshot.longest(np.array([[1, 2]]))
    with pytest.raises(ConfigError, match="max_order is 0"):
        snapshot.match([1], max_order=-1)
    with pytest.raises(ConfigError, match=r"orders 0\.\.1; got 2"):
        snapshot.continuations(snapshot.match([1]), 2)
    with pytest.raises(ConfigError, match="between 0 and 1; got 1"):
        snapshot.distribution([1], discount=1)
    with pytest.raises(ConfigError, match="an id for each of 3 ids; got 1"):
        snapshot.score([1, 2, 3], following=[1], count="documents")
    with pytest.raises(ConfigError, match="leave following out"):
        snapshot.score([1, 2, 3], following=[1, 2, 4])
    with pytest.raises(ConfigError, match='orders is "all" or "longest"'):
        snapshot.score([1], orders="some")
    with pytest.raises(ConfigError, match='count is "tokens", "documents" or "sources", or "sources:"'):
        snapshot.score([1], count="words")
    with pytest.raises(ConfigError, match="A cap is for"):
        snapshot.score([1], cap=2)
    with pytest.raises(ConfigError, match="A cap is 1 or more"):
        snapshot.score([1], count="documents", cap=0)
    with pytest.raises(ConfigError, match="looks at 64 tokens"):
        snapshot.score([1], count="documents", max_order=65)
    with pytest.raises(ConfigError, match="float32"):
        snapshot.distribution([1], np.empty(VOCAB + 1))
