"""One table split over the processes of torch.distributed: each rank holds a run of rows, and reads and trains all of them.

    table = ShardedTable(n_rows=16_000_057, width=64)           # on every rank; an even split
    rows = table.gather(address)                                # each rank its own addresses
    table.read(address, table.gradients.handle).sum().backward()
    optimizer.step()                                            # each rank updates the rows it holds

Reading: addresses are deduplicated, go to the ranks that hold them, and rows come back; the answer is that of one
`DeviceTable`, bit for bit. Training: gradients go to the ranks that hold the rows and are summed in the order of ranks,
within a rank in the order of appearance, so a step is that of one `DeviceTable` that was given the ranks' batches
concatenated in rank order, bit for bit as long as clipping does not scale it (the norm that clipping sees is summed
shard by shard, the same number on every rank, a last bit from one table's). For that every occurrence of an address
crosses, not only its sum: 4 width + 8 bytes each. Gradients are summed, not averaged: a loss that is a mean over its own
rank's batch is to be divided by the number of ranks.

Every rank makes the same calls in the same order, with no addresses where it wants nothing; a rank that calls nothing is
waited for until the process group times out. Each exchange starts with a meeting at which all ranks learn what the
others are about to do: an address outside, or calls that do not match, raise on every rank before rows move.

Not here: rows on accelerators (they lie in host memory, and travel through the group's CPU backend, gloo), rules that
couple rows (RowMomentumSinkhorn), DistributedDataParallel and FSDP around the handle.
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import AddressError, CheckpointError, ConfigError, EngramError
from engram_lm.storage.kernels import rows as kernels
from engram_lm.tables.device import DeviceTable
from engram_lm.tables.gradients import Gather, RowGradients
from engram_lm.tables.pending import RowsGradient, gradient_of
from engram_lm.tables.protocol import Save
from engram_lm.tables.ranks import Doing, Ranks
from engram_lm.tables.rules import RowRule
from engram_lm.tables.shards import Shard, even_boundaries


class ShardedTable:
    """`n_rows` rows of which rank r of the group holds `boundaries[r]` to `boundaries[r + 1]`.

    Args, the same on every rank:
        n_rows, width: the shape of the whole table.
        boundaries: n_ranks + 1 ascending addresses from 0 to n_rows; default `even_boundaries`. No rank is without rows.
        dtype, rule, name, seed: as `DeviceTable`.
        identity: the readable facts of the addresses' identity, kept in checkpoints and compared by `restore`.
        group: the process group; it needs a backend for the CPU (gloo). Default the world.
    """

    fetches_ahead = True
    device = torch.device("cpu")
    trains = "group"

    def __init__(
        self,
        *,
        n_rows: int,
        width: int,
        boundaries: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        rule: RowRule | None = None,
        name: str = "table",
        seed: int = 0,
        identity: dict | None = None,
        group: Any = None,
    ) -> None:
        self.ranks = Ranks(group, name=name)
        self.n_rows, self.width, self.dtype, self.identity = n_rows, width, dtype, identity
        self._version = 0  # updates and restores so far
        problem, rule_json = None, None
        try:
            self.part = Shard(
                name=name, boundaries=_boundaries(boundaries, n_rows, self.ranks.n), rank=self.ranks.rank,
                identity=identity,
            )  # fmt: skip
            first, last = self.part.first, self.part.last
            self.gradients = ShardedRowGradients(self, rule=rule, name=name)
            rule_json = self.gradients.rule.to_json()
            _require_single_rows(self.gradients.rule)
            self.shard = DeviceTable(
                n_rows=last - first, width=width, dtype=dtype, rule=self.gradients.rule, seed=seed,
                first_row=first, name=f"{name} (rows {first} to {last})",
            )  # fmt: skip
        except EngramError as error:
            problem = error
        given = [n_rows, width, boundaries and list(boundaries), str(dtype), name, seed, identity, rule_json]
        self.ranks.agree(json.dumps(given, sort_keys=True), problem=problem)

    def __reduce__(self) -> tuple:
        raise CheckpointError(
            "A sharded table cannot be pickled: save what each rank's checkpoint() returns."
        )

    def __deepcopy__(self, memo: dict) -> "ShardedTable":
        """A table of its own in the same group; every rank must copy."""
        twin = object.__new__(ShardedTable)
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.shard = copy.deepcopy(self.shard, memo)
        twin.gradients = self.gradients.copy_for(twin, memo)
        return twin

    @property
    def bytes_per_row(self) -> int:
        return self.shard.bytes_per_row

    def state_bytes(self) -> int:
        """Bytes of row-optimizer state on this rank."""
        return self.shard.state_bytes()

    def rows_view(self) -> Tensor:
        """The rows that this rank holds, [last - first, width]; rows under way in a ticket do not see what is written."""
        return self.shard.rows_view()

    # ---- reading ------------------------------------------------------------------------------------------------

    def gather(self, address: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows [..., width] in the table's dtype at int64 `address` [...]. AddressError on all ranks for one outside."""
        return ShardedTicket(self, address, out).rows()

    def prefetch(self, address: Tensor) -> "ShardedTicket":
        """Send the addresses now; the rows travel while this rank does something else."""
        return ShardedTicket(self, address)

    def read(self, address: Tensor, handle: Tensor, ticket: "ShardedTicket | None" = None) -> Tensor:
        """`gather` with a gradient: what a layer calls. `handle` must be this table's handle parameter."""
        if torch.compiler.is_compiling():
            raise ConfigError("Sharded tables do not run under torch.compile; use DeviceTable.")
        if torch.is_grad_enabled() and handle.requires_grad:
            return Gather.apply(handle, self, address, ticket)
        return self.gather(address) if ticket is None else ticket.rows()

    # ---- writing ------------------------------------------------------------------------------------------------

    def update(
        self, unique: Tensor, gradient: Tensor, *, rule: RowRule, learning_rate: float, scale: float = 1.0
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) of those this rank holds. Nothing is sent.

        All ranks update equally often, with no rows where there is nothing to do: rounding and tickets count updates.
        """
        _require_single_rows(rule)
        part = self.part
        if len(unique) and not (part.first <= int(unique[0]) and int(unique[-1]) < part.last):
            raise AddressError(
                f"An update of rows {int(unique[0])} to {int(unique[-1])} came to {part}: each rank updates its own."
            )
        self._version += 1
        self.shard.update(unique - part.first, gradient, rule=rule, learning_rate=learning_rate, scale=scale)

    def checkpoint(self) -> dict[str, Tensor]:
        """This rank's rows and row-optimizer state (views), and which part of which table they are ("shard.")."""
        return self.shard.checkpoint() | self.part.to_tensors()

    def where(self) -> None:
        """Its rows are in no log."""

    def save(self, save: Save, stem: str, *, identity: str) -> dict[str, Any]:
        """Refused: no process holds all the rows."""
        raise CheckpointError(
            f"The rows of {stem} are split over {self.ranks.n} processes, and a memory's directory is written by one: save "
            "what each rank's checkpoint() returns."
        )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `checkpoint`, by all ranks together: nothing changes on any unless each was given its own part."""
        self._restore(lambda: self.part.own(tensors))

    def restore_from(self, pieces: Iterable[dict[str, Tensor]]) -> None:
        """Restore from the checkpoints of all ranks of a table that was split otherwise, over any number of them.

        Args:
            pieces: what each rank's `checkpoint` returned, in any order; those without rows of this rank may be left out.
        """
        self._restore(lambda: self.part.cut_out(pieces))

    def _restore(self, tensors_of: Callable[[], dict[str, Tensor]]) -> None:
        problem, tensors = None, {}
        try:
            tensors = tensors_of()
            self.shard.require_fits(tensors)
        except EngramError as error:
            problem = error
        self.ranks.meet(Doing.RESTORE, problem=problem)
        self._version += 1
        self.shard.restore(tensors)

    # ---- between ranks ------------------------------------------------------------------------------------------

    def route(self, address_N: Tensor, gradient_NW: Tensor, *, reads_to_go: int) -> tuple[Tensor, Tensor]:
        """Send gradients to the ranks that hold the rows. Returns what came: by rank, then in order of appearance."""
        address_N, gradient_NW = address_N.cpu(), gradient_NW.cpu()
        owner_N = torch.searchsorted(torch.tensor(self.part.boundaries[1:]), address_N, right=True)
        order_N = torch.sort(owner_N, stable=True).indices
        n_sent = torch.bincount(owner_N, minlength=self.ranks.n).tolist()
        n_received = self.ranks.meet(Doing.BACKWARD, to_go=reads_to_go, n_sent=n_sent)
        address_V, _ = self.ranks.swap(address_N[order_N], n_sent, n_received)
        gradient_VW, _ = self.ranks.swap(gradient_NW[order_N], n_sent, n_received)
        return address_V, gradient_VW


class ShardedTicket:
    """A gather under way: addresses were sent, rows travel."""

    def __init__(self, table: ShardedTable, address: Tensor, out: Tensor | None = None) -> None:
        self._table, self._address, self._out = table, address, out
        address_N = address.detach().reshape(-1).to("cpu")
        problem, n_sent = None, [0] * table.ranks.n
        try:
            _require_readable(table, address_N, (*address.shape, table.width), out)
        except EngramError as error:
            problem = error
        else:
            unique_U, self._place_N = torch.unique(address_N, return_inverse=True)
            at = torch.searchsorted(unique_U, torch.tensor(table.part.boundaries)).tolist()
            n_sent = [end - start for start, end in pairwise(at)]
        n_received = table.ranks.meet(Doing.READ, problem=problem, n_sent=n_sent)
        self._version = table._version
        wanted_V, _ = table.ranks.swap(unique_U, n_sent, n_received)
        rows_VW = table.shard.gather(wanted_V - table.part.first)
        # as bytes: backends do not know every dtype
        self._bytes_UB, self._work = table.ranks.swap(
            rows_VW.view(torch.uint8), n_received, n_sent, wait=False
        )

    def rows(self) -> Tensor:
        """The rows `gather` would return now; on every rank, as rows that changed since are fetched again."""
        table, work, self._work = self._table, self._work, None
        if work is None or self._version != table._version:
            if work is not None:
                work.wait()
            return table.gather(self._address, out=self._out)
        work.wait()
        rows_UB, place_N = self._bytes_UB, self._place_N
        out = self._out
        if out is None:
            out = torch.empty((*self._address.shape, table.width), dtype=table.dtype)
        kernels.gather(rows_UB.data_ptr(), place_N.numpy(), out.data_ptr(), table.bytes_per_row)
        self._bytes_UB = self._place_N = None
        return out


class ShardedRowGradients(RowGradients):
    """Pending gradients of the rows that this rank holds; the handle's gradient is the norm over all ranks."""

    def _summed(self, incoming: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        if not incoming:
            self.table.ranks.meet(Doing.BACKWARD)
        n = len(incoming)
        return super()._summed([self.table.route(*incoming[i], reads_to_go=n - i) for i in range(n)])

    def _gradient(self, unique_U: Tensor, merged_UW: Tensor) -> RowsGradient:
        square = merged_UW.double().square().sum().reshape(1)
        norm = self.table.ranks.sum_in_order(square).sqrt().float()
        return gradient_of(unique_U, merged_UW, name=self.name, handle=self.handle, norm=norm, is_whole=False)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _boundaries(boundaries: Sequence[int] | None, n_rows: int, n_ranks: int) -> tuple[int, ...]:
    found = even_boundaries(n_rows, n_ranks) if boundaries is None else [int(at) for at in boundaries]
    if len(found) != n_ranks + 1 or found[-1] != n_rows:
        raise ConfigError(
            f"boundaries are {n_ranks + 1} addresses from 0 to {n_rows}, for {n_ranks} ranks; got {found}."
        )
    return tuple(found)


def _require_single_rows(rule: RowRule) -> None:
    if rule.couples_rows:
        raise ConfigError(
            f"{rule.name} balances all rows of a step together, and the rows of a sharded table are stepped where they lie. "
            "Use row-adam or row-adam-momentum."
        )


def _require_readable(
    table: ShardedTable, address_N: Tensor, shape: tuple[int, ...], out: Tensor | None
) -> None:
    if address_N.dtype != torch.int64:
        raise AddressError(f"Addresses are int64; got {address_N.dtype}.")
    bad = kernels.first_out_of_range(address_N.numpy(), table.n_rows)
    if bad >= 0:
        raise AddressError(
            f"Address {address_N[bad]} at place {bad} is outside {table.gradients.name}, which has {table.n_rows} rows."
        )
    if out is not None and (out.shape != shape or out.dtype != table.dtype or not out.is_contiguous()):
        raise AddressError(f"out must be a contiguous {shape} tensor of {table.dtype}.")
