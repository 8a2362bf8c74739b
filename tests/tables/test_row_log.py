"""Tables that train on disk: the numbers of a table in memory, and a log that a kill cannot spoil."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.storage import DiskStore, HostStore, TableWriter, open_packed, verify
from engram_lm.storage.rowlog import START, LoggedStore
from engram_lm.tables import DeviceTable, rule_from_json
from engram_lm.tables.logged import LoggedTable

ROWS, WIDTH = 500, 48


def base_file(path, *, codec="fp32", rows=None):
    rows = (
        np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32) if rows is None else rows
    )
    with TableWriter(path, n_rows=ROWS, width=WIDTH, codec=codec) as writer:
        writer.add_rows(rows)
        writer.finish()
    return rows


def step(table, seed):
    """One update of some rows, through the table's handle and a torch optimizer."""
    generator = torch.Generator().manual_seed(seed)
    address = torch.randint(0, ROWS, (40,), generator=generator)
    optimizer = torch.optim.SGD([table.gradients.handle], lr=0.1)
    rows = table.read(address, table.gradients.handle, table.prefetch(address))
    (rows.float() * torch.randn(rows.shape, generator=generator)).sum().backward()
    torch.nn.utils.clip_grad_norm_([table.gradients.handle], 3.0)
    optimizer.step()


def everything(table):
    return table.gather(torch.arange(ROWS))


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "rule", ["sgd", "row-adam", "row-rmsprop", "row-adam-momentum", "row-momentum-sinkhorn"]
)
def test_training_on_disk_gives_the_bits_of_training_in_memory(rule, codec, tmp_path):
    start = base_file(tmp_path / "t.engram", codec=codec)
    dtype = torch.float32 if codec == "fp32" else torch.bfloat16
    memory = DeviceTable(n_rows=ROWS, width=WIDTH, dtype=dtype, rule=rule_from_json(rule))
    memory.rows_view().copy_(torch.from_numpy(start))
    disk = LoggedTable.open(
        tmp_path / "t.engram", tmp_path / "t.rows", rule=rule_from_json(rule), dtype=dtype, shadow=True
    )
    for seed in range(6):
        step(memory, seed)
        step(disk, seed)
        assert torch.equal(everything(disk).view(torch.int16), everything(memory).view(torch.int16))
    assert not torch.equal(everything(disk).float(), torch.from_numpy(start))


def test_a_checkpoint_is_a_position_and_going_back_to_it_is_exact(tmp_path):
    base_file(tmp_path / "t.engram")
    table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    for seed in range(3):
        step(table, seed)
    kept, wanted = table.checkpoint(), everything(table)
    assert kept["log_position"].tolist() == [os.path.getsize(tmp_path / "t.rows"), 3]
    for seed in range(3, 6):
        step(table, seed)
    then = everything(table)
    table.close()

    again = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    assert torch.equal(everything(again), then)
    assert again.gradients.updates == 6
    again.restore(kept)
    assert torch.equal(everything(again), wanted)
    assert again.gradients.updates == 3
    for seed in range(3, 6):
        step(again, seed)
    assert torch.equal(everything(again), then)
    with pytest.raises(CheckpointError, match="names no position of its log"):
        again.restore({"rows": wanted})
    with pytest.raises(CheckpointError, match="the log lost rows"):
        again.restore({"log_position": torch.tensor([10**9, 9])})
    with pytest.raises(CheckpointError, match="no whole batch that ends at"):
        again.restore({"log_position": kept["log_position"] - torch.tensor([8, 0])})


def test_every_torn_end_is_cut_and_every_flipped_bit_noticed(tmp_path):
    base_file(tmp_path / "t.engram")
    disk = DiskStore(open_packed(tmp_path / "t.engram"))
    store = LoggedStore(disk, tmp_path / "t.rows")
    ends, states = [START], [store.gather(np.arange(ROWS))]
    for update in (1, 2, 3):
        row_U = np.array([1, 5 * update, 400])
        store.append(row_U, np.full((3, 4 * WIDTH), update, np.uint8), update=update)
        ends.append(store.sync())
        states.append(store.gather(np.arange(ROWS)))
    store.close()
    whole = (tmp_path / "t.rows").read_bytes()

    for size in range(ends[0], len(whole) + 1, 113):
        (tmp_path / "t.rows").write_bytes(whole[:size])
        store = LoggedStore(DiskStore(open_packed(tmp_path / "t.engram")), tmp_path / "t.rows")
        n_whole = sum(end <= size for end in ends) - 1
        assert np.array_equal(store.gather(np.arange(ROWS)), states[n_whole])
        assert store.position == ends[n_whole] == os.path.getsize(tmp_path / "t.rows")
        store.close()
    for at in range(ends[1], ends[2], 29):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        (tmp_path / "t.rows").write_bytes(flipped)
        store = LoggedStore(DiskStore(open_packed(tmp_path / "t.engram")), tmp_path / "t.rows")
        assert np.array_equal(store.gather(np.arange(ROWS)), states[1])
        store.close()


def test_folding_makes_a_base_of_the_log_and_keeps_the_state(tmp_path):
    base_file(tmp_path / "t.engram")
    table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    step(table, 0)
    wanted = everything(table)
    table.store.fold(tmp_path / "new.engram", state_path=tmp_path / "new.state.engram")
    verify(tmp_path / "new.engram")
    assert np.array_equal(
        HostStore.load(open_packed(tmp_path / "new.engram")).gather(np.arange(ROWS)), wanted.numpy()
    )
    _, state_US = table.store.read_entries(np.arange(ROWS))
    kept = HostStore.load(open_packed(tmp_path / "new.state.engram")).record_RB
    assert np.array_equal(kept, state_US)
    assert state_US.any()


def test_training_goes_on_from_a_folded_base_and_its_states_as_if_nothing_had_happened(tmp_path):
    base_file(tmp_path / "t.engram")
    straight = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    for seed in range(4):
        step(straight, seed)
    straight.store.fold(tmp_path / "new.engram", state_path=tmp_path / "new.state.engram")
    files = {"base": tmp_path / "new.engram", "log": tmp_path / "new.rows"}
    folded = LoggedTable.open(**files, state=tmp_path / "new.state.engram")
    assert folded.store.rows_logged == 0
    for seed in range(4, 8):
        step(straight, seed)
        step(folded, seed)
    assert torch.equal(everything(folded), everything(straight))
    folded.close()
    with pytest.raises(CheckpointError, match="another base file, rule or format"):
        LoggedTable.open(**files)
    with pytest.raises(CheckpointError, match=r"holds 500 states of 8 bytes; .* needs 500 of 4"):
        LoggedTable.open(**files, state=tmp_path / "new.state.engram", rule=rule_from_json("row-rmsprop"))


def test_a_fold_that_was_killed_goes_on_only_where_the_log_still_says_the_same(tmp_path):
    base_file(tmp_path / "t.engram")
    table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    step(table, 0)

    def stop(done, total):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            table.store.fold(tmp_path / "new.engram", report=stop)
    step(table, 1)
    with pytest.raises(CheckpointError, match="holds part of another table"):
        table.store.fold(tmp_path / "new.engram")
    (tmp_path / "new.engram.partial").unlink()
    table.store.fold(tmp_path / "new.engram")
    folded = HostStore.load(open_packed(tmp_path / "new.engram")).gather(np.arange(ROWS))
    assert np.array_equal(folded, everything(table).numpy())
    with pytest.raises(CheckpointError, match="is the base of this log, which never changes"):
        table.store.fold(tmp_path / "t.engram")


def test_another_base_rule_or_writer_is_refused(tmp_path):
    base_file(tmp_path / "t.engram")
    base_file(tmp_path / "other.engram", rows=np.zeros((ROWS, WIDTH), np.float32))
    first = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    with pytest.raises(CheckpointError, match="being written by another process"):
        LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    first.close()
    for base, rule in (("other", "row-adam"), ("t", "row-rmsprop")):
        with pytest.raises(CheckpointError, match="another base file, rule or format"):
            LoggedTable.open(tmp_path / f"{base}.engram", tmp_path / "t.rows", rule=rule_from_json(rule))
    base_file(tmp_path / "fp8.engram", codec="fp8_e4m3", rows=np.zeros((ROWS, WIDTH), np.float32))
    with pytest.raises(ConfigError, match="Rows of codec fp8_e4m3 do not train"):
        LoggedTable.open(tmp_path / "fp8.engram", tmp_path / "fp8.rows")


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    base_file(tmp_path / "t.engram")
    store = LoggedStore(DiskStore(open_packed(tmp_path / "t.engram")), tmp_path / "t.rows")
    store.append(np.array([3]), np.ones((1, 4 * WIDTH), np.uint8), update=1)
    wanted, pwrite, calls = store.gather(np.arange(ROWS)), os.pwrite, []

    def full(file, data, at):
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(None)
        return pwrite(file, data[: len(data) // 2], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.append(np.array([3, 4]), np.full((2, 4 * WIDTH), 7, np.uint8), update=2)
    monkeypatch.undo()
    assert np.array_equal(store.gather(np.arange(ROWS)), wanted)
    assert os.path.getsize(tmp_path / "t.rows") == store.position
    assert store.last_update == 1


@pytest.mark.slow
def test_a_killed_run_rolls_back_to_its_checkpoint_and_goes_on_bit_for_bit(tmp_path):
    base_file(tmp_path / "t.engram")
    script = textwrap.dedent("""
        import sys, torch
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from test_row_log import LoggedTable, step
        here = Path(sys.argv[1])
        table = LoggedTable.open(here / "t.engram", here / "t.rows")
        for seed in range(1000):
            step(table, seed)
            if seed == 4:
                torch.save(table.checkpoint(), here / "checkpoint.pt")
                print("saved", flush=True)
    """)
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), os.path.dirname(__file__)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "saved\n"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()

    table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
    table.restore(torch.load(tmp_path / "checkpoint.pt"))
    straight = DeviceTable(n_rows=ROWS, width=WIDTH)
    straight.rows_view().copy_(
        torch.from_numpy(HostStore.load(open_packed(tmp_path / "t.engram")).gather(np.arange(ROWS)))
    )
    for seed in range(5):
        step(straight, seed)
    assert torch.equal(everything(table), everything(straight))
    for seed in range(5, 8):
        step(straight, seed)
        step(table, seed)
    assert torch.equal(everything(table), everything(straight))


def test_a_log_of_another_run_is_not_taken_for_the_checkpoints(tmp_path):
    """Equal numbers of updates, of rows in each, and of bytes: as a run leaves them that was started anew."""
    base_file(tmp_path / "t.engram")
    chains, lengths = [], []
    for scale in (1.0, 0.5):
        (tmp_path / "t.rows").unlink(missing_ok=True)
        table = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
        for seed in range(2):
            address = torch.arange(10 * seed, 10 * seed + 5)
            optimizer = torch.optim.SGD([table.gradients.handle], lr=scale)
            table.read(address, table.gradients.handle).sum().backward()
            optimizer.step()
        where = table.where()
        chains.append(where["chain"])
        lengths.append(where["position"])
        assert table.store.chain_at(where["position"]) == where["chain"] == table.store.chain
        assert table.gradients.run == table.run
        for at in (where["position"] - 1, where["position"] + 1):
            with pytest.raises(CheckpointError, match=r"no whole batch that ends at|the log lost rows"):
                table.store.chain_at(at)
        kept = table.gradients.run
        table.close()
        # what it is known by is in the log
        again = LoggedTable.open(tmp_path / "t.engram", tmp_path / "t.rows")
        assert again.gradients.run == kept
        again.close()
    assert lengths[0] == lengths[1]
    assert chains[0] != chains[1]
