"""Rows of a file that are trained where they lie: a base that never changes, and a log of what did (docs/format.md).

    store = LoggedStore(DiskStore(open_packed(base)), "layer1.rows", state_bytes=8, rule=rule.to_json())
    store.append(rows, records, states, update=17)
    position = store.sync()            # what a checkpoint names
    store.roll_back(position)          # what going on from it does

A row is read from its last entry in the log, or from the base. An update writes its rows once, at the end of the log; a
checkpoint is an fsync. `fold` makes a new base when the log has grown too long.
"""

import contextlib
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.kernels import checksums
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import Header, read_header
from engram_lm.storage.kernels import disk as disk_kernels
from engram_lm.storage.kernels import rowmap
from engram_lm.storage.store import RowStore
from engram_lm.storage.writer import TableWriter

MAGIC = b"\x89ENGL\r\n\x1a"
VERSION = 1
START = 4096
_HEADER = struct.Struct("<8sIIIIQQQ")
_BATCH = struct.Struct("<IIQQ")
_MARK = 0x48435442


class LoggedStore(RowStore):
    """A disk store whose rows can be written.

    Args:
        base: of a packed file with codec fp32 or bf16.
        path: of the log; made where it is missing. A torn end is cut.
        state_bytes: row-optimizer state kept with each row that was written.
        rule: how the rows train; a log of another rule is refused.
        states: the state file that `fold` wrote beside the base; without one, rows that the log lacks have zero state.

    Raises: CheckpointError for a log of another base or rule, or one that another process writes.
    """

    def __init__(
        self,
        base: DiskStore,
        path: str | os.PathLike,
        *,
        state_bytes: int = 0,
        rule: dict[str, Any] | None = None,
        states: DiskStore | None = None,
    ) -> None:
        super().__init__(
            name=base.name,
            n_rows=base.n_rows,
            width=base.width,
            codec=base.codec.name,
            identity=base.identity,
        )
        if not self.codec.trains:
            raise ConfigError(
                f"Rows of codec {self.codec.name} do not train; convert {base.name} to fp32 or bf16."
            )
        self.base, self.path, self.state_bytes, self.states = base, Path(path), state_bytes, states
        if states is not None and (states.n_rows, states.record_bytes) != (self.n_rows, _words(state_bytes)):
            raise CheckpointError(
                f"{states.name} holds {states.n_rows:,} states of {states.record_bytes} bytes; {base.name} needs "
                f"{self.n_rows:,} of {_words(state_bytes)}."
            )
        self.entry_bytes = self.record_bytes + state_bytes
        self._pairs, self._n_rows_logged = rowmap.empty(), 0
        self._lock = threading.RLock()
        header = self._header(rule or {})
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be opened: {error.strerror}.") from None
        try:
            self._lock_file()
            if os.fstat(self._file).st_size < START:
                os.ftruncate(self._file, 0)
                _write_all(self._file, header, 0, self.path)
                durable.sync(self._file)
            elif os.pread(self._file, START, 0) != header:
                raise CheckpointError(
                    f"{self.path} is the log of another base file, rule or format than {base.name} trained by "
                    f"{(rule or {}).get('name', 'no rule')}."
                )
            self._first_link = struct.unpack("<Q", header[-8:])[0]
            self.last_update, self._chain = 0, self._first_link
            self.position = self._replay(None)
        except BaseException:
            self.close()
            raise

    def _header(self, rule: dict[str, Any]) -> bytes:
        headers = b"".join(_header_of(store) for store in (self.base, self.states) if store is not None)
        base = checksums.xxh64(np.frombuffer(headers, np.uint8))
        constants = json.dumps(rule, sort_keys=True).encode()
        fixed = _HEADER.pack(
            MAGIC, VERSION, self.record_bytes, self.state_bytes, 0, self.n_rows, int(base),
            int(checksums.xxh64(np.frombuffer(constants, np.uint8))),
        ).ljust(START - 8, b"\0")  # fmt: skip
        return fixed + struct.pack("<Q", int(checksums.xxh64(np.frombuffer(fixed, np.uint8))))

    def _lock_file(self) -> None:
        if not durable.try_lock(self._file):
            raise CheckpointError(f"{self.path} is being written by another process.")

    def _replay(self, until: int | None) -> int:
        """Read batches up to position `until` (default: as long as they are whole), cut the file there, map the rows."""
        self._pairs, self._n_rows_logged = rowmap.empty(), 0
        self.last_update, self._chain = 0, self._first_link
        size, at = os.fstat(self._file).st_size, START
        while at < size and (until is None or at < until):
            head = os.pread(self._file, _BATCH.size, at)
            if len(head) < _BATCH.size:
                break
            mark, count, update, wanted = _BATCH.unpack(head)
            body_bytes = count * (8 + self.entry_bytes)
            if mark != _MARK or not 0 < count <= self.n_rows or at + _BATCH.size + body_bytes > size:
                break
            body = os.pread(self._file, body_bytes, at + _BATCH.size)
            if len(body) < body_bytes or _batch_hash(head, body) != wanted:
                break
            row_U = np.frombuffer(body, "<i8", count)
            if row_U[0] < 0 or row_U[-1] >= self.n_rows or (np.diff(row_U) <= 0).any():
                break
            self._map(row_U, at + _BATCH.size + 8 * count)
            self.last_update, self._chain = update, _linked(self._chain, wanted)
            at += _BATCH.size + body_bytes
        if until is not None and at != until:
            raise self._no_batch_ends_at(until, at)
        os.ftruncate(self._file, at)
        return at

    def _require_length(self, position: int) -> None:
        if not START <= position <= self.position:
            raise CheckpointError(
                f"{self.path} ends at {self.position:,}; the checkpoint names {position:,}: the log lost rows."
            )

    def _no_batch_ends_at(self, position: int, at: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path} has no whole batch that ends at {position:,}; it holds batches to {at:,}. The checkpoint and the "
            "log do not belong together."
        )

    def _map(self, row_U: np.ndarray, first_entry: int) -> None:
        place_U = first_entry + np.arange(len(row_U), dtype=np.int64) * self.entry_bytes
        self._pairs = rowmap.room_for(self._pairs, self._n_rows_logged + len(row_U))
        self._n_rows_logged += rowmap.put(self._pairs, np.ascontiguousarray(row_U), place_U)

    @property
    def rows_logged(self) -> int:
        """Rows that differ from the base's, or may."""
        return self._n_rows_logged

    # ---- reading ------------------------------------------------------------------------------------------------------

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        self._read(row_U, out_UR, self.record_bytes)

    def read_entries(self, row_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Records uint8 [U, record_bytes] and states uint8 [U, state_bytes] of rows ascending, each once."""
        entry_UE = np.zeros((len(row_U), self.entry_bytes), np.uint8)
        missing_U = ~self._read(row_U, entry_UE, self.entry_bytes)
        if self.states is not None and missing_U.any():
            state_MS = np.empty((int(missing_U.sum()), self.states.record_bytes), np.uint8)
            self.states.read_records(np.ascontiguousarray(row_U[missing_U]), state_MS)
            entry_UE[missing_U, self.record_bytes :] = state_MS[:, : self.state_bytes]
        return entry_UE[:, : self.record_bytes].copy(), entry_UE[:, self.record_bytes :].copy()

    def _read(self, row_U: np.ndarray, out_UX: np.ndarray, n_bytes: int) -> np.ndarray:
        """Fill what the log or the base has of each row; bool [U]: which rows the log had."""
        row_U = np.ascontiguousarray(row_U)
        place_U = np.empty(len(row_U), np.int64)
        with self._lock:
            rowmap.get(self._pairs, row_U, place_U)
            logged_U = place_U >= 0
            if logged_U.any():
                out_UX[logged_U, :n_bytes] = self._read_log(place_U[logged_U], n_bytes)
        if not logged_U.all():
            record_MR = np.empty((int((~logged_U).sum()), self.record_bytes), np.uint8)
            self.base.read_records(row_U[~logged_U], record_MR)
            out_UX[~logged_U, : self.record_bytes] = record_MR
        return logged_U

    def _read_log(self, place_J: np.ndarray, n_bytes: int) -> np.ndarray:
        out_JX = np.empty((len(place_J), n_bytes), np.uint8)
        size_J = np.full(len(place_J), n_bytes, np.int64)
        status = np.zeros(3, np.int64)
        disk_kernels.read_slice(
            np.full(len(place_J), self._file, np.int64), place_J, size_J, size_J, out_JX.ctypes.data, n_bytes,
            0, len(place_J), status,
        )  # fmt: skip
        if status[0] != disk_kernels.OK:
            raise CheckpointError(f"{self.path} could not be read at byte {place_J[status[1]]:,}.")
        return out_JX

    # ---- writing ------------------------------------------------------------------------------------------------------

    def append(
        self, row_U: np.ndarray, record_UR: np.ndarray, state_US: np.ndarray | None = None, *, update: int
    ) -> None:
        """Write rows int64 [U], ascending, each once. CheckpointError when the disk is full: nothing has changed then."""
        if not len(row_U):
            return
        entry_UE = np.zeros((len(row_U), self.entry_bytes), np.uint8)
        entry_UE[:, : self.record_bytes] = record_UR
        if state_US is not None:
            entry_UE[:, self.record_bytes :] = state_US
        body = np.ascontiguousarray(row_U, "<i8").tobytes() + entry_UE.tobytes()
        head = _BATCH.pack(_MARK, len(row_U), update, 0)
        head = _BATCH.pack(_MARK, len(row_U), update, _batch_hash(head, body))
        with self._lock:
            try:
                _write_all(self._file, head + body, self.position, self.path)
            except CheckpointError:
                os.ftruncate(self._file, self.position)
                raise
            self._map(row_U, self.position + _BATCH.size + 8 * len(row_U))
            self.position += _BATCH.size + len(body)
            self.last_update, self._chain = update, _linked(self._chain, _BATCH.unpack(head)[3])

    def sync(self) -> int:
        """Make everything appended last; returns the position that a checkpoint names."""
        with self._lock:
            durable.sync(self._file)
            return self.position

    @property
    def chain(self) -> str:
        """A hash of the base and of every batch so far: two logs that have the same are the same."""
        return f"{self._chain:016x}"

    def chain_at(self, position: int) -> str:
        """What `chain` was when the log ended at `position`. CheckpointError where that is no position of this log."""
        self._require_length(position)
        at, chain = START, self._first_link
        while at < position:
            _, count, _, wanted = _BATCH.unpack(os.pread(self._file, _BATCH.size, at))
            at, chain = at + _BATCH.size + count * (8 + self.entry_bytes), _linked(chain, wanted)
        if at != position:
            raise self._no_batch_ends_at(position, at)
        return f"{chain:016x}"

    def roll_back(self, position: int) -> None:
        """Forget what was appended after `position`. CheckpointError where that is no position of this log."""
        with self._lock:
            self._require_length(position)
            if position != self.position:
                self.position = self._replay(position)

    def fold(
        self, path: str | os.PathLike, *, state_path: str | os.PathLike | None = None, note: str = "",
        report: Callable[[int, int], None] | None = None,
    ) -> Header:  # fmt: skip
        """Write base and log as a new packed file, and the states beside it; the log stays as it is."""
        base = self.base.layout.segments[0].path
        if Path(path).resolve() == base.resolve():
            raise CheckpointError(
                f"{path} is the base of this log, which never changes; fold into another file."
            )
        source = read_header(base)
        # what a killed fold left is continued only where the log still says the same
        made_by = f"engram-lm, log {self.chain}"
        with contextlib.ExitStack() as stack:
            rows = stack.enter_context(
                TableWriter(
                    path, n_rows=self.n_rows, width=self.width, codec=self.codec.name, identity=self.identity,
                    made_by=made_by, note=note or source.note,
                )
            )  # fmt: skip
            states = None
            if state_path is not None and self.state_bytes:
                states = stack.enter_context(
                    TableWriter(
                        state_path,
                        n_rows=self.n_rows,
                        width=_words(self.state_bytes) // 4,
                        codec="fp32",
                        made_by=made_by,
                        note="row state",
                    )
                )
            first = min(rows.rows_done, self.n_rows if states is None else states.rows_done)
            step = max(1, (4 << 20) // self.entry_bytes)
            for start in range(first, self.n_rows, step):
                row_U = np.arange(start, min(start + step, self.n_rows))
                record_UR, state_US = self.read_entries(row_U)
                rows.add(record_UR[max(0, rows.rows_done - start) :])
                if states is not None:
                    wide_US = np.zeros((len(row_U), states.header.record_bytes), np.uint8)
                    wide_US[:, : self.state_bytes] = state_US
                    states.add(wide_US[max(0, states.rows_done - start) :])
                if report is not None:
                    report(int(row_U[-1]) + 1, self.n_rows)
            if states is not None:
                states.finish()
            return rows.finish()

    def close(self) -> None:
        """Unlock and close the log, the base and its states."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for store in (self.base, self.states):
            if store is not None:
                store.close()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def _words(n_bytes: int) -> int:
    """Rounded up to float32 numbers, as a state file holds them."""
    return -(-n_bytes // 4) * 4


def _header_of(store: DiskStore) -> bytes:
    with open(store.layout.segments[0].path, "rb") as file:
        return file.read(store.layout.pages_at)


def _linked(chain: int, batch: int) -> int:
    """A hash of all batches so far, from that of the ones before and the newest's."""
    return int(checksums.xxh64(np.frombuffer(struct.pack("<QQ", chain, batch), np.uint8)))


def _batch_hash(head: bytes, body: bytes) -> int:
    return int(checksums.xxh64(np.frombuffer(head[:16] + body, np.uint8)))


def _write_all(file: int, data: bytes, at: int, path: Path) -> None:
    view = memoryview(data)
    while view:
        try:
            done = os.pwrite(file, view, at)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}.") from None
        view, at = view[done:], at + done
