"""The store: what readers see after adds, deletes, replacements, merges and purges, against a dictionary of documents."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engram_lm.errors import CheckpointError, ConfigError, IdentityError, TokenIdError
from engram_lm.index import merge_policy, plain, writer
from engram_lm.index.deletes import mask_from_bytes, mask_to_bytes
from engram_lm.index.manifest import Entry, Manifest, Mask
from engram_lm.index.purging import Runs, runs_of
from engram_lm.index.segment import Document, sha256_of
from engram_lm.index.store import Index
from engram_lm.kernels import checksums

VOCAB = 7


def make(path, **options):
    return Index.create(path, vocab_size=VOCAB, tokenizer="fp", merging="by hand", **options)


def require_equal(snapshot, documents):
    """Counts of every order of every context that the documents have, of empty ones, and of what is not there."""
    documents = [list(tokens) for tokens in documents]
    assert snapshot.n_documents == len(documents)
    assert snapshot.n_tokens == sum(len(tokens) + 1 for tokens in documents)
    for context in [
        [],
        [0, 1, 2],
        *(tokens[:4] for tokens in documents),
        *(tokens[-3:] for tokens in documents),
    ]:
        match = snapshot.match(context)
        assert match.depth == plain.depth(documents, context, end=VOCAB, most=64)
        for order in range(match.depth + 1):
            token_I, count_I = snapshot.continuations(match, order)
            wanted = plain.continuations(documents, context[len(context) - order :], end=VOCAB)
            assert dict(zip(token_I.tolist(), count_I.tolist(), strict=True)) == dict(wanted)


@pytest.fixture(autouse=True)
def never_synced():
    """Nothing here cuts the power; waiting for a disk would be most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


class AnyOrder(RuleBasedStateMachine):
    """Any order of changes: a writer and a reader that has been open all along say what a dictionary says."""

    ids = st.sampled_from(["a", "b c", "d/../e", "ü", "f", "g"])
    tenants = st.sampled_from(["public", "other tenant"])
    texts = st.lists(st.integers(0, VOCAB - 1), max_size=12)

    @initialize()
    def begin(self):
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "an index"
        self.store, self.reader = make(self.path), Index.open(self.path)
        self.model = {"public": {}, "other tenant": {}}

    def teardown(self):
        self.store.close()
        self.reader.close()
        self.directory.cleanup()

    @rule(tenant=tenants, documents=st.dictionaries(ids, texts, max_size=3))
    def add(self, tenant, documents):
        items = list(documents.items())
        if documents.keys() & self.model[tenant].keys():
            with pytest.raises(ConfigError, match="already"):
                self.store.add(items, tenant=tenant)
            self.store.add(items, tenant=tenant, replace="yes")
        else:
            self.store.add(items, tenant=tenant)
        self.model[tenant].update(documents)

    @rule(tenant=tenants, ids=st.lists(ids, max_size=3))
    def delete(self, tenant, ids):
        if set(ids) - self.model[tenant].keys():
            with pytest.raises(ConfigError, match="There is no document"):
                self.store.delete(ids, tenant=tenant)
        self.store.delete(ids, tenant=tenant, missing="ignore")
        for id in ids:
            self.model[tenant].pop(id, None)

    @rule(tenant=tenants, ids=st.lists(ids, max_size=2), documents=st.dictionaries(ids, texts, max_size=2))
    def change(self, tenant, ids, documents):
        self.store.update(
            add=list(documents.items()), delete=ids, tenant=tenant, replace="yes", missing="ignore"
        )
        for id in ids:
            self.model[tenant].pop(id, None)
        self.model[tenant].update(documents)

    @rule()
    def merge_due(self):
        self.store.merge(how="due")

    @rule(tenant=tenants)
    def merge(self, tenant):
        self.store.merge(tenant)
        assert len(self.store._opened.manifest.tenants.get(tenant, ())) == bool(self.model[tenant])

    @rule()
    def purge(self):
        self.store.purge()
        assert self.store.stats().dead_documents == 0

    @rule()
    def open_again(self):
        self.store.close()
        self.store = Index.open(self.path, "write", merging="by hand")

    @invariant()
    def same(self):
        if not hasattr(self, "store"):
            return
        for store in (self.store, self.reader):
            for tenant, documents in self.model.items():
                require_equal(store.snapshot(tenant), documents.values())
                assert {document.id for document in store.documents(tenant)} == documents.keys()
            both = [tokens for documents in self.model.values() for tokens in documents.values()]
            require_equal(store.snapshot(("other tenant", "public")), both)
        self.store.verify()
        wanted = self.store._opened.manifest.files() | {"manifest", "lock"}
        assert {path.name for path in self.path.iterdir()} == wanted


AnyOrder.TestCase.settings = settings(max_examples=6, stateful_step_count=8, deadline=None)
test_any_order_of_changes_gives_what_a_dictionary_gives = AnyOrder.TestCase


@pytest.mark.slow
def test_many_orders_of_changes_give_what_a_dictionary_gives():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        AnyOrder, settings=settings(max_examples=60, stateful_step_count=25, deadline=None)
    )


@pytest.fixture
def store(tmp_path):
    with make(tmp_path / "i") as store:
        yield store


def test_a_document_is_known_with_its_facts_and_a_reader_sees_it_at_once(store):
    reader = Index.open(store.directory, tokenizer="fp", vocab_size=VOCAB)
    assert not reader.refresh()
    assert store.add([("a", [1, 2, 3], "a.txt"), (Document(id="b", source="s", added=12.5), [])]) == 1
    assert reader.refresh()
    assert not reader.refresh()
    (a, b) = reader.documents()
    assert (a.id, a.source, a.sha256) == ("a", "a.txt", sha256_of(np.array([1, 2, 3])))
    assert a.added > 1e9
    assert (b.id, b.source, b.added) == ("b", "s", 12.5)
    document, tokens = reader.get("a")
    assert document == a
    assert tokens.tolist() == [1, 2, 3]
    assert reader.get("c") is None
    assert reader.snapshot() is reader.snapshot()
    assert (reader.generation, reader.vocab_size, reader.tokenizer, reader.tenants) == (
        1,
        VOCAB,
        "fp",
        ("public",),
    )
    assert store.add([]) == store.delete([]) == 1


def test_a_snapshot_stays_as_it_was_and_outlives_its_files(store):
    store.add([(name, [i, i, 5, i]) for i, name in enumerate("abcd")])
    reader = Index.open(store.directory)
    old = reader.snapshot()
    store.delete(["a", "b"])
    newer = reader.snapshot()
    store.purge()
    reader.close()
    store.close()
    for path in store.directory.iterdir():
        path.unlink()
    require_equal(old, [[i, i, 5, i] for i in range(4)])
    require_equal(newer, [[i, i, 5, i] for i in (2, 3)])


def test_tenants_never_mix_and_an_unknown_one_sees_nothing(store):
    store.add([("a", [1, 2, 3])], tenant="acme")
    before = Index.open(store.directory).snapshot("acme").distribution([1, 2]).p.copy()
    store.add([("a", [1, 2, 4])], tenant="../x y")
    assert np.array_equal(store.snapshot("acme").distribution([1, 2]).p, before)
    require_equal(store.snapshot("acme"), [[1, 2, 3]])
    require_equal(store.snapshot(["acme", "../x y", "acme"]), [[1, 2, 3], [1, 2, 4]])
    require_equal(store.snapshot(), [])
    store.merge()
    assert [entry.documents for _, entry in store._opened.manifest.entries()] == [1, 1]
    with pytest.raises(ConfigError, match=r"1 to 256 printable characters; got ''"):
        store.snapshot("")
    with pytest.raises(ConfigError, match="printable"):
        store.add([("b", [1])], tenant="a\nb")
    with pytest.raises(ConfigError, match="no document 'a' in the tenant 'public'"):
        store.delete("a")


def test_what_cannot_be_changes_nothing(store):
    store.add([("a", [1, 2])])
    files = sorted(os.listdir(store.directory))
    for wrong, error, text in (
        (
            [("b", [1]), ("a", [2])],
            ConfigError,
            "'a' is in the tenant 'public' already. Delete it first, or add with replace",
        ),
        ([("b", [1]), ("b", [2])], ConfigError, "'b' is there twice in one add"),
        ([("b", [1, VOCAB])], TokenIdError, f"Token id {VOCAB} at place 1 of document 'b'"),
        ([("b", "text")], ConfigError, "is text; the index takes token ids"),
        ([("", [1])], ConfigError, "has 1 to 4,096 characters"),
        ([(3, [1])], ConfigError, "got an id of int"),
        ([("b",)], ConfigError, r"A document is \(id, tokens\)"),
        (["b"], ConfigError, "got str 'b'"),
    ):
        with pytest.raises(error, match=text):
            store.add(wrong)
    for wrong, text in (
        ("b", "There is no document 'b' in"),
        (["b", "a", "c"], "no document 'b' and 1 more in"),
    ):
        with pytest.raises(ConfigError, match=text):
            store.delete(wrong)
    with pytest.raises(ConfigError, match="missing is one of 'error', 'ignore'; got 'no'"):
        store.delete("a", missing="no")
    with pytest.raises(ConfigError, match="replace is one of"):
        store.add([("a", [1])], replace=True)
    with pytest.raises(ConfigError, match='how is "whole"'):
        store.merge(how="all")
    assert store.generation == 1
    assert sorted(os.listdir(store.directory)) == files
    require_equal(store.snapshot(), [[1, 2]])


def test_a_deleted_document_is_gone_and_its_id_is_free(store):
    store.add([("a", [1, 2, 1, 2]), ("b", [1, 2, 3]), ("empty", [])])
    assert store.delete("a") == 2
    with pytest.raises(ConfigError, match="never added, or deleted already"):
        store.delete("a")
    assert store.delete("a", missing="ignore") == 2
    store.delete("empty")
    require_equal(store.snapshot(), [[1, 2, 3]])
    store.add([("a", [4])])
    store.add([("a", [5]), ("b", [6])], replace="yes")
    require_equal(store.snapshot(), [[5], [6]])
    assert sorted(document.id for document in store.documents()) == ["a", "b"]
    # nothing of the first segment is live: it is gone, with its mask
    assert store.stats().segments == 1


def test_a_large_add_becomes_several_segments_of_one_generation(store, monkeypatch):
    monkeypatch.setattr(writer, "SEGMENT_TOKENS", 10)
    documents = {f"d{i}": [i % VOCAB] * 4 for i in range(7)}
    assert store.add(iter(documents.items())) == 1
    assert store.stats().segments == 4
    require_equal(store.snapshot(), documents.values())
    with pytest.raises(ConfigError, match="'x' is there twice"):
        store.add(("x", [1] * 9) for _ in range(2))
    assert len(list(store.directory.glob("*.segment"))) == 4


def test_delete_during_a_merge_is_in_the_merged_segment(store, monkeypatch):
    store.add([("a", [1, 2]), ("b", [3, 4])])
    store.add([("c", [5]), ("d", [6])])
    store.add([("e", [6, 6])])
    real, seen = writer.IndexWriter.write, []

    def build(self, *args):
        monkeypatch.undo()
        store.delete(["b", "e"])
        store.add([("b", [0, 0]), ("c", [2, 2])], replace="yes")
        monkeypatch.setattr(writer.IndexWriter, "write", look)
        return real(self, *args)

    def look(self, *args):
        # the first merge is in: its dead documents are masked in the new segment, and are why there is another merge
        require_equal(store.snapshot(), [[1, 2], [6], [0, 0], [2, 2]])
        seen.append(store.stats().dead_documents)
        store.verify()
        return real(self, *args)

    monkeypatch.setattr(writer.IndexWriter, "write", build)
    assert store.merge()
    assert seen == [3]
    require_equal(store.snapshot(), [[1, 2], [6], [0, 0], [2, 2]])
    assert not store.merge()
    store.delete(["a"])

    def build_all_gone(self, *args):
        monkeypatch.undo()
        store.delete([document.id for document in store.documents()])
        return real(self, *args)

    monkeypatch.setattr(writer.IndexWriter, "write", build_all_gone)
    store.merge()
    require_equal(store.snapshot(), [])
    assert sorted(os.listdir(store.directory)) == ["lock", "manifest"]


def test_merging_in_the_background_keeps_segments_few(tmp_path):
    documents = {f"d{i}": [i % VOCAB, i // VOCAB % VOCAB, i // VOCAB**2] for i in range(60)}
    with Index.create(tmp_path / "i", vocab_size=VOCAB) as store:
        for item in documents.items():
            store.add([item])
            assert store.stats().segments <= merge_policy.MOST_SEGMENTS
    with Index.open(tmp_path / "i", "write") as store:
        store.merge(how="due")
        assert store.stats().segments < merge_policy.FAN
        assert store.stats().merge_error == ""
        require_equal(store.snapshot(), documents.values())


def entry(number, live, dead=0):
    masks = (Mask(number=900 + number, documents=1, tokens=dead, seal="0" * 16),) if dead else ()
    return Entry(number=number, tokens=live + dead, documents=2, bytes=0, seal="0" * 16, masks=masks)


def test_which_segments_are_merged():
    def numbers(*entries, **options):
        return [found.number for found in merge_policy.due(entries, **options)]

    assert [merge_policy.tier(n) for n in (0, 4095, 4096, 16383, 16384)] == [0, 0, 1, 1, 2]
    small = [entry(i, 100) for i in range(5)]
    assert numbers(*small[:3], entry(9, 5000)) == []
    assert numbers(entry(9, 5000), *small) == [0, 1, 2, 3, 4]
    assert numbers(*small, busy={0, 1}) == []
    assert numbers(*small, most=399) == []
    assert numbers(entry(1, 5000, 2400)) == []
    assert numbers(entry(1, 5000, 2600)) == [1]
    assert [[e.number for e in g] for g in merge_policy.groups([*small, entry(9, 5000)], 250)] == [
        [0, 1],
        [2, 3],
        [4],
        [9],
    ]
    # whatever comes, segments stay about three a tier, and each token is written a few times
    entries, written = [], 0
    for i in range(3000):
        entries.append(entry(i, 1000))
        while group := merge_policy.due(entries):
            total = sum(found.live_tokens for found in group)
            entries = [entry(i, total), *(found for found in entries if found not in group)]
            written += total
        assert len(entries) <= 24
    assert written < 8 * 3_000_000


def random_documents(n, length, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return {f"d{i}": rng.integers(0, vocab, length) for i in range(n)}


@pytest.mark.parametrize("vocab", [5000, 100_000])
def test_purge_takes_documents_out_of_the_files_and_proves_it(tmp_path, vocab):
    documents = random_documents(12, 100, vocab)
    with Index.create(tmp_path / "i", vocab_size=vocab, merging="by hand") as store:
        store.add(list(documents.items())[:6])
        store.add(list(documents.items())[6:])
        store.add([("copy", documents["d3"][:60]), ("short", [1, 2]), ("same", [7] * 300)])
        store.delete(["d1", "d8", "short", "same"])
        dtype = store.snapshot().views[0].segment.tokens.dtype
        data = documents["d1"].astype(dtype).tobytes()
        assert any(data in path.read_bytes() for path in tmp_path.glob("i/*"))
        seen = []
        report = store.purge(["d3"], progress=lambda *facts: seen.append(facts))
        assert (report.documents, report.segments, report.unproven) == (5, 3, 2)
        assert report.runs == 3 * 7
        assert report.live_copies == 3
        assert report.tokens == 3 * 101 + 3 + 301
        assert seen[:3] == [("rewritten", i, 3) for i in (1, 2, 3)]
        assert seen[-1] == ("read", report.files, report.files)
        for name in ("d1", "d8"):
            data = documents[name].astype(dtype).tobytes()
            for path in tmp_path.glob("i/*"):
                found = path.read_bytes()
                assert not any(data[at : at + 24] in found for at in range(0, len(data), 2 * dtype.itemsize))
        assert not any(b'"d1"' in path.read_bytes() for path in tmp_path.glob("i/*"))
        assert store.snapshot().n_documents == 10
        assert not list(tmp_path.glob("i/*.mask"))
        store.verify()
        with pytest.raises(ConfigError, match="no document 'd3'"):
            store.purge("d3")
        with pytest.raises(ConfigError, match="no document 'd4' in the tenant 'nobody'"):
            store.purge("d4", tenant="nobody")


def test_a_purge_that_leaves_something_says_where(tmp_path, monkeypatch):
    documents = random_documents(4, 100, 5000)
    with Index.create(tmp_path / "i", vocab_size=5000, merging="by hand") as store:
        store.add(list(documents.items()))
        (tmp_path / "i" / "notes").mkdir()
        rest = tmp_path / "i" / "notes" / "a copy.bin"
        rest.write_bytes(b"x" + documents["d2"][37:68].astype("<u2").tobytes())
        with pytest.raises(CheckpointError, match=r"a copy\.bin still holds tokens of a deleted document"):
            store.purge("d2")
        rest.unlink()
        store.delete("d1")
        # a rewrite that forgets the mask
        real = writer.IndexWriter.write
        pairs = [(Document(id=name), documents[name]) for name in ("d0", "d1", "d3")]
        monkeypatch.setattr(writer.IndexWriter, "write", lambda self, found, files: real(self, pairs, files))
        with pytest.raises(CheckpointError, match="still holds the deleted document 'd1'"):
            store.purge()


def test_a_purge_is_not_alarmed_by_sorted_tokens_that_ascend_as_a_deleted_document(tmp_path):
    gone = list(range(0, 40, 2))
    with Index.create(tmp_path / "i", vocab_size=300, merging="by hand") as store:
        store.add([("gone", gone)])
        # 32 places of each second last token before 200: every 32nd of them is one further
        store.add([(f"{token} {k}", [token, 200]) for token in gone for k in range(32)])
        before = store.snapshot().views[-1].segment.arrays["before"].tolist()
        assert str(gone[1:18])[1:-1] in str(before)
        report = store.purge(["gone"])
    assert (report.documents, report.unproven, report.live_copies) == (1, 0, 0)


def test_a_purge_looks_beside_the_tokens_of_a_segment(tmp_path):
    """The bytes of a deleted document in another place of a live segment's file are told, whatever they mean there."""
    words = "abcdefghijklmnopqrstuvwxyzABCDEF"
    gone = np.frombuffer(words.encode(), "<u2")
    with Index.create(tmp_path / "i", vocab_size=32_000, merging="by hand") as store:
        store.add([("gone", gone)])
        store.add([("kept", [1, 2, 3], words)])
        with pytest.raises(
            CheckpointError, match="still holds tokens of a deleted document, outside its documents"
        ):
            store.purge(["gone"])


def test_a_purge_of_one_tenant_names_another_that_keeps_the_same_deleted(tmp_path):
    (text,) = random_documents(1, 100, 5000).values()
    with Index.create(tmp_path / "i", vocab_size=5000, merging="by hand") as store:
        for tenant in ("a", "b"):
            store.add([("same", text), ("other", [1])], tenant=tenant)
            store.delete("same", tenant=tenant)
        with pytest.raises(
            CheckpointError, match=r"document 'same' of the tenant 'b'\. Purge that tenant too"
        ):
            store.purge(tenant="a")
        assert store.purge().documents == 1
        store.verify()


def test_runs_are_found_wherever_they_stand():
    rng = np.random.default_rng(3)
    lists = [rng.integers(0, 60_000, n).astype(np.uint16) for n in (15, 16, 17, 64, 100)]
    run_RW, without = runs_of([*lists, np.zeros(50, np.uint16)])
    assert without == 2
    assert len(run_RW) == 1 + 2 + 4 + 7
    runs = Runs(run_RW, np.dtype("<u2"))
    data = rng.integers(0, 256, 50_000).astype(np.uint8)
    for at, part in ((0, lists[3][16:48]), (12_345, lists[4][3:34]), (49_968, lists[2][1:])):
        data[at : at + 2 * len(part)] = part.view(np.uint8)
    strings = {row.astype("<u2").tobytes() for row in run_RW}
    wanted = [p for p in range(len(data)) if data[p : p + 32].tobytes() in strings]
    assert runs.places(data) == wanted
    assert wanted[0] == 0
    assert wanted[-1] == 49_968
    assert runs.places(np.tile(lists[1].view(np.uint8), 9000)) == [32 * i for i in range(9000)]
    assert Runs(run_RW[:0], np.dtype("<u2")).places(data) == []
    assert runs.places(data[:31]) == []


def test_another_tokenizer_vocabulary_directory_or_mode_is_refused(store, tmp_path):
    store.add([("a", [1])])
    for options, text in (
        ({"tokenizer": "other"}, "the tokenizer 'fp'; yours is 'other'"),
        ({"vocab_size": 8}, "a vocabulary of 7; yours has 8"),
    ):
        with pytest.raises(IdentityError, match=text):
            Index.open(store.directory, **options)
    with pytest.raises(CheckpointError, match="holds no index"):
        Index.open(tmp_path)
    with pytest.raises(ConfigError, match="mode is 'read' or 'write'"):
        Index.open(store.directory, "rw")
    with pytest.raises(ConfigError, match="merging is"):
        Index.open(store.directory, merging="no")
    with Index.open(store.directory) as reader, pytest.raises(ConfigError, match='Open it with mode="write"'):
        reader.delete("a")
    with pytest.raises(ConfigError, match="is closed"):
        reader.snapshot()
    store.close()
    with pytest.raises(CheckpointError, match="holds an index already"):
        make(store.directory)
    (store.directory / "manifest").unlink()
    with pytest.raises(CheckpointError, match="an index that lost it"):
        make(store.directory)
    with pytest.raises(ConfigError, match="tokenizer is a fingerprint"):
        Index.create(tmp_path / "other", vocab_size=7, tokenizer=None)
    for vocab in (0, True, 2**31, "7"):
        with pytest.raises(ConfigError, match="vocab_size is a whole number"):
            Index.create(tmp_path / "other", vocab_size=vocab)


def test_a_directory_put_back_from_a_backup_is_not_mistaken(store, tmp_path):
    store.add([("a", [1, 2])])
    backup = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    store.add([("b", [3, 4])])
    reader = Index.open(store.directory)
    require_equal(reader.snapshot(), [[1, 2], [3, 4]])
    store.close()
    for path in store.directory.iterdir():
        path.unlink()
    for name, data in backup.items():
        (store.directory / name).write_bytes(data)
    with Index.open(store.directory, "write", merging="by hand") as again:
        again.add([("c", [5, 6])])
        require_equal(reader.snapshot(), [[1, 2], [5, 6]])
    assert sorted(document.id for document in reader.documents()) == ["a", "c"]


def test_stats_and_verify_count_what_is_there(store):
    store.add([("a", [1, 2, 3]), ("b", [4])])
    store.add([("c", [])], tenant="t")
    store.delete("b")
    stats = store.stats()
    assert (stats.documents, stats.tokens, stats.dead_documents, stats.dead_tokens) == (2, 5, 1, 2)
    assert (stats.segments, stats.generation, stats.tokenizer) == (2, 3, "fp")
    assert stats.bytes == sum(path.stat().st_size for path in store.directory.iterdir())
    assert stats.bytes_per_token == stats.bytes / 5
    assert stats.dead_share == 2 / 7
    assert stats.tenants["t"].tokens == 1
    seen = []
    report = store.verify(progress=lambda *facts: seen.append(facts))
    assert (report.segments, report.masks, report.documents, report.tokens) == (2, 1, 2, 5)
    assert seen[-1] == (report.bytes_read, report.bytes_read)


# ---- hostile files ------------------------------------------------------------------------------------------------------


def signed(facts):
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return b"engram-index 1 %016x\n" % int(checksums.xxh64(np.frombuffer(text, np.uint8))) + text


def good():
    part = {"number": 0, "tokens": 9, "documents": 2, "bytes": 4096, "seal": "0" * 16}
    part["masks"] = [{"number": 1, "documents": 1, "tokens": 3, "seal": "1" * 16}]
    return {"generation": 3, "next": 5, "vocab_size": 7, "tokenizer": "fp", "tenants": {"public": [part]}}


def test_a_manifest_comes_back_as_it_was():
    manifest = Manifest.from_bytes(signed(good()), "m")
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest
    assert manifest.files() == {"000000000000.segment", "000000000001.mask"}
    assert manifest.tenants["public"][0].live_tokens == 6


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (("generation",), -1, "generation is no whole number"),
        (("generation",), True, "generation is no whole number"),
        (("next",), 1e3, "next is no whole number"),
        (("next",), 10**30, "next is no whole number"),
        (("vocab_size",), 0, "vocab_size is 0"),
        (("vocab_size",), 2**40, "vocab_size is 1,099"),
        (("tokenizer",), 5, "tokenizer is no text"),
        (("tenants",), [], "tenants is no object"),
        (("tenants", "public"), {}, "'public' is no list"),
        (("tenants", "a\0b"), [], "printable"),
        (("tenants", "public", 0), "../../etc/passwd", "a segment is no object"),
        (("tenants", "public", 0, "number"), "../../etc/passwd", "number is no whole number"),
        (("tenants", "public", 0, "number"), 5, "named twice or not below next"),
        (("tenants", "public", 0, "number"), 1, "named twice or not below next"),
        (("tenants", "public", 0, "tokens"), 1, "2 documents in 1 tokens"),
        (("tenants", "public", 0, "tokens"), float("nan"), "tokens is no whole number"),
        (("tenants", "public", 0, "seal"), "x" * 16, "16 hexadecimal digits"),
        (("tenants", "public", 0, "path"), "/tmp", "the unknown field 'path'"),
        (("tenants", "public", 0, "masks", 0, "documents"), 3, "counts? more than it has"),
        (("tenants", "public", 0, "masks", 0, "documents"), 4, "mask 1 has 4 documents in 3 tokens"),
        (("tenants", "public", 0, "masks", 0, "documents"), 0, "mask 1 has 0 documents"),
        (("tenants", "public", 0, "masks", 0, "tokens"), 10, "the masks of segment 0 count more than it has"),
        (("tenants", "public", 0, "masks", 0), None, "a mask is no object"),
        (("tenants", "public", 0, "masks"), {}, "masks is no list"),
    ],
)
def test_a_hostile_manifest_is_refused(place, value, text):
    facts = good()
    found = facts
    for name in place[:-1]:
        found = found[name]
    found[place[-1]] = value
    with pytest.raises(CheckpointError, match=f"x/manifest is damaged: .*{text}"):
        Manifest.from_bytes(signed(facts), "x/manifest")


def test_bytes_that_are_no_manifest_are_refused(store):
    whole = signed(good())
    for data, text in (
        (b"", "is no manifest"),
        (b"{}", "is no manifest"),
        (whole.replace(b"index 1", b"index 2"), "version 2; this build reads version 1. Upgrade"),
        (whole[:-1], "checksum is wrong"),
        (signed(b"[" * 100_000), "is damaged"),
        (signed(b"1" * 10_000), "is damaged"),
        (signed(b"\xff"), "is damaged"),
        (signed([]), "the manifest is no object"),
        (signed({}), "lacks generation, next"),
    ):
        with pytest.raises(CheckpointError, match=text):
            Manifest.from_bytes(data, "m")
    for at in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        with pytest.raises(CheckpointError):
            Manifest.from_bytes(bytes(flipped), "m")
    store.close()
    (store.directory / "manifest").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"1\.mask is missing"):
        Index.open(store.directory).snapshot()


def test_a_damaged_or_wrong_mask_is_refused():
    dead_documents, dead_rank = np.array([1]), np.array([2, 5, 8])
    whole = mask_to_bytes(0, dead_documents, dead_rank)
    found = Manifest.from_bytes(signed(good()), "m").tenants["public"][0]
    documents, rank = mask_from_bytes(whole, "m", found, found.masks[0])
    assert (documents.tolist(), rank.tolist()) == ([1], [2, 5, 8])
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        with pytest.raises(CheckpointError):
            mask_from_bytes(bytes(flipped), "m", found, found.masks[0])
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            mask_from_bytes(whole[:size], "m", found, found.masks[0])
    for wrong, text in (
        (mask_to_bytes(4, dead_documents, dead_rank), "not what the manifest says"),
        (mask_to_bytes(0, dead_documents, np.array([2, 5, 9])), "points outside"),
        (mask_to_bytes(0, dead_documents, np.array([2, 2, 8])), "not in order"),
        (mask_to_bytes(0, np.array([2]), dead_rank), "points outside"),
    ):
        with pytest.raises(CheckpointError, match=text):
            mask_from_bytes(wrong, "m", found, found.masks[0])


def test_masks_that_hide_the_same_twice_are_refused(store):
    store.add([(f"d{i}", [i, i, i]) for i in range(6)])
    store.delete(["d0", "d1", "d2"])
    store.delete("d3")
    first, second = sorted(store.directory.glob("*.mask"))
    (entry,) = store._opened.manifest.tenants["public"]
    documents, rank = mask_from_bytes(first.read_bytes(), first, entry, entry.masks[0])
    wrong = mask_to_bytes(entry.number, documents[:1], rank[:4])
    store.close()
    second.write_bytes(wrong)
    facts = json.loads((store.directory / "manifest").read_bytes().split(b"\n", 1)[1])
    facts["tenants"]["public"][0]["masks"][1]["seal"] = (
        f"{int(checksums.xxh64(np.frombuffer(wrong, np.uint8))):016x}"
    )
    (store.directory / "manifest").write_bytes(signed(facts))
    reader = Index.open(store.directory)
    with pytest.raises(CheckpointError, match="masks that hide the same places"):
        reader.snapshot()
    with pytest.raises(CheckpointError, match=r"hides documents that another mask|hides other places"):
        reader.verify()


def test_masks_stay_few_and_say_what_one_would(store):
    store.add([(f"d{i:02}", [i % VOCAB, 1, i // 10]) for i in range(60)])
    for i in range(50):
        store.delete(f"d{i:02}")
        (entry,) = store._opened.manifest.tenants["public"]
        assert len(entry.masks) <= 1 + np.log2(i + 1)
        assert entry.dead_documents == i + 1
    left = [[i % VOCAB, 1, i // 10] for i in range(50, 60)]
    require_equal(store.snapshot(), left)
    require_equal(Index.open(store.directory).snapshot(), left)
    assert Index.open(store.directory).verify().documents == 10


def test_a_damaged_file_is_named_by_verify_and_a_swapped_one_when_opened(store, tmp_path):
    documents = random_documents(3, 3000, VOCAB)
    store.add(list(documents.items())[:2])
    store.add(list(documents.items())[2:])
    store.delete("d0")
    (first, second), (mask,) = sorted(store.directory.glob("*.segment")), store.directory.glob("*.mask")
    kept = {path: path.read_bytes() for path in (first, second, mask)}

    def refused(path, data, text, act):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{path.name}.*{text}"):
            act()
        path.write_bytes(kept[path])

    for path in (first, second):
        flipped = bytearray(kept[path])
        flipped[5000] ^= 4
        refused(path, bytes(flipped), "is damaged", lambda: Index.open(store.directory).verify())
    refused(
        second,
        kept[first],
        "is not the file that the manifest names",
        lambda: Index.open(store.directory).snapshot(),
    )
    refused(mask, kept[mask][:-4], "is damaged", lambda: Index.open(store.directory).snapshot())
    # a mask that hides others' places is well formed; only a look at the segment tells
    reader = Index.open(store.directory)
    manifest = reader._opened.manifest
    entry = manifest.tenants["public"][0]
    _, rank = mask_from_bytes(kept[mask], mask, entry, entry.masks[0])
    wrong = mask_to_bytes(entry.number, np.array([1]), rank)
    mask.write_bytes(wrong)
    text = (store.directory / "manifest").read_bytes().split(b"\n", 1)[1]
    facts = json.loads(text)
    facts["tenants"]["public"][0]["masks"][0]["seal"] = (
        f"{int(checksums.xxh64(np.frombuffer(wrong[:4096], np.uint8))):016x}"
    )
    (store.directory / "manifest").write_bytes(signed(facts))
    with pytest.raises(CheckpointError, match="hides other places than those of its 1 documents"):
        Index.open(store.directory).verify()
