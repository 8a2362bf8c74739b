"""Stores: the same rows from memory and from disk, however they are asked for, and no wrong row whatever happens."""

import contextlib
import ctypes
import errno
import logging
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alone import run_alone, started
from engram_lm.errors import AddressError, CheckpointError, ConfigError
from engram_lm.storage import disk, read_ahead
from engram_lm.storage.cached import CachedStore
from engram_lm.storage.codecs import CODECS, bf16_bits, codec_named
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import PAGE, open_packed, verify
from engram_lm.storage.kernels import disk as kernels
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.layout import Extent, Layout
from engram_lm.storage.store import OUT_DTYPES, HostStore, int64, records_of
from engram_lm.storage.writer import TableWriter

# Ways to read a layout; "unqueued": past the page cache, but by threads, as where queues have run out; "ahead": handed to
# a reading thread and taken up at once.
WAYS = ("host", "queued", "threads", "unqueued", "ahead")


class AheadStore(DiskStore):
    def gather(self, address, *, out=None, dtype="fp32"):
        asked = int64(address)
        begun = self.begin(asked.ctypes.data, asked.size)
        if begun is None:
            return super().gather(address, out=out, dtype=dtype)
        out = np.full((*asked.shape, self.width), 7, OUT_DTYPES[dtype]) if out is None else out
        begun.finish(out.ctypes.data, dtype)
        return out


def opened(way: str, layout: Layout, monkeypatch=None, **options):
    if way == "host":
        return HostStore.load(layout)
    if way in ("queued", "ahead"):
        store = (DiskStore if way == "queued" else AheadStore)(layout, **options)
        assert store.direct, "this test needs a file system with O_DIRECT"
        return store
    if way == "threads":
        return DiskStore(layout, direct=False, **({"depth": 4} | options))
    store = DiskStore(layout, **({"depth": 4} | options))
    store._idle.clear()
    monkeypatch.setattr(kernels, "queue", lambda depth: None)
    return store


def some_records(n_rows: int, n_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n_rows, n_bytes), dtype=np.uint8)


def packed(path: Path, records: np.ndarray, **options) -> Layout:
    with TableWriter(path, n_rows=len(records), **options) as writer:
        writer.add(records)
        writer.finish()
    return open_packed(path)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.fixture(scope="module")
def bf16_table(tmp_path_factory):
    """500 rows of 100 numbers, 20 a page: (layout, records, rows as float32)."""
    records = some_records(500, 200)
    # no NaN, so that rows compare as bits
    records[:, 1::2] &= 0x3F
    layout = packed(tmp_path_factory.mktemp("table") / "t", records, width=100, codec="bf16")
    return layout, records, CODECS["bf16"].decode(records)


@pytest.fixture
def own_table(tmp_path, bf16_table):
    """A copy that a test may damage."""
    path = tmp_path / "t"
    path.write_bytes(bf16_table[0].segments[0].path.read_bytes())
    return open_packed(path), *bf16_table[1:]


# ---- the same rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_way_gives_the_plain_codecs_rows(way, codec, tmp_path, monkeypatch):
    rng, rule = np.random.default_rng(0), codec_named(codec)
    rows = rng.standard_normal((333, 96)).astype(np.float32)
    scale = 0.03 if codec == "fp8_e4m3" else 1.0
    records = rule.encode(rows, scale=scale)
    layout = packed(tmp_path / "t", records, width=96, codec=codec, scale=scale)
    store, wanted = opened(way, layout, monkeypatch), rule.decode(records, scale=layout.scale)
    for address in (
        rng.integers(0, 333, (40, 3, 2)),
        np.zeros((2, 50), np.int64) + 332,
        np.arange(333)[::-1],
        np.array([0]),
        np.array(7),
        np.zeros((0,), np.int64),
        np.zeros((3, 0, 2), np.int32),
        [[5, 6], [6, 5]],
        [],
    ):
        index = np.asarray(address, np.int64)
        assert same(store.gather(address), wanted[index])
        assert same(store.gather(address, dtype="bf16"), bf16_bits(wanted[index]))
    store.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_large_gather_with_repeats(way, tmp_path, monkeypatch):
    """More reads than a round holds, more than are in flight; records of a page and a bit."""
    monkeypatch.setattr(disk, "STAGE_BYTES", 10 * PAGE)
    monkeypatch.setattr(read_ahead, "ROUND_BYTES", 10 * PAGE)
    rng = np.random.default_rng(0)
    for n_rows, width in ((4000, 264), (150, 4100), (5, 50_000)):
        records = some_records(n_rows, width)
        layout = packed(tmp_path / "t", records, width=width, codec="fp8_e4m3")
        store, found = opened(way, layout, monkeypatch), np.zeros((n_rows, width), np.uint8)
        address = rng.integers(0, n_rows, 3 * n_rows)
        assert np.array_equal(
            store.gather(address), CODECS["fp8_e4m3"].decode(records)[address], equal_nan=True
        )
        store.read_records(np.arange(n_rows), found)
        assert np.array_equal(found, records)
        store.close()
        monkeypatch.undo()
        monkeypatch.setattr(disk, "STAGE_BYTES", 10 * PAGE)
        monkeypatch.setattr(read_ahead, "ROUND_BYTES", 10 * PAGE)


@pytest.mark.parametrize("depth", [1, 2, 3, 200])
@pytest.mark.parametrize("way", ["queued", "threads", "ahead"])
def test_any_number_of_reads_in_flight(depth, way, bf16_table):
    layout, _, rows = bf16_table
    store, address = opened(way, layout, depth=depth), np.random.default_rng(0).integers(0, 500, 900)
    assert same(store.gather(address), rows[address])
    assert 0 < store.bytes_read == store.reads * PAGE <= 25 * PAGE
    store.close()


@pytest.mark.parametrize("way", WAYS)
def test_eight_threads_at_once(way, bf16_table, monkeypatch):
    layout, _, rows = bf16_table
    store, wrong, done = opened(way, layout, monkeypatch), [], []

    def gather(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            address = rng.integers(0, 500, int(rng.integers(1, 300)))
            if not same(store.gather(address), rows[address]):
                wrong.append(seed)
        done.append(seed)

    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sorted(done), wrong) == (list(range(8)), [])
    store.close()


# ---- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [-1, 500, 2**40, -(2**63)])
def test_an_address_outside_is_refused_before_anything_is_read(way, bad, bf16_table, monkeypatch):
    store, out = opened(way, bf16_table[0], monkeypatch), np.full((3, 100), 7, np.float32)
    monkeypatch.setattr(store, "read_records", lambda *_: pytest.fail("read"))
    with pytest.raises(AddressError, match=f"Address {bad} at place 1 is outside .*, which has 500 rows"):
        store.gather([3, bad, 5], out=out)
    assert (out == 7).all()
    store.close()


@pytest.mark.parametrize("way", ["host", "queued"])
def test_addresses_are_whole_numbers(way, bf16_table):
    """1.7 is not row 1, and True is not row 1 either."""
    store = opened(way, bf16_table[0])
    for wrong in ([1.0, 1.7], np.array([True, False]), np.array(["1"]), np.array([None])):
        with pytest.raises(AddressError, match="Addresses are int64; got"):
            store.gather(wrong)
    with pytest.raises(AddressError, match="Address 18446744073709551615 is outside"):
        store.gather(np.array([3, 2**64 - 1], np.uint64))
    assert same(store.gather(np.array([3], np.uint8)), bf16_table[2][[3]])
    store.close()


@pytest.mark.parametrize("way", ["host", "queued", "threads"])
def test_out_is_filled_where_it_fits_and_refused_otherwise(way, bf16_table):
    layout, _, rows = bf16_table
    store, address = opened(way, layout), np.array([[3, 3], [499, 0]])
    room = np.zeros((3, 2, 100), np.float32)
    out = room[:2]
    assert store.gather(address, out=out) is out
    assert same(out, rows[address])
    assert not room[2].any()
    halves = np.zeros((2, 2, 100), np.uint16)
    assert same(store.gather(address, out=halves, dtype="bf16"), bf16_bits(rows[address]))
    locked = np.zeros((2, 2, 100), np.float32)
    locked.flags.writeable = False
    for wrong in (
        np.zeros((4, 100), np.float32),
        np.zeros((2, 2, 99), np.float32),
        np.zeros((2, 2, 100)),
        halves,
        np.zeros((2, 2, 200), np.float32)[..., ::2],
        np.asfortranarray(np.zeros((2, 2, 100), np.float32)),
        locked,
    ):
        with pytest.raises(AddressError, match=r"out for .* must be (contiguous float32 of shape|writable)"):
            store.gather(address, out=wrong)
    assert not locked.any()
    with pytest.raises(ConfigError, match="Rows leave as fp32 or bf16; got dtype='fp16'"):
        store.gather(address, dtype="fp16")
    store.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_closed_store_says_so(way, bf16_table, monkeypatch):
    store = opened(way, bf16_table[0], monkeypatch)
    store.gather([1, 2])
    store.close()
    with pytest.raises(CheckpointError, match="was closed"):
        store.gather([1, 2])
    with pytest.raises(CheckpointError, match="was closed"):
        store.read_records(np.array([1]), np.zeros((1, 200), np.uint8))
    store.close()


def test_a_closed_cache_says_so_too(bf16_table):
    store = CachedStore(opened("queued", bf16_table[0]), budget_bytes=100_000)
    for _ in range(2):
        assert same(store.gather([1, 2]), bf16_table[2][[1, 2]])
    assert store.hits == 2
    store.close()
    with pytest.raises(CheckpointError, match="was closed"):
        store.gather([1, 2])


def test_what_cannot_be_is_refused(bf16_table):
    with pytest.raises(ConfigError, match="depth is 0"):
        DiskStore(bf16_table[0], depth=0)
    with pytest.raises(ConfigError, match=r"No memory for table: .* rows of 4 bytes .* Read it from disk"):
        HostStore(n_rows=2**60, width=1)


def test_host_rows_can_be_written(bf16_table):
    layout, records, rows = bf16_table
    store = HostStore.load(layout, huge_pages=False)
    store.write_records(np.array([4, 9]), records[[100, 200]])
    assert same(store.gather([3, 4, 9]), rows[[3, 100, 200]])
    fresh = HostStore(n_rows=3, width=100, codec="bf16")
    assert not fresh.gather([0, 1, 2]).any()


def test_loading_reports_bytes(bf16_table):
    seen = []
    HostStore.load(bf16_table[0], report=lambda done, total: seen.append((done, total)))
    assert seen == [(100_000, 100_000)]


# ---- tables in several files -------------------------------------------------------------------------------------------


def split_table(directory: Path, records: np.ndarray, width: int, seed: int) -> Layout:
    """Codes in two files, scales in a third, at odd offsets: as safetensors lie, and with gaps between rows and groups."""
    rng = np.random.default_rng(seed)
    n_rows, n_bytes = records.shape
    cut, segments = int(rng.integers(1, n_rows)), []
    for name, first_row, last_row, at, end in (
        ("codes-1", 0, cut, 0, width),
        ("codes-2", cut, n_rows, 0, width),
        ("scales", 0, n_rows, width, n_bytes),
    ):
        n, part = last_row - first_row, end - at
        gap, group = int(rng.integers(0, 4)) * 5, int(rng.integers(1, n + 1))
        segment = Extent(
            path=directory / name,
            offset=int(rng.integers(0, 9000)),
            first_row=first_row,
            n_rows=n,
            stride=part + gap,
            group=group,
            group_stride=(group - 1) * (part + gap) + part + int(rng.integers(0, 50)),
            at=at,
            n_bytes=part,
        )
        data = rng.integers(0, 256, segment.end + int(rng.integers(0, 3)), dtype=np.uint8)
        for i in range(n):
            start = segment.offset + i // group * segment.group_stride + i % group * segment.stride
            data[start : start + part] = records[first_row + i, at:end]
        data.tofile(segment.path)
        segments.append(segment)
    return Layout(name="split", n_rows=n_rows, width=width, codec="fp8_e4m3_e8m0", segments=tuple(segments))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(6))
def test_tables_split_over_files_read_the_same(way, seed, tmp_path, monkeypatch):
    width = (32, 64, 256, 4096, 5024, 320)[seed]
    records = some_records(180 if width < 4000 else 20, width + width // 32, seed)
    layout = split_table(tmp_path, records, width, seed)
    store, rng = opened(way, layout, monkeypatch), np.random.default_rng(seed)
    found = np.zeros_like(records)
    store.read_records(np.arange(len(records)), found)
    assert np.array_equal(found, records)
    for n in (1, 7, 300):
        address = rng.integers(0, len(records), n)
        wanted = CODECS["fp8_e4m3_e8m0"].decode(records[address])
        assert np.array_equal(store.gather(address), wanted, equal_nan=True)
    store.close()


def test_records_are_iterated_from_any_row_to_any_row(tmp_path, bf16_table):
    records = some_records(180, 264)
    for layout, wanted in ((split_table(tmp_path, records, 256, 3), records), bf16_table[:2]):
        for first, last in ((0, None), (17, 18), (19, 41), (100, 180)):
            parts = list(records_of(layout, first=first, last=last))
            assert parts[0][0] == first
            assert np.array_equal(np.concatenate([part for _, part in parts]), wanted[first:last])


@pytest.mark.parametrize("way", WAYS)
def test_a_split_table_that_is_cut_short_is_refused(way, tmp_path, monkeypatch):
    layout = split_table(tmp_path, some_records(50, 66), 64, 0)
    os.truncate(layout.segments[1].path, layout.segments[1].end - 1)
    with pytest.raises(CheckpointError, match=r"codes-2 .*was cut short"):
        opened(way, layout, monkeypatch)
    layout.segments[2].path.unlink()
    with pytest.raises(CheckpointError, match=r"(codes-2|scales) .*(cut short|cannot be read)"):
        opened(way, layout, monkeypatch)


@pytest.mark.parametrize("way", ["queued", "threads", "unqueued", "ahead"])
def test_errors_name_the_file_of_a_split_table(way, tmp_path, monkeypatch):
    records = some_records(50, 66)
    layout = split_table(tmp_path, records, 64, 0)
    store = opened(way, layout, monkeypatch)
    for k, name in enumerate(("codes-1", "codes-2", "scales")):
        segment = layout.segments[k]
        data = segment.path.read_bytes()
        os.truncate(segment.path, segment.offset)
        with pytest.raises(CheckpointError, match=rf"/{name} ends at byte [\d,]+, inside a row"):
            store.gather(np.arange(50))
        segment.path.write_bytes(data)
    wanted = CODECS["fp8_e4m3_e8m0"].decode(records)
    assert np.array_equal(store.gather(np.arange(50)), wanted, equal_nan=True)
    store.close()


# ---- what may happen to a file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_page_damaged_while_open_is_refused_with_its_rows(way, own_table, monkeypatch):
    """Page 3 holds rows 60 to 79; whatever byte of it is wrong, also of its padding."""
    layout, _, rows = own_table
    path, at = layout.segments[0].path, layout.pages_at + 3 * PAGE + PAGE - 1
    store = None if way == "host" else opened(way, layout, monkeypatch)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\1")
    message = r"page 3 \(rows 60 to 79\) is damaged: its checksum is wrong\. Nothing of it is used"
    if store is None:
        with pytest.raises(CheckpointError, match=message):
            HostStore.load(layout)
        return
    for address in ([61], [0, 79, 499]):
        with pytest.raises(CheckpointError, match=message):
            store.gather(address)
    # other rows are as good as before, also where the file is gone by now
    others = np.r_[0:60, 80:500]
    path.unlink()
    assert same(store.gather(others), rows[others])
    with pytest.raises(CheckpointError, match=message):
        store.gather([65])
    store.close()


@pytest.mark.parametrize("way", ["queued", "threads", "unqueued", "ahead"])
def test_a_file_cut_short_while_open_is_refused(way, own_table, monkeypatch):
    layout, _, _ = own_table
    store, path = opened(way, layout, monkeypatch), layout.segments[0].path
    store.gather(np.arange(500))
    for length in (layout.pages_at + 4 * PAGE + 100, layout.pages_at + 4 * PAGE, 100, 0):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match=r"it was cut short while open|is damaged"):
            store.gather([3, 85])
    store.close()


@pytest.mark.parametrize("way", ["queued", "threads", "unqueued", "ahead"])
def test_a_file_without_checksums_cut_short_while_open_gives_no_stale_row(way, tmp_path, monkeypatch):
    """Bytes of an earlier read lie where the missing ones would come."""
    records = some_records(300, 33)
    whole = Extent(
        path=tmp_path / "t", offset=5, first_row=0, n_rows=300, stride=33, group=300, group_stride=9900, at=0, n_bytes=33
    )  # fmt: skip
    whole.path.write_bytes(b"12345" + records.tobytes())
    layout = Layout(name="t", n_rows=300, width=32, codec="fp8_e4m3_e8m0", segments=(whole,))
    store = opened(way, layout, monkeypatch)
    wanted = store.gather(np.arange(300))
    for length in (5 + 299 * 33 + 10, 8192 + 100, 8192, 4096 + 7, 3):
        os.truncate(whole.path, length)
        last = (length - 5) // 33
        with pytest.raises(
            CheckpointError, match=r"t ends at byte .*, inside a row: it was cut short while open"
        ):
            store.gather([max(0, last)])
        if last > 0:
            assert np.array_equal(store.gather(np.arange(last)), wanted[:last], equal_nan=True)
    store.close()


@pytest.mark.parametrize("way", ["queued", "threads", "ahead"])
def test_an_open_store_reads_on_when_its_file_is_removed_or_replaced(way, own_table):
    layout, records, rows = own_table
    store, path = opened(way, layout), layout.segments[0].path
    path.unlink()
    assert same(store.gather([0, 499]), rows[[0, 499]])
    packed(path, records[::-1].copy(), width=100, codec="bf16")
    assert same(store.gather([0, 499]), rows[[0, 499]])
    store.close()


@pytest.mark.parametrize("way", ["host", "queued", "threads"])
@pytest.mark.parametrize(
    "other", [{"codec": "fp8_e4m3", "width": 200}, {"codec": "bf16", "width": 100, "identity": {"layer": 7}}]
)
def test_a_layout_of_a_file_that_was_replaced_is_refused(way, other, own_table):
    """Its rows would be read as something else, with checksums that are right."""
    layout, records, _ = own_table
    packed(layout.segments[0].path, records, **other)
    with pytest.raises(CheckpointError, match="was replaced by another table since it was opened"):
        opened(way, layout)


@pytest.mark.parametrize("way", ["queued", "threads", "unqueued", "ahead"])
def test_a_read_error_is_named_and_the_next_read_is_right(way, own_table, monkeypatch):
    layout, _, rows = own_table
    store, path = opened(way, layout, monkeypatch), layout.segments[0].path
    (handle,) = store._files.values()
    kept, write_only = os.dup(handle), os.open(path, os.O_WRONLY)
    os.dup2(write_only, handle)
    for _ in range(3):
        with pytest.raises(CheckpointError, match=r"t could not be read at byte [\d,]+: Bad file descriptor"):
            store.gather(np.arange(500))
    os.dup2(kept, handle)
    assert same(store.gather(np.arange(500)), rows)
    store.close()
    os.close(kept)
    os.close(write_only)


def test_an_error_of_the_device_is_named(own_table):
    """The memory of this process at address 0 and on: input/output error."""
    store = opened("threads", own_table[0])
    (handle,) = store._files.values()
    with open("/proc/self/mem", "rb", buffering=0) as file:
        os.dup2(file.fileno(), handle)
    with pytest.raises(CheckpointError, match="could not be read at byte 4,096: Input/output error"):
        store.gather([0])
    store.close()


# ---- systems that refuse something -------------------------------------------------------------------------------------


def refuse_direct(monkeypatch, number: int = errno.EINVAL) -> None:
    really = os.open

    def open_(path, flags, *more, **options):
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number), str(path))
        return really(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", open_)


def test_where_o_direct_is_refused_threads_read_and_it_is_said_once(bf16_table, monkeypatch, caplog):
    layout, _, rows = bf16_table
    refuse_direct(monkeypatch)
    with caplog.at_level(logging.WARNING):
        store = DiskStore(layout, depth=3)
        for _ in range(3):
            assert same(store.gather(np.arange(500)), rows)
    (record,) = caplog.records
    assert (
        "O_DIRECT is refused (Invalid argument); reading through the page cache with 3 threads"
        in record.message
    )
    assert not store.direct
    store.close()


def test_where_there_are_no_queues_threads_read_and_it_is_said_once(bf16_table, monkeypatch, caplog):
    layout, _, rows = bf16_table
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(kernels, "queue", lambda depth: None)
        store = DiskStore(layout, depth=3)
        assert same(store.gather(np.arange(500)), rows)
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "the system gives no queue for asynchronous reads; reading through the page cache with 3 threads."
    ]
    store.close()
    caplog.clear()
    # a reader that comes when they have run out
    store = opened("unqueued", layout, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(store.gather(np.arange(500)), rows)
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "no further queue for asynchronous reads; 4 threads read."
    ]
    store.close()


def test_a_file_that_cannot_be_opened_is_named(bf16_table, monkeypatch, caplog):
    def none_left(path, *_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(os, "open", none_left)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="t cannot be read: Too many open"),
    ):
        DiskStore(bf16_table[0])
    # it was not O_DIRECT
    assert caplog.records == []


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_files_in_memory_read_the_same(bf16_table, tmp_path_factory):
    layout, _, rows = bf16_table
    path = Path(f"/dev/shm/engram-lm-test-{os.getpid()}")
    try:
        path.write_bytes(layout.segments[0].path.read_bytes())
        store = DiskStore(open_packed(path), depth=4)
        assert same(store.gather(np.arange(500)), rows)
        store.close()
    finally:
        path.unlink()


# ---- processes, threads and what they leave ----------------------------------------------------------------------------

FORK = """
import os, sys, threading
import numpy as np
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import open_packed

layout = open_packed(sys.argv[1])
for direct in (True, False):
    store, every = DiskStore(layout, direct=direct, depth=4), np.arange(layout.n_rows)
    wanted = store.gather(every).copy()
    def sent():
        begun, out = store.begin(every.ctypes.data, len(every)), np.zeros_like(wanted)
        if begun is not None:
            begun.finish(out.ctypes.data, "fp32")
        return (begun is not None) == direct and np.array_equal(out, wanted if direct else 0 * wanted)
    for _ in range(3):
        under_way = store.begin(every.ctypes.data, len(every))
        child = os.fork()
        if child == 0:
            right = all(np.array_equal(store.gather(every[k::3]), wanted[k::3]) for k in range(3)) and sent()
            del under_way
            store.close()
            os._exit(0 if right else 1)
        assert np.array_equal(store.gather(every), wanted)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert np.array_equal(store.gather(every), wanted) and sent()
        del under_way
    store.close()
print("read")
"""


@pytest.mark.slow
def test_a_forked_child_reads_on_as_its_parent_does(bf16_table):
    """As workers of a data loader: a queue and threads are the parent's alone."""
    assert run_alone(FORK, bf16_table[0].segments[0].path) == "read\n"


@pytest.mark.slow
def test_a_reader_that_is_killed_leaves_nothing_broken(own_table):
    layout, _, rows = own_table
    path = layout.segments[0].path
    code = """
import sys
import numpy as np
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import open_packed
store = DiskStore(open_packed(sys.argv[1]))
store.gather([0])
print("reading", flush=True)
while True:
    store.gather(np.arange(500))
"""
    before = path.read_bytes()
    with started(code, path) as reader:
        assert reader.stdout.readline() == "reading\n"
        time.sleep(0.05)
        reader.send_signal(signal.SIGKILL)
        assert reader.wait() == -signal.SIGKILL
    assert path.read_bytes() == before
    assert verify(path).n_rows == 500
    store = opened("queued", layout)
    assert same(store.gather(np.arange(500)), rows)
    store.close()


def settles(condition):
    """Whether it becomes true: the system counts the queues of every process, and others come and go."""
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.1)
    return False


def queued_events() -> int:
    return int(Path("/proc/sys/fs/aio-nr").read_text())


@pytest.mark.parametrize("n_stores", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_descriptors_and_queues_are_given_back(n_stores, bf16_table):
    layout, some = bf16_table[0], np.array([1, 498])
    opened("ahead", layout).gather([1])
    n_files, n_events, n_threads = len(os.listdir("/proc/self/fd")), queued_events(), threading.active_count()
    for k in range(n_stores):
        store = DiskStore(layout, depth=64)
        store.gather([k, 499])
        if k % 3:
            begun = store.begin(some.ctypes.data, 2)
            begun = None if k % 3 == 1 else begun
        if k % 2:
            store.close()
        # the other half is closed as it is forgotten
    for _ in range(10):
        store = DiskStore(layout, depth=3, direct=False)
        store.gather([3])
        store.close()
    del store, begun
    for _ in range(100):
        if threading.active_count() <= n_threads:
            break
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) == n_files
    assert threading.active_count() <= n_threads
    # others on this machine may hold queues meanwhile, but not as many
    assert settles(lambda: queued_events() - n_events < max(5, n_stores / 4) * 64)


def test_failed_openings_and_gathers_give_back_what_they_took(own_table):
    layout, _, _ = own_table
    path = layout.segments[0].path
    opened("queued", layout).gather([1])
    n_files, n_events = len(os.listdir("/proc/self/fd")), queued_events()
    store = opened("queued", layout)
    os.truncate(path, 5 * PAGE)
    for _ in range(15):
        with pytest.raises(CheckpointError):
            store.gather([499])
    store.close()
    for _ in range(15):
        with pytest.raises(CheckpointError):
            DiskStore(replace(layout, checksums_at=None))
    assert len(os.listdir("/proc/self/fd")) == n_files
    assert settles(lambda: queued_events() - n_events < 7 * 64)


def test_closing_waits_for_gathers_that_are_under_way(own_table):
    """A descriptor closed under a read may be another file's by then."""
    layout, _, rows = own_table
    for way in ("queued", "threads"):
        store, wrong, ended = opened(way, layout), [], []

        def gather(store=store, wrong=wrong, ended=ended) -> None:
            with contextlib.suppress(CheckpointError):
                while True:
                    if not same(store.gather(np.arange(500)), rows):
                        wrong.append(None)
            ended.append(None)

        threads = [threading.Thread(target=gather) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        store.close()
        assert store._busy == []
        for thread in threads:
            thread.join(timeout=30)
        assert (len(ended), wrong) == (4, [])


def test_after_a_failure_no_thread_writes_on(own_table, monkeypatch):
    """The first slice fails at once, the others take their time: the gather ends after the last of them."""
    store, under_way = opened("threads", own_table[0]), []
    really = kernels.read_slice

    def slow(*arguments):
        if arguments[6] == 0:
            raise KeyboardInterrupt
        under_way.append(None)
        time.sleep(0.1)
        really(*arguments)
        under_way.pop()

    monkeypatch.setattr(kernels, "read_slice", slow)
    with pytest.raises(KeyboardInterrupt):
        store.gather(np.arange(500))
    assert under_way == []
    assert store._idle == []
    monkeypatch.undo()
    assert same(store.gather(np.arange(500)), own_table[2])
    store.close()


# ---- the queue, against a system that does what systems may -----------------------------------------------------------


class System:
    """io_submit and io_getevents over bytes, with partial submissions, refusals, interruptions and any order."""

    def __init__(self, data: bytes, choose, *, fatal: int = 0, broken: bool = False):
        self.data, self.choose, self.fatal, self.broken = data, choose, fatal, broken
        self.under_way, self.destroyed, self.error, self.refused_in_a_row = [], False, 0, 0

    def syscall(self, number, handle, a, b, c, d):
        if number == kernels._SUBMIT:
            return self.submit(a, b)
        if number == kernels._EVENTS:
            return self.events(int(a), int(b), c)
        assert number == kernels._DESTROY
        self.under_way.clear()
        self.destroyed = True
        return 0

    def submit(self, n, pointers):
        assert n > 0
        if self.fatal and self.choose(0, 9) == 0:
            self.error = self.fatal
            return -1
        how = self.choose(0, 3) if self.refused_in_a_row < 5 else 3
        if how == 0 and self.under_way:
            self.error = errno.EAGAIN
        elif how == 1:
            self.error = errno.EINTR
        else:
            self.refused_in_a_row = 0
            taken = self.choose(1, int(n)) if how == 2 else int(n)
            for place in (ctypes.c_int64 * taken).from_address(int(pointers)):
                self.under_way.append(tuple((ctypes.c_uint64 * 8).from_address(place)))
            # no two requests under way share a slot
            slots = [request[0] >> 40 for request in self.under_way]
            assert len(set(slots)) == len(slots)
            return taken
        self.refused_in_a_row += 1
        return -1

    def events(self, least, most, place):
        assert self.under_way, "waits for ever"
        assert least == 1
        if self.broken and self.choose(0, 3) == 0:
            self.error = errno.EINVAL
            return -1
        if self.choose(0, 5) == 0:
            self.error = errno.EINTR
            return -1
        n = self.choose(1, min(most, len(self.under_way)))
        for e in range(n):
            request = self.under_way.pop(self.choose(0, len(self.under_way) - 1))
            data, _, operation, buffer, n_bytes, offset, *rest = request
            assert operation >> 32 == 77
            assert operation & 0xFFFF == 0
            assert rest == [0, 0]
            found = self.data[offset : offset + n_bytes]
            ctypes.memmove(buffer, found, len(found))
            (ctypes.c_int64 * 4).from_address(int(place) + 32 * e)[:] = (data, 0, len(found), 0)
        return n


def queued(system: System, offsets, depth: int, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """read_queued as plain Python over `system`: (the stage, its status)."""
    monkeypatch.setattr(kernels, "_syscall", system.syscall)
    monkeypatch.setattr(kernels, "_errno", lambda: np.int64(system.error))
    J = len(offsets)
    stage, status = np.zeros((J, 512), np.uint8), np.zeros(3, np.int64)
    kernels.read_queued.py_func(
        1, np.full(J, 77), np.array(offsets, np.int64), np.full(J, 512), np.full(J, 300), stage.ctypes.data, 512,
        np.zeros((depth, 8), np.uint64), np.zeros(depth, np.int64), np.zeros((depth, 4), np.int64), status,
    )  # fmt: skip
    return stage, status


@given(st.data(), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60)
def test_the_queue_reads_everything_once_whatever_the_system_does(drawn, n_jobs, depth):
    rng = np.random.default_rng(drawn.draw(st.integers(0, 2**20)))
    data = rng.integers(0, 256, 512 * 40, dtype=np.uint8).tobytes()
    system = System(data, lambda a, b: int(rng.integers(a, b + 1)))
    offsets = rng.integers(0, 39, n_jobs) * 512
    with pytest.MonkeyPatch.context() as patch:
        stage, status = queued(system, offsets, depth, patch)
    assert status[0] == kernels.OK
    assert system.under_way == []
    for j, offset in enumerate(offsets):
        assert stage[j].tobytes() == data[offset : offset + 512]


@given(st.integers(0, 2**20), st.sampled_from(["refused", "broken", "short"]))
@settings(max_examples=60)
def test_when_the_queue_returns_nothing_is_under_way(seed, what):
    """Else the system would write to memory that is somebody else's by then."""
    rng = np.random.default_rng(seed)
    data = bytes(512 * (10 if what == "short" else 40))
    system = System(
        data,
        lambda a, b: int(rng.integers(a, b + 1)),
        fatal=errno.EBADF if what == "refused" else 0,
        broken=what == "broken",
    )
    with pytest.MonkeyPatch.context() as patch:
        _, status = queued(system, rng.integers(0, 39, 30) * 512, 5, patch)
    assert system.under_way == []
    assert (
        status[0]
        in {
            "refused": (kernels.OK, kernels.FAILED),
            "broken": (kernels.OK, kernels.BROKEN),
            "short": (kernels.OK, kernels.SHORT),
        }[what]
    )
    assert system.destroyed == (status[0] == kernels.BROKEN)
    if status[0] == kernels.FAILED:
        assert status[2] == -errno.EBADF


def test_a_queue_that_is_gone_is_an_error_and_not_an_endless_wait(own_table):
    layout, _, rows = own_table
    store = opened("queued", layout)
    store.gather([0])
    (reader,) = store._idle
    kernels.close_queue(reader.queue)
    with pytest.raises(CheckpointError, match="could not be read at byte 4,096: Invalid argument"):
        store.gather([0])
    # the next gather has a queue of its own
    assert same(store.gather(np.arange(500)), rows)
    store.close()


def test_stages_are_given_back_to_no_child(monkeypatch):
    """Direct reads into a page that a fork shares could be lost: the stage is not in the child at all."""
    advised = []

    class Pages(bytearray):
        def madvise(self, option):
            advised.append(option)

    monkeypatch.setattr(row_kernels, "zero_pages", lambda n_bytes, **_: Pages(n_bytes))
    reader = disk._Reader.__new__(disk._Reader)
    reader.pid, reader.queue, reader.threads, reader._stage = os.getpid(), None, None, np.empty(0, np.uint8)
    assert len(reader.stage(5000)) >= 5000
    assert advised == [disk.mmap.MADV_DONTFORK]
