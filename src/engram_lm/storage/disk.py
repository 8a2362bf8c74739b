"""Rows read from files, each once a gather, many reads at a time, past the page cache.

A gather's addresses are sorted and made unique, covered with whole 4 KiB units, and read with O_DIRECT through a queue of
`depth` (`kernels.disk`). Every page of a packed file is checked against its checksum before a byte of it is used. Where
O_DIRECT or the queue is refused, threads read through the page cache; that is said once.

`close` waits for gathers that are under way. A forked child may go on reading: it makes its own queues and threads.
"""

import contextlib
import ctypes
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.storage.format import PAGE, damaged_rows, read_checksums_of
from engram_lm.storage.kernels import disk as kernels
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.kernels.read_ahead import N_BYTES, N_READS
from engram_lm.storage.layout import Layout
from engram_lm.storage.read_ahead import ROWS, PostedGather, ReadThread
from engram_lm.storage.store import RowStore

logger = logging.getLogger(__name__)

DEPTH = 64  # reads in flight; a virtual disk gave no more beyond it
STAGE_BYTES = 16 << 20  # what one round of reads may hold before its rows are taken out


class DiskStore(RowStore):
    """The rows of a layout, read when asked for. Several threads may gather at once.

    Args:
        depth: reads in flight.
        direct: False reads through the page cache, with threads.
    """

    def __init__(self, layout: Layout, *, depth: int = DEPTH, direct: bool = True) -> None:
        self._files: dict[Path, int] = {}
        self._idle: list[_Reader] = []
        self._idle_ahead: list[ReadThread] = []
        self._aheads: weakref.WeakSet[ReadThread] = weakref.WeakSet()
        # process ids, one for every gather under way; a child inherits its parent's, which are none of its own
        self._busy: list[int] = []
        self._changed = threading.Condition()
        super().__init__(
            name=layout.name, n_rows=layout.n_rows, width=layout.width, codec=layout.codec, scale=layout.scale,
            identity=layout.identity,
        )  # fmt: skip
        if depth < 1:
            raise ConfigError(f"depth is {depth}; at least one read must be in flight.")
        self.layout, self.depth, self.direct = layout, depth, direct
        sums = read_checksums_of(layout)
        self.sums = np.empty(0, np.uint32) if sums is None else sums
        # bytes that one row may take to read: without checksums it lies anywhere in its units
        self.most_read = max(-(-s.n_bytes // PAGE) * PAGE for s in layout.segments) + (
            PAGE if sums is None else 0
        )
        self._open()
        self._require_whole_files()
        self.reads = 0  # since opening, for instruments
        self.bytes_read = 0

    def _require_whole_files(self) -> None:
        for segment in self.layout.segments:
            size = os.fstat(self._files[segment.path]).st_size
            if segment.end > size:
                raise CheckpointError(
                    f"{segment.path} has {size:,} bytes; rows to {segment.first_row + segment.n_rows - 1:,} need "
                    f"{segment.end:,}: it was cut short."
                )

    def _open(self) -> None:
        reason = ""
        if self.direct:
            try:
                self._open_files(os.O_RDONLY | os.O_DIRECT)
                for handle in self._files.values():
                    os.preadv(handle, [row_kernels.zero_pages(PAGE)], 0)
                reader = _Reader(self)
                if reader.queue is not None:
                    # closing a queue takes the system 20 ms: this one reads
                    self._idle.append(reader)
                    return
                reason = "the system gives no queue for asynchronous reads"
            except (OSError, AttributeError) as error:
                reason = f"O_DIRECT is refused ({getattr(error, 'strerror', error)})"
            self._close_files()
            self.direct = False
        try:
            self._open_files(os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from None
        if reason:
            logger.warning(
                "%s: %s; reading through the page cache with %d threads.", self.name, reason, self.depth
            )

    def _open_files(self, flags: int) -> None:
        for path in dict.fromkeys(segment.path for segment in self.layout.segments):
            self._files[path] = os.open(path, flags)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def close(self) -> None:
        with self._changed:
            files, self._files = self._files, {}
            # a descriptor closed under a read could be another file's by the next one
            self._changed.wait_for(lambda: os.getpid() not in self._busy)
            idle, self._idle, self._idle_ahead = self._idle, [], []
        for holder in (*idle, *self._aheads):
            holder.close()
        for handle in files.values():
            os.close(handle)

    def __del__(self) -> None:
        self._close_files()

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        with self._changed:
            files = self._files
            if not files:
                raise CheckpointError(f"{self.name} was closed.")
            pid = os.getpid()
            self._busy.append(pid)
            reader = self._idle.pop() if self._idle else None
        try:
            if reader is None or reader.pid != pid:
                reader = _Reader(self)
                if self.direct and reader.queue is None:
                    logger.warning(
                        "%s: no further queue for asynchronous reads; %d threads read.", self.name, self.depth
                    )
            for pieces in self._rounds(row_U):
                self._read_round(reader, files, pieces, row_U, out_UR)
            # one that failed is not used again
            with self._changed:
                self._idle.append(reader)
        finally:
            with self._changed:
                self._busy.remove(pid)
                self._changed.notify_all()

    def begin(self, address_at: int, n: int) -> PostedGather | None:
        if not self.direct or not 0 < n <= ROWS:
            return None
        # under the lock from first to last: a store that closes ends its threads
        with self._changed:
            if not self._files:
                return None
            ahead = self._idle_ahead.pop() if self._idle_ahead else None
            if ahead is None or ahead.pid != os.getpid():
                try:
                    ahead = ReadThread(self, _segment_table(self.layout, self._files))
                except (OSError, RuntimeError):  # no descriptor, memory or thread is left: others may gather
                    return None
                if not ahead.usable:
                    return None
                self._aheads.add(ahead)
            bad = ahead.post(address_at, n)
            if bad >= 0:
                self._idle_ahead.append(ahead)
        if bad >= 0:
            raise self.out_of_range(ctypes.c_int64.from_address(address_at + 8 * bad).value, bad)
        return PostedGather(self, ahead, n)

    def give_back(self, ahead: ReadThread) -> None:
        """A gather that `begin` began is done."""
        reads, bytes_read = ahead.control[N_READS : N_BYTES + 1].tolist()
        with self._changed:
            self._idle_ahead.append(ahead)
            self.reads += reads
            self.bytes_read += bytes_read

    def failure(self, handle: int, at: int, status: int, got: int) -> CheckpointError:
        """The error for a read of a file at a byte, with the codes of `storage.kernels.disk`."""
        path = next((path for path, number in self._files.items() if number == handle), self.name)
        if status == kernels.SHORT:
            return CheckpointError(
                f"{path} ends at byte {at + got:,}, inside a row: it was cut short while open."
            )
        return CheckpointError(f"{path} could not be read at byte {at:,}: {os.strerror(-got)}.")

    def _rounds(self, row_U: np.ndarray) -> Iterator[list["_Piece"]]:
        """What is read at a time: rows of as many segments as the stage holds, so that reads of all of them overlap."""
        per_round = max(1, STAGE_BYTES // self.most_read)
        if len(self.layout.segments) == 1 and 0 < len(row_U) <= per_round:
            yield [_Piece(0, 0, len(row_U))]
            return
        pieces, room = [], per_round
        for number, segment in enumerate(self.layout.segments):
            start, last = row_U.searchsorted((segment.first_row, segment.first_row + segment.n_rows)).tolist()
            while start < last:
                end = min(last, start + room)
                pieces.append(_Piece(number, start, end))
                start, room = end, room - (end - start)
                if not room:
                    yield pieces
                    pieces, room = [], per_round
        if pieces:
            yield pieces

    def _read_round(
        self,
        reader: "_Reader",
        files: dict[Path, int],
        pieces: list["_Piece"],
        row_U: np.ndarray,
        out_UR: np.ndarray,
    ) -> None:
        piece_PX = _segment_table(self.layout, files)[[piece.segment for piece in pieces]]
        piece_PX[:, :2] = [(piece.start, piece.end) for piece in pieces]
        n, status = sum(piece.end - piece.start for piece in pieces), np.zeros(3, np.int64)
        n_jobs, fd_J, offset_J, asked_J = reader.run(row_U, piece_PX, n, out_UR, status)
        if status[0] == kernels.DAMAGED:
            raise damaged_rows(self.layout, int(status[1]))
        if status[0] != kernels.OK:
            job = int(status[1])
            raise self.failure(int(fd_J[job]), int(offset_J[job]), int(status[0]), int(status[2]))
        with self._changed:
            self.reads += n_jobs
            self.bytes_read += int(asked_J[:n_jobs].sum())


def _segment_table(layout: Layout, files: dict[Path, int]) -> np.ndarray:
    """int64 [S, 11]: two places that a gather fills, then a segment as `kernels.disk.plan_pieces` takes it, and its rows."""
    return np.array(
        [
            (
                0, 0, s.offset, s.first_row, s.stride, s.group, s.group_stride, s.n_bytes, s.at, files[s.path], s.n_rows,
            )
            for s in layout.segments
        ]
    )  # fmt: skip


class _Piece(NamedTuple):
    """Places start to end of the rows asked for, which lie in the layout's segment of this number."""

    segment: int
    start: int
    end: int


class _Reader:
    """What one thread needs to read: a queue, request blocks and a page-aligned stage."""

    def __init__(self, store: DiskStore) -> None:
        self.depth, self.pid = store.depth, os.getpid()
        self.most_read, self.pages_at, self.sums = store.most_read, store.layout.pages_at, store.sums
        self.queue: int | None = None
        self.threads: ThreadPoolExecutor | None = None
        if store.direct:
            self.queue = kernels.queue(self.depth)
        if self.queue is None:
            self.threads = ThreadPoolExecutor(self.depth)
        self.request_DQ = np.zeros((self.depth, 8), np.uint64)
        self.pointer_D = np.zeros(self.depth, np.int64)
        self.event_DE = np.zeros((self.depth, 4), np.int64)
        self._stage = np.empty(0, np.uint8)

    def close(self) -> None:
        queue, self.queue = self.queue, None
        threads, self.threads = self.threads, None
        # a child's own queue may have the number that its parent's had
        if self.pid != os.getpid():
            return
        if queue is not None:
            kernels.close_queue(queue)
        if threads is not None:
            threads.shutdown(wait=False)

    def __del__(self) -> None:
        self.close()

    def stage(self, n_bytes: int) -> np.ndarray:
        if len(self._stage) < n_bytes:
            pages = row_kernels.zero_pages(max(n_bytes, 1 << 20))
            # a page that a child shares could be copied away from under a read
            with contextlib.suppress(OSError, AttributeError):
                pages.madvise(mmap.MADV_DONTFORK)
            self._stage = np.frombuffer(pages, np.uint8)
        return self._stage

    def run(
        self, row_U: np.ndarray, piece_PX: np.ndarray, n: int, out_UR: np.ndarray, status: np.ndarray
    ) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Read the pieces' n rows into out_UR: (reads, their descriptors, offsets and bytes); `status` says what failed."""
        fd_J, offset_J, asked_J, needed_J, job_N, within_N = np.empty((6, n), np.int64)
        stage_X = self.stage(n * self.most_read)
        if self.queue is not None:
            n_jobs = kernels.read_pieces(
                self.queue, row_U, piece_PX, self.pages_at, self.sums, stage_X, fd_J, offset_J, asked_J, needed_J, job_N,
                within_N, self.request_DQ, self.pointer_D, self.event_DE, out_UR, status,
            )  # fmt: skip
            if status[0] == kernels.BROKEN:
                self.queue, status[0] = None, kernels.FAILED
            return n_jobs, fd_J, offset_J, asked_J
        n_jobs = kernels.plan_pieces(row_U, piece_PX, fd_J, offset_J, asked_J, needed_J, job_N, within_N)
        stride = int(asked_J[:n_jobs].max())
        self._run_threads(fd_J[:n_jobs], offset_J, asked_J, needed_J, stage_X, stride, status)
        if status[0] == kernels.OK and len(self.sums):
            bad = kernels.first_bad_read(stage_X, stride, offset_J, asked_J, n_jobs, self.pages_at, self.sums)
            if bad >= 0:
                status[:2] = kernels.DAMAGED, bad
        if status[0] == kernels.OK:
            kernels.take_pieces(stage_X, stride, piece_PX, job_N, within_N, out_UR)
        return n_jobs, fd_J, offset_J, asked_J

    def _run_threads(
        self, fd_J: np.ndarray, offset_J: np.ndarray, asked_J: np.ndarray, needed_J: np.ndarray, stage_X: np.ndarray,
        stage_stride: int, status: np.ndarray,
    ) -> None:  # fmt: skip
        J = len(fd_J)
        cuts = np.linspace(0, J, min(self.depth, J) + 1).astype(np.int64)
        found = np.zeros((len(cuts) - 1, 3), np.int64)

        def read(k: int) -> None:
            # holds the stage, so that it lives as long as somebody writes to it
            place = stage_X.ctypes.data
            kernels.read_slice(
                fd_J, offset_J, asked_J, needed_J, place, stage_stride, cuts[k], cuts[k + 1], found[k]
            )

        waiting: list[Future] = []
        try:
            for k in range(len(found)):
                waiting.append(self.threads.submit(read, k))
            for future in waiting:
                future.result()
        finally:
            # interrupted: the files stay open until the last thread has read
            wait(waiting)
        for one in found:
            if one[0] != kernels.OK:
                status[:] = one
                return
