"""Changed rows over tables that stay: as tables that were changed, for all sequences or for some, gone without a trace."""

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engram_lm.attachment import memories, reading  # noqa: E402
from engram_lm.errors import ConfigError  # noqa: E402
from engram_lm.memory.overlay import BySequence, Overlay  # noqa: E402
from matrix import text  # noqa: E402
from models import build, give_memory  # noqa: E402


@pytest.fixture
def model():
    return give_memory(build("llama", torch.float64), "paper")


def read_rows(model, ids, block):
    """Rows that the layer before a block reads for these ids, each once."""
    from engram_lm.attachment import trace

    with torch.no_grad(), trace(model) as records:
        model(ids)
    return torch.tensor(next(r.address for r in records if r.block == block)).unique()


def changed(model, ids, seed=3):
    """(an overlay of every third row that is read, a copy of the model whose tables hold the same)."""
    overlay, twin = Overlay(), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for slot in memories(twin)["memory"].slots:
        rows = read_rows(model, ids, slot.block)[::3]
        values = torch.randn((len(rows), slot.table.width), generator=generator)
        # in two steps, in any order, one row twice
        shuffled = torch.randperm(len(rows), generator=generator)
        overlay.put(slot.block, rows[:1], torch.zeros(1, slot.table.width))
        overlay.put(slot.block, rows[shuffled], values[shuffled])
        slot.table.rows_view()[rows] = values
        assert overlay.n_rows(slot.block) == len(rows)
    return overlay, twin


@torch.no_grad()
def test_it_reads_as_a_table_that_was_changed_and_goes_without_a_trace(model):
    ids = text()
    before = model(ids).logits
    overlay, twin = changed(model, ids)
    with reading(model, overlay):
        found = model(ids).logits
    assert torch.equal(found, twin(ids).logits)
    assert (found - before).abs().max() > 0.1
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_each_sequence_may_have_its_own(model):
    ids = text()
    before = model(ids).logits
    one, first = changed(model, ids, seed=3)
    other, third = changed(model, ids, seed=4)
    with reading(model, BySequence([one, None, other])):
        found = model(ids).logits
    for row, wanted in enumerate((first(ids).logits, before, third(ids).logits)):
        assert torch.equal(found[row], wanted[row])


@torch.no_grad()
def test_cached_decoding_reads_them_too(model):
    ids = text()
    overlay, twin = changed(model, ids)
    with reading(model, overlay):
        output = model(ids[:, :7], use_cache=True)
        parts = [output.logits]
        for t in range(7, ids.shape[1]):
            output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    assert (torch.cat(parts, 1) - twin(ids).logits).abs().max() < 1e-9


def test_values_learn_where_they_were_read(model):
    ids = text()
    rows = read_rows(model, ids, 1)
    width = memories(model)["memory"].slots[0].table.width
    values = torch.zeros(2, width, requires_grad=True)
    unread = next(n for n in range(10_000) if n not in set(rows.tolist()))
    overlay = Overlay()
    overlay.put(1, [int(rows[0]), unread], values)
    with reading(model, overlay):
        model(ids, use_cache=False).logits.square().mean().backward()
    read, not_read = values.grad.abs().sum(1).tolist()
    assert read > 0
    assert not_read == 0


@torch.no_grad()
def test_dropped_rows_are_the_tables_again(model):
    ids = text()
    before = model(ids).logits
    overlay, _ = changed(model, ids)
    for slot in memories(model)["memory"].slots:
        overlay.drop(slot.block, read_rows(model, ids, slot.block))
        assert overlay.n_rows(slot.block) == 0
    with reading(model, overlay):
        assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_what_does_not_fit_is_refused(model):
    ids, overlay = text(), Overlay()
    for rows, values, said in (
        ([1, 2], torch.zeros(1, 8), r"rows \[R\] and values \[R, W\]; got \[2\] and \[1, 8\]"),
        ([1, 1], torch.zeros(2, 8), "each row once"),
    ):
        with pytest.raises(ConfigError, match=said):
            overlay.put(1, rows, values)
    overlay.put(1, [5], torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="have 3 numbers here; got 8"):
        overlay.put(1, [6], torch.zeros(1, 8))
    with (
        pytest.raises(ConfigError, match="rows 5 to 5 of 3 numbers for block 1; the table has"),
        reading(model, overlay),
    ):
        model(ids)
    overlay = Overlay()
    overlay.put(1, [10**9], torch.zeros(1, 8))
    with pytest.raises(ConfigError, match="1,000,000,000"), reading(model, overlay):
        model(ids)
    with (
        pytest.raises(ConfigError, match="for 2 sequences; this forward has 3"),
        reading(model, BySequence([None] * 2)),
    ):
        model(ids)
