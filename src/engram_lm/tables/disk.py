"""Rows read from files, each once a gather, many reads at a time, past the page cache.

A gather's addresses are sorted and made unique, covered with whole 4 KiB units, and read with O_DIRECT through a queue of
`depth` (`kernels.disk`). Every page of a packed file is checked against its checksum before a byte of it is used. Where
O_DIRECT or the queue is refused, threads read through the page cache; that is said once.
"""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.kernels import disk as kernels
from engram_lm.kernels import rows as row_kernels
from engram_lm.tables.format import PAGE, damaged_rows, read_checksums_of
from engram_lm.tables.layout import Layout, Segment
from engram_lm.tables.store import Store

logger = logging.getLogger(__name__)

DEPTH = 64  # reads in flight; a virtual disk gave no more beyond it
STAGE_BYTES = 16 << 20  # what one round of reads may hold before its rows are taken out


class DiskStore(Store):
    """The rows of a layout, read when asked for. Several threads may gather at once.

    Args:
        depth: reads in flight.
        direct: False reads through the page cache, with threads.
    """

    def __init__(self, layout: Layout, *, depth: int = DEPTH, direct: bool = True) -> None:
        super().__init__(
            name=layout.name, n_rows=layout.n_rows, width=layout.width, codec=layout.codec, scale=layout.scale,
            identity=layout.identity,
        )  # fmt: skip
        self.layout, self.depth = layout, depth
        self._sums = read_checksums_of(layout)
        self._files: dict[Path, int] = {}
        self.direct = direct
        self._require_whole_files()
        self._open()
        self._idle: list[_Reader] = []
        self._lock = threading.Lock()
        self.reads = 0  # since opening, for instruments
        self.bytes_read = 0

    def _require_whole_files(self) -> None:
        for segment in self.layout.segments:
            try:
                size = segment.path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{segment.path} cannot be read: {error.strerror}.") from None
            if segment.end > size:
                raise CheckpointError(
                    f"{segment.path} has {size:,} bytes; rows to {segment.first_row + segment.n_rows - 1:,} need "
                    f"{segment.end:,}: it was cut short."
                )

    def _open(self) -> None:
        paths = {segment.path for segment in self.layout.segments}
        if self.direct:
            try:
                self._files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
                os.preadv(next(iter(self._files.values())), [row_kernels.zero_pages(PAGE)], 0)
                queue = kernels.queue(self.depth)
                if queue is not None:
                    kernels.close_queue(queue)
                    return
                reason = "the system gives no queue for asynchronous reads"
            except (OSError, AttributeError) as error:
                reason = f"O_DIRECT is refused ({getattr(error, 'strerror', error)})"
            self.close()
            self.direct = False
            logger.warning(
                "%s: %s; reading through the page cache with %d threads.", self.name, reason, self.depth
            )
        self._files = {path: os.open(path, os.O_RDONLY) for path in paths}

    def close(self) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files = {}

    def __del__(self) -> None:
        self.close()

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        if not self._files:
            raise CheckpointError(f"{self.name} was closed.")
        with self._lock:
            reader = self._idle.pop() if self._idle else _Reader(self)
        try:
            for segment in self.layout.segments:
                first, last = np.searchsorted(row_U, (segment.first_row, segment.first_row + segment.n_rows))
                self._read_segment(reader, segment, row_U, int(first), int(last), out_UR)
        finally:
            with self._lock:
                self._idle.append(reader)

    def _read_segment(
        self,
        reader: "_Reader",
        segment: Segment,
        row_U: np.ndarray,
        first: int,
        last: int,
        out_UR: np.ndarray,
    ) -> None:
        unit = PAGE
        most = -(-segment.n_bytes // unit) * unit + (0 if self._sums is not None else unit)
        per_round = max(1, STAGE_BYTES // most)
        for start in range(first, last, per_round):
            end = min(last, start + per_round)
            job_U, within_U = np.empty(end - start, np.int64), np.empty(end - start, np.int64)
            offset_J, asked_J, needed_J = (np.empty(end - start, np.int64) for _ in range(3))
            n_jobs = kernels.plan(
                row_U, start, end, segment.offset, segment.first_row, segment.stride, segment.group,
                segment.group_stride, segment.n_bytes, unit, offset_J, asked_J, needed_J, job_U, within_U,
            )  # fmt: skip
            stage_stride = int(asked_J[:n_jobs].max())
            stage_X = reader.stage(n_jobs * stage_stride)
            reader.run(
                self._files[segment.path], offset_J[:n_jobs], asked_J[:n_jobs], needed_J[:n_jobs], stage_X, stage_stride,
                segment.path,
            )  # fmt: skip
            if self._sums is not None:
                bad = kernels.first_bad_read(
                    stage_X, stage_stride, offset_J, asked_J, n_jobs, self.layout.pages_at, self._sums
                )
                if bad >= 0:
                    raise damaged_rows(self.layout, bad)
            kernels.take(stage_X, stage_stride, job_U, within_U, segment.n_bytes, out_UR, start, segment.at)
            self.reads += n_jobs
            self.bytes_read += int(asked_J[:n_jobs].sum())


class _Reader:
    """What one thread needs to read: a queue, request blocks and a page-aligned stage."""

    def __init__(self, store: DiskStore) -> None:
        self.depth = store.depth
        self.queue = kernels.queue(self.depth) if store.direct else None
        self.threads = None if self.queue is not None else ThreadPoolExecutor(self.depth)
        self.request_DQ = np.zeros((self.depth, 8), np.uint64)
        self.pointer_D = np.zeros(self.depth, np.int64)
        self.event_DE = np.zeros((self.depth, 4), np.int64)
        self._stage = np.empty(0, np.uint8)

    def __del__(self) -> None:
        if self.queue is not None:
            kernels.close_queue(self.queue)
        if self.threads is not None:
            self.threads.shutdown(wait=False)

    def stage(self, n_bytes: int) -> np.ndarray:
        if len(self._stage) < n_bytes:
            self._stage = np.frombuffer(row_kernels.zero_pages(max(n_bytes, 1 << 20)), np.uint8)
        return self._stage

    def run(
        self, handle: int, offset_J: np.ndarray, asked_J: np.ndarray, needed_J: np.ndarray, stage_X: np.ndarray,
        stage_stride: int, path: Path,
    ) -> None:  # fmt: skip
        fd_J = np.full(len(offset_J), handle, np.int64)
        status = np.zeros(3, np.int64)
        place = stage_X.ctypes.data
        if self.queue is not None:
            kernels.read_queued(
                self.queue, fd_J, offset_J, asked_J, needed_J, place, stage_stride, self.request_DQ, self.pointer_D,
                self.event_DE, status,
            )  # fmt: skip
        else:
            self._run_threads(fd_J, offset_J, asked_J, needed_J, place, stage_stride, status)
        if status[0] == kernels.SHORT:
            raise CheckpointError(
                f"{path} ends at byte {offset_J[status[1]] + status[2]:,}, inside a row: it was cut short while open."
            )
        if status[0] == kernels.FAILED:
            reason = os.strerror(int(-status[2]))
            raise CheckpointError(f"{path} could not be read at byte {offset_J[status[1]]:,}: {reason}.")

    def _run_threads(
        self, fd_J: np.ndarray, offset_J: np.ndarray, asked_J: np.ndarray, needed_J: np.ndarray, place: int,
        stage_stride: int, status: np.ndarray,
    ) -> None:  # fmt: skip
        J = len(offset_J)
        cuts = np.linspace(0, J, min(self.depth, J) + 1).astype(np.int64)
        found = np.zeros((len(cuts) - 1, 3), np.int64)
        waiting = [
            self.threads.submit(
                kernels.read_slice,
                fd_J,
                offset_J,
                asked_J,
                needed_J,
                place,
                stage_stride,
                cuts[k],
                cuts[k + 1],
                found[k],
            )
            for k in range(len(cuts) - 1)
        ]
        for future in waiting:
            future.result()
        for one in found:
            if one[0] != kernels.OK:
                status[:] = one
                return
