"""A memory's directory: one save or none, also where saves are killed or mixed by hand."""

import os
import shutil

import pytest
import torch

from engram_lm.attachment import files as module
from engram_lm.attachment import from_pretrained, memories, save_memory
from engram_lm.errors import CheckpointError
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
