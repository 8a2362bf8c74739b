"""What a memory reads in place of its own rows: each change does what it says, and is undone bit for bit."""

import copy

import pytest
import torch

import models
from engram_lm.attachment import (
    Intervention,
    NoiseRows,
    OneRow,
    OtherRows,
    memories,
    memory_off,
    reading,
    trace,
)
from engram_lm.errors import ConfigError
from matrix import text


@pytest.fixture(scope="module")
def loud():
    return models.give_memory(models.build("llama"), "several")


def slot_of(model):
    return next(iter(memories(model).values())).slots[0]


@pytest.mark.parametrize(
    "change", [OneRow(), OtherRows(seed=3), NoiseRows(seed=3)], ids=lambda c: type(c).__name__
)  # fmt: skip
@torch.no_grad()
def test_a_change_moves_the_logits_and_leaves_no_bit_behind(loud, change):
    before = loud(text()).logits
    rows = [slot.table.rows_view().clone() for memory in memories(loud).values() for slot in memory.slots]
    with reading(loud, change):
        changed = loud(text()).logits
        with memory_off(loud):
            off = loud(text()).logits
    assert not torch.allclose(changed, before, atol=0.1)
    assert torch.equal(loud(text()).logits, before)
    assert torch.equal(loud(text(), memory="off").logits, off)
    after = [slot.table.rows_view() for memory in memories(loud).values() for slot in memory.slots]
    assert all(torch.equal(*pair) for pair in zip(rows, after, strict=True))


@torch.no_grad()
def test_it_is_undone_after_a_failure_and_inside_another(loud):
    before = loud(text()).logits
    with pytest.raises(ZeroDivisionError), reading(loud, OneRow()), reading(loud, OtherRows(seed=0)):
        raise ZeroDivisionError
    assert torch.equal(loud(text()).logits, before)
    with reading(loud, OneRow()):
        one = loud(text()).logits
        with reading(loud, Intervention()):
            assert torch.equal(loud(text()).logits, one)
        with reading(loud, OtherRows(seed=0)):
            other = loud(text()).logits
        assert torch.equal(loud(text()).logits, one)
    assert not torch.allclose(other, one, atol=0.1)
    with reading(loud, OtherRows(seed=0)):
        assert not torch.allclose(loud(text()).logits, other, atol=0.1)


@torch.no_grad()
def test_one_memory_can_be_named(loud):
    with reading(loud, OneRow(), "bare"), trace(loud) as records:
        loud(text())
    for record in records:
        spread = (record.address != record.address[:1, :1]).any()
        assert spread == (record.memory != "bare")
    with pytest.raises(ConfigError, match="'nosuch'"), reading(loud, OneRow(), "nosuch"):
        pass


def test_one_row_is_the_first_of_its_head(loud):
    slot = slot_of(loud)
    address = OneRow().addresses(slot, torch.zeros((2, 3, len(slot.scheme.moduli)), dtype=torch.int64))
    assert address.tolist() == [[slot.scheme.offsets.tolist()] * 3] * 2


def test_other_rows_are_one_to_one_in_every_head(loud):
    slot = slot_of(loud)
    for head, (first, size) in enumerate(zip(slot.scheme.offsets, slot.scheme.moduli, strict=True)):
        address = torch.zeros((1, int(size), len(slot.scheme.moduli)), dtype=torch.int64)
        address[0, :, head] = torch.arange(int(first), int(first + size))
        found = OtherRows(seed=5).addresses(slot, address)[0, :, head]
        assert sorted(found.tolist()) == address[0, :, head].tolist()
        assert int((found == address[0, :, head]).sum()) <= 1


def test_noise_is_as_long_as_the_row_and_the_same_for_an_address(loud):
    slot = slot_of(loud)
    address = torch.tensor([[[5, 9], [5, 700]]])
    rows = slot.table.gather(address)
    noise = NoiseRows(seed=2).rows(slot, address, rows, None)
    torch.testing.assert_close(noise.norm(dim=-1), rows.norm(dim=-1))
    assert torch.equal(noise[0, 0, 0], noise[0, 1, 0])
    cosine = torch.cosine_similarity(noise, rows, dim=-1)
    assert bool((cosine.abs() < 0.999).all())
    assert torch.equal(
        NoiseRows(seed=2).rows(slot, address, torch.zeros_like(rows), None), torch.zeros_like(rows)
    )


def test_gradients_go_to_the_rows_that_were_read():
    model = models.give_memory(models.build("llama")).train()
    slot = slot_of(model)
    before = slot.table.rows_view().clone()
    optimizer = torch.optim.SGD([slot.handle], lr=1.0)
    with reading(model, OneRow()):
        model(text()).logits.square().mean().backward()
    optimizer.step()
    changed = (slot.table.rows_view() != before).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) == set(slot.scheme.offsets.tolist())


def test_a_copy_keeps_its_reading(loud):
    with reading(loud, OneRow()):
        twin = copy.deepcopy(loud)
    assert all(memory.intervention is not None for memory in memories(twin).values())
    assert all(memory.intervention is None for memory in memories(loud).values())
