"""A memory's directory: one save or none, also where saves are killed or mixed by hand."""

import json
import os
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from engram_lm.attachment import files as module
from engram_lm.attachment import from_pretrained, load_memory, memories, save_memory
from engram_lm.errors import CheckpointError, IdentityError, RowUpdateError
from models import build, give_memory, make_loud

IDS = torch.arange(2, 22)[None]


def changed(model, *, seed):
    """The same model after what stands for training: other rows, and another base."""
    make_loud(model, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def model():
    return give_memory(build("llama"))


def test_a_save_replaces_the_one_before_it_base_included(model, tmp_path):
    save_memory(model, tmp_path)
    for seed in (2, 3):
        save_memory(changed(model, seed=seed), tmp_path)
        assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    assert not list(tmp_path.glob(".*"))


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("moment", ["after the base", "before the moves"])
def test_a_save_that_ends_early_leaves_the_one_before_it(moment, model, tmp_path, monkeypatch):
    save_memory(model, tmp_path)
    before = logits(model)
    listed = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def stop(*args, **kwargs):
        raise KilledError

    monkeypatch.setattr(module, "_remove", lambda path: None)  # a killed process tidies nothing
    if moment == "after the base":
        kept = module._save_base
        monkeypatch.setattr(module, "_save_base", lambda *args: (kept(*args), stop()))
    else:
        monkeypatch.setattr(os, "replace", stop)
        monkeypatch.setattr(
            type(next(iter(memories(model).values())).token_map), "save", lambda self, path: path.touch()
        )
    with pytest.raises(KilledError):
        save_memory(changed(model, seed=2), tmp_path)
    monkeypatch.undo()
    assert torch.equal(logits(from_pretrained(tmp_path)), before)
    save_memory(model, tmp_path)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == listed


def test_the_base_of_another_save_is_refused(model, tmp_path):
    save_memory(model, tmp_path / "first")
    save_memory(changed(model, seed=2), tmp_path / "second")
    shutil.rmtree(tmp_path / "first" / "base")
    shutil.copytree(tmp_path / "second" / "base", tmp_path / "first" / "base")
    with pytest.raises(CheckpointError, match=r"base belongs to another save than memory\.json"):
        from_pretrained(tmp_path / "first")


def test_a_config_edited_by_hand_is_refused(model, tmp_path):
    save_memory(model, tmp_path)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    manifest["memories"][0]["config"]["gate"] = "plain"
    (tmp_path / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises(IdentityError, match=r"memory\.safetensors was saved with config"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("base"),
        lambda m: m.pop("save_id"),
        lambda m: m.update(memories=5),
        lambda m: m["memories"][0]["tables"].pop(),
        lambda m: m["memories"][0]["tables"][0].update(updates="x"),
        lambda m: m["memories"][0]["config"].update(name=3),
    ],
)
def test_a_damaged_manifest_is_one_clear_error(edit, model, tmp_path):
    save_memory(model, tmp_path)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    edit(manifest)
    (tmp_path / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises((CheckpointError, IdentityError), match=r"memory\.json"):
        from_pretrained(tmp_path)


def test_a_number_of_updates_that_the_weights_do_not_carry_is_refused(model, tmp_path):
    save_memory(model, tmp_path)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    manifest["memories"][0]["tables"][0]["updates"] = 77
    (tmp_path / "memory.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="the weights carry 0 row updates"):
        from_pretrained(tmp_path)


def test_a_swapped_tokenizer_is_refused_and_an_added_token_is_not(model, tmp_path):
    save_memory(model, tmp_path)
    kept = logits(from_pretrained(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), kept)
    text = (tmp_path / "tokenizer.json").read_text()
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    vocab["x"], vocab["7"] = vocab["7"], vocab["x"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(IdentityError, match="its ids mean other text"):
        from_pretrained(tmp_path)


def test_a_pickle_of_the_whole_model_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"Use model\.save_pretrained\(directory\)"):
        torch.save(model, tmp_path / "model.pt")


def test_row_state_that_was_saved_must_be_there(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    save_memory(model, tmp_path, row_state=True)
    for path in tmp_path.glob("state-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"state-.* is missing"):
        load_memory(model, tmp_path, row_state=True)
    load_memory(model, tmp_path)


def test_a_disk_that_is_full_is_one_clear_error_and_leaves_the_save_before(model, tmp_path, monkeypatch):
    save_memory(model, tmp_path)
    before = logits(model)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device\. What was there before is untouched"
    ):
        save_memory(changed(model, seed=2), tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), before)


def test_another_models_optimizer_may_step_in_between(model):
    other = torch.nn.Linear(2, 2)
    strange = torch.optim.SGD(other.parameters(), lr=0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    other(torch.randn(1, 2)).sum().backward()
    strange.step()
    model(IDS, labels=IDS).loss.backward()
    lost = torch.optim.SGD([model.lm_head.weight, *model.model.layers.parameters()], lr=0.1)
    lost.step()
    with pytest.raises(RowUpdateError, match="SGD stepped without its handle"):
        model(IDS, labels=IDS)
