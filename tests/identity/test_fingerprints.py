"""Which tokenizer it is, by what it does: writings that change no id are one tokenizer, one changed id is another."""

import json
import re
import shutil
import unicodedata

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engram_lm.errors import IdentityError
from engram_lm.identity import print_of, tokenizer_fingerprint
from engram_lm.identity.probe import probe
from engram_lm.identity.tokenizers import first_difference, without_tokens_since
from engram_lm.identity.writings import first_print, first_prints
from engram_lm.library.encoding import FILE, TextEncoder
from engram_lm.library.library import Library
from engram_lm.mixing.identity import as_the_gate_says
from engram_lm.vocab import TokenMap
from places import GOLDEN

GOLDEN = GOLDEN / "first-prints"
# text and all of `byte_level()`
PINNED = (
    "509e80921601552edc19fc66cf1f41931fefc889c5f9d410209619bf2cd01c93",
    "6ad9b50fbee054661ca335e51a63a45821aae2d2694f24bee45ded27a1315946",
)
# how many texts, and 16 digits of their sha256
PROBE = (13_931, "693ea67d74574060")
TEXTS = ["The cat, the Cat and THE CAT sat on Él and él, 1984 of them. " * 5, "def f(x):\n    return x\n" * 5]


def byte_level(**pre):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )  # fmt: skip
    return tokenizer


def metaspace(*, always=True):
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("a", -1.0), ("b", -1.1)], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if always else "never")
    return tokenizer


def rewritten(tokenizer, change):
    facts = json.loads(tokenizer.to_str())
    change(facts)
    return Tokenizer.from_str(json.dumps(facts))


class Written:
    """A tokenizer of another release of the library: only its writing is known."""

    get_vocab = decode = id_to_token = None

    def __init__(self, tokenizer, change):
        self.facts = json.loads(tokenizer.to_str())
        change(self.facts)

    def to_str(self):
        return json.dumps(self.facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
        lambda facts: facts["model"].update(merges=[" ".join(m) for m in facts["model"]["merges"]]),
        lambda facts: facts["model"].update(dropout=0.3),
        lambda facts: facts.update(
            truncation={"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
        ),
        lambda facts: facts.update(decoder={"type": "Fuse"}),
        lambda facts: facts["added_tokens"][0].update(special=False),
        # two writings of one pre-tokeniser
        lambda facts: facts.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [facts["pre_tokenizer"]]},
            normalizer={"type": "Sequence", "normalizers": []},
        ),
    ],
    ids=["empty for null", "merges as strings", "dropout", "truncation", "decoder", "special", "sequences"],
)
def test_writings_that_move_no_id_are_one_tokenizer(change):
    plain = byte_level()
    found, wanted = print_of(Written(plain, change)), print_of(plain)
    assert (found.text, found.all, found.n_tokens) == (wanted.text, wanted.all, wanted.n_tokens)


def test_how_a_tokenizer_is_written_did_count_in_first_prints():
    """What the second print mends: this is why an old hash is looked for in several writings."""
    plain = byte_level()
    empty = Written(
        plain, lambda facts: facts["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    )
    assert first_print(json.loads(plain.to_str())) != first_print(empty.facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
        lambda t: setattr(t, "normalizer", normalizers.Replace("\u00ad", "")),
        lambda t: setattr(t, "normalizer", normalizers.StripAccents()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        lambda t: setattr(
            t, "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), t.pre_tokenizer]),
        ),
        lambda t: setattr(
            t, "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+"), "isolated"), t.pre_tokenizer]),
        ),
        lambda t: t.add_tokens(["Zoomba"]),
        lambda t: t.add_tokens([AddedToken("cat", lstrip=True)]),
    ],
    ids=["lower", "NFC", "soft hyphen", "accents", "prefix", "no regex", "digits", "blanks", "word", "strip"],
)  # fmt: skip
def test_what_moves_an_id_is_another_tokenizer(change):
    plain, other = byte_level(), byte_level()
    change(other)
    assert print_of(plain).text != print_of(other).text
    assert print_of(plain).all != print_of(other).all


def test_merges_and_scores_count_even_where_no_text_shows_them():
    plain = byte_level()
    swapped = rewritten(plain, lambda facts: facts["model"].update(merges=facts["model"]["merges"][::-1]))
    assert print_of(swapped).text != print_of(plain).text
    other = rewritten(metaspace(), lambda facts: facts["model"]["vocab"][4].__setitem__(1, -1.2))
    assert print_of(other).text != print_of(metaspace()).text
    # float32 is what other files keep of a score
    near = rewritten(metaspace(), lambda facts: facts["model"]["vocab"][4].__setitem__(1, -1.1 + 1e-12))
    assert print_of(near).text == print_of(metaspace()).text


def test_a_marker_that_was_added_changes_no_text():
    plain, marked = byte_level(), byte_level()
    marked.add_special_tokens(["<|mine|>"])
    marked.add_tokens(["<tool_call>"])
    assert print_of(marked).text == print_of(plain).text
    assert print_of(marked).all != print_of(plain).all
    assert print_of(marked).n_tokens == print_of(plain).n_tokens + 2
    assert without_tokens_since(print_of(marked), print_of(plain).n_tokens).all == print_of(plain).all
    exchanged = byte_level()
    exchanged.add_tokens(["<tool_call>"])
    exchanged.add_special_tokens(["<|mine|>"])
    assert print_of(exchanged).all != print_of(marked).all


def test_a_short_text_that_tells_two_apart():
    assert first_difference(byte_level(), byte_level()) is None
    grown = byte_level()
    grown.add_tokens(["Zoomba"])
    assert first_difference(byte_level(), grown) == "Zoomba"
    assert first_difference(metaspace(), metaspace(always=False)) == "1"


def test_a_blank_that_a_text_begins_with_is_not_asked():
    """A Llama or Mistral directory's own rule puts a blank in front of every text; what transformers rebuilds, of every text
    that has none. No other id differs."""
    facts = json.loads(metaspace().to_str())
    facts["pre_tokenizer"] = None
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    facts["normalizer"] = {"type": "Sequence", "normalizers": steps}
    file = Tokenizer.from_str(json.dumps(facts))
    facts["normalizer"] = None
    facts["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False
    }  # fmt: skip
    rebuilt = Tokenizer.from_str(json.dumps(facts))
    assert file.encode(" a").ids != rebuilt.encode(" a").ids
    assert print_of(file).text == print_of(rebuilt).text
    assert print_of(metaspace(always=False)).text != print_of(rebuilt).text


def test_tokenizers_of_other_kinds_have_prints():
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    prints = {print_of(tokenizer).text for tokenizer in (pieces, words, metaspace(), byte_level())}
    assert len(prints) == 4


def test_prints_are_pinned():
    """Stored in indexes, gates and tables for ever: another value here is a third print."""
    found = print_of(byte_level())
    assert (found.text, found.all) == PINNED


def test_the_probe_is_frozen():
    """The same text in every Python: made of code points that Unicode had assigned by 2021."""
    texts = probe()
    assert (len(texts), hash_of(texts)) == PROBE
    signs = {sign for text in texts for sign in text}
    if unicodedata.unidata_version == "14.0.0":
        assigned = {chr(c) for c in range(0xF0000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")}
        assert assigned <= signs
    assert all(unicodedata.category(sign) != "Cn" for sign in signs)


def hash_of(texts):
    import hashlib

    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def test_prints_are_kept_by_what_was_serialised(tmp_path, monkeypatch):
    from engram_lm.identity import tokenizers as module

    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    module._print_of.cache_clear()
    first = print_of(byte_level())
    kept = list(tmp_path.glob("fingerprints/*/*.json"))
    assert len(kept) == 1
    module._print_of.cache_clear()
    monkeypatch.setattr(module, "_take", lambda facts: pytest.fail("taken twice"))
    assert print_of(byte_level()) == first
    monkeypatch.undo()
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    for damage in (b"", b"{", kept[0].read_bytes().replace(b'"all": "', b'"all": "x')):
        kept[0].write_bytes(damage)
        module._print_of.cache_clear()
        assert print_of(byte_level()) == first
    monkeypatch.setenv("ENGRAM_CACHE", "/proc/nowhere")
    module._print_of.cache_clear()
    assert print_of(byte_level()) == first
    module._print_of.cache_clear()


# ---- what older files hold ------------------------------------------------------------------------------------------------


def test_an_old_hash_is_known_in_each_writing(tmp_path):
    plain = byte_level()
    empty = Written(
        plain, lambda facts: facts["model"].update(continuing_subword_prefix="", end_of_word_suffix="")
    )
    for old in (first_print(json.loads(plain.to_str())), first_print(empty.facts)):
        assert print_of(plain).is_the_one_of(old)
    other = byte_level()
    other.normalizer = normalizers.Lowercase()
    assert not print_of(other).is_the_one_of(first_print(json.loads(plain.to_str())))
    assert not print_of(plain).is_the_one_of("0" * 64)


def test_an_old_hash_of_the_file_is_known_where_transformers_rebuilds_it(tmp_path):
    """Qwen2's class writes another pre-tokeniser and decoder than the file holds; every id is the same."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    facts = json.loads(byte_level().to_str())
    made = Qwen2Tokenizer(vocab=facts["model"]["vocab"], merges=[tuple(m) for m in facts["model"]["merges"]])
    made.save_pretrained(tmp_path)
    file = tmp_path / FILE
    facts = json.loads(file.read_text())
    facts["decoder"]["trim_offsets"] = not facts["decoder"]["trim_offsets"]
    file.write_text(json.dumps(facts))
    raw, rebuilt = Tokenizer.from_file(str(file)), AutoTokenizer.from_pretrained(tmp_path)
    old = first_print(json.loads(raw.to_str()))
    assert old != first_print(json.loads(rebuilt.backend_tokenizer.to_str()))
    assert print_of(rebuilt).text == print_of(raw).text
    assert print_of(rebuilt).is_the_one_of(old)
    # the file is believed only where it is the same tokenizer
    facts["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(facts))
    changed = first_print(json.loads(Tokenizer.from_file(str(file)).to_str()))
    assert not print_of(rebuilt).is_the_one_of(changed)


def test_the_shipped_gate_knows_its_tokenizer_in_both_writings():
    from engram_lm.mixing.gate import Gate

    plain = byte_level()
    gate = type("G", (), {"tokenizer": next(iter(first_prints(print_of(plain))))})
    assert as_the_gate_says(gate, plain) == gate.tokenizer
    other = byte_level()
    other.normalizer = normalizers.Lowercase()
    assert as_the_gate_says(gate, other) == print_of(other).text
    assert Gate  # the class whose `require` compares the two


def test_what_the_first_version_wrote_is_read(tmp_path):
    """An index and two token maps, made of `byte_level()` with "" where it has null, by the version before these prints."""
    shutil.copytree(GOLDEN / "index", tmp_path / "index")
    old = (GOLDEN / "fingerprint.txt").read_text().strip()
    assert old != first_print(json.loads(byte_level().to_str()))
    with Library.open(tmp_path / "index", tokenizer=byte_level()) as library:
        assert library.store.tokenizer == old
        _, hits = library.search("sat on 1984")
        assert [hit.document.id for hit in hits] == ["cat.md"]
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    for name in ("compressed.bin", "raw.bin"):
        loaded = TokenMap.load(GOLDEN / name)
        assert (loaded.tokenizer_fingerprint, loaded.n_tokens) == (old, 0)
        loaded.require_tokenizer(byte_level(), where="here")
        with pytest.raises(IdentityError, match="its ids mean other text"):
            loaded.require_tokenizer(lower, where="here")


# ---- where prints are compared --------------------------------------------------------------------------------------------


def test_an_index_is_read_by_its_own_tokenizer(tmp_path):
    plain = byte_level()
    Library.create(tmp_path / "i", tokenizer=plain).store.close()
    rebuilt = rewritten(plain, lambda facts: facts.update(decoder={"type": "Fuse"}))
    rebuilt.add_special_tokens(["<|turn|>"])
    with Library.open(tmp_path / "i", tokenizer=rebuilt) as library:
        assert library.encoder.decode(library.encoder.encode("The cat")) == "The cat"
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(
        IdentityError, match=r"another tokenizer than this model's, '.+' for one becomes other ids"
    ):
        Library.open(tmp_path / "i", tokenizer=lower)
    TextEncoder.of(lower).save(tmp_path / "i")
    with pytest.raises(IdentityError, match="it was exchanged"):
        Library.open(tmp_path / "i")


def test_an_index_without_a_tokenizer_file_asks_its_manifest(tmp_path):
    from engram_lm.index.store import Index

    plain = byte_level()
    for number, label in enumerate((first_print(json.loads(plain.to_str())), tokenizer_fingerprint(plain))):
        Index.create(tmp_path / str(number), vocab_size=330, tokenizer=label).close()
        Library.open(tmp_path / str(number), tokenizer=plain).store.close()
        lower = byte_level()
        lower.normalizer = normalizers.Lowercase()
        with pytest.raises(IdentityError, match="holds tokens of the tokenizer"):
            Library.open(tmp_path / str(number), tokenizer=lower)


@pytest.mark.parametrize("kind", ["compressed", "raw"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_table_refuses_other_text_and_takes_added_tokens(kind, version, tmp_path):
    plain = byte_level()
    made = TokenMap.from_tokenizer(plain) if kind == "compressed" else TokenMap.raw(plain)
    if version == 1:  # as older files hold it
        made = TokenMap(made.canonical, kind, first_print(json.loads(plain.to_str())))
    made.save(tmp_path / "tokens.bin")
    assert (tmp_path / "tokens.bin").read_bytes()[8] == version
    loaded = TokenMap.load(tmp_path / "tokens.bin")
    assert loaded == made
    assert loaded.n_tokens == made.n_tokens
    loaded.require_tokenizer(plain, where="here")
    grown = byte_level()
    grown.add_special_tokens(["<|mine|>"])
    grown.add_tokens(["Zoomba"])
    loaded.require_tokenizer(grown, where="here")
    for change in (
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
    ):
        other = byte_level()
        change(other)
        with pytest.raises(IdentityError, match="its ids mean other text"):
            loaded.require_tokenizer(other, where="here")
        other.add_tokens(["Zoomba"])
        with pytest.raises(IdentityError, match="its ids mean other text"):
            loaded.require_tokenizer(other, where="here")


def test_a_table_refuses_markers_that_changed_places(tmp_path):
    one, other = byte_level(), byte_level()
    one.add_special_tokens(["<|a|>", "<|b|>"])
    other.add_special_tokens(["<|b|>", "<|a|>"])
    assert print_of(one).text == print_of(other).text
    with pytest.raises(IdentityError, match="its ids mean other text"):
        TokenMap.raw(one).require_tokenizer(other, where="here")


def test_a_pickled_map_leaves_the_tokenizers_text_behind():
    import pickle

    made = TokenMap.raw(byte_level())
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert re.search(b"pre_tokenizer", pickle.dumps(made)) is None
