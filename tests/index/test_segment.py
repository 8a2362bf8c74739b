"""Segments of the index against counting by hand: every context, every order, every continuation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index import LiveSegment, Snapshot, plain, segment_file
from engram_lm.index import segment as segment_module
from engram_lm.index.segment import Document, Segment, sha256_of, write_segment

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
    opened = Segment.open(path, verify="all")
    assert (opened.vocab_size, opened.tokenizer, opened.heavy) == (40, "fingerprint", 20)
    assert len(segment.arrays["node_low"]) > 5
    for name, array in segment.arrays.items():
        assert np.array_equal(opened.arrays[name], array), name
    context = segment.document_tokens(2)[100:120]
    assert np.array_equal(opened.match(context).low, segment.match(context).low)
    assert [path.name] == [file.name for file in path.parent.iterdir()]
    assert path.read_bytes() == segment.to_bytes().tobytes()


def test_every_flipped_byte_is_refused(saved):
    _, path = saved
    data = path.read_bytes()
    facts, _ = segment_file.read(path, verify="none")
    assert len(data) == facts.file_bytes
    places = list(facts.places())
    inside = {place for _, at, n_bytes in places for place in range(at, at + n_bytes, 97)}
    for place in sorted({*range(0, 328, 3), *inside}):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            Segment.open(path)
    for size in (0, 10, 24, 320, len(data) // 2, len(data) - 64, len(data) + 64):
        path.write_bytes(data[:size].ljust(size, b"\0"))
        with pytest.raises(CheckpointError):
            Segment.open(path)


def test_a_file_of_version_1_gives_the_same_answers(saved):
    """It has no `before`, and all else."""
    segment, path = saved
    data = path.read_bytes()
    facts, _ = segment_file.read(path, verify="all")
    older = replace(facts, rows=facts.rows[:-1])
    whole = bytearray(older.file_bytes)
    whole[: len(older.to_bytes())] = older.to_bytes()
    for (_, to, n_bytes), (_, at, _) in zip(older.places(), facts.places(), strict=False):
        whole[to : to + n_bytes] = data[at : at + n_bytes]
    assert whole[8:16] == bytes([1, 0, 0, 0, 17, 0, 0, 0])
    path.write_bytes(whole)
    opened = Segment.open(path, verify="all")
    assert len(opened.arrays["before"]) == 0 < len(segment.arrays["before"])
    context = segment.document_tokens(2)[100:120]
    wanted = Snapshot([LiveSegment(segment)], vocab_size=40).match(context)
    assert np.array_equal(Snapshot([LiveSegment(opened)], vocab_size=40).match(context).low_SD, wanted.low_SD)
    opened.save(path)
    opened.verify()


# ---- hostile files: every checksum is right, the numbers are not -----------------------------------------------------------


def forged(path, segment, **changed):
    """The segment with some sections replaced."""
    with segment_file.SegmentFile.create(path, vocab_size=segment.vocab_size, wide=segment.wide) as file:
        for name in segment_file.SECTIONS:
            file.put(name, changed.get(name, segment.arrays[name]))
        file.finish(heavy=segment.heavy, sync="none")


HOSTILE = [
    ("tokens", 5, 41), ("order", 7, 1606), ("order", 7, 2**32 - 1), ("next", 3, 41), ("first_token", -1, 40),
    ("first_token", 3, 2), ("first_at", 4, 0), ("first_at", -1, 1606), ("node_low", 2, 1606), ("node_high", 2, 1607),
    ("node_at", 0, 1), ("node_at", 3, 2**31), ("node_at", -1, 2**31), ("node_token", 0, 41), ("document_at", 0, 1),
    ("document_at", 1, 0), ("document_at", -1, 1607), ("document_line", 1, 2**63), ("document_line", -1, 3),
    ("document_by_id", 1, 3), ("tokens", 700, 0), ("tokens", 12, 40), ("before", 3, 41),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "number"), HOSTILE)
def test_a_hostile_number_is_refused(saved, name, place, number):
    segment, path = saved
    array = segment.arrays[name].copy()
    assert len(segment) == 1606
    array[place] = number
    forged(path, segment, **{name: array})
    with pytest.raises(CheckpointError, match="damaged"):
        Segment.open(path)


def test_verify_compares_what_stands_before_with_the_tokens(saved):
    segment, path = saved
    before = np.sort(segment.arrays["before"])
    forged(path, segment, before=before)
    with pytest.raises(CheckpointError, match="the section before is not what stands before"):
        Segment.open(path, verify="all")
    forged(path, segment, before=before[:0])
    assert Segment.open(path, verify="all").match([3, 3]).depth == segment.match([3, 3]).depth


def test_sections_of_a_wrong_length_are_refused(saved):
    segment, path = saved
    for name in set(segment_file.SECTIONS) - {"tokenizer", "tokens", "node_token", "documents"}:
        forged(path, segment, **{name: segment.arrays[name][:-1]})
        with pytest.raises(CheckpointError, match="damaged"):
            Segment.open(path, verify="none")


def test_a_line_of_a_document_holds_what_it_should(saved):
    segment, path = saved
    for line in (
        b'{"id": 7}\n',
        b'{"id": "a", "price": 2}\n',
        b"[]\n",
        b"{\n",
        b'{"id": "a", "extra": {"b": 1}}\n',
    ):
        forged(
            path, segment, documents=np.frombuffer(line * 3, np.uint8), document_line=len(line) * np.arange(4)
        )
        opened = Segment.open(path)
        with pytest.raises(CheckpointError, match="line is damaged"):
            opened.document(1)
        if b'"a"' not in line:
            with pytest.raises(CheckpointError, match="line is damaged"):
                opened.number_of("b")


def test_a_large_file_is_mapped_and_verified_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_file, "SMALL_BYTES", 1000)
    rng = np.random.default_rng(3)
    segment = Segment.build([rng.integers(0, 900, 500) for _ in range(4)], vocab_size=900)
    path = segment.save(tmp_path / "one.segment")
    data = bytearray(path.read_bytes())
    data[400] ^= 1
    path.write_bytes(data)
    opened = Segment.open(path)
    with pytest.raises(CheckpointError, match="section tokens is damaged"):
        opened.verify()
    with pytest.raises(CheckpointError, match="section tokens is damaged"):
        Segment.open(path, verify="all")
    segment.save(path)
    Segment.open(path, verify="all").verify()
    with pytest.raises(ConfigError, match="verify is 'small', 'all' or 'none'"):
        Segment.open(path, verify="some")


def test_what_was_not_verified_reads_nothing_outside(saved, monkeypatch):
    monkeypatch.setattr(segment_file, "SMALL_BYTES", 1000)
    segment, path = saved
    rng = np.random.default_rng(7)
    for high in (2**32, 3000):
        order = rng.integers(0, high, len(segment)).astype(np.uint32)
        forged(path, segment, order=order, next=rng.integers(0, 2**16, len(segment)).astype(np.uint16))
        opened = Segment.open(path)
        for start in range(0, 600, 7):
            match = opened.match(segment.tokens[start : start + 20])
            for d in range(match.depth + 1):
                tokens, counts = opened.continuations(match, d)
                assert len(tokens) == len(counts) <= opened.vocab_size + 1
                assert tokens.size == 0 or 0 <= tokens.min() <= tokens.max() <= opened.vocab_size


# ---- making ----------------------------------------------------------------------------------------------------------------


def test_a_file_written_in_parts_is_the_one_built_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_module, "_PART", 100)
    rng = np.random.default_rng(4)
    documents = [
        (
            Document(id=f"d{i % 7}", source="s", added=i + 0.5, extra={"licence": "CC0 \U0001f642"}),
            rng.integers(0, 30, n),
        )
        for i, n in enumerate((400, 0, 1, 90, 333, 20, 5, 64))
    ]
    options = {"vocab_size": 30, "tokenizer": "fingerprint", "heavy": 40, "wide": 10}
    written = write_segment(tmp_path / "a.segment", iter(documents), **options)
    built = Segment.build([t for _, t in documents], documents=[d for d, _ in documents], **options)
    built.save(tmp_path / "b.segment", sync="none")
    assert (tmp_path / "a.segment").read_bytes() == (tmp_path / "b.segment").read_bytes()
    assert written.document(3).extra == {"licence": "CC0 \U0001f642"}
    assert [written.number_of(f"d{i}") for i in range(8)] == [0, 1, 2, 3, 4, 5, 6, -1]
    with pytest.raises(IndexError):
        written.document(-1)
    with pytest.raises(ValueError, match="read-only"):
        written.tokens[0] = 1


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TokenIdError):
        write_segment(tmp_path / "a.segment", [(Document(id="a"), [5])], vocab_size=5)
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        Segment.build([[1]], vocab_size=5).save(tmp_path / "none" / "a.segment")
    segment = Segment.build([[1]], vocab_size=5)
    with (
        pytest.raises(ValueError, match="does not come here"),
        segment_file.SegmentFile.create(tmp_path / "b.segment", vocab_size=5, wide=1) as file,
    ):
        file.put("order", segment.order)
    assert list(tmp_path.iterdir()) == []


def test_merged_is_built_of_what_is_kept():
    rng = np.random.default_rng(5)
    lists = [rng.integers(0, 20, n) for n in (30, 40, 0, 25)]
    facts = [Document(id=name, added=1.0) for name in "abcd"]
    parts = [
        Segment.build(lists[i : i + 2], vocab_size=20, documents=facts[i : i + 2], tokenizer="t")
        for i in (0, 2)
    ]
    whole = Segment.build([lists[1], *lists[2:]], vocab_size=20, documents=facts[1:], tokenizer="t")
    merged = Segment.merged(parts, keep=[{1}, [1, 0]])
    assert merged.arrays.keys() == whole.arrays.keys()
    assert all(np.array_equal(merged.arrays[name], array) for name, array in whole.arrays.items())
    assert len(Segment.merged(parts)) == sum(len(part) for part in parts)


def test_a_small_segment_is_a_small_file(tmp_path):
    rng = np.random.default_rng(6)
    segment = Segment.build([rng.zipf(1.3, 3000) % 49_000], vocab_size=49_152)
    assert segment.save(tmp_path / "a.segment").stat().st_size < 14 * 3001
    assert Segment.build([[1]], vocab_size=49_152).save(tmp_path / "b.segment").stat().st_size < 1500


def test_first_is_where_each_last_token_begins(saved):
    segment, _ = saved
    last = np.concatenate([[40], segment.tokens[:-1]])[segment.order].astype(int)
    last[last == 40] = -1
    assert segment.first.tolist() == np.searchsorted(last, np.arange(41)).tolist()
    damaged = Segment(
        {**segment.arrays, "first_token": segment.arrays["first_token"][::-1].copy()},
        vocab_size=40,
        heavy=9,
        wide=9,
    )
    with pytest.raises(CheckpointError, match="table of last tokens"):
        damaged.match([1])


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(TokenIdError, match="Token id 9 at place 1 of document 'x'"):
        Segment.build([[1, 9]], vocab_size=9, documents=[Document(id="x")])
    with pytest.raises(TokenIdError, match="whole numbers; got float64"):
        Segment.build([[1]], vocab_size=9).match([1.7])
    with pytest.raises(TokenIdError, match="whole numbers; document '0' has float64"):
        Segment.build([[1.5]], vocab_size=9)
    for facts in (
        {"id": 3},
        {"id": "a", "source": None},
        {"id": "a", "added": float("nan")},
        {"id": "a", "extra": {"b": 2}},
    ):
        with pytest.raises(ConfigError):
            Document(**facts)
    with pytest.raises(ConfigError, match="vocabulary of 1 to"):
        Segment.build([[1]], vocab_size=2**32 - 1)
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
