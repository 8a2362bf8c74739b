"""Row kernels on the CPU: gather, merge of repeated rows, and the row updates, each beside no Python loop per row.

Plain twins: `gather` is `rows[address]`; `merge` is sort + segment sum (`tables.gradients.merge_plain`); the updates are
`tables.rules.*.apply_plain`. All kernels release the GIL and touch memory through NumPy views alone.

The gather asks the memory controller for row i + PREFETCH_ROWS while it copies row i: a random row is a cache miss and
usually a TLB miss, and one miss at a time is what makes `index_select` slow (80-300 ns a row against 23-48 ns here).
"""

import contextlib
import mmap

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from engram_lm.kernels.compiled import kernel

PREFETCH_ROWS = 24  # rows in flight; measured flat between 16 and 32 on server Xeons
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15  # Linux; 2 MiB pages halve the cost of a random row
CACHE_LINE = 64


@intrinsic
def _prefetch(typing_context, address):
    """LLVM's prefetch of one cache line for reading, kept in all cache levels."""
    signature = types.void(types.uintp)

    def codegen(context, builder, signature, args):
        byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32]),
            "llvm.prefetch.p0",
        )
        pointer = builder.inttoptr(args[0], byte_pointer)
        builder.call(function, [pointer, ir.Constant(int32, 0), ir.Constant(int32, 3), ir.Constant(int32, 1)])

    return signature, codegen


@intrinsic
def _copy_bytes(typing_context, destination, source, n_bytes):
    """memcpy between two addresses."""
    signature = types.void(types.uintp, types.uintp, types.intp)

    def codegen(context, builder, signature, args):
        byte_pointer = ir.IntType(8).as_pointer()
        target, origin = builder.inttoptr(args[0], byte_pointer), builder.inttoptr(args[1], byte_pointer)
        cgutils.raw_memcpy(builder, target, origin, args[2], 1, align=1)

    return signature, codegen


@kernel
def first_out_of_range(address_N, n_rows):
    """Index of the first address outside [0, n_rows), or -1. One pass, before anything is read."""
    bad = False
    for i in range(address_N.shape[0]):
        bad |= (address_N[i] < 0) | (address_N[i] >= n_rows)
    if bad:
        for i in range(address_N.shape[0]):
            if address_N[i] < 0 or address_N[i] >= n_rows:
                return i
    return -1


@kernel
def distinct(address_N, row_N, index_N):
    """Fill row_N with the different addresses, ascending, and index_N with each address's place there; returns how many.

    As NumPy's unique with its inverse, without the interpreter: for the few rows of a decode step.
    """
    order_N = np.argsort(address_N, kind="mergesort")
    u = -1
    for n in order_N:
        if u < 0 or row_N[u] != address_N[n]:
            u += 1
            row_N[u] = address_N[n]
        index_N[n] = u
    return u + 1


@kernel
def gather(base_pointer, address_N, out_pointer, bytes_per_row):
    """Copy row address_N[i] of the table at `base_pointer` to row i at `out_pointer`. Addresses must be in range."""
    n = address_N.shape[0]
    row_bytes = np.uint64(bytes_per_row)
    for i in range(n):
        if i + PREFETCH_ROWS < n:
            ahead = base_pointer + np.uint64(address_N[i + PREFETCH_ROWS]) * row_bytes
            for line in range(0, bytes_per_row, CACHE_LINE):
                _prefetch(ahead + np.uint64(line))
        source = base_pointer + np.uint64(address_N[i]) * row_bytes
        _copy_bytes(out_pointer + np.uint64(i) * row_bytes, source, bytes_per_row)


@kernel
def merge(sorted_N, order_N, gradient_NW, unique_U, merged_UW):
    """Sum the gradients of equal addresses, in order of appearance. Returns how many rows were written.

    sorted_N: addresses ascending (stable); order_N: where each came from; outputs must hold N rows.
    """
    n, width = gradient_NW.shape
    u = -1
    for i in range(n):
        source = order_N[i]
        if i == 0 or sorted_N[i] != sorted_N[i - 1]:
            u += 1
            unique_U[u] = sorted_N[i]
            for w in range(width):
                merged_UW[u, w] = gradient_NW[source, w]
        else:
            for w in range(width):
                merged_UW[u, w] += gradient_NW[source, w]
    return u + 1


@kernel
def update_rmsprop(rows_RW, second_R, unique_U, gradient_UW, rate, scale, decay, eps):
    """Row-wise RMSprop: one second moment a row, the mean over its width."""
    width = rows_RW.shape[1]
    for u in range(unique_U.shape[0]):
        r = unique_U[u]
        total = 0.0
        for w in range(width):
            g = np.float64(scale * gradient_UW[u, w])
            total += g * g
        second_R[r] = np.float32(decay * second_R[r] + (1.0 - decay) * (total / width))
        step = np.float32(rate / (np.sqrt(np.float64(second_R[r])) + eps))
        for w in range(width):
            rows_RW[r, w] -= step * (scale * gradient_UW[u, w])


@kernel
def update_adam(rows_RW, second_R, count_R, unique_U, gradient_UW, rate, scale, beta2, eps):
    """Row-wise Adam with beta1 = 0: one second moment and one count a row, bias-corrected by that row's own count."""
    width = rows_RW.shape[1]
    for u in range(unique_U.shape[0]):
        r = unique_U[u]
        total = 0.0
        for w in range(width):
            g = np.float64(scale * gradient_UW[u, w])
            total += g * g
        count_R[r] += 1
        second_R[r] = np.float32(beta2 * second_R[r] + (1.0 - beta2) * (total / width))
        corrected = np.float64(second_R[r]) / (1.0 - beta2 ** np.float64(count_R[r]))
        step = np.float32(rate / (np.sqrt(corrected) + eps))
        for w in range(width):
            rows_RW[r, w] -= step * (scale * gradient_UW[u, w])


@kernel
def update_adam_momentum(
    rows_RW, first_RW, second_R, count_R, unique_U, gradient_UW, rate, scale, beta1, beta2, eps
):
    """Row-wise Adam with a first moment for every number; second moment and count are one a row."""
    width = rows_RW.shape[1]
    for u in range(unique_U.shape[0]):
        r = unique_U[u]
        total = 0.0
        for w in range(width):
            g = np.float64(scale * gradient_UW[u, w])
            total += g * g
            first_RW[r, w] = np.float32(beta1 * first_RW[r, w] + (1.0 - beta1) * g)
        count_R[r] += 1
        second_R[r] = np.float32(beta2 * second_R[r] + (1.0 - beta2) * (total / width))
        count = np.float64(count_R[r])
        corrected = np.float64(second_R[r]) / (1.0 - beta2**count)
        step = np.float32(rate / ((1.0 - beta1**count) * (np.sqrt(corrected) + eps)))
        for w in range(width):
            rows_RW[r, w] -= step * first_RW[r, w]


@kernel
def update_sinkhorn(rows_RW, momentum_RW, unique_U, gradient_UW, rate, scale, momentum, tau, balancings):
    """Nesterov momentum, then `balancings` (odd) divisions of rows and columns in turn by their L2 norms.

    The balanced matrix is diag(a) N diag(c), so only the squares of a and c are carried: 1 / a_u^2 = sum_w N_uw^2 c_w^2
    for a division of rows, 1 / c_w^2 = sum_u N_uw^2 a_u^2 for one of columns. A row division and the sums of the column
    division after it share a pass over N. All sums are float64 and in the order of the rows.
    """
    n, width = gradient_UW.shape
    nesterov_UW = np.empty((n, width), np.float32)
    row_square_U = np.empty(n, np.float64)
    mean_norm = 0.0
    for u in range(n):
        r = unique_U[u]
        total = 0.0
        for w in range(width):
            g = np.float64(scale * gradient_UW[u, w])
            momentum_RW[r, w] = np.float32(momentum * momentum_RW[r, w] + (1.0 - momentum) * g)
            value = np.float32(momentum * momentum_RW[r, w] + (1.0 - momentum) * g)
            nesterov_UW[u, w] = value
            total += np.float64(value) * np.float64(value)
        row_square_U[u] = total
        mean_norm += np.sqrt(total) / n
    for u in range(n):
        if np.sqrt(row_square_U[u]) <= tau * mean_norm:
            for w in range(width):
                nesterov_UW[u, w] = 0.0
    column_scale_W = np.ones(width, np.float64)  # squares of c
    column_square_W = np.empty(width, np.float64)
    for _ in range((balancings - 1) // 2):
        for w in range(width):
            column_square_W[w] = 0.0
        for u in range(n):
            row_scale = _row_scale(nesterov_UW, u, column_scale_W)
            for w in range(width):
                value = np.float64(nesterov_UW[u, w])
                column_square_W[w] += value * value * row_scale
        for w in range(width):
            column_scale_W[w] = 1.0 / column_square_W[w] if column_square_W[w] > 0.0 else 1.0
    for w in range(width):
        column_square_W[w] = np.sqrt(column_scale_W[w])
    for u in range(n):
        r = unique_U[u]
        size = rate * np.sqrt(np.float64(width)) * np.sqrt(_row_scale(nesterov_UW, u, column_scale_W))
        for w in range(width):
            rows_RW[r, w] -= np.float32(size * (np.float64(nesterov_UW[u, w]) * column_square_W[w]))


@kernel(inline="always")
def _row_scale(values_UW, u, column_scale_W):
    """1 / the square of row u's norm under the columns' scales; 1 for a row of zeros."""
    total = 0.0
    for w in range(column_scale_W.shape[0]):
        value = np.float64(values_UW[u, w])
        total += value * value * column_scale_W[w]
    return 1.0 / total if total > 0.0 else 1.0


def zero_pages(n_bytes: int, *, huge: bool = True) -> mmap.mmap:
    """`n_bytes` of private anonymous memory asking for huge pages (or refusing them): zero, free until touched.

    Private matters: Python's default is shared memory, which gets no huge pages.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, max(n_bytes, 1), flags=flags)
    if hasattr(pages, "madvise"):
        with contextlib.suppress(OSError):  # kernels without transparent huge pages; slower, not wrong
            pages.madvise(MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)
    return pages
