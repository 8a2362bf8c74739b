"""A table split over ranks against one DeviceTable: the same rows, the same steps, and refusals that no rank waits for.

Each world of processes is started once; every check runs on all its ranks and says there what it found. The one table
that a check compares with is built on every rank, from the data of all ranks, which follow from seeds.
"""

import copy
import datetime
import traceback
import warnings

import pytest
import torch
from torch import distributed as dist

from engram_lm.errors import (
    AddressError,
    CheckpointError,
    ConfigError,
    EngramError,
    StateError,
)
from engram_lm.tables import SGD, DeviceTable, RowAdam, RowAdamMomentum, RowMomentumSinkhorn, ShardedTable
from engram_lm.tables.protocol import Table
from engram_lm.tables.shards import Shard, even_boundaries

ROWS, WIDTH = 50, 6
BOUNDARIES = {1: [0, 50], 2: [0, 13, 50], 3: [0, 7, 8, 50]}


def start_rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(99))


def pair(**options) -> tuple[ShardedTable, DeviceTable]:
    """The split table and the whole one, with the same rows."""
    uneven = BOUNDARIES[dist.get_world_size()]
    sharded = ShardedTable(n_rows=ROWS, width=WIDTH, boundaries=uneven, **options)
    whole = DeviceTable(n_rows=ROWS, width=WIDTH, **options)
    whole.rows_view().copy_(start_rows())
    sharded.rows_view().copy_(start_rows()[sharded.part.first : sharded.part.last])
    return sharded, whole


def own(table: ShardedTable, tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor with a number or row for every row."""
    return tensor[table.part.first : table.part.last]


def batches(seed: int, *, empty: int | None = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(addresses, weights) of each rank: few rows, often repeated; rank `empty` has none."""
    found = []
    for rank in range(dist.get_world_size()):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        n = 0 if rank == empty else 40 + rank
        address = torch.randint(0, ROWS, (n,), generator=generator) // 3 * 3
        found.append((address, torch.randn(n, WIDTH, generator=generator)))
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def same_table(sharded: ShardedTable, whole: DeviceTable) -> bool:
    """Rows and state of this rank, bit for bit."""
    mine = {k: v for k, v in sharded.checkpoint().items() if not k.startswith("shard.")}
    all_rows = whole.checkpoint()
    return mine.keys() == all_rows.keys() and all(
        same(v, all_rows[k] if k == "state.rounding" else own(sharded, all_rows[k])) for k, v in mine.items()
    )


def error_of(call) -> tuple[type, str]:
    try:
        call()
    except EngramError as error:
        return type(error), str(error)
    return type(None), ""


# ---- checks, each run by every rank ---------------------------------------------------------------------------------


def gathers_the_same_rows(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sharded, whole = pair(dtype=dtype)
        for seed in range(3):
            address = batches(seed, empty=seed)[rank][0]
            wanted = whole.gather(address)
            assert same(sharded.gather(address), wanted)
            out = torch.full_like(wanted, 7.0)
            assert sharded.gather(address, out=out) is out
            assert same(out, wanted)
        square = torch.arange(rank, rank + 12).view(3, 4)
        assert same(sharded.gather(square), whole.gather(square))
        nothing = torch.zeros(0, 4, dtype=torch.long)
        assert same(sharded.gather(nothing), whole.gather(nothing))
    assert isinstance(sharded, Table)


def tickets_change_when_and_never_what(rank: int) -> None:
    sharded, whole = pair(rule=SGD())
    first, second = batches(0)[rank][0], batches(1, empty=0)[rank][0]
    tickets = [sharded.prefetch(first), sharded.prefetch(second)]
    assert same(sharded.gather(second), whole.gather(second))
    assert same(tickets[1].rows(), whole.gather(second))
    every = torch.arange(ROWS)
    whole.update(every, torch.ones(ROWS, WIDTH), rule=SGD(), learning_rate=0.1)
    rows = own(sharded, every)
    sharded.update(rows, torch.ones(len(rows), WIDTH), rule=SGD(), learning_rate=0.1)
    assert same(tickets[0].rows(), whole.gather(first))
    assert same(tickets[0].rows(), whole.gather(first))
    ticket = sharded.prefetch(first)
    handle = sharded.gradients.handle
    read = sharded.read(first, handle, ticket)
    assert read.requires_grad
    assert same(read.detach(), whole.gather(first))
    with torch.no_grad():
        assert same(sharded.read(second, handle, sharded.prefetch(second)), whole.gather(second))


def steps_of(rank: int | None, n: int, *, seed: int = 0) -> list:
    """Steps of two backwards of two reads, (addresses, weights) each; of all ranks in rank order where rank is None."""
    steps = []
    for step in range(n):
        halves = []
        for half in range(2):
            reads = []
            for read in range(2):
                by_rank = batches(seed + 100 * step + 10 * half + read, empty=(step + half) % 3)
                chosen = by_rank if rank is None else [by_rank[rank]]
                reads.append(tuple(torch.cat(parts) for parts in zip(*chosen, strict=True)))
            halves.append(reads)
        steps.append(halves)
    return steps


def train(table, steps: list, *, clip: float | None = None) -> list[float]:
    """Train through the handle; returns the norms that it saw."""
    handle, norms = table.gradients.handle, []
    optimizer = torch.optim.SGD([handle], lr=0.01)
    for halves in steps:
        optimizer.zero_grad()
        for reads in halves:
            sum((table.read(address, handle).float() * weight).sum() for address, weight in reads).backward()
        norms.append(float(handle.grad))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([handle], clip)
        optimizer.step()
    return norms


def trains_as_one_table_fed_all_batches(rank: int) -> None:
    for rule, dtype in (
        (SGD(), torch.float32),
        (RowAdam(), torch.float32),
        (RowAdamMomentum(), torch.float32),
        (RowAdam(), torch.bfloat16),
    ):
        sharded, whole = pair(rule=rule, dtype=dtype, **({"seed": 4} if dtype == torch.bfloat16 else {}))
        norms = train(sharded, steps_of(rank, 4))
        wanted = train(whole, steps_of(None, 4))
        assert same_table(sharded, whole), (rule, dtype)
        assert not torch.equal(whole.rows_view(), start_rows().to(dtype))
        assert norms == pytest.approx(wanted, rel=1e-6)
        assert sharded.gradients.updates == 4
        address = torch.arange(ROWS)
        assert same(sharded.gather(address), whole.gather(address))


def clips_alike_on_every_rank(rank: int) -> None:
    sharded, whole = pair(rule=SGD())
    norms = train(sharded, steps_of(rank, 3), clip=0.5)
    wanted = train(whole, steps_of(None, 3), clip=0.5)
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, norms)
    assert of_ranks == [norms] * len(of_ranks)
    assert norms == pytest.approx(wanted, rel=1e-6)
    assert min(norms) > 0.5
    # a norm off by its last bit scales every gradient by it
    torch.testing.assert_close(sharded.rows_view(), own(sharded, whole.rows_view()), rtol=1e-6, atol=1e-7)


def no_gradient_anywhere_changes_nothing(rank: int) -> None:
    sharded, whole = pair(rule=RowAdam())
    nothing = [[[(torch.zeros(0, dtype=torch.long), torch.zeros(0, WIDTH))]]]
    assert train(sharded, nothing) == [0.0]
    assert same(sharded.rows_view(), own(sharded, whole.rows_view()))
    zero = [[[(torch.tensor([3]), torch.zeros(1, WIDTH))]]]
    assert train(sharded, zero) == train(whole, zero) == [0.0]
    assert same_table(sharded, whole)


def a_copy_trains_alone(rank: int) -> None:
    sharded, whole = pair(rule=SGD())
    twin = copy.deepcopy(sharded)
    train(twin, steps_of(rank, 1))
    assert same_table(sharded, whole)
    train(whole, steps_of(None, 1))
    assert same_table(twin, whole)


def one_ranks_wrong_address_raises_on_all(rank: int) -> None:
    sharded, whole = pair(name="facts")
    last = dist.get_world_size() - 1
    right = torch.tensor([3, 5])
    wrong = {
        "outside, which has 50 rows": lambda: sharded.gather(torch.tensor([0, ROWS, 1])),
        "prefetched": lambda: sharded.prefetch(torch.tensor([-1])),
        "int64": lambda: sharded.gather(torch.tensor([3], dtype=torch.int32)),
        "out": lambda: sharded.gather(right, out=torch.zeros(3, WIDTH)),
    }
    said = {}
    for what, call in wrong.items():
        kind, said[what] = error_of(call if rank == last else lambda: sharded.gather(right))
        assert kind is AddressError
        if rank != last:
            assert said[what].startswith(f"Rank {last} could not go on with facts")
        assert same(sharded.gather(right), whole.gather(right))
    if rank == last:
        assert (
            said["outside, which has 50 rows"] == "Address 50 at place 1 is outside facts, which has 50 rows."
        )
        assert said["prefetched"] == "Address -1 at place 0 is outside facts, which has 50 rows."
        assert said["int64"] == "Addresses are int64; got torch.int32."
        assert said["out"].startswith("out must be a contiguous (2, 6) tensor")


def ranks_that_do_different_things_are_told(rank: int) -> None:
    sharded, _ = pair(name="facts")
    if dist.get_world_size() == 1:
        return
    held = sharded.checkpoint()
    kind, said = error_of(lambda: sharded.restore(held) if rank == 0 else sharded.gather(torch.tensor([1])))
    assert kind is StateError
    assert "rank 0 restores, rank 1 reads" in said
    handle, one = sharded.gradients.handle, torch.tensor([1])
    reads = [sharded.read(one, handle) for _ in range(2)]
    total = reads[0].sum() if rank == 0 else reads[0].sum() + reads[1].sum()
    kind, said = error_of(total.backward)
    assert kind is StateError
    assert "rank 0 runs backward over 1 reads, rank 1 runs backward over 2 reads" in said
    sharded.gradients.check(handle, training=True)
    assert sharded.gather(one).shape == (1, WIDTH)


def a_checkpoint_goes_back_to_its_own_rank(rank: int) -> None:
    identity = {"layer": 1, "moduli": [23, 27]}
    sharded, whole = pair(rule=RowAdam(), dtype=torch.bfloat16, seed=7)
    train(sharded, steps_of(rank, 2))
    train(whole, steps_of(None, 2))
    held = {name: tensor.clone() for name, tensor in sharded.checkpoint().items()}
    again, _ = pair(rule=RowAdam(), dtype=torch.bfloat16)
    again.restore(held)
    for table in (sharded, again):
        train(table, steps_of(rank, 2, seed=5))
    train(whole, steps_of(None, 2, seed=5))
    assert same_table(sharded, whole)
    assert same_table(again, whole)
    # refused on every rank, and nothing changed
    before = again.rows_view().clone()
    last = dist.get_world_size() - 1
    damaged = held | {"rows": held["rows"][:-1]}
    kind, said = error_of(lambda: again.restore(damaged if rank == last else held))
    assert kind is CheckpointError
    assert ("the checkpoint holds rows of shape" if rank == last else f"Rank {last} could not") in said
    kind, said = error_of(lambda: again.restore(whole.checkpoint()))
    assert kind is CheckpointError
    assert "does not say which part it holds" in said
    other = ShardedTable(
        n_rows=ROWS, width=WIDTH, boundaries=BOUNDARIES[last + 1], rule=RowAdam(), identity=identity
    )
    kind, said = error_of(lambda: other.restore(held))
    assert kind is CheckpointError
    assert "another identity" in said
    assert same(again.rows_view(), before)


def a_checkpoint_fits_another_split(rank: int) -> None:
    sharded, whole = pair(rule=RowAdam(), dtype=torch.bfloat16, seed=7)
    train(sharded, steps_of(rank, 2))
    pieces: list = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, {name: tensor.clone() for name, tensor in sharded.checkpoint().items()})
    even = ShardedTable(n_rows=ROWS, width=WIDTH, rule=RowAdam(), dtype=torch.bfloat16)
    assert list(even.part.boundaries) == even_boundaries(ROWS, dist.get_world_size())
    if len(pieces) > 1:
        kind, said = error_of(lambda: even.restore(pieces[rank]))
        assert kind is CheckpointError
        assert "Give every rank's checkpoint to restore_from" in said
        kind, said = error_of(lambda: even.restore_from(pieces[:-1]))
        assert kind is CheckpointError
    even.restore_from(reversed(pieces))
    train(even, steps_of(rank, 2, seed=5))
    train(whole, steps_of(None, 2))
    train(whole, steps_of(None, 2, seed=5))
    assert same_table(even, whole)


def tables_that_ranks_make_differently_are_refused(rank: int) -> None:
    last = dist.get_world_size() - 1
    kind, said = error_of(lambda: ShardedTable(n_rows=ROWS, width=WIDTH + (rank == last), name="facts"))
    assert kind is (ConfigError if last else type(None))
    if last:
        assert f"Rank {last} was given another facts than rank 0" in said
    kind, said = error_of(
        lambda: ShardedTable(n_rows=ROWS, width=WIDTH, seed=-1 if rank == last else 0, name="facts")
    )
    assert kind is ConfigError
    assert ("seed is a whole number" if rank == last else f"Rank {last} cannot hold its part") in said
    wrong = [
        {"boundaries": [0, ROWS, ROWS + 1, ROWS + 2, ROWS + 3]},
        {"boundaries": [1, *BOUNDARIES[last + 1][1:]]},
        {"rule": RowMomentumSinkhorn()},
    ]
    for options in wrong:
        assert (
            error_of(lambda options=options: ShardedTable(n_rows=ROWS, width=WIDTH, **options))[0]
            is ConfigError
        )
    if last:
        assert error_of(lambda: ShardedTable(n_rows=last, width=WIDTH))[0] is ConfigError
    sharded, _ = pair()
    outside = torch.tensor([sharded.part.last])
    kind, said = error_of(
        lambda: sharded.update(outside, torch.ones(1, WIDTH), rule=SGD(), learning_rate=0.1)
    )
    assert kind is AddressError
    assert "each rank updates its own" in said


def a_part_of_the_ranks_is_a_group(rank: int) -> None:
    members = list(range(max(1, dist.get_world_size() - 1)))
    group = dist.new_group(members)
    if rank in members:
        table = ShardedTable(n_rows=ROWS, width=WIDTH, group=group)
        table.rows_view().copy_(own(table, start_rows()))
        address = torch.arange(rank, ROWS, 3)
        assert same(table.gather(address), start_rows()[address])
    dist.barrier()


CHECKS = [
    gathers_the_same_rows,
    tickets_change_when_and_never_what,
    trains_as_one_table_fed_all_batches,
    clips_alike_on_every_rank,
    no_gradient_anywhere_changes_nothing,
    a_copy_trains_alone,
    one_ranks_wrong_address_raises_on_all,
    ranks_that_do_different_things_are_told,
    a_checkpoint_goes_back_to_its_own_rank,
    a_checkpoint_fits_another_split,
    tables_that_ranks_make_differently_are_refused,
    a_part_of_the_ranks_is_a_group,
]


# ---- the worlds -----------------------------------------------------------------------------------------------------


def on_one_rank(rank: int, store: str, world: int, out: str | None) -> dict[str, str]:
    """Run the checks up to the first that fails; "passed", a traceback, or that it did not run, for each."""
    if out is not None:  # a process of its own, which conftest has not prepared
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    found = {check.__name__: "did not run: an earlier check failed" for check in CHECKS}
    try:
        for check in CHECKS:
            try:
                check(rank)
                found[check.__name__] = "passed"
            except Exception:
                found[check.__name__] = f"rank {rank}: {traceback.format_exc()}"
                break  # ranks are out of step now; without this one the others fail too and do not wait
    finally:
        if out is not None:
            torch.save(found, f"{out}.{rank}")
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What the ranks of a world of n processes found, each world run once."""
    done = {}

    def run(n: int) -> list[dict[str, str]]:
        if n not in done:
            place = tmp_path_factory.mktemp("world")
            store, out = str(place / "store"), str(place / "out")
            if n == 1:
                done[n] = [on_one_rank(0, store, 1, None)]
            else:
                torch.multiprocessing.spawn(on_one_rank, (store, n, out), nprocs=n)
                done[n] = [torch.load(f"{out}.{rank}") for rank in range(n)]
        return done[n]

    return run


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize(
    "n", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_in_a_world_of(worlds, n, check):
    found = worlds(n)
    assert len(found) == n
    for of_rank in found:
        assert of_rank[check] == "passed", of_rank[check]


def test_without_a_process_group_the_next_step_is_named():
    with pytest.raises(
        ConfigError, match=r"call torch\.distributed\.init_process_group first, or use DeviceTable"
    ):
        ShardedTable(n_rows=ROWS, width=WIDTH)


def test_even_boundaries_give_the_remainder_to_the_first():
    assert even_boundaries(11, 3) == [0, 4, 8, 11]
    assert even_boundaries(12, 3) == [0, 4, 8, 12]
    assert even_boundaries(2, 1) == [0, 2]


def piece(rank: int, boundaries: tuple, **more) -> dict:
    part = Shard(name="facts", boundaries=boundaries, rank=rank)
    rows = torch.arange(part.first, part.last)[:, None].float()
    return {"rows": rows, "state.count": rows[:, 0]} | part.to_tensors() | more


@pytest.mark.parametrize("target", [(0, 4, 5, 10), (0, 9, 10), (0, 10)])
@pytest.mark.parametrize("source", [(0, 1, 10), (0, 3, 6, 10), (0, 10)])
def test_parts_are_cut_out_of_any_split(source, target):
    pieces = [piece(rank, source) for rank in range(len(source) - 1)]
    for rank in range(len(target) - 1):
        part = Shard(name="facts", boundaries=target, rank=rank)
        found = part.cut_out(reversed(pieces))
        assert found["rows"][:, 0].tolist() == list(range(part.first, part.last))
        assert found["state.count"].tolist() == list(range(part.first, part.last))


def test_parts_that_do_not_fit_are_refused_by_what_is_wrong():
    part = Shard(name="facts", boundaries=(0, 2, 10), rank=1)
    split = (0, 3, 6, 10)
    pieces = [piece(rank, split) for rank in range(3)]
    assert part.own(piece(1, (0, 2, 10)))["rows"][:, 0].tolist() == list(range(2, 10))
    for wrong, message in [
        (pieces[::2], "hold row 3 of facts not once"),
        ([*pieces, pieces[1]], "hold row 6 of facts not once"),
        ([*pieces[:2], piece(1, (0, 6, 10))], "several splits of facts"),
        ([pieces[0], piece(1, split, rows=torch.zeros(2, 1)), pieces[2]], "holds 2 rows"),
        (
            [pieces[0], piece(1, split, **{"state.rounding": torch.tensor([0, 1])}), pieces[2]],
            "different rules",
        ),
        (
            [piece(rank, split, **{"state.rounding": torch.tensor([0, rank])}) for rank in range(3)],
            "different steps",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            part.cut_out(wrong)
    with pytest.raises(
        CheckpointError, match=r"of rank 0 of 2 \(rows 0 to 2 of facts\); this is rank 1 of 2"
    ):
        part.own(piece(0, (0, 2, 10)))
    with pytest.raises(
        CheckpointError, match="facts has 10 rows; the checkpoint is of rank 1 of a table of 11"
    ):
        part.own(piece(1, (0, 2, 11)))
    with pytest.raises(ConfigError, match="ascending addresses from 0, with rows for every rank"):
        Shard(name="facts", boundaries=(0, 2, 2), rank=0)
