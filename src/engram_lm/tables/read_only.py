"""A store as a table: torch tensors in and out, rows fetched ahead in the background, read only.

    table = StoredTable(DiskStore(open_packed(path)))
    ticket = table.prefetch(address)            # returns at once; a thread reads
    rows = ticket.rows()                        # waits for what is missing

A ticket decides when the work is done, never what the answer is: one that failed, or was asked for twice, is gathered
anew, and with `shadow=True` every ticket is compared with a gather of its own.
"""

import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, RowUpdateError, StateError
from engram_lm.storage.store import PendingGather, RowStore, int64
from engram_lm.tables.gradients import RowGradients
from engram_lm.tables.protocol import Save
from engram_lm.tables.rules import RowRule
from engram_lm.tables.saving import save_tensors

logger = logging.getLogger(__name__)

_OUT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class ReadOnlyTable:
    """Rows of a store, as the layers read them.

    Args:
        store: HostStore, DiskStore, CachedStore or one of your own.
        dtype: rows leave as torch.float32 or torch.bfloat16, in pinned memory where CUDA is in use.
        threads: gathers at a time in the background.
        shadow: compare every prefetched gather with a second one; StateError on any difference. For tests: it doubles reads.
    """

    def __init__(
        self, store: RowStore, *, dtype: torch.dtype = torch.float32, threads: int = 2, shadow: bool = False
    ) -> None:
        if dtype not in _OUT:
            raise ConfigError(f"Rows of a stored table leave as float32 or bfloat16; got {dtype}.")
        self.store, self.dtype, self.shadow, self.threads = store, dtype, shadow, threads
        self.n_rows, self.width = store.n_rows, store.width
        self.gradients = RowGradients(self, name=store.name)
        self.gradients.handle.requires_grad_(False)
        # for instruments: tickets that layers asked for their rows, and what they waited for them
        self.tickets_read, self.waited_s = 0, 0.0
        self._pins = True  # until pinned memory fails once
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of: int | None = None
        self._lock = threading.Lock()

    device = torch.device("cpu")
    fetches_ahead = True
    trains = "never"

    def __deepcopy__(self, memo: dict) -> "ReadOnlyTable":
        """A table of the same store: it cannot change."""
        twin = ReadOnlyTable(self.store, dtype=self.dtype, threads=self.threads, shadow=self.shadow)
        memo[id(self)] = twin
        twin.gradients = self.gradients.copy_for(twin, memo)
        return twin

    @property
    def identity(self) -> dict | None:
        """The readable facts of the file's identity, None where it has none."""
        return self.store.identity

    @property
    def bytes_per_row(self) -> int:
        return self.store.record_bytes

    def state_bytes(self) -> int:
        """No optimizer state: these rows do not train."""
        return 0

    def gather(self, address: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows [..., width] in the table's dtype at int64 `address` [...]; AddressError when one is out of range."""
        if out is None:
            out = self._empty((*address.shape, self.width))
        elif out.dtype != self.dtype:
            raise ConfigError(f"out must be {self.dtype}; got {out.dtype}.")
        self.store.gather(address.detach().to("cpu").numpy(), out=self._array(out), dtype=_OUT[self.dtype])
        return out

    def finish(self, begun: PendingGather, shape: tuple[int, ...]) -> Tensor:
        """The rows [*shape, width] of a gather that the store began."""
        out = self._empty((*shape, self.width))
        begun.finish(out.data_ptr(), _OUT[self.dtype])
        return out

    def _array(self, out: Tensor) -> np.ndarray:
        return out.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else out.numpy()

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for rows: pinned where this process uses a GPU, so that a copy to it runs while the CPU goes on."""
        # not is_available: a context on a GPU that a model on the CPU, or a forked worker, never asked for
        if self._pins and torch.cuda.is_initialized():
            try:
                return torch.empty(shape, dtype=self.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                logger.warning(
                    "%s gathers into plain memory: pinned memory failed (%s).", self.store.name, error
                )
        return torch.empty(shape, dtype=self.dtype)

    def prefetch(self, address: Tensor) -> "StoredTicket":
        """Begin a gather and return its ticket. Addresses outside raise now.

        A disk has a compiled thread that reads (`storage.read_ahead`). Elsewhere a Python thread gathers; it has to take
        turns with this one for the interpreter, which costs a decode step a millisecond.
        """
        if address.dtype is not torch.int64 or address.device.type != "cpu" or not address.is_contiguous():
            address = torch.from_numpy(int64(address.detach().to("cpu").numpy()))
        begun = self.store.begin(address.data_ptr(), address.numel())
        if begun is not None:
            return StoredTicket(self, address, None, begun)
        self.store.require_in_range(address.numpy().reshape(-1))
        return StoredTicket(self, address, self._workers().submit(self.gather, address), None)

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool_of != os.getpid():  # threads do not survive a fork
                self._pool, self._pool_of = ThreadPoolExecutor(self.threads, "engram-prefetch"), os.getpid()
            return self._pool

    def read(self, address: Tensor, handle: Tensor, ticket: "StoredTicket | None" = None) -> Tensor:
        """What a layer calls: the ticket's rows, or a gather now."""
        if torch.compiler.is_compiling():
            raise ConfigError(
                "Tables on host memory or disk do not run under torch.compile yet; use tier='device'."
            )
        return self.gather(address) if ticket is None else ticket.rows()

    def update(
        self, unique: Tensor, gradient: Tensor, *, rule: RowRule, learning_rate: float, scale: float = 1.0
    ) -> None:
        """Refused: see `tables.device` for host memory that trains."""
        raise RowUpdateError(
            f"The rows of {self.store.name} are read only. Train them on tier 'device', or on disk as a LoggedTable."
        )

    def checkpoint(self) -> dict[str, Tensor]:
        """All rows, decoded. CheckpointError where they exceed a quarter of this machine's free memory."""
        n_bytes = self.n_rows * self.width * self.dtype.itemsize
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if n_bytes > free // 4:
            raise CheckpointError(
                f"{self.store.name} holds {n_bytes / 2**30:,.1f} GiB of rows that have not changed: keep its file."
            )
        rows = torch.empty((self.n_rows, self.width), dtype=self.dtype)  # never pinned: it may be large
        return {"rows": self.gather(torch.arange(self.n_rows), out=rows)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Refused: a stored table is what its file says."""
        raise CheckpointError(
            f"{self.store.name} is read from its file and cannot be filled from a checkpoint."
        )

    def where(self) -> None:
        """Its rows are in no log."""

    def save(self, save: Save, stem: str, *, identity: str) -> dict[str, object]:
        """See `Table.save`."""
        return save_tensors(self, save, stem, identity=identity)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self.store.close()


class StoredTicket:
    """A gather under way."""

    def __init__(
        self, table: ReadOnlyTable, address: Tensor, future: Future | None, begun: PendingGather | None
    ) -> None:
        self._table, self._address, self._future, self._begun = table, address, future, begun

    def rows(self) -> Tensor:
        """The rows `gather` would return now."""
        table, future, begun = self._table, self._future, self._begun
        self._future = self._begun = None
        if future is None and begun is None:  # asked for before: gradient checkpointing runs a block twice
            return table.gather(self._address)
        started = time.perf_counter()
        try:
            rows = future.result() if begun is None else table.finish(begun, self._address.shape)
        except Exception as error:  # whatever it was: if it lasts, the gather raises it again
            logger.warning("A prefetch of %s failed (%r); reading again.", table.store.name, error)
            rows = table.gather(self._address)
        table.waited_s += time.perf_counter() - started
        table.tickets_read += 1
        if table.shadow:
            again = table.gather(self._address)
            if not torch.equal(rows.view(torch.uint8), again.view(torch.uint8)):
                raise StateError(
                    f"A prefetch of {table.store.name} brought other rows than a gather: please report it."
                )
        return rows
