"""Controls of a memory: what each reads, trains and costs, and that files say which one it is."""

import copy
import json

import pytest
import torch

import engram_lm
import models
from engram_lm.ablation.arms import MEMORY_ARMS, control
from engram_lm.attachment import attach, memories, trace
from engram_lm.config import CONTROLS, MemoryConfig
from engram_lm.errors import ConfigError
from engram_lm.memory.controls import FROZEN_STD

CONFIG = MemoryConfig(layers=(0, 2), rows_per_head=53, head_width=4, heads=2)
IDS = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def bare():
    return models.build("llama", torch.float32)


def with_control(bare, config):
    torch.manual_seed(5)
    return attach(copy.deepcopy(bare), models.tokenizer(), config)


def arm(bare, name):
    return with_control(bare, control(CONFIG, name))


def read_by(model, ids=IDS):
    """Addresses of the first slot, int64 [B, T, C]."""
    with torch.no_grad(), trace(model) as records:
        model(ids)
    return torch.from_numpy(records[0].address)


def trained(model, steps=3, rate=1e-2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def table_of(model):
    return memories(model)["memory"].slots[0].table


def test_every_arm_reads_as_many_rows(bare):
    shapes = {name: read_by(arm(bare, name)).shape for name in MEMORY_ARMS}
    assert set(shapes.values()) == {(3, 12, 4)}
    rows = {name: table_of(arm(bare, name)).n_rows for name in MEMORY_ARMS}
    assert max(rows.values()) - min(rows.values()) <= 12, rows


def test_one_row_reads_row_0_of_each_head(bare):
    model = arm(bare, "one-row")
    offsets = torch.tensor(memories(model)["memory"].slots[0].scheme.offsets)
    assert torch.equal(read_by(model), offsets.expand(3, 12, 4))
    before = table_of(model).rows_view().clone()
    changed = (table_of(trained(model)).rows_view() != before).any(1)
    assert changed.nonzero()[:, 0].tolist() == offsets.tolist()


def test_shuffled_rows_change_with_every_step_and_stay_one_to_one(bare):
    own, model = read_by(arm(bare, "memory")), arm(bare, "shuffled")
    first = read_by(model)
    assert torch.equal(first, read_by(model)), "the same forward is the same"
    trained(model, steps=1)
    second = read_by(model)
    scheme = memories(model)["memory"].slots[0].scheme
    for found in (first, second):
        assert (found != own).float().mean() > 0.9
        for c, (size, offset) in enumerate(zip(scheme.moduli, scheme.offsets, strict=True)):
            assert ((found[..., c] >= offset) & (found[..., c] < offset + size)).all()
            for b in range(3):
                pairs = set(zip(own[b, :, c].tolist(), found[b, :, c].tolist(), strict=True))
                assert len(pairs) == len(set(own[b, :, c].tolist())) == len(set(found[b, :, c].tolist()))
    assert (first != second).float().mean() > 0.9


def test_shuffled_does_not_see_what_comes(bare):
    model = arm(bare, "shuffled")
    other = IDS.clone()
    other[:, 6:] = other[:, 6:].flip(1)
    assert torch.equal(read_by(model)[:, :6], read_by(model, other)[:, :6])
    assert not torch.equal(read_by(model), read_by(model, other))


def test_frozen_rows_are_random_and_stay_bit_equal(bare):
    model = arm(bare, "frozen-random")
    before = table_of(model).rows_view().clone()
    assert before.std() == pytest.approx(FROZEN_STD, rel=0.1)
    projection = memories(model)["memory"].slots[0].projection.weight.clone()
    trained(model)
    assert torch.equal(table_of(model).rows_view(), before)
    assert not torch.equal(memories(model)["memory"].slots[0].projection.weight, projection)


def test_controls_begin_from_the_projection_of_the_memory(bare):
    wanted = memories(arm(bare, "memory"))["memory"].slots[1].projection.weight
    for name in ("one-row", "shuffled", "frozen-random"):
        assert torch.equal(memories(arm(bare, name))["memory"].slots[1].projection.weight, wanted)


def test_unigram_depends_on_one_id(bare):
    model, other = arm(bare, "unigram"), IDS.clone()
    other[:, 5] = (other[:, 5] + 1) % 258
    differ = (read_by(model) != read_by(model, other)).any(-1)
    assert differ.any(0).nonzero()[:, 0].tolist() == [5]
    slot, whole = (memories(arm(bare, name))["memory"].slots[0] for name in ("unigram", "memory"))
    assert slot.conv_dilation == whole.conv_dilation


def test_bias_adds_one_vector_and_trains_nothing_else(bare):
    model = with_control(
        copy.deepcopy(bare).requires_grad_(False), MemoryConfig(layers=(1,), control="bias", **_sizes())
    )
    assert torch.equal(model(IDS).logits, bare(IDS).logits)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.engram.memory.0.bias"]
    trained(model)
    hidden = torch.zeros(1, 2, 32)
    slot = memories(model)["memory"].slots[0]
    assert slot.bias.abs().max() > 0
    from engram_lm.memory.controls import bias_of

    assert torch.equal(bias_of(slot, hidden), slot.bias.expand(1, 2, 32))
    assert torch.equal(model(IDS, memory="off").logits, bare(IDS).logits)


def test_off_is_never_read(bare):
    model = with_control(bare, MemoryConfig(layers=(1,), control="off", **_sizes()))
    with torch.no_grad():
        memories(model)["memory"].slots[0].table.rows_view().fill_(1.0)
        assert torch.equal(model(IDS).logits, bare(IDS).logits)


@pytest.mark.parametrize("name", ["one-row", "shuffled", "frozen-random", "unigram", "bias", "off"])
def test_a_saved_control_is_that_control(name, bare, tmp_path):
    config = (
        MemoryConfig(layers=(1,), control=name, **_sizes())
        if name in ("bias", "off")
        else control(CONFIG, name)
    )
    model = (
        trained(with_control(copy.deepcopy(bare).requires_grad_(False), config)) if name != "off" else None
    )
    model = model or with_control(bare, config)
    model.save_pretrained(tmp_path)
    again = engram_lm.from_pretrained(tmp_path, base=copy.deepcopy(bare))
    assert memories(again)["memory"].config == memories(model)["memory"].config
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    said = (tmp_path / "README.md").read_text()
    assert ("is a control" in said) == (name != "unigram")


def _sizes():
    return {"rows_per_head": 53, "head_width": 4, "heads": 2}


def test_an_ordinary_memory_is_saved_as_before(bare, tmp_path):
    arm(bare, "memory").save_pretrained(tmp_path)
    assert "control" not in json.loads((tmp_path / "memory.json").read_text())["memories"][0]["config"]


def test_refusals():
    with pytest.raises(ConfigError, match=r"memory, one-row.*got 'two-rows'"):
        control(CONFIG, "two-rows")
    with pytest.raises(ConfigError, match="'bias' already"):
        control(MemoryConfig(layers=(1,), control="bias"), "one-row")
    with pytest.raises(ConfigError, match="control is one-row"):
        MemoryConfig(layers=(1,), control="none")
    assert len(CONTROLS) == 5
