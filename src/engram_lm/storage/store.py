"""Stores: the bytes of a table's rows on one tier, read by address. NumPy alone; `tables.read_only` puts torch around them.

    store = HostStore.load(layout)                 # or DiskStore(layout), CachedStore(DiskStore(layout), budget_bytes=...)
    rows = store.gather(address)                   # float32 [..., width]; dtype="bf16": uint16 with bfloat16's bits

The same rows bit for bit from every store of the same table; an address outside raises AddressError before anything is
read, and a damaged row raises CheckpointError.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from engram_lm.errors import AddressError, CheckpointError, ConfigError
from engram_lm.kernels import checksums
from engram_lm.storage.codecs import codec_named
from engram_lm.storage.format import PAGE, damaged_rows, read_checksums_of
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.kernels.decode import KERNELS
from engram_lm.storage.layout import Layout

OUT_DTYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(np.uint16)}


class RowStore:
    """Base: `n_rows` records of `record_bytes`, decoded by `codec`."""

    def __init__(
        self,
        *,
        name: str,
        n_rows: int,
        width: int,
        codec: str,
        scale: float = 1.0,
        identity: dict | None = None,
    ) -> None:
        self.name, self.n_rows, self.width, self.scale, self.identity = name, n_rows, width, scale, identity
        self.codec = codec_named(codec)
        self.record_bytes = self.codec.record_bytes(width)

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        """Fill uint8 [U, record_bytes] with the records of rows int64 [U], ascending, each once, all in range."""
        raise NotImplementedError

    def gather(self, address: Any, *, out: np.ndarray | None = None, dtype: str = "fp32") -> np.ndarray:
        """Rows [..., width] at int64 addresses [...]; `out` is filled and returned where given."""
        address = int64(address)
        address_N = address.reshape(-1)
        self.require_in_range(address_N)
        out = _output(out, (*address.shape, self.width), dtype, self.name)
        row_U, index_N = np.unique(address_N, return_inverse=True)
        record_UR = np.empty((len(row_U), self.record_bytes), np.uint8)
        self.read_records(row_U, record_UR)
        decode(self, record_UR, index_N.reshape(-1), out, dtype)
        return out

    def begin(self, address_at: int, n: int) -> "PendingGather | None":
        """Send the reads of a small gather and return at once; None where this store cannot.

        address_at: where n int64 lie in memory, for this call alone. AddressError as from a gather.
        """
        return None

    def require_in_range(self, address_N: np.ndarray) -> None:
        """AddressError for the first address outside."""
        bad = row_kernels.first_out_of_range(address_N, self.n_rows)
        if bad >= 0:
            raise self.out_of_range(address_N[bad], bad)

    def out_of_range(self, address: int, place: int) -> AddressError:
        """The error for an address that no row has."""
        return AddressError(
            f"Address {address} at place {place} is outside {self.name}, which has {self.n_rows} rows."
        )

    def close(self) -> None:
        """Give back files and memory; reading afterwards is an error."""


class PendingGather(Protocol):
    """A gather whose reads are on their way, without a thread that waits for them."""

    def finish(self, out_at: int, dtype: str) -> None:
        """Wait for the reads and put the rows one after the other at `out_at`, once. Whatever failed raises."""


class HostStore(RowStore):
    """Records in this machine's memory: private anonymous pages, huge ones where the system has them."""

    def __init__(
        self, *, name: str = "table", n_rows: int, width: int, codec: str = "fp32", scale: float = 1.0,
        huge_pages: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(name=name, n_rows=n_rows, width=width, codec=codec, scale=scale)
        n_bytes = n_rows * self.record_bytes
        try:
            pages = row_kernels.zero_pages(n_bytes, huge=huge_pages)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"No memory for {name}: {n_rows:,} rows of {self.record_bytes} bytes are {n_bytes / 2**30:,.1f} GiB "
                f"({error}). Read it from disk."
            ) from None
        self.record_RB = np.frombuffer(pages, np.uint8, count=n_bytes).reshape(n_rows, self.record_bytes)

    @classmethod
    def load(
        cls, layout: Layout, *, huge_pages: bool = True, report: Callable[[int, int], None] | None = None
    ) -> "HostStore":
        """A copy of a table's files in memory, every page of a packed file checked. report(bytes done, bytes in all)."""
        store = cls(
            name=layout.name, n_rows=layout.n_rows, width=layout.width, codec=layout.codec, scale=layout.scale,
            huge_pages=huge_pages,
        )  # fmt: skip
        store.identity = layout.identity
        done, total = 0, layout.n_rows * layout.record_bytes
        for first_row, record_NR in records_of(layout):
            store.record_RB[first_row : first_row + len(record_NR)] = record_NR
            done += record_NR.nbytes
            if report is not None:
                report(done, total)
        return store

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        row_kernels.gather(self._records().ctypes.data, row_U, out_UR.ctypes.data, self.record_bytes)

    def write_records(self, row_U: np.ndarray, record_UR: np.ndarray) -> None:
        """The inverse of `read_records`."""
        self._records()[row_U] = record_UR

    def close(self) -> None:
        self.record_RB = np.empty((0, self.record_bytes), np.uint8)

    def _records(self) -> np.ndarray:
        record_RB = self.record_RB
        if len(record_RB) != self.n_rows:
            raise CheckpointError(f"{self.name} was closed.")
        return record_RB

    def gather(self, address: Any, *, out: np.ndarray | None = None, dtype: str = "fp32") -> np.ndarray:
        address = int64(address)
        address_N = address.reshape(-1)
        self.require_in_range(address_N)
        out = _output(out, (*address.shape, self.width), dtype, self.name)
        record_RB = self._records()
        decode(self, record_RB, address_N, out, dtype)
        return out


def decode(store: RowStore, record_RB: np.ndarray, index_N: np.ndarray, out: np.ndarray, dtype: str) -> None:
    """out[i] = the row of record index[i]."""
    decode_at(store, record_RB.ctypes.data, index_N, out.ctypes.data, dtype)


def decode_at(store: RowStore, record_at: int, index_N: np.ndarray, out_at: int, dtype: str) -> None:
    """`decode` between two places in memory."""
    kernel = KERNELS.get((store.codec.name, dtype))
    if kernel is None:
        row_kernels.gather(record_at, index_N, out_at, store.record_bytes)
    else:
        kernel(record_at, index_N, out_at, store.width, np.float32(store.scale))


def records_of(layout: Layout, *, first: int = 0, last: int | None = None) -> Any:
    """Iterate (first row, uint8 [N, record_bytes]) over rows first to last, in order, some MB at a time, all checked."""
    last = layout.n_rows if last is None else last
    starts = sorted({s.first_row for s in layout.segments} | {first})
    step = max(1, (8 << 20) // layout.record_bytes)
    sums = read_checksums_of(layout)
    row = first
    while row < last:
        end = min([last, row + step, *(s for s in starts if s > row)])
        record_NR = np.empty((end - row, layout.record_bytes), np.uint8)
        for segment in layout.segments:
            if segment.first_row <= row < segment.first_row + segment.n_rows:
                _copy_run(layout, segment, row, end, record_NR, sums)
        yield row, record_NR
        row = end


def _copy_run(
    layout: Layout, segment: Any, row: int, end: int, record_NR: np.ndarray, sums: np.ndarray | None
) -> None:
    """Bytes of rows row to end that lie in one segment, read in one go."""
    i_N = np.arange(row - segment.first_row, end - segment.first_row)
    at_N = segment.offset + i_N // segment.group * segment.group_stride + i_N % segment.group * segment.stride
    start, stop = int(at_N[0]), int(at_N[-1]) + segment.n_bytes
    if sums is not None:
        start, stop = start // PAGE * PAGE, -(-stop // PAGE) * PAGE
    n_bytes = stop - start
    try:
        with open(segment.path, "rb", buffering=0) as file:
            file.seek(start)
            data = np.fromfile(file, np.uint8, n_bytes)
    except OSError as error:
        raise CheckpointError(f"{segment.path} cannot be read: {error}.") from None
    if len(data) < n_bytes:
        raise CheckpointError(f"{segment.path} ends before row {end - 1:,}: it was cut short.")
    if sums is not None:
        page = (start - layout.pages_at) // PAGE
        bad = checksums.first_bad_page(data, sums[page : page + n_bytes // PAGE])
        if bad >= 0:
            raise damaged_rows(layout, page + bad)
    rows = np.lib.stride_tricks.sliding_window_view(data, segment.n_bytes)[at_N - start]
    record_NR[:, segment.at : segment.at + segment.n_bytes] = rows


def int64(address: Any) -> np.ndarray:
    """Whole numbers as contiguous int64; none is cut to one."""
    found = np.asarray(address)
    if found.size and found.dtype.kind not in "iu":
        raise AddressError(f"Addresses are int64; got {found.dtype}.")
    if found.dtype == np.uint64 and found.size and found.max() > np.iinfo(np.int64).max:
        raise AddressError(f"Address {found.max()} is outside: no table has as many rows.")
    return np.asarray(found, dtype=np.int64, order="C")


def _output(out: np.ndarray | None, shape: tuple[int, ...], dtype: str, name: str) -> np.ndarray:
    if dtype not in OUT_DTYPES:
        raise ConfigError(f"Rows leave as {' or '.join(OUT_DTYPES)}; got dtype={dtype!r}.")
    if out is None:
        return np.empty(shape, OUT_DTYPES[dtype])
    if out.shape != shape or out.dtype != OUT_DTYPES[dtype] or not out.flags.c_contiguous:
        raise AddressError(f"out for {name} must be contiguous {OUT_DTYPES[dtype]} of shape {shape}.")
    if not out.flags.writeable:
        raise AddressError(f"out for {name} must be writable; it is not.")
    return out
