"""Training data: reading text strictly, tokenising once, splitting by document, packing without losing an id."""

import gzip
import hashlib
import json
import lzma
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.bases.recipes import byte_tokenizer  # noqa: E402
from engram_lm.corpus import tokenised as corpus_module  # noqa: E402
from engram_lm.corpus.blocks import NO_LABEL, Blocks, pack, part_of  # noqa: E402
from engram_lm.corpus.text import find_files, read_documents, require_documents  # noqa: E402
from engram_lm.corpus.tokenised import Corpus, tokenise  # noqa: E402
from engram_lm.errors import CheckpointError, ConfigError, DataError  # noqa: E402

TEXTS = ["one\u2028two", "three \u0085 four\r", "日本", "five"]
END = 0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "corpora"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write_jsonl(path, texts):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        for text in texts:
            file.write(json.dumps({"id": 1, "text": text}, ensure_ascii=False).encode() + b"\n")
    return path


def texts_of(*args, **options):
    return [document.text for document in read_documents(*args, **options)]


# Reading


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_only_newlines_end_lines(tmp_path, ending):
    path = write_jsonl(tmp_path / f"a.jsonl{ending}", TEXTS)
    assert texts_of(path) == TEXTS
    assert [document.line for document in read_documents(path)] == [1, 2, 3, 4]


def test_txt_is_a_file_lines_or_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\nKing:\nWho?\n\n \n\nFool:\u2028I.\r\n".encode())
    assert texts_of(path) == ["\nKing:\nWho?\n\n \n\nFool:\u2028I.\r\n"]
    assert texts_of(path, txt_documents="line") == ["King:", "Who?", " ", "Fool:\u2028I."]
    assert [(d.text, d.line) for d in read_documents(path, txt_documents="paragraph")] == [
        ("King:\nWho?", 2),
        ("Fool:\u2028I.", 7),
    ]
    with pytest.raises(ConfigError, match="got 'page'"):
        read_documents(path, txt_documents="page")


def test_globs_are_sorted_and_files_come_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path / "b.txt", str(tmp_path / "*.txt"), tmp_path / "c.jsonl"])
    assert [path.name for path in found] == ["b.txt", "a.txt", "c.jsonl"]
    (tmp_path / "[1].txt").write_text("brackets")
    assert texts_of(tmp_path / "[1].txt") == ["brackets"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty: it holds no document"),
        ("a.jsonl", b"\n \n", r"a\.jsonl is empty: it holds no document"),
        (
            "a.txt",
            b"\xef\xbb\xbfok\nb\xffd\n",
            r"a\.txt: byte 7 \(line 2\) is not UTF-8 \(invalid start byte\)",
        ),
        ("a.txt", b"\xef\xbb\xbfo\xff", r"a\.txt: byte 4 \(line 1\)"),
        ("a.txt", "é".encode("utf-16"), r"a\.txt: byte 0 \(line 1\)"),
        ("a.txt", b"cut \xe6\x97", r"a\.txt: byte 4 \(line 1\) is not UTF-8 \(unexpected end of data\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: broken JSON: "),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: broken JSON: "),
        (
            "a.jsonl",
            b'\n{"title": "a", "body": 1}\n',
            r"a\.jsonl:2: no field 'text'; there are: 'title', 'body'",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is a int, wanted a string"),
        (
            "a.jsonl",
            b'{"text": "x\\ud800"}\n',
            r"a\.jsonl:1: field 'text' holds '\\ud800', half a surrogate pair",
        ),
        ("a.jsonl", b'"text"\n', r"a\.jsonl:1: a JSON str, wanted an object"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz is damaged or cut short after line 0"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz is damaged or cut short after line 0"),
        (
            "a.txt.gz",
            gzip.compress(b"a\n" * 10_000, mtime=0)[:-12],
            r"a\.txt\.gz is damaged or cut short after line",
        ),
        ("a.txt.xz", lzma.compress(b"a\n" * 10_000)[:-12], r"a\.txt\.xz is damaged or cut short after line"),
        ("a.csv", b"x", r"a\.csv: text is read from \.txt and \.jsonl files"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_documents(tmp_path / name))


def test_the_beginning_of_every_file_is_enough_to_know_that_it_can_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"body": "x"}\nbroken\n')
    (tmp_path / "b.txt").write_bytes(b"fine\n" + b"\xff")
    assert require_documents(tmp_path / "*", field="body") == [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: no field 'text'; there are: 'body'"):
        require_documents(tmp_path / "*")
    (tmp_path / "c.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"c\.jsonl is empty: it holds no document"):
        require_documents([tmp_path / "b.txt", tmp_path / "c.jsonl"])


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file, and nothing matches it"):
        find_files(tmp_path / "*.txt")
    with pytest.raises(DataError, match="is a directory; name files or a glob"):
        find_files(tmp_path)
    with pytest.raises(DataError, match="no files of text were named"):
        find_files([])


# Tokenising


def test_documents_end_with_the_end_id(tmp_path, tokenizer):
    corpus = tokenise(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, ""]), tokenizer=tokenizer)
    assert [tokenizer.decode(corpus.document(i)[:-1]) for i in range(len(corpus))] == TEXTS
    assert [int(corpus.document(i)[-1]) for i in range(len(corpus))] == [END] * 4
    assert corpus.ids.dtype == np.int32
    assert corpus.tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert corpus.empty_documents == 1
    with pytest.raises(IndexError, match="document 4 of 4"):
        corpus.document(4)


def test_special_tokens_in_text_stay_text(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["a<|end|>b"])
    corpus = tokenise(path, tokenizer=tokenizer)
    assert corpus.document(0).tolist().count(END) == 1
    assert corpus.tokens == len("a<|end|>b") + 1
    # The caller's tokenizer is as it was.
    assert tokenizer.encode("<|end|>") == [END]


def test_second_time_comes_from_the_cache(tmp_path, tokenizer, cache):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    calls = []
    one = tokenise(path, tokenizer=tokenizer, progress=calls.append)
    assert [(call.documents, call.tokens, call.file) for call in calls] == [(4, one.tokens, path)]
    renamed = path.rename(tmp_path / "b.jsonl")
    two = tokenise(renamed, tokenizer=tokenizer, progress=calls.append)
    assert len(calls) == 1
    assert two.directory == one.directory
    assert np.array_equal(one.ids, two.ids)
    others = [
        tokenise(renamed, tokenizer=tokenizer, end_id=1),
        tokenise(write_jsonl(tmp_path / "c.jsonl", [*TEXTS, "x"]), tokenizer=tokenizer),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_corpus_of_an_older_version_is_found_and_a_run_on_it_goes_on(tmp_path, tokenizer, cache):
    """Older caches and runs are named by how the tokenizer was written, in one of its writings."""
    from engram_lm.identity import print_of
    from engram_lm.identity.writings import first_prints

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    new = tokenise(path, tokenizer=tokenizer)
    files = corpus_module._of_files([path])
    how = {"format": corpus_module._FORMAT, "field": "text", "txt_documents": "file", "end_id": END}
    for old_print in first_prints(print_of(tokenizer)):
        old = hashlib.sha256(
            json.dumps(how, sort_keys=True).encode() + old_print.encode() + files
        ).hexdigest()
        going_on = tokenise(path, tokenizer=tokenizer, known=old)
        assert going_on.fingerprint == old
        assert going_on.ids.tolist() == new.ids.tolist()
    assert tokenise(path, tokenizer=tokenizer).fingerprint == new.fingerprint
    shutil.rmtree(cache / new.fingerprint[:32])
    assert (
        tokenise(path, tokenizer=tokenizer).fingerprint != new.fingerprint
    )  # one of the old ones, not made again
    # of other text, the fingerprint that a run holds is not this corpus's
    assert tokenise(write_jsonl(path, TEXTS[1:]), tokenizer=tokenizer, known=old).fingerprint != old


def test_a_failure_in_the_middle_leaves_no_cache(tmp_path, tokenizer, cache):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        tokenise(path, tokenizer=tokenizer)
    assert [entry.name for entry in cache.iterdir() if not entry.name.endswith(".lock")] == []


def test_a_damaged_cache_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    ids = tokenise(path, tokenizer=tokenizer).directory / "ids.bin"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(
        CheckpointError, match=r"is no whole tokenised corpus .* Delete it; it is built again"
    ):
        tokenise(path, tokenizer=tokenizer)


def test_long_documents_are_cut_before_line_breaks(tmp_path, tokenizer, monkeypatch):
    text = "a line\nof text\n\nand more\n" * 20 + "x" * 200
    path = write_jsonl(tmp_path / "a.jsonl", [text, "next"])
    whole = tokenise(path, tokenizer=tokenizer, end_id=1)
    monkeypatch.setattr(corpus_module, "_PIECE_CHARS", 50)
    pieces = corpus_module._pieces(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 50
    assert all(piece.startswith("\n") for piece in pieces[1:5])
    cut = tokenise(path, tokenizer=tokenizer)
    assert len(cut) == 2
    assert cut.document(0)[:-1].tolist() == whole.document(0)[:-1].tolist()


def test_tokenise_refusals(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [""])
    with pytest.raises(DataError, match="none of the 1 documents holds any text"):
        tokenise(path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="end_id 258 is outside the tokenizer's 258 ids"):
        tokenise(path, tokenizer=tokenizer, end_id=258)
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        tokenise(path, tokenizer=bare)


# Splitting and packing


def in_memory(lengths):
    """A corpus whose ids count up, so that every id tells where it came from; each document's last id is its end."""
    ends = np.cumsum(lengths)
    hashes = np.random.default_rng(1).integers(0, 2**64, size=len(lengths), dtype=np.uint64)
    return Corpus(None, np.arange(ends[-1], dtype=np.int32), ends, hashes, "x", END, 0)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(LENGTHS, st.integers(2, 9), st.none() | st.integers(0, 3))
def test_blocks_are_the_stream_and_nothing_else(lengths, length, seed):
    corpus = in_memory(lengths)
    if corpus.tokens < length:
        with pytest.raises(DataError, match="do not fill one block"):
            pack(corpus, sequence_length=length, seed=seed)
        return
    blocks = pack(corpus, sequence_length=length, packing="documents", seed=seed)
    stream = np.concatenate([corpus.document(i) for i in blocks.documents])
    assert sorted(blocks.documents.tolist()) == list(range(len(lengths)))
    places = np.concatenate([np.arange(n) for n in corpus.lengths[blocks.documents]])
    assert len(blocks) * length + blocks.left_over_tokens == corpus.tokens
    assert 0 <= blocks.left_over_tokens < length
    for i in range(len(blocks)):
        row = blocks[i]
        here = slice(i * length, (i + 1) * length)
        assert row["input_ids"].tolist() == stream[here].tolist()
        # Positions: as in the document, less what the block before has seen of it.
        wanted = places[here] - np.where(np.cumsum(places[here] == 0) == 0, places[here][0], 0)
        assert row["position_ids"].tolist() == wanted.tolist()
        wanted_labels = np.where(places[here] == 0, NO_LABEL, stream[here])
        assert row["labels"].tolist() == wanted_labels.tolist()


def test_concat_labels_are_the_ids_and_loaders_take_it():
    blocks = pack(in_memory([5, 3, 9]), sequence_length=4, seed=None)
    assert set(blocks[0]) == {"input_ids", "labels"}
    assert blocks[-1]["input_ids"].tolist() == [12, 13, 14, 15]
    batches = list(torch.utils.data.DataLoader(blocks, batch_size=3))
    assert torch.cat([batch["labels"] for batch in batches]).flatten().tolist() == list(range(16))
    assert batches[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError, match="block 4 of 4"):
        blocks[4]


def test_seed_shuffles_documents_the_same_way_every_time():
    corpus = in_memory([3] * 50)
    orders = [pack(corpus, sequence_length=3, seed=seed).documents.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:5] == [18, 23, 36, 4, 2]


def test_held_out_documents_are_whole_and_apart():
    corpus = in_memory([2] * 4000)
    train, held_out = (part_of(corpus, part=part, held_out_share=0.1) for part in ("train", "held_out"))
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(4000))
    # 400 ± 4 standard deviations of a binomial.
    assert 324 < len(held_out) < 476
    more = part_of(corpus, part="held_out", held_out_share=0.2)
    assert set(held_out.tolist()) < set(more.tolist())


def test_the_split_follows_the_text_not_its_place(tmp_path, tokenizer):
    texts = [f"text {i}" for i in range(60)]
    sides = []
    for name, order in (("a", texts), ("b", texts[::-1] + texts[:5])):
        corpus = tokenise(write_jsonl(tmp_path / f"{name}.jsonl", order), tokenizer=tokenizer)
        held_out = part_of(corpus, part="held_out", held_out_share=0.3)
        sides.append({tokenizer.decode(corpus.document(int(i))[:-1]) for i in held_out})
    assert sides[0] == sides[1]
    assert 5 < len(sides[0]) < 35


def test_files_are_split_into_sides_that_share_no_document(tmp_path, tokenizer):
    texts = [f"document number {i}" for i in range(80)]
    write_jsonl(tmp_path / "a.jsonl.xz", texts[:40])
    write_jsonl(tmp_path / "b.jsonl.gz", texts[40:])
    corpus = tokenise(tmp_path / "*.jsonl.*", tokenizer=tokenizer)
    shape = {"sequence_length": 16, "held_out_share": 0.25}
    train, held_out = (pack(corpus, part=part, seed=0, **shape) for part in ("train", "held_out"))
    assert (
        train.corpus.tokens
        == train.tokens + train.left_over_tokens + held_out.tokens + held_out.left_over_tokens
    )
    assert not set(train.documents.tolist()) & set(held_out.documents.tolist())
    capped = pack(corpus, part="train", seed=9, max_tokens=100, **shape)
    assert (len(capped), capped.tokens) == (6, 96)


def test_blocks_travel_to_workers_without_the_ids(tmp_path, tokenizer):
    corpus = tokenise(write_jsonl(tmp_path / "a.jsonl", ["x" * 50_000]), tokenizer=tokenizer)
    blocks = pack(corpus, sequence_length=100)
    carried = pickle.dumps(blocks)
    assert len(carried) < 5_000
    assert torch.equal(pickle.loads(carried)[7]["input_ids"], blocks[7]["input_ids"])


def test_packing_refusals():
    corpus = in_memory([5, 5])
    for options, error, message in (
        ({"sequence_length": 1}, ConfigError, "sequence_length is 1, wanted at least 2"),
        ({"sequence_length": 4, "packing": "padded"}, ConfigError, "got 'padded'"),
        ({"sequence_length": 4, "part": "test"}, ConfigError, "got 'test'"),
        ({"sequence_length": 4, "max_tokens": 3}, ConfigError, "max_tokens 3 is below one block of 4"),
        (
            {"sequence_length": 4, "max_tokens": 1000},
            DataError,
            "1,000 tokens were asked for; these documents hold 10",
        ),
        ({"sequence_length": 11}, DataError, "10 tokens in 2 documents do not fill one block of 11"),
        (
            {"sequence_length": 4, "held_out_share": 1.0},
            ConfigError,
            "held_out_share is 1.0, wanted 0 ≤ share < 1",
        ),
    ):
        with pytest.raises(error, match=message):
            pack(corpus, **options)
    with pytest.raises(DataError, match="0 tokens in 0 documents"):
        Blocks(corpus, np.array([], dtype=np.int64), 4)


def test_packed_documents_do_not_see_each_other():
    """transformers reads documents off position_ids that restart: the logits of each are those it has alone."""
    from engram_lm.bases.base import load_base

    model = load_base("scratch:tiny", report=lambda line: None).model
    corpus = in_memory([6, 5, 7])
    row = pack(corpus, sequence_length=18, packing="documents", seed=None)[0]
    with torch.no_grad():
        packed = model(
            row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False
        ).logits[0]
        alone = [model(torch.tensor(corpus.document(i))[None].long()).logits[0] for i in range(3)]
    # float32 sums over 18 keys with twelve masked, against sums over 6.
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
