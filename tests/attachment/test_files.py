"""A memory's directory: one save or none, also where saves are killed or mixed by hand."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from engram_lm.attachment import MemoryConfig, attach, from_pretrained, load_memory, memories, save_memory
from engram_lm.attachment import saving as module
from engram_lm.bases.base import load_base
from engram_lm.errors import CheckpointError, IdentityError, RowUpdateError, StateError
from models import build, give_memory, make_loud, tokenizer

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


# ---- two training runs with equal counts -----------------------------------------------------------------------------


def trained(model, *, seed, steps=2):
    """The model after `steps` updates on text of its own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(2, 258, (1, 16), generator=generator)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run_of(model):
    return [table.gradients.run for memory in memories(model).values() for table in memory.tables]


@pytest.fixture
def two_runs():
    return [trained(give_memory(build("llama")), seed=seed) for seed in (1, 2)]


OTHER_RUN = "both saved after 2 row updates, of different training runs"


@pytest.mark.parametrize(
    "change",
    [
        lambda ours, theirs: theirs,
        lambda ours, theirs: theirs.bfloat16(),
        lambda ours, theirs: (ours + theirs) / 2,
        lambda ours, theirs: (0.25 * ours.double() + 0.75 * theirs.double()).to(ours.dtype),
    ],
)
def test_the_weights_of_another_run_with_an_equal_count_are_refused(change, two_runs, tmp_path):
    ours, theirs = two_runs
    own = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.load_state_dict({name: change(own[name], tensor) for name, tensor in theirs.state_dict().items()})
    for _ in range(2):
        with pytest.raises(StateError, match=OTHER_RUN):
            logits(ours)
    with pytest.raises(StateError, match=OTHER_RUN):
        save_memory(ours, tmp_path)
    ours.load_state_dict(own)
    logits(ours)
    ours.load_state_dict({name: tensor.bfloat16() for name, tensor in own.items()})
    logits(ours)


def test_weights_of_before_there_was_a_number_are_taken_by_their_count(two_runs):
    ours = two_runs[0]
    old = {name: x for name, x in ours.state_dict().items() if not name.endswith("_extra_state")}
    assert len(old) < len(ours.state_dict())
    ours.load_state_dict(old)
    logits(ours)
    fresh = give_memory(build("llama"))
    fresh.load_state_dict(old)
    with pytest.raises(
        StateError, match="saved after 2 row updates, but the rows of memory at block 1 carry 0"
    ):
        logits(fresh)


def test_a_run_keeps_its_number_where_it_goes_on_and_loses_it_where_two_part(two_runs, tmp_path):
    ours, theirs = two_runs
    assert len({*run_of(ours), *run_of(theirs)}) == 4
    save_memory(ours, tmp_path, row_state=True)
    copies = [from_pretrained(tmp_path) for _ in range(3)]
    assert all(run_of(copy) == run_of(ours) for copy in copies)
    for one, seed in zip(copies, (5, 5, 6), strict=True):
        load_memory(one, tmp_path, row_state=True)
        trained(one, seed=seed, steps=1)
    assert run_of(copies[0]) == run_of(copies[1])
    assert run_of(copies[0]) != run_of(copies[2])
    copies[0].load_state_dict(copies[1].state_dict())
    logits(copies[0])
    copies[0].load_state_dict(copies[2].state_dict())
    with pytest.raises(StateError, match="of different training runs"):
        logits(copies[0])


@pytest.mark.parametrize(
    "name", ["memory.safetensors", "rows-memory-1.safetensors", "state-memory-2.safetensors"]
)
def test_a_file_of_another_run_with_an_equal_count_is_refused_whatever_its_save_id(name, two_runs, tmp_path):
    """As someone makes it fit who takes the save ids for all that stands in the way."""
    for model, where in zip(two_runs, ("ours", "theirs"), strict=True):
        save_memory(model, tmp_path / where, row_state=True)
    ours = tmp_path / "ours"
    manifest = json.loads((ours / "memory.json").read_text())
    with safe_open(tmp_path / "theirs" / name, "pt") as file:
        tensors, marks = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, ours / name, metadata={**marks, "save_id": manifest["save_id"]})
    model = give_memory(build("llama"))
    with pytest.raises(CheckpointError, match=rf"{name} comes from another training run than memory\.json"):
        load_memory(model, ours, row_state=True)
    assert run_of(model) == [0, 0]


def test_a_memory_saved_before_there_was_a_number_loads_and_trains_on(two_runs, tmp_path):
    save_memory(two_runs[0], tmp_path, row_state=True)
    manifest = json.loads((tmp_path / "memory.json").read_text())
    for table in manifest["memories"][0]["tables"]:
        del table["run"]
    (tmp_path / "memory.json").write_text(json.dumps(manifest))
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors, marks = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        assert marks.pop("run", None)
        save_file(tensors, path, metadata=marks)
    model = from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(two_runs[0]))
    assert run_of(model) == [0, 0]
    trained(model, seed=3, steps=1)
    assert all(run_of(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's use of transformers
def test_the_adapter_of_another_save_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for seed, where in enumerate(("ours", "theirs")):
        base = load_base(str(tmp_path / "base"), report=lambda line: None)
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = attach(
            peft.get_peft_model(base.model, lora),
            base.tokenizer,
            MemoryConfig(layers=(1,), rows_per_head=53, head_width=4, heads=1),
            base=base.ref,
        )
        save_memory(model, tmp_path / where)
    from_pretrained(tmp_path / "ours")
    shutil.copytree(tmp_path / "theirs" / "adapter", tmp_path / "ours" / "adapter", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"adapter belongs to another save than memory\.json"):
        from_pretrained(tmp_path / "ours")
