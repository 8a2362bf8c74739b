"""Texts in an index: what goes in, what is found, and the commands, on a small byte-level tokenizer."""

import gzip
import io
import json
import os
import sys
import types

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from engram_lm import cli
from engram_lm.bases.recipes import byte_tokenizer
from engram_lm.errors import CheckpointError, ConfigError, DataError, IdentityError, MissingExtraError
from engram_lm.identity import print_of
from engram_lm.library import Library, Text, library, read_texts
from engram_lm.library.encoding import TextEncoder


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    backend.add_special_tokens(["<|im_start|>"])
    return backend


@pytest.fixture
def folder(tmp_path):
    """A handbook of two files and three JSON lines; hidden files and pictures beside them."""
    root = tmp_path / "hand book"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "leave.md").write_text("Annual leave is thirty days.\n", encoding="utf8")
    (root / "dog.txt").write_text("The dog is called Orlando.", encoding="utf8")
    with gzip.open(root / "faq.jsonl.gz", "wt", encoding="utf8") as file:
        for record in (
            {"id": "q1", "text": "Annual leave is not paid out.", "title": "Pay", "licence": "CC0", "url": 7},
            {"text": ""},
            {"id": 12, "text": "日本語 and <|im_start|>system"},
        ):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    (root / ".hidden.txt").write_text("never read")
    (root / "photo.png").write_bytes(b"\x89PNG")
    return root


def ids_of(store, tenant="public"):
    return sorted(document.id for document in store.documents(tenant))


# ---- texts -------------------------------------------------------------------------------------------------------------


def test_texts_of_a_folder_have_ids_below_it_and_keep_what_json_lines_tell(folder):
    texts = {text.id: text for text in read_texts([folder])}
    assert list(texts) == ["deep/leave.md", "dog.txt", "q1", "faq.jsonl.gz:2", "12"]
    assert texts["q1"].extra["title"] == "Pay"
    assert texts["q1"].extra["licence"] == "CC0"
    assert "url" not in texts["q1"].extra
    assert texts["q1"].source == "faq.jsonl.gz"
    assert texts["dog.txt"].extra["folder"] == str(folder.resolve())
    assert texts["faq.jsonl.gz:2"].text == ""
    (single,) = read_texts(folder / "dog.txt", id="dog", extra={"licence": "MIT"})
    assert (single.id, single.extra["licence"]) == ("dog", "MIT")
    assert "folder" not in single.extra


def test_a_name_that_is_no_text_becomes_an_id_that_is(folder):
    name = os.fsdecode(b"n\xe9.txt")
    (folder / name).write_text("news")
    ids = [text.id for text in read_texts([folder])]
    assert "n\\udce9.txt" in ids
    assert all(id.encode("utf8") for id in ids)


def test_what_cannot_be_read_is_named(folder, tmp_path, monkeypatch):
    (folder / "dog.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataError, match=r"dog\.txt: byte 5 is not UTF-8"):
        list(read_texts([folder]))
    with pytest.raises(DataError, match="no such file or folder"):
        list(read_texts([tmp_path / "absent"]))
    with pytest.raises(DataError, match=r"photo\.png: texts are read from"):
        list(read_texts([folder / "photo.png"]))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no file that can be read"):
        list(read_texts([tmp_path / "bare"]))
    with pytest.raises(DataError, match="cannot name"):
        list(read_texts([folder], id="one"))
    with pytest.raises(DataError, match="standard input needs an id"):
        list(read_texts(["-"]))
    monkeypatch.setitem(sys.modules, "markitdown", None)
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(
        MissingExtraError, match=r'converted by markitdown, the extra "documents".* install "markitdown'
    ):
        list(read_texts([folder / "paper.pdf"]))


def test_other_formats_go_through_the_converter_which_may_fail(tmp_path, monkeypatch):
    class Missing(Exception):
        pass

    class Converter:
        def convert(self, stream, info):
            data = stream.read()
            if data == b"broken":
                raise RuntimeError("no such\npage")
            if data == b"missing":
                raise Missing
            return types.SimpleNamespace(markdown=f"{info.extension} {data.decode()}")

    monkeypatch.setitem(
        sys.modules,
        "markitdown",
        types.SimpleNamespace(
            MissingDependencyException=Missing,
            StreamInfo=types.SimpleNamespace,
            converters=types.SimpleNamespace(HtmlConverter=Converter, DocxConverter=Converter),
        ),
    )
    (tmp_path / "a.HTML").write_bytes(b"page")
    (text,) = read_texts([tmp_path / "a.HTML"])
    assert text.text == ".html page"
    (tmp_path / "b.docx").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"b\.docx cannot be converted: no such page"):
        list(read_texts([tmp_path / "b.docx"]))
    (tmp_path / "c.docx").write_bytes(b"missing")
    with pytest.raises(MissingExtraError, match=r'lacks what \.docx needs, the extra "documents"'):
        list(read_texts([tmp_path / "c.docx"]))


def test_special_tokens_in_a_text_are_its_letters(tokenizer):
    encoder = TextEncoder.of(tokenizer)
    special = tokenizer.token_to_id("<|im_start|>")
    assert special in tokenizer.encode("<|im_start|>").ids
    ids = encoder.encode("a<|im_start|>b")
    assert special not in ids
    assert encoder.decode(ids) == "a<|im_start|>b"
    assert special not in encoder.encode_all(["<|im_start|>"])[0]
    # the caller's tokenizer keeps its ways
    assert special in tokenizer.encode("<|im_start|>").ids
    # markers that a tokenizer does not call special are split as well; other added tokens are words
    chatty = Tokenizer.from_str(tokenizer.to_str())
    chatty.add_tokens([AddedToken(word, special=False) for word in ("<tool_call>", "[INST]", "Orlando")])
    ids = TextEncoder.of(chatty).encode("<tool_call>[INST]Orlando<|im_start|>")
    added = [chatty.token_to_id(word) for word in ("<tool_call>", "[INST]", "Orlando", "<|im_start|>")]
    assert [i in ids for i in added] == [False, False, True, False]
    assert TextEncoder.of(chatty).decode(ids) == "<tool_call>[INST]Orlando<|im_start|>"
    assert TextEncoder.of(chatty).fingerprint == print_of(chatty).text
    assert added[0] in chatty.encode("<tool_call>").ids
    assert encoder.fingerprint == TextEncoder.of(tokenizer).fingerprint


# ---- the library ---------------------------------------------------------------------------------------------------------


def test_a_text_is_found_when_it_is_in_and_gone_when_it_is_deleted(folder, tokenizer, tmp_path):
    with Library.create(tmp_path / "an index", tokenizer=tokenizer) as made:
        added = made.add(read_texts([folder]))
        assert (added.documents, added.skipped) == (5, 0)
        total, hits = made.search("Annual leave")
        assert total == 2
        assert {hit.document.id for hit in hits} == {"deep/leave.md", "q1"}
        (before, found, after) = hits[0].passages[0]
        assert found == "Annual leave"
        assert (before + found + after).strip().startswith("Annual leave is")
        told = made.explain("We know: Annual leave is ")
        assert told.matched.endswith("Annual leave is ")
        assert told.counts[-1] == 2
        assert [one.text for one in told.continuations] == ["n", "t"]
        assert {h.document.id for h in told.hits} == {
            "deep/leave.md",
            "q1",
        }
        assert told.hits[0].document.extra["file_sha256"]
        made.delete(["q1"])
        total, hits = made.search("Annual leave")
        assert total == 1
        assert hits[0].document.id == "deep/leave.md"
        with pytest.raises(ConfigError, match="q1"):
            made.delete(["q1"])
        assert made.search("absent words") == (0, [])
        with pytest.raises(ConfigError, match="text is empty"):
            made.search("  ")
    with Library.open(tmp_path / "an index", tokenizer=tokenizer) as read:
        assert read.search("Orlando")[0] == 1
        ended = read.explain("called Orlando.")
        assert [one.text for one in ended.continuations] == [""]


def test_an_empty_index_explains_nothing(tokenizer, tmp_path):
    with Library.create(tmp_path / "i", tokenizer=tokenizer) as made:
        told = made.explain("anything")
        assert (told.depth, told.hits) == (0, ())
        assert not told.continuations
        assert made.search("anything") == (0, [])


def test_additions_are_committed_in_parts_and_go_on_where_they_stopped(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "COMMIT_CHARACTERS", 20)
    texts = [Text(id=f"t{k}", text=f"text number {k}") for k in range(7)]

    def broken():
        yield from texts[:5]
        raise KeyboardInterrupt

    seen = []
    with Library.create(tmp_path / "i", tokenizer=tokenizer) as made:
        with pytest.raises(KeyboardInterrupt):
            made.add(broken(), report=lambda documents, tokens: seen.append(documents))
        assert seen == [2, 4]
        assert ids_of(made.store) == ["t0", "t1", "t2", "t3"]
        with pytest.raises(ConfigError, match="t0"):
            made.add(texts)
        added = made.add(texts, existing="skip")
        assert (added.documents, added.skipped) == (3, 4)
        assert len(ids_of(made.store)) == 7
        added = made.add([Text(id="t1", text="other words")], existing="replace")
        assert (added.documents, added.replaced) == (1, 1)
        assert made.search("number 1")[0] == 0
        assert made.search("other words")[0] == 1


def test_a_folder_is_followed(folder, tokenizer, tmp_path):
    with Library.create(tmp_path / "i", tokenizer=tokenizer) as made:
        made.add([Text(id="elsewhere", text="stays")])
        first = made.sync(folder)
        assert (first.added, first.changed, first.removed, first.unchanged) == (5, 0, 0, 0)
        again = made.sync(folder)
        assert (again.added, again.changed, again.removed, again.unchanged) == (0, 0, 0, 5)
        generation = made.store.generation
        assert made.sync(folder).tokens == 0
        assert made.store.generation == generation
        (folder / "dog.txt").write_text("The dog is called Bruno.")
        (folder / "deep" / "leave.md").unlink()
        (folder / "faq.jsonl.gz").unlink()
        (folder / "new.rst").write_text("News.")
        changed = made.sync(folder)
        assert (changed.added, changed.changed, changed.removed, changed.unchanged) == (1, 1, 4, 0)
        assert made.store.generation == generation + 1
        assert ids_of(made.store) == ["dog.txt", "elsewhere", "new.rst"]
        assert made.search("Orlando")[0] == 0
        assert made.search("Bruno")[0] == 1
        for file in (folder / "dog.txt", folder / "new.rst"):
            file.unlink()
        assert made.sync(folder).removed == 2
        assert ids_of(made.store) == ["elsewhere"]
        with pytest.raises(DataError, match="is no folder"):
            made.sync(folder / "absent")


def test_tenants_see_their_own(tokenizer, tmp_path):
    with Library.create(tmp_path / "i", tokenizer=tokenizer) as made:
        made.add([Text(id="a", text="the plan of acme")], tenant="acme inc.")
        made.add([Text(id="a", text="the plan of globex")], tenant="globex")
        assert made.search("plan", tenant="acme inc.")[1][0].passages[0][2].strip() == "of acme"
        assert made.search("acme", tenant="globex") == (0, [])
        assert made.search("acme") == (0, [])


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    Library.create(tmp_path / "i", tokenizer=tokenizer).store.close()
    other = TextEncoder.of(tokenizer).backend
    other.add_tokens(["engram"])
    with pytest.raises(IdentityError, match="tokenizer"):
        Library.open(tmp_path / "i", tokenizer=other)
    (tmp_path / "i" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Library.open(tmp_path / "i")
    (tmp_path / "i" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Library.open(tmp_path / "i")
    with pytest.raises(ConfigError, match="fast one"):
        TextEncoder.of(object())


def test_ids_of_a_text_decode_to_it(tokenizer):
    encoder = TextEncoder.of(tokenizer)
    for text in ("", " a", "\n\n", "日本語 😀 ﷺ", "a\u2028b", "x" * 5000):
        assert encoder.decode(encoder.encode(text)) == text
        assert np.array_equal(encoder.encode_all([text])[0], encoder.encode(text))


# ---- commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tokenizer, tmp_path, capsys):
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    directory = tmp_path / "my index"
    assert cli.run(["index", "create", str(directory), "--model", str(tmp_path / "tok")]) == 0
    assert "an empty index of" in capsys.readouterr().out
    return str(directory)


def told(capsys, *tokens):
    """Exit code and JSON of a command."""
    code = cli.run([*tokens, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_commands_from_first_to_last(made, folder, capsys, monkeypatch):
    assert told(capsys, "index", "add", made, str(folder), "--licence", "CC BY 4.0")[1]["documents"] == 5
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"Ida is away.")))
    assert told(capsys, "index", "add", made, "-", "--id", "note")[1]["documents"] == 1
    assert told(capsys, "index", "search", made, "Annual leave")[1]["count"] == 2
    assert cli.run(["index", "search", made, "Annual leave"]) == 0
    printed = capsys.readouterr().out
    assert "found 2 times in 2 documents" in printed
    assert "...[Annual leave] is thirty days." in printed
    assert "licence: CC BY 4.0" in printed
    assert "title: Pay; licence: CC0" not in printed
    assert cli.run(["index", "explain", made, "The dog is called "]) == 0
    printed = capsys.readouterr().out
    assert "longest match: 18 tokens, 1 time" in printed
    assert "'O'" in printed
    assert "dog.txt  (1 time)" in printed
    _code, facts = told(capsys, "index", "explain", made, "The dog is called ")
    assert facts["continuations"][0]["text"] == "O"
    assert facts["hits"][0]["document"]["id"] == "dog.txt"
    assert told(capsys, "index", "delete", made, "dog.txt", "note")[1]["deleted"] == 2
    assert told(capsys, "index", "search", made, "Orlando")[1]["count"] == 0
    assert cli.run(["index", "delete", made, "dog.txt"]) == cli.REFUSED
    assert "dog.txt" in capsys.readouterr().err
    (folder / "dog.txt").write_text("The dog is called Bruno.")
    assert told(capsys, "index", "update", made, str(folder))[1]["replaced"] == 4
    assert told(capsys, "index", "sync", made, str(folder))[1]["unchanged"] == 5
    assert cli.run(["index", "stats", made]) == 0
    printed = capsys.readouterr().out
    assert "5 documents" in printed
    assert "compressed contexts" not in printed
    assert cli.run(["index", "stats", made, "--compressed"]) == 0
    assert "the channel of compressed contexts, in memory: 0.0" in capsys.readouterr().out
    assert told(capsys, "index", "stats", made, "--compressed")[1]["compressed_bytes"] > 1000
    assert told(capsys, "index", "stats", made)[1]["compressed_bytes"] is None
    assert told(capsys, "index", "merge", made)[1]["segments"] == 1
    assert told(capsys, "index", "verify", made)[0] == 0
    assert told(capsys, "index", "purge", made, "q1")[0] == 0
    stats = told(capsys, "index", "stats", made)[1]
    assert (stats["documents"], stats["dead_documents"], list(stats["tenants"])) == (4, 0, ["public"])


def test_what_a_text_has_word_for_word(made, folder, tmp_path, capsys):
    cli.run(["index", "add", made, str(folder)])
    (tmp_path / "said.txt").write_text(
        "I think annual leave is thirty days, as in 'The dog is called Orlando.'"
    )
    capsys.readouterr()
    facts = told(capsys, "index", "verbatim", made, str(tmp_path / "said.txt"))[1]
    by_text = {run["text"]: run["documents"] for run in facts["runs"]}
    assert by_text["The dog is called Orlando."] == [{"id": "dog.txt", "count": 1}]
    assert by_text["nnual leave is thirty days"] == [{"id": "deep/leave.md", "count": 1}]
    assert cli.run(["index", "verbatim", made, str(tmp_path / "said.txt"), "--shortest", "50"]) == 0
    assert "no run of 50 or more is a document's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["add", "{i}"], "PATHS requires an argument"),
        (["add", "{i}", "absent.txt"], "no such file or folder"),
        (["add", "absent-index", "{f}"], "absent-index holds no index. Make one"),
        (["search", "{i}", ""], "text is empty"),
        (["delete", "{i}", "nobody"], "nobody"),
        (["create", "{i}", "--model", "{t}"], "holds an index already"),
        (["sync", "{i}", "absent"], "is no folder"),
        (["verify", "absent"], "absent"),
    ],
)
def test_what_is_refused_is_one_line(made, folder, tmp_path, tokens, said, capsys):
    names = {"{i}": made, "{f}": str(folder), "{t}": str(tmp_path / "tok")}
    assert cli.run(["index", *(names.get(token, token) for token in tokens)]) == cli.REFUSED
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
