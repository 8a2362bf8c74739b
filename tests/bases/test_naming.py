"""What a model's name means: found without torch, the hub asked once, and a mistyped name answered with the right one."""

import json
import socket
import subprocess
import sys

import pytest

from engram_lm.bases.naming import FoundBase, find_base, find_model, require_memory
from engram_lm.errors import CheckpointError, ConfigError

hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors  # noqa: E402


@pytest.fixture
def lookups(tmp_path, monkeypatch):
    """A machine without a network and with an empty hub cache: the hosts that were looked up."""
    asked = []

    def getaddrinfo(host, *rest, **more):
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture
def answered(monkeypatch):
    """Makes the hub answer with an error, or well; the calls that it got."""
    calls = []

    def answer(error=None):
        def metadata(url, **options):
            calls.append((url, options))
            if error is not None:
                raise error

        monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)

    answer.calls = calls
    return answer


def hub_error(kind, status):
    """An error of the hub's library, with an answer of whichever transport it is built on."""
    (transport,) = {base.__module__.partition(".")[0] for base in kind.__mro__} - {
        "huggingface_hub",
        "builtins",
    }
    made = sys.modules[transport]
    return kind("no", response=made.Response(status, request=made.Request("HEAD", "https://hub/x")))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "smollm2"),
        ("SmolLM2", "smollm2"),
        ("smollm2-135m-instruct", "smollm2"),
        ("scratch", "scratch:tiny"),
        ("scratch-small", "scratch:small"),
        ("scrach:small", "scratch:small"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_right_one_and_nobody_is_asked(name, meant, lookups):
    with pytest.raises(CheckpointError, match=rf"^'{name}' names no base\. Did you mean {meant}\? Wanted "):
        find_base(name)
    assert lookups == []


@pytest.mark.parametrize("name", ["org/name", "gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_a_hub_that_is_not_reached_is_tried_once(name, lookups):
    with pytest.raises(
        CheckpointError,
        match=rf"^'{name}' is no directory, and not in the hub's cache on this machine; https://\S+ could not be reached "
        r"\(.*Name or service not known.*; one try of at most 5 s\)\.",
    ) as refusal:
        find_base(name)
    assert len(lookups) == 1
    assert ("Did you mean smollm2?" in str(refusal.value)) == ("Smol" in name)


def test_the_hub_gets_five_seconds_or_what_its_own_variable_says(lookups, answered, monkeypatch):
    answered()
    assert find_base("org/name") == FoundBase(name="org/name", kind="hub")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "60")
    find_base("org/name")
    assert [options for _, options in answered.calls] == [{"timeout": 5.0}, {"timeout": 60.0}]
    assert all(url.endswith("/org/name/resolve/main/config.json") for url, _ in answered.calls)


@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        (errors.RepositoryNotFoundError, 404, "has no public model of that name"),
        (errors.GatedRepoError, 403, "who were granted access"),
        (errors.HfHubHTTPError, 503, "answered with status 503"),
    ],
)
def test_what_the_hub_says_is_told(kind, status, told, lookups, answered):
    answered(hub_error(kind, status))
    with pytest.raises(CheckpointError, match=told):
        find_base("org/name")


def test_a_model_without_config_json_is_left_to_transformers(lookups, answered):
    answered(errors.EntryNotFoundError("no config.json"))
    assert not find_base("org/adapter").cached_only


def test_an_offline_process_asks_nobody(lookups, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="was not asked, as HF_HUB_OFFLINE is set"):
        find_base("org/name")
    assert lookups == []


def test_no_setting_of_the_process_is_changed(lookups, monkeypatch):
    import os

    before = (dict(os.environ), {name: getattr(constants, name) for name in dir(constants) if name.isupper()})
    with pytest.raises(CheckpointError):
        find_base("org/name")
    assert before == (
        dict(os.environ),
        {name: getattr(constants, name) for name in dir(constants) if name.isupper()},
    )
    assert socket.getdefaulttimeout() is None


@pytest.fixture
def cached(tmp_path):
    """A small model in the hub's cache, as the hub's library lays it."""
    pytest.importorskip("torch")
    from models import build, tokenizer

    place = tmp_path / "hub" / "models--org--small"
    snapshot = place / "snapshots" / ("a" * 40)
    build("llama").save_pretrained(snapshot)
    tokenizer().save_pretrained(snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


@pytest.mark.usefixtures("cached")
def test_a_cached_model_is_loaded_though_the_hub_is_not_reached(lookups):
    from engram_lm.bases.base import load_base
    from engram_lm.bases.tokenizer import load_tokenizer

    assert find_base("org/small") == FoundBase(name="org/small", kind="hub", cached_only=True)
    before = len(lookups)
    base = load_base("org/small", report=lambda line: None)
    assert (base.ref.name, base.ref.kind) == ("org/small", "hub")
    assert len(lookups) == before + 1
    assert load_tokenizer("org/small").get_vocab() == base.tokenizer.get_vocab()
    assert len(lookups) == before + 2


def test_directories_and_files_that_are_no_base_are_told_apart(tmp_path, lookups):
    (tmp_path / "models" / "handbook").mkdir(parents=True)
    (tmp_path / "a.gguf").write_text("x")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.json").write_text("{}")
    for name, told in {
        "./models/handbok": r"no such directory\. Did you mean models/handbook\?",
        "./models/other": r"no such directory\. Wanted",
        "a/b/c": "no such directory",
        "~/base": "no such directory",
        "models/handbook": "holds no config.json",
        "memory": "holds a memory, not a base",
        "a.gguf": "is a file",
        "two words": "'two words' names no base. Wanted",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            find_base(name)
    with pytest.raises(ConfigError, match="there are: tiny, small, base"):
        find_base("scratch:tinny")
    assert lookups == []


def test_every_kind_of_base_is_found(tmp_path, lookups):
    for file in ("config.json", "adapter_config.json"):
        (tmp_path / file).mkdir()
        (tmp_path / file / file).write_text("{}")
        assert find_base(tmp_path / file).kind == "local"
    assert [find_base(name).kind for name in ("smollm2", "scratch:tiny")] == ["smollm2", "scratch"]
    assert lookups == []


# ---- memories --------------------------------------------------------------------------------------------------------


def saved(directory, base, kept):
    directory.mkdir()
    (directory / "memory.json").write_text(json.dumps({"base": {"name": base}, "base_files": kept}))
    return directory


def test_a_memory_whose_base_is_not_to_be_had_is_told_before_it_is_loaded(tmp_path, lookups):
    find_model(saved(tmp_path / "whole", "org/gone", "base"))
    find_model(saved(tmp_path / "ours", "smollm2", None))
    with pytest.raises(CheckpointError, match="bare belongs to the base 'org/gone', which cannot be loaded"):
        find_model(saved(tmp_path / "bare", "org/gone", None))
    with pytest.raises(CheckpointError, match=r"belongs to the base '\./moved'"):
        find_model(saved(tmp_path / "adapter", "./moved", "adapter"))
    assert len(lookups) == 1


def test_a_base_has_no_memory_yet_and_the_next_step_is_said(tmp_path, lookups):
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text("{}")
    for name, typed in {
        "smollm2": "smollm2",
        "scratch:tiny": "scratch:tiny",
        "my model": "'my model'",
    }.items():
        with pytest.raises(
            CheckpointError,
            match=f"{name} has no memory yet. Train one: `engram-lm train {typed} --data FILES --out my-memory`; or see one "
            "that is trained: `engram-lm demo`. Or so.",
        ):
            require_memory(name, instead=" Or so.")
    (tmp_path / "my-memory").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name, told in {
        "my-memroy": "no such directory. Did you mean my-memory?",
        "my-memory": "holds no memory: memory.json is missing",
        "notes.txt": "is a file",
    }.items():
        with pytest.raises(CheckpointError, match=told):
            require_memory(name)


def test_finding_imports_neither_torch_nor_transformers():
    program = (
        "import sys\n"
        "from engram_lm.bases.naming import find_base\n"
        "import engram_lm\n"
        "for name in ('smolm2', 'org/name', './nowhere'):\n"
        "    for find in (find_base, engram_lm.load_base):\n"
        "        try: find(name)\n"
        "        except engram_lm.errors.CheckpointError: continue\n"
        "        sys.exit(name)\n"
        "sys.exit(str({'torch', 'transformers', 'numba'} & set(sys.modules) or 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "0"), done.stderr
