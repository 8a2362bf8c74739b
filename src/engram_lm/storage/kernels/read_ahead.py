"""Gathers of records by a thread that never takes the interpreter's lock.

A Python thread that has to take turns with a decoding model cost each step a millisecond, and the reads themselves, sent
from the model's own thread, half of one. `serve` runs in a thread of its own from its first call to its last, compiled and
without the lock: it sleeps on an eventfd, reads what the request in `control` says, and rings another eventfd. To `post` a
request costs the model's thread a check of the addresses and one system call.

control int64 [CONTROL]: the request and its answer (see `STOP` and the like).
room_XN int64 [3, N] of the requester: addresses, then the different ones ascending, then the place of each among those.
"""

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from engram_lm.kernels.compiled import kernel
from engram_lm.storage.kernels.disk import (
    _INTERRUPTED,
    DAMAGED,
    OK,
    _errno,
    first_bad_read,
    plan_pieces,
    read_queued,
    take_pieces,
)
from engram_lm.storage.kernels.rows import distinct

STOP, N_ADDRESSES, ROOM, CAPACITY, RECORDS, N_READS, N_BYTES, STATUS, WHERE, GOT, HANDLE, OFFSET = range(12)
CONTROL = 12
ADDRESS_N, ROW_U, INDEX_N = 0, 1, 2
JOB_ROWS = 6

_read, _write = (
    types.ExternalFunction(name, types.intp(types.intc, types.uintp, types.uintp))
    for name in ("read", "write")
)


def _pointer_to(kind: types.Type):
    @intrinsic
    def pointer(typing_context, address):
        signature = types.CPointer(kind)(types.int64)

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return signature, codegen

    return pointer


_int64_at, _bytes_at = _pointer_to(types.int64), _pointer_to(types.uint8)


@kernel
def _ring(handle, beat):
    """Add one to an eventfd."""
    beat[0] = 1
    while _write(handle, beat.ctypes.data, 8) < 0 and _errno() == _INTERRUPTED:
        pass


@kernel
def wait(handle, beat):
    """Sleep until an eventfd was rung; False where it cannot be read."""
    while True:
        if _read(handle, beat.ctypes.data, 8) == 8:
            return True
        if _errno() != _INTERRUPTED:
            return False


@kernel
def post(address_at, n, n_rows, control, wake, beat):
    """Hand n int64 at `address_at` to the reader. Returns the place of the first outside [0, n_rows), or -1."""
    address_N = carray(_int64_at(address_at), n)
    room_N = carray(_int64_at(control[ROOM]), n)
    for i in range(n):
        if address_N[i] < 0 or address_N[i] >= n_rows:
            return i
        room_N[i] = address_N[i]
    control[N_ADDRESSES] = n
    _ring(wake, beat)
    return -1


@kernel
def serve(
    handle, wake, done, control, segment_SX, pages_at, sums_P, record_bytes, per_round, stage_X, job_XJ, request_DQ,
    pointer_D, event_DE,
):  # fmt: skip
    """Answer requests until one says STOP.

    segment_SX int64 [S, 11] is `piece_PX` of `kernels.disk.plan_pieces`, start and end to be filled here, and the rows of
    each segment. job_XJ int64 [JOB_ROWS, per_round * S].
    """
    beat = np.zeros(1, np.int64)
    while wait(wake, beat) and control[STOP] == 0:
        _gather(
            handle, control, segment_SX, pages_at, sums_P, record_bytes, per_round, stage_X, job_XJ, request_DQ, pointer_D,
            event_DE,
        )  # fmt: skip
        _ring(done, beat)


@kernel
def _gather(
    handle, control, segment_SX, pages_at, sums_P, record_bytes, per_round, stage_X, job_XJ, request_DQ, pointer_D,
    event_DE,
):  # fmt: skip
    """One request: its different rows' records, some at a time."""
    n = control[N_ADDRESSES]
    room_XN = carray(_int64_at(control[ROOM]), (3, control[CAPACITY]))
    row_U = room_XN[ROW_U]
    row_U = row_U[: distinct(room_XN[ADDRESS_N, :n], row_U, room_XN[INDEX_N])]
    U = row_U.shape[0]
    record_UR = carray(_bytes_at(control[RECORDS]), (U, record_bytes))
    fd_J, offset_J, asked_J, needed_J, job_N, within_N = (
        job_XJ[0], job_XJ[1], job_XJ[2], job_XJ[3], job_XJ[4], job_XJ[5],
    )  # fmt: skip
    status = control[STATUS : GOT + 1]
    status[0] = OK
    control[N_READS] = control[N_BYTES] = 0
    for first in range(0, U, per_round):
        last = min(U, first + per_round)
        for s in range(segment_SX.shape[0]):
            start = segment_SX[s, 3]
            segment_SX[s, 0] = min(last, max(first, np.searchsorted(row_U, start)))
            segment_SX[s, 1] = min(last, max(first, np.searchsorted(row_U, start + segment_SX[s, 10])))
        n_jobs = plan_pieces(row_U, segment_SX, fd_J, offset_J, asked_J, needed_J, job_N, within_N)
        stride = np.int64(0)
        for j in range(n_jobs):
            stride = max(stride, asked_J[j])
            control[N_BYTES] += asked_J[j]
        control[N_READS] += n_jobs
        read_queued(
            handle, fd_J[:n_jobs], offset_J, asked_J, needed_J, np.int64(stage_X.ctypes.data), stride, request_DQ,
            pointer_D, event_DE, status,
        )  # fmt: skip
        if status[0] != OK:
            control[HANDLE], control[OFFSET] = fd_J[status[1]], offset_J[status[1]]
            return
        if sums_P.shape[0] > 0:
            bad = first_bad_read(stage_X, stride, offset_J, asked_J, n_jobs, pages_at, sums_P)
            if bad >= 0:
                status[0], status[1] = DAMAGED, bad
                return
        take_pieces(stage_X, stride, segment_SX, job_N, within_N, record_UR)
