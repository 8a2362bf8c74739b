"""Gathers of a disk store that a thread outside the interpreter carries out (`storage.kernels.read_ahead`).

    begun = Begun(store, ahead, n)         # made by DiskStore.begin
    begun.finish(out.data_ptr(), "fp32")   # waits for what is missing

An `ReadThread` is one such thread with a queue and all the memory a gather needs, used again and again: a decode step has no
time to allocate.
"""

import contextlib
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.storage.format import damaged_rows
from engram_lm.storage.kernels import disk as codes
from engram_lm.storage.kernels import read_ahead as kernels
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.store import decode_at

if TYPE_CHECKING:
    from engram_lm.storage.disk import DiskStore

ROWS = 1 << 16  # of a gather that is handed over; it keeps memory for as many records as it ever held
ROUND_BYTES = 4 << 20  # read before its records are taken out


class ReadThread:
    """A reading thread and its memory. One gather at a time.

    Args:
        segment_SX: int64 [S, 11], as `storage.kernels.read_ahead.serve` takes it.
    """

    def __init__(self, store: "DiskStore", segment_SX: np.ndarray) -> None:
        self.pid, self.n_rows, self.record_bytes = os.getpid(), store.n_rows, store.record_bytes
        self.control = np.zeros(kernels.CONTROL, np.int64)
        self._beat = np.zeros(1, np.int64)
        self._room(64)
        self.usable = False
        queue = codes.queue(store.depth) if hasattr(os, "eventfd") else None
        if queue is None:
            return
        events: list[int] = []
        try:
            for _ in range(2):
                events.append(os.eventfd(0, os.EFD_CLOEXEC))
            self._start(store, segment_SX, queue, events)
        except BaseException:
            codes.close_queue(queue)
            for handle in events:
                os.close(handle)
            raise

    def _start(self, store: "DiskStore", segment_SX: np.ndarray, queue: int, events: list[int]) -> None:
        self._wake, self._done = events
        per_round = max(1, ROUND_BYTES // store.most_read)
        pages = row_kernels.zero_pages(per_round * len(segment_SX) * store.most_read)
        # a page that a child shares could be copied away from under a read
        with contextlib.suppress(OSError, AttributeError):
            pages.madvise(mmap.MADV_DONTFORK)
        thread = threading.Thread(
            target=_serve,
            args=(
                queue, self._wake, self._done, self.control, segment_SX, store.layout.pages_at, store.sums,
                store.record_bytes, per_round, np.frombuffer(pages, np.uint8),
                np.zeros((kernels.JOB_ROWS, per_round * len(segment_SX)), np.int64),
                np.zeros((store.depth, 8), np.uint64), np.zeros(store.depth, np.int64),
                np.zeros((store.depth, 4), np.int64),
            ),
            name="engram-disk-reader",
            daemon=True,
        )  # fmt: skip
        thread.start()
        # not a method: the thread and what ends it hold no reference to this object
        self._end = weakref.finalize(self, _end, self.pid, thread, self.control, queue, events)
        self.usable = True

    def _room(self, n: int) -> None:
        self._room_XN = np.zeros((3, n), np.int64)
        self._record_NR = np.zeros((n, self.record_bytes), np.uint8)
        self.control[kernels.ROOM] = self._room_XN.ctypes.data
        self.control[kernels.CAPACITY] = n
        self.control[kernels.RECORDS] = self.record_at = self._record_NR.ctypes.data
        self.index_N = self._room_XN[kernels.INDEX_N]

    def post(self, address_at: int, n: int) -> int:
        """Begin a gather of n int64 addresses; the place of the first one outside, or -1."""
        if n > len(self.index_N):
            self._room(max(n, 2 * len(self.index_N)))
        return kernels.post(address_at, n, self.n_rows, self.control, self._wake, self._beat)

    def wait(self) -> bool:
        """Wait for it; True where every record came."""
        return kernels.wait(self._done, self._beat) and self.control[kernels.STATUS] == codes.OK

    def close(self) -> None:
        """Wait for reads under way and end the thread."""
        if self.usable:
            self.usable = False
            self._end()


def _serve(*args: Any) -> None:
    # never in front of the thread that woke it, where cores are few
    with contextlib.suppress(OSError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_BATCH, os.sched_param(0))
    kernels.serve(*args)


def _end(pid: int, thread: threading.Thread, control: np.ndarray, queue: int, events: list[int]) -> None:
    if pid == os.getpid():
        control[kernels.STOP] = 1
        os.eventfd_write(events[0], 1)
        thread.join()
        # a queue that broke is closed already, and its number may be another's
        if control[kernels.STATUS] != codes.BROKEN:
            codes.close_queue(queue)
    for handle in events:
        os.close(handle)


class PostedGather:
    """A gather under way. Dropped, it waits for its reads: their memory is used again."""

    __slots__ = ("_ahead", "_n", "_store")

    def __init__(self, store: "DiskStore", ahead: ReadThread, n: int) -> None:
        self._store, self._ahead, self._n = store, ahead, n

    def finish(self, out_at: int, dtype: str) -> None:
        store, ahead, self._ahead = self._store, self._ahead, None
        if ahead is None or not ahead.usable or ahead.pid != os.getpid():
            raise CheckpointError(f"{store.name}: these reads were finished, closed or another process's.")
        if not ahead.wait():
            ahead.close()
            raise _failure(store, ahead.control)
        decode_at(store, ahead.record_at, ahead.index_N[: self._n], out_at, dtype)
        store.give_back(ahead)

    def __del__(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.usable and ahead.pid == os.getpid():
            if ahead.wait():
                self._store.give_back(ahead)
            else:
                ahead.close()


def _failure(store: "DiskStore", control: np.ndarray) -> CheckpointError:
    status, where, got, handle, offset = control[kernels.STATUS : kernels.OFFSET + 1].tolist()
    if status == codes.DAMAGED:
        return damaged_rows(store.layout, where)
    return store.failure(handle, offset, status, got)
