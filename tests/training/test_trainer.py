"""MemoryTrainer in the hands of someone who writes their own training script, and the stock Trainer beside it."""

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

import engram_lm  # noqa: E402
from engram_lm.bases.recipes import Recipe, build_model, byte_tokenizer  # noqa: E402
from engram_lm.config import MemoryConfig  # noqa: E402
from engram_lm.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    ModelError,
    RowUpdateError,
    StateError,
)
from engram_lm.storage import TableWriter  # noqa: E402
from engram_lm.tables import LoggedTable  # noqa: E402
from engram_lm.training.trainer import WHOLE, MemoryTrainer, last_checkpoint, load_checkpoint  # noqa: E402

RECIPE = Recipe(
    name="doll", vocab_size=258, hidden_size=32, layers=2, heads=2, key_value_heads=1, intermediate_size=64
)


class Lines(torch.utils.data.Dataset):
    """Random ids with a rhythm that an N-gram memory can learn."""

    def __init__(self, size=24, length=16):
        ids = torch.randint(2, 258, (4, length), generator=torch.Generator().manual_seed(1))
        self.ids = [ids[i % 4] for i in range(size)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_model():
    tokenizer = byte_tokenizer()
    model = build_model(RECIPE, tokenizer=tokenizer)
    config = MemoryConfig(layers=(1,), heads=2, rows_per_head=101, head_width=8)
    torch.manual_seed(3)
    return engram_lm.attach(model, tokenizer, config)


def arguments(out, **options):
    chosen = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 3e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return TrainingArguments(**chosen | options)


def rows_of(model):
    return engram_lm.memories(model)["memory"].tables[0].rows_view().clone()


def test_checkpoints_hold_rows_and_go_on_bit_for_bit(tmp_path):
    whole = a_model()
    MemoryTrainer(whole, arguments(tmp_path / "a"), train_dataset=Lines()).train()
    trainer = MemoryTrainer(a_model(), arguments(tmp_path / "a"), train_dataset=Lines())
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    # as a kill while checkpoint 6 was being written leaves it
    shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "a" / "checkpoint-6")
    (tmp_path / "a" / "checkpoint-6" / WHOLE).unlink()
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-4"
    trainer.train(resume_from_checkpoint=True)
    assert rows_of(whole).abs().sum() > 0
    assert torch.equal(rows_of(trainer.model), rows_of(whole))
    for (name, one), other in zip(whole.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert last_checkpoint(tmp_path / "a").name == "checkpoint-6"
    assert not list(tmp_path.rglob("training_args.bin"))


def test_the_best_model_comes_back_with_its_rows(tmp_path):
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=0.3,
        lr_scheduler_type="constant",
    )
    model = a_model()
    trainer = MemoryTrainer(model, args, train_dataset=Lines(), eval_dataset=Lines(8))
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert torch.equal(rows_of(model), load_file(f"{best}/rows-memory-1.safetensors")["rows"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_weight_decay_falls_on_matrices_alone():
    model = a_model()
    trainer = MemoryTrainer(model, arguments("unused", weight_decay=0.1), train_dataset=Lines())
    decayed = trainer.get_decay_parameter_names(model)
    assert [name.rpartition("memory.0.")[2] for name in decayed if ".engram." in name] == [
        "projection.weight"
    ]
    assert "model.layers.0.mlp.up_proj.weight" in decayed
    optimizer = trainer.create_optimizer()
    handle = engram_lm.memories(model)["memory"].slots[0].handle
    rest = next(group for group in optimizer.param_groups if group["weight_decay"] == 0.0)
    assert any(parameter is handle for parameter in rest["params"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fp16": True, "use_cpu": False}, "fp16"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_ways_of_training_that_lose_rows_are_refused_by_name(options, told, tmp_path):
    args = arguments(tmp_path)
    # set behind the arguments' own checks, which differ from machine to machine
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(RowUpdateError, match=f"Rows do not train with {told}"):
        MemoryTrainer(a_model(), args, train_dataset=Lines())


def test_several_devices_are_refused_by_name(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(RowUpdateError, match="DataParallel over several devices"):
        MemoryTrainer(a_model(), args, train_dataset=Lines())


def test_a_model_without_memory_is_refused(tmp_path):
    plain = build_model(RECIPE, tokenizer=byte_tokenizer())
    with pytest.raises(ModelError, match="has no memory; attach one first"):
        MemoryTrainer(plain, arguments(tmp_path), train_dataset=Lines())
    with pytest.raises(ConfigError, match="model_init is not supported"):
        MemoryTrainer(args=arguments(tmp_path), model_init=a_model, train_dataset=Lines())


def test_what_a_checkpoint_lacks_is_named(tmp_path):
    MemoryTrainer(a_model(), arguments(tmp_path, max_steps=2), train_dataset=Lines()).train()
    end = tmp_path / "checkpoint-2"
    for name, told in (
        ("state-memory-1.safetensors", "cannot go on as if nothing had happened"),
        ("optimizer.pt", "has no optimizer.pt"),
        (WHOLE, "was not written to its end"),
        ("rows-memory-1.safetensors", "is missing"),
    ):
        kept = (end / name).read_bytes()
        (end / name).unlink()
        trainer = MemoryTrainer(a_model(), arguments(tmp_path), train_dataset=Lines())
        with pytest.raises(CheckpointError, match=told):
            trainer.train(resume_from_checkpoint=str(end))
        assert not rows_of(trainer.model).any()
        (end / name).write_bytes(kept)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        MemoryTrainer(a_model(), arguments(tmp_path / "none"), train_dataset=Lines()).train(
            resume_from_checkpoint=True
        )


def test_the_stock_trainer_trains_rows_and_its_checkpoints_are_not_mixed_up(tmp_path):
    ours, theirs = a_model(), a_model()
    MemoryTrainer(ours, arguments(tmp_path / "a"), train_dataset=Lines()).train()
    Trainer(theirs, arguments(tmp_path / "b"), train_dataset=Lines()).train()
    assert torch.equal(rows_of(ours), rows_of(theirs))
    assert rows_of(ours).any()
    # it goes on from no checkpoint of a model with memory, and says so
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        Trainer(a_model(), arguments(tmp_path / "b"), train_dataset=Lines()).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(CheckpointError, match="or by another Trainer"):
        load_checkpoint(a_model(), tmp_path / "b" / "checkpoint-6")
    model = engram_lm.from_pretrained(tmp_path / "b" / "checkpoint-6")
    assert torch.equal(rows_of(model), rows_of(theirs))


def test_weights_of_one_step_and_rows_of_another_are_noticed_once(tmp_path):
    trained, fresh = a_model(), a_model()
    MemoryTrainer(trained, arguments(tmp_path, save_strategy="no"), train_dataset=Lines()).train()
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    fresh.load_state_dict(trained.state_dict())
    with pytest.raises(
        StateError, match="saved after 6 row updates, but the rows of memory at block 1 carry 0"
    ):
        fresh(**batch)
    # the same count: nothing to notice, and no second look
    trained.load_state_dict(trained.state_dict())
    assert engram_lm.memories(trained)["memory"].tables[0].gradients._unverified
    trained(**batch)
    assert not engram_lm.memories(trained)["memory"].tables[0].gradients._unverified
    # rows that follow make it whole
    engram_lm.save_memory(trained, tmp_path / "memory")
    from engram_lm.attachment import load_memory

    load_memory(fresh, tmp_path / "memory")
    assert torch.equal(fresh(**batch).logits, trained.eval()(**batch).logits)


def on_disk(model, directory):
    """The model with its rows, new, in a packed file and a log."""
    (slot,) = engram_lm.memories(model)["memory"].slots
    base = directory / "base.engram"
    if not base.exists():
        facts = dict(slot.scheme.identity.facts)
        with TableWriter(
            base, n_rows=slot.table.n_rows, width=slot.table.width, codec="fp32", identity=facts
        ) as writer:
            writer.add_rows(slot.table.rows_view().numpy())
            writer.finish()
    table = LoggedTable.open(base, directory / "base.rows", rule=slot.table.gradients.rule)
    return engram_lm.use_table(model, 1, table), table


def test_rows_on_disk_train_as_in_memory_and_go_on_from_a_position_of_their_log(tmp_path):
    memory = a_model()
    MemoryTrainer(memory, arguments(tmp_path / "m"), train_dataset=Lines()).train()
    wanted = rows_of(memory)

    model, table = on_disk(a_model(), tmp_path)
    trainer = MemoryTrainer(model, arguments(tmp_path / "d"), train_dataset=Lines())
    trainer.train()
    assert torch.equal(table.gather(torch.arange(table.n_rows)), wanted)
    assert not list((tmp_path / "d").rglob("rows-*"))  # checkpoints name a position, and copy nothing
    with pytest.raises(CheckpointError, match=r"are position [\d,]+ of the log .* use_table"):
        engram_lm.from_pretrained(
            tmp_path / "d" / "checkpoint-6", base=build_model(RECIPE, tokenizer=byte_tokenizer())
        )
    table.close()

    # killed after checkpoint 4, with more in the log
    shutil.rmtree(tmp_path / "d" / "checkpoint-6")
    model, table = on_disk(a_model(), tmp_path)
    trainer = MemoryTrainer(model, arguments(tmp_path / "d"), train_dataset=Lines())
    trainer.train(resume_from_checkpoint=True)
    assert table.store.last_update == 6
    assert torch.equal(table.gather(torch.arange(table.n_rows)), wanted)
    for (name, one), other in zip(memory.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name

    model.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("rows-*")] == ["rows-memory-1.engram"]
    ids = Lines().ids[0][None]
    for tier in ("device", "host", "disk"):
        there = engram_lm.from_pretrained(tmp_path / "saved", tier=tier)
        with torch.no_grad():
            assert torch.equal(there(ids).logits, memory.eval()(ids).logits)


def test_a_log_of_another_run_of_equal_length_is_refused(tmp_path):
    model, table = on_disk(a_model(), tmp_path)
    MemoryTrainer(model, arguments(tmp_path / "d", max_steps=2), train_dataset=Lines()).train()
    table.close()
    (tmp_path / "base.rows").unlink()
    # the same texts, and so the same rows, at another rate
    model, table = on_disk(a_model(), tmp_path)
    other = arguments(tmp_path / "e", max_steps=2, learning_rate=1e-3)
    MemoryTrainer(model, other, train_dataset=Lines()).train()
    before = table.gather(torch.arange(table.n_rows))
    with pytest.raises(
        CheckpointError, match=r"holds other rows up to position [\d,]+ than when .* was saved"
    ):
        load_checkpoint(model, tmp_path / "d" / "checkpoint-2")
    assert torch.equal(table.gather(torch.arange(table.n_rows)), before)
    load_checkpoint(model, tmp_path / "e" / "checkpoint-2")


def test_the_base_of_another_checkpoint_is_refused(tmp_path):
    for out, rate in (("a", 3e-3), ("b", 1e-3)):
        args = arguments(tmp_path / out, max_steps=2, learning_rate=rate)
        MemoryTrainer(a_model(), args, train_dataset=Lines()).train()
    here, there = (tmp_path / out / "checkpoint-2" for out in "ab")
    shutil.copytree(there / "base", here / "base", dirs_exist_ok=True)
    model = a_model()
    with pytest.raises(CheckpointError, match=r"base belongs to another save than memory\.json"):
        load_checkpoint(model, here)
    assert not rows_of(model).any()
