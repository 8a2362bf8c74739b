"""Rows in host memory for a model on a GPU: the same code on the CPU, with the decision of where ids lie replaced."""

import copy
import logging

import pytest
import torch

import matrix
import models
from engram_lm.attachment import memories, use_table
from engram_lm.errors import TokenIdError
from engram_lm.memory import memory
from engram_lm.storage import HostStore
from engram_lm.tables import ReadOnlyTable


@pytest.fixture(scope="module", params=["paper", "qwen-ple"])
def model(request):
    return models.give_memory(models.build("llama"), request.param)


def stored_like(table):
    store = HostStore(n_rows=table.n_rows, width=table.width)
    store.record_RB[:] = table.rows_view().numpy().view("uint8").reshape(store.record_RB.shape)
    return ReadOnlyTable(store)


@pytest.fixture
def offloaded(model, monkeypatch):
    """The first slot's rows in host memory, the second's on the device, which the ids are said to be on."""
    twin = copy.deepcopy(model)
    first, _ = memories(twin)["memory"].slots
    use_table(twin, first.block, stored_like(first.table))
    asked = []

    def rows_on_cpu(table):
        asked.append(table)
        return isinstance(table, ReadOnlyTable)

    monkeypatch.setattr(memory, "_ids_on_cpu", lambda window: False)
    monkeypatch.setattr(memory, "_rows_on_cpu", rows_on_cpu)
    yield twin
    assert {type(table).__name__ for table in asked} >= {"ReadOnlyTable", "DeviceTable"}


def cached(model, side, pieces, cache):
    """Logits of a padded batch, a piece at a time."""
    rows, mask, places = matrix.padded(matrix.text(), side)
    return torch.cat(
        [
            model(
                rows[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b], past_key_values=cache
            ).logits
            for a, b in pieces
        ],
        1,
    )


PIECES = [(0, 9), (9, 10), (10, 17), (17, 20)]
WAYS = {
    "whole": lambda m: m(matrix.text(), use_cache=False).logits,
    "left padding": lambda m: cached(m, "left", PIECES, matrix.new_cache(m)),
    "right padding": lambda m: cached(m, "right", PIECES, matrix.new_cache(m)),
    "left padding, static cache": lambda m: cached(m, "left", PIECES, matrix.static(m)),
    "packed documents": lambda m: (
        m(matrix.text(), position_ids=torch.tensor([[*range(8), *range(12)]]), use_cache=False).logits
    ),
    "generation": lambda m: matrix.generate(m, matrix.text()).sequences,
}


@pytest.mark.parametrize("way", WAYS)
def test_addresses_computed_on_the_cpu_for_host_rows_and_on_the_device_for_others_are_the_same(
    way, model, offloaded, monkeypatch
):
    with torch.no_grad():
        got = WAYS[way](offloaded)
        monkeypatch.setattr(memory, "_ids_on_cpu", lambda window: True)
        assert torch.equal(got, WAYS[way](model))


def test_ids_outside_the_vocabulary_are_refused_where_addresses_are_computed_on_the_cpu(offloaded):
    ids = matrix.text()
    ids[1, 3] = 258
    with torch.no_grad(), pytest.raises(TokenIdError):
        memories(offloaded)["memory"].addresses(memory.Window(ids, ids.shape[1], state=None))


def test_a_table_says_where_it_is_read(model):
    (table, _) = memories(model)["memory"].tables
    assert memory._rows_on_cpu(table)
    assert memory._rows_on_cpu(stored_like(table))
    elsewhere = type("Elsewhere", (), {"device": torch.device("meta")})()
    assert not memory._rows_on_cpu(elsewhere)


def test_pinned_memory_that_fails_is_said_once_and_the_rows_come_all_the_same(model, monkeypatch, caplog):
    table = stored_like(memories(model)["memory"].tables[0])
    address = torch.arange(24).reshape(2, 3, 4)
    want = table.gather(address)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    asked, empty = [], torch.empty

    def no_pinned(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("no pinned memory today")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", no_pinned)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(table.gather(address), want)
        assert torch.equal(table.prefetch(address).rows(), want)
    assert asked == [True, False, False]
    assert ["no pinned memory today" in record.message for record in caplog.records] == [True]


def test_the_rows_of_a_checkpoint_are_never_pinned(model, monkeypatch):
    table = stored_like(memories(model)["memory"].tables[0])
    monkeypatch.setattr(table, "_empty", lambda shape: pytest.fail("pinned memory is for gathers"))
    assert table.checkpoint()["rows"].shape == (table.n_rows, table.width)


def test_rows_in_pinned_memory_are_copied_without_waiting(model, monkeypatch):
    from engram_lm.memory import layer

    asked = []

    class Rows:
        device = torch.device("cpu")

        def __init__(self, pinned):
            self.is_pinned = lambda: pinned

        def to(self, device, *, non_blocking=False):
            asked.append((str(device), non_blocking))
            return self

    for pinned in (True, False):
        layer.on_device(Rows(pinned), torch.device("meta"))
    assert asked == [("meta", True), ("meta", False)]
