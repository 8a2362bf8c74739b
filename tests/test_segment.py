"""Segments of the index against counting by hand: every context, every order, every continuation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index import plain
from engram_lm.index.segment import Document, Segment, sha256_of

VOCAB = 6


def texts(max_documents=6, max_length=12):
    tokens = st.lists(st.integers(0, VOCAB - 1), max_size=max_length)
    return st.lists(tokens, max_size=max_documents)


def counts(segment, match, order):
    token_I, count_I = segment.continuations(match, order)
    return dict(zip(token_I.tolist(), count_I.tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(
    documents=texts(),
    context=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    heavy=st.sampled_from([1, 3, 1024]),
)
def test_every_order_is_counted_as_by_hand(documents, context, heavy):
    # a document again, as whole and as part: contexts that are equal for long
    documents = [*documents, *documents[:1], *(document[1:] for document in documents[:1])]
    segment = Segment.build(documents, vocab_size=VOCAB, heavy=heavy)
    for query in (context, *(document[:k] for document in documents for k in (3, 7))):
        match = segment.match(query)
        assert match.depth == plain.depth(documents, query, end=VOCAB, most=64)
        for order in range(match.depth + 1):
            wanted = plain.continuations(documents, query[len(query) - order :], end=VOCAB)
            assert counts(segment, match, order) == dict(wanted)
            assert match.count(order) == sum(wanted.values())


@settings(max_examples=60, deadline=None)
@given(documents=texts())
def test_positions_are_sorted_by_what_stands_before_them(documents):
    segment = Segment.build(documents, vocab_size=VOCAB)
    stream = [token for document in documents for token in (*document, VOCAB)]

    def context(p):
        start = max((i + 1 for i in range(p) if stream[i] == VOCAB), default=0)
        return [*reversed(stream[start:p])], p

    assert segment.order.tolist() == sorted(range(len(stream)), key=context)
    assert segment.next.tolist() == [stream[p] for p in segment.order]


def test_long_repeats_and_one_token_are_no_special_case():
    rng = np.random.default_rng(0)
    chapter = rng.integers(0, 50_000, 3000)
    documents = [chapter, chapter, np.zeros(2000, np.int64), chapter[1000:]]
    segment = Segment.build(documents, vocab_size=50_000)
    match = segment.match(chapter[:2000], max_order=1500)
    assert match.depth == 1500
    assert counts(segment, match, 1500) == {int(chapter[2000]): 2}
    assert counts(segment, match, 900) == {int(chapter[2000]): 3}
    zeros = segment.match(np.zeros(1999, np.int64), max_order=1999)
    assert counts(segment, zeros, 1999) == {0: 1, 50_000: 1}
    assert counts(segment, zeros, 1) == {0: 1999, 50_000: 1}


def test_documents_are_found_with_how_often_and_their_facts():
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 300, n) for n in (40, 0, 25)]
    documents[2][:6] = documents[0][10:16]
    documents[2][10:16] = documents[0][10:16]
    described = [Document(id=name, source=f"{name}.txt", added=12.5) for name in ("a", "b", "c")]
    segment = Segment.build(documents, vocab_size=70_000, documents=described)
    assert segment.tokens.dtype == np.dtype("<u4")
    match = segment.match(documents[0][10:16])
    found = [(document.id, n) for document, n in segment.documents_of(match, 6)]
    assert found == [("c", 2), ("a", 1)]
    assert segment.document(1) == Document(id="b", source="b.txt", added=12.5, sha256=sha256_of(documents[1]))
    assert [segment.document_tokens(i).tolist() for i in range(3)] == [d.tolist() for d in documents]


@pytest.fixture
def saved(tmp_path):
    rng = np.random.default_rng(2)
    documents = [rng.integers(0, 40, n) for n in (700, 3, 900)]
    segment = Segment.build(documents, vocab_size=40, tokenizer="fingerprint", heavy=20)
    return segment, segment.save(tmp_path / "a b.segment")


def test_a_file_gives_the_same_answers(saved):
    segment, path = saved
    opened = Segment.open(path, verify=True)
    assert (opened.vocab_size, opened.tokenizer, opened.heavy) == (40, "fingerprint", 20)
    assert len(segment.arrays["node_low"]) > 5
    for name, array in segment.arrays.items():
        assert np.array_equal(opened.arrays[name], array), name
    context = segment.document_tokens(2)[100:120]
    assert np.array_equal(opened.match(context).low, segment.match(context).low)
    assert [path.name] == [file.name for file in path.parent.iterdir()]


def test_every_flipped_byte_is_refused(saved):
    _, path = saved
    data = path.read_bytes()
    facts = json.loads(data[24 : data.index(b"\0", 24)])
    inside = {
        place
        for section in facts["sections"].values()
        for place in range(
            section["at"], section["at"] + section["count"] * np.dtype(section["dtype"]).itemsize, 97
        )
    }
    for place in sorted({*range(0, 400, 3), *inside}):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            Segment.open(path, verify=True)
    for size in (0, 10, 24, 4096, len(data) // 2, len(data) - 4096):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            Segment.open(path)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(TokenIdError, match="Token id 9 at place 1 of document 'x'"):
        Segment.build([[1, 9]], vocab_size=9, documents=[Document(id="x")])
    with pytest.raises(TokenIdError, match="whole numbers; got float64"):
        Segment.build([[1]], vocab_size=9).match([1.7])
    with pytest.raises(ConfigError, match="2 documents have 1 descriptions"):
        Segment.build([[1], [2]], vocab_size=9, documents=[Document(id="x")])
    with pytest.raises(CheckpointError, match="is missing"):
        Segment.open(tmp_path / "none.segment")
    (tmp_path / "other").write_bytes(b"something else entirely, longer than a header")
    with pytest.raises(CheckpointError, match="is no segment"):
        Segment.open(tmp_path / "other")


def test_nothing_in_it_is_nothing_found():
    for documents in ([], [[]], [[], []]):
        segment = Segment.build(documents, vocab_size=3)
        assert segment.match([1, 2]).depth == 0
        assert counts(segment, segment.match([]), 0) == ({3: len(documents)} if documents else {})
    assert Segment.build([[0, 1]], vocab_size=3).match([5, -1, 7]).depth == 0
