"""Rows on other tiers: the model's answers stay what they were, bit for bit, however and whenever the rows come."""

import copy
import ctypes
import logging
import os
import threading

import numpy as np
import pytest
import torch

import models
from engram_lm.attachment import from_pretrained, memories, open_rows, save_memory, use_table
from engram_lm.errors import (
    AddressError,
    CheckpointError,
    ConfigError,
    IdentityError,
    RowUpdateError,
    StateError,
)
from engram_lm.storage import CachedStore, DiskStore, HostStore, TableWriter, disk, open_packed
from engram_lm.storage.saved import saved_tables
from engram_lm.tables import ReadOnlyTable
from engram_lm.tabletools.sources import open_source
from matrix import text

TIERS = {"host": {}, "disk": {}, "cached": {"cache_bytes": 200_000}}


@pytest.fixture(scope="module")
def model():
    return models.give_memory(models.build("llama"))


def packed(model, directory, *, codec="fp32", identity=True):
    """Every table of the model as a packed file: {block: path}."""
    found = {}
    for slot in memories(model)["memory"].slots:
        path = directory / f"{slot.block}.engram"
        facts = dict(slot.scheme.identity.facts) if identity else None
        with TableWriter(
            path, n_rows=slot.table.n_rows, width=slot.table.width, codec=codec, identity=facts
        ) as writer:
            writer.add_rows(slot.table.rows_view().numpy())
            writer.finish()
        found[slot.block] = path
    return found


def placed(model, files, **options):
    twin = copy.deepcopy(model)
    for block, path in files.items():
        use_table(twin, block, open_rows(path, **options))
    return twin


def tables(model):
    return memories(model)["memory"].tables


@pytest.mark.parametrize("tier", TIERS)
def test_forward_scoring_and_generation_are_bit_equal_on_every_tier(tier, model, tmp_path):
    twin = placed(model, packed(model, tmp_path), tier=tier, **TIERS[tier])
    for table in tables(twin):
        table.shadow = True
    ids = text()
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert torch.equal(twin(ids, labels=ids).loss, model(ids, labels=ids).loss)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(twin.generate(ids, **options), model.generate(ids, **options))
    assert all(isinstance(table, ReadOnlyTable) for table in tables(twin))


def test_training_around_frozen_rows_is_bit_equal_checkpointing_included(model, tmp_path):
    files, ids = packed(model, tmp_path), text()
    gradients = []
    for make in (copy.deepcopy, lambda m: placed(m, files, tier="disk")):
        twin = make(model).train()
        for slot in memories(twin)["memory"].slots:
            slot.handle.requires_grad_(False)
        twin.activation_checkpointing_enable()
        twin(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# A few rows are sent for without a thread (`DiskStore.begin`); where the store cannot, a thread gathers them.
WAYS = ["sent", "thread"]


def without_sending(way, monkeypatch):
    if way == "thread":
        monkeypatch.setattr(DiskStore, "begin", lambda self, address_at, n: None)


@pytest.mark.parametrize("way", WAYS)
def test_a_prefetch_that_fails_changes_no_value_and_is_logged(way, model, tmp_path, monkeypatch, caplog):
    without_sending(way, monkeypatch)
    twin, ids = placed(model, packed(model, tmp_path), tier="disk"), text()
    read, failed = DiskStore.read_records, []

    def fail_ahead(self, row_U, out_UR):
        if threading.current_thread() is not threading.main_thread():
            failed.append(self.name)
            raise RuntimeError("injected")
        return read(self, row_U, out_UR)

    def fail_to_finish(self, out_at, dtype):
        failed.append(self._store.name)
        raise RuntimeError("injected")

    monkeypatch.setattr(DiskStore, "read_records", fail_ahead)
    monkeypatch.setattr(disk.PostedGather, "finish", fail_to_finish)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    assert len(failed) == 2
    assert sum("prefetch" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("way", WAYS)
def test_shadow_mode_notices_other_rows(way, model, tmp_path, monkeypatch):
    without_sending(way, monkeypatch)
    twin, gather = placed(model, packed(model, tmp_path), tier="disk"), DiskStore.gather
    finish = disk.PostedGather.finish

    def other_ahead(self, address, **options):
        rows = gather(self, address, **options)
        return rows if threading.current_thread() is threading.main_thread() else np.negative(rows, out=rows)

    def other_at_the_end(self, out_at, dtype):
        finish(self, out_at, dtype)
        first = ctypes.c_float.from_address(out_at)
        first.value = -first.value - 1

    for table in tables(twin):
        table.shadow = True
    monkeypatch.setattr(DiskStore, "gather", other_ahead)
    monkeypatch.setattr(disk.PostedGather, "finish", other_at_the_end)
    with torch.no_grad(), pytest.raises(StateError, match="brought other rows than a gather"):
        twin(text())


def test_tickets_that_nobody_asks_for_and_a_store_that_closes_under_them(tmp_path):
    rows = np.random.default_rng(0).standard_normal((900, 64)).astype(np.float32)
    with TableWriter(tmp_path / "t.engram", n_rows=900, width=64, codec="fp32") as writer:
        writer.add_rows(rows)
        writer.finish()
    table = ReadOnlyTable(DiskStore(open_packed(tmp_path / "t.engram")))
    address = torch.tensor([5, 5, 899, 0])
    for _ in range(20):
        table.prefetch(address)
    held = [table.prefetch(address + k) for k in (0, 0)]
    assert all(np.array_equal(ticket.rows().numpy(), rows[address.numpy()]) for ticket in held)
    for n in (1, 255, 256, 257):
        some = torch.randint(0, 900, (n,), generator=torch.Generator().manual_seed(n))
        assert np.array_equal(table.prefetch(some).rows().numpy(), rows[some.numpy()])
    ticket = table.prefetch(address)
    table.store.close()
    with pytest.raises(CheckpointError, match="was closed"):
        ticket.rows()


@pytest.mark.parametrize("lacking", ["descriptors", "threads"])
def test_where_no_reading_thread_can_be_had_a_ticket_comes_all_the_same(lacking, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((900, 64)).astype(np.float32)
    with TableWriter(tmp_path / "t.engram", n_rows=900, width=64, codec="fp32") as writer:
        writer.add_rows(rows)
        writer.finish()
    table, before = (
        ReadOnlyTable(DiskStore(open_packed(tmp_path / "t.engram"))),
        len(os.listdir("/proc/self/fd")),
    )
    with monkeypatch.context() as patch:
        if lacking == "descriptors":
            patch.setattr(os, "eventfd", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        else:
            start = threading.Thread.start
            patch.setattr(
                threading.Thread,
                "start",
                lambda self: (
                    (_ for _ in ()).throw(RuntimeError("no"))
                    if self.name == "engram-disk-reader"
                    else start(self)
                ),
            )
        assert np.array_equal(table.prefetch(torch.tensor([5, 40])).rows().numpy(), rows[[5, 40]])
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(table.prefetch(torch.tensor([40, 899])).rows().numpy(), rows[[40, 899]])
    assert table.store._aheads


def test_a_cut_or_damaged_page_is_an_error_of_the_ticket_too(tmp_path):
    rows = np.random.default_rng(0).standard_normal((900, 64)).astype(np.float32)
    with TableWriter(tmp_path / "t.engram", n_rows=900, width=64, codec="fp32") as writer:
        writer.add_rows(rows)
        writer.finish()
    table = ReadOnlyTable(DiskStore(open_packed(tmp_path / "t.engram")))
    with open(tmp_path / "t.engram", "r+b") as file:
        file.seek(4096 + 5)
        file.write(b"?")
    with pytest.raises(CheckpointError, match=r"page 0 \(rows 0 to 15\) is damaged"):
        table.prefetch(torch.tensor([3, 40])).rows()
    assert np.array_equal(table.prefetch(torch.tensor([40])).rows().numpy(), rows[[40]])
    os.truncate(tmp_path / "t.engram", 4096 * 5)
    with pytest.raises(CheckpointError, match="was cut short while open"):
        table.prefetch(torch.tensor([40, 800])).rows()


def test_a_ticket_may_be_asked_twice_and_addresses_outside_raise_at_once(tmp_path):
    store = HostStore(n_rows=9, width=8)
    store.record_RB[:] = np.arange(9 * 32, dtype=np.uint8).reshape(9, 32)
    table = ReadOnlyTable(store, dtype=torch.bfloat16)
    address = torch.tensor([[0, 8], [3, 3]])
    ticket = table.prefetch(address)
    first = ticket.rows()
    assert torch.equal(first.view(torch.int16), ticket.rows().view(torch.int16))
    assert torch.equal(first.view(torch.int16), table.gather(address).view(torch.int16))
    with pytest.raises(AddressError, match="Addresses are int64; got float32"):
        table.prefetch(torch.tensor([1.5]))
    with pytest.raises(AddressError, match="Address 9 at place 1 is outside"):
        table.prefetch(torch.tensor([0, 9]))


def test_a_cache_within_its_budget_gives_the_same_rows_and_counts_hits(tmp_path):
    rows = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    with TableWriter(tmp_path / "t.engram", n_rows=3000, width=16, codec="bf16") as writer:
        writer.add_rows(rows)
        writer.finish()
    disk = DiskStore(open_packed(tmp_path / "t.engram"))
    rng = np.random.default_rng(1)
    for policy in ("lru", "frequency"):
        store = CachedStore(disk, budget_bytes=40_000, policy=policy)
        assert 0.9 * 40_000 < store.bytes_held <= 40_000
        for _ in range(200):
            address = (3000 * rng.random(64) ** 4).astype(np.int64)
            assert np.array_equal(store.gather(address), disk.gather(address))
        assert store.hits > store.misses > 0
    with pytest.raises(ConfigError, match="holds no set of rows; give at least 788"):
        CachedStore(disk, budget_bytes=100)


def test_what_does_not_fit_is_refused(model, tmp_path):
    files = packed(model, tmp_path)
    first, second = files
    twin = copy.deepcopy(model)
    with pytest.raises((IdentityError, CheckpointError), match=r"layer|reads .* rows"):
        use_table(twin, first, open_rows(files[second]))
    with pytest.raises(ConfigError, match="has no table at block 77"):
        use_table(twin, 77, open_rows(files[first]))
    with pytest.raises(ConfigError, match="cache_bytes belongs to the tier 'cached'"):
        open_rows(files[first], tier="cached")
    with pytest.raises(CheckpointError, match="the table has 7 of 3"):
        use_table(twin, first, ReadOnlyTable(HostStore(n_rows=7, width=3)))
    use_table(twin, first, open_rows(files[first]))
    with pytest.raises(RowUpdateError, match="read only"):
        tables(twin)[0].update(torch.tensor([0]), torch.zeros(1, 4), rule=None, learning_rate=1.0)


@pytest.mark.parametrize("tier", TIERS)
def test_a_saved_memory_is_read_where_it_lies(tier, model, tmp_path):
    save_memory(model, tmp_path)
    there = from_pretrained(tmp_path, tier=tier, **TIERS[tier])
    with torch.no_grad():
        assert torch.equal(there(text()).logits, model(text()).logits)
    assert all(isinstance(table, ReadOnlyTable) for table in tables(there))
    save_memory(there, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "again")(text()).logits, model(text()).logits)


def test_files_of_another_save_are_refused_on_every_tier(model, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        save_memory(models.make_loud(copy.deepcopy(model), seed=seed) or model, tmp_path / name)
    rows = next(path.name for path in (tmp_path / "a").glob("rows-*"))
    (tmp_path / "a" / rows).write_bytes((tmp_path / "b" / rows).read_bytes())
    for tier, options in TIERS.items():
        with pytest.raises(CheckpointError, match="belongs to another save"):
            from_pretrained(tmp_path / "a", tier=tier, **options)


def test_a_saved_memory_is_a_table_for_the_commands_too(model, tmp_path):
    save_memory(model, tmp_path)
    found = saved_tables(tmp_path)
    slots = memories(model)["memory"].slots
    assert list(found) == [slot.block for slot in slots]
    for slot in slots:
        layout = found[slot.block]
        assert layout.identity == dict(slot.scheme.identity.facts)
        assert np.array_equal(HostStore.load(layout).gather([0, 5]), slot.table.rows_view()[[0, 5]].numpy())
    assert list(open_source(tmp_path).tables) == list(found)
    (tmp_path / "memory.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"memory\.json cannot be read"):
        saved_tables(tmp_path)
