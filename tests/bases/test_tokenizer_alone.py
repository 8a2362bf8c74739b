"""A base's tokenizer without its weights: read from its file, by a base's names, with neither torch nor transformers."""

import json
import subprocess
import sys

import pytest

from engram_lm import cli
from engram_lm.bases import base, smollm2, tokenizer
from engram_lm.bases.recipes import byte_tokenizer
from engram_lm.bases.tokenizer import load_tokenizer
from engram_lm.errors import CheckpointError, ConfigError

WORDS = ["the", "office", "dog"]


def written(directory, words=WORDS):
    """A tokenizer.json of some words, in a directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(directory / "tokenizer.json"))
    return directory


def words_of(found):
    return sorted(found.get_vocab())


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def loaded(*given, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(base, "load_base", loaded)


@pytest.fixture
def cached_smollm2(tmp_path, monkeypatch):
    """A cache that holds smollm2 already."""
    directory = written(tmp_path / "cache", [*WORDS, "smollm2"])
    monkeypatch.setattr(smollm2, "smollm2_directory", lambda *, report: directory)


def test_a_directory_and_its_file_are_one_tokenizer(tmp_path):
    directory = written(tmp_path / "my model")
    for name in (directory, str(directory), directory / "tokenizer.json"):
        assert words_of(load_tokenizer(name)) == sorted(WORDS)


@pytest.mark.usefixtures("cached_smollm2")
def test_smollm2_is_taken_from_the_cache_whatever_lies_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "smollm2")
    assert "smollm2" in words_of(load_tokenizer("smollm2"))
    assert words_of(load_tokenizer("./smollm2")) == sorted(WORDS)


def test_a_first_use_fetches_and_says_so(tmp_path, monkeypatch):
    lines = []

    def fetched(*, report):
        report("fetching")
        return written(tmp_path / "fetched")

    monkeypatch.setattr(smollm2, "smollm2_directory", fetched)
    assert words_of(load_tokenizer("smollm2", report=lines.append)) == sorted(WORDS)
    assert lines == ["fetching"]


def test_a_scratch_base_has_bytes_as_its_tokenizer_does():
    pytest.importorskip("transformers")
    found, own = load_tokenizer("scratch:small"), byte_tokenizer()
    text = "naïve 日本  12\n<|end|>"
    assert found.encode(text).ids == own(text).input_ids
    assert found.get_vocab() == own.get_vocab()
    with pytest.raises(ConfigError, match="there are: tiny, small, base"):
        load_tokenizer("scratch:huge")


def test_a_model_without_the_file_is_left_to_transformers(tmp_path):
    pytest.importorskip("transformers")
    letters = {letter: n for n, letter in enumerate([*"abcd", "ab", "<|endoftext|>"])}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert load_tokenizer(tmp_path).encode("abcd").ids == [4, 2, 3]


def test_the_hub_s_file_is_asked_for_and_no_other(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(written(tmp_path / "hub") / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for cached_only in (False, True):
        named = tokenizer.FoundBase(name="org/name", kind="hub", cached_only=cached_only)
        monkeypatch.setattr(tokenizer, "find_base", lambda name, named=named: named)
        assert words_of(load_tokenizer("org/name")) == sorted(WORDS)
    assert asked == [
        ("org/name", "tokenizer.json", {"local_files_only": cached_only}) for cached_only in (False, True)
    ]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    for name, told in {
        "broken": "broken/tokenizer.json holds no tokenizer",
        "bare": "bare holds no config.json",
        "absent.json": "absent.json: no such file",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            load_tokenizer(tmp_path / name)


@pytest.mark.usefixtures("cached_smollm2")
def test_commands_take_smollm2_for_its_tokenizer_alone(tmp_path, capsys):
    assert cli.run(["index", "create", str(tmp_path / "notes"), "--model", "smollm2"]) == 0
    assert "an empty index of 4 token ids" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the office dog smollm2\n" * 4)
    simulate = ["table", "simulate", "--tokens", str(tmp_path / "text.txt"), "--profile", "qwen-ple"]
    assert cli.run([*simulate, "--eos-ids", "1", "--tokenizer", "smollm2", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")


def test_an_index_is_made_without_torch(tmp_path):
    written(tmp_path / "model")
    program = (
        "import sys\n"
        "from engram_lm import cli\n"
        "code = cli.run(['index', 'create', 'notes', '--model', 'model'])\n"
        "code += cli.run(['index', 'create', 'bytes', '--model', 'scratch:tiny'])\n"
        "sys.exit(str(sorted({'torch', 'transformers'} & set(sys.modules)) or '') or code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "notes: an empty index of 3 token ids",
        "bytes: an empty index of 258 token ids",
    ]
