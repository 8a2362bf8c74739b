"""Table files: where rows lie, what a killed or hindered writer leaves, and that no damage is ever read as rows."""

import json
import os
import resource
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engram_lm.errors import CheckpointError, ConfigError, EngramError, IdentityError
from engram_lm.kernels import checksums
from engram_lm.storage import format as packed
from engram_lm.storage.codecs import CODECS, codec_named
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import MAGIC, PAGE, Header, open_packed, read_header, verify
from engram_lm.storage.layout import Layout
from engram_lm.storage.store import HostStore
from engram_lm.storage.writer import TableWriter
from places import GOLDEN

GOLDEN = GOLDEN / "tables-v1"
FACTS = {"profile": "test", "layer": 1, "moduli": [5, 7], "seed": 3}


def some_records(n_rows: int, width: int, codec: str, seed: int = 0) -> np.ndarray:
    n_bytes = codec_named(codec).record_bytes(width)
    return np.random.default_rng(seed).integers(0, 256, (n_rows, n_bytes), dtype=np.uint8)


def write(path: Path, records: np.ndarray, *, pieces: list[int] | None = None, **options) -> Header:
    with TableWriter(path, n_rows=len(records), **options) as writer:
        for piece in np.split(records, np.cumsum(pieces or [])):
            writer.add(piece)
        return writer.finish()


def rows_at(path: Path, records_wanted: np.ndarray) -> np.ndarray:
    """Every record, through the store that reads from disk."""
    store = DiskStore(open_packed(path), direct=False, depth=2)
    found = np.zeros_like(records_wanted)
    try:
        store.read_records(np.arange(len(found)), found)
    finally:
        store.close()
    return found


# ---- where rows lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "width", "record_bytes", "records_per_page", "pages_per_record"),
    [
        ("fp8_e4m3_e8m0", 256, 264, 15, 1),
        ("fp8_e4m3", 256, 256, 16, 1),
        ("fp32", 1024, 4096, 1, 1),
        ("fp32", 1025, 4100, 1, 2),
        ("bf16", 1, 2, 2048, 1),
        ("fp8_e4m3", 3000, 3000, 1, 1),
        ("fp32", 5000, 20000, 1, 5),
    ],
)
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 33])
def test_rows_lie_where_the_document_says(
    codec, width, record_bytes, records_per_page, pages_per_record, n_rows, tmp_path
):
    path, records = tmp_path / "t.engram", some_records(n_rows, width, codec)
    header = write(path, records, width=width, codec=codec, identity=FACTS)
    assert (header.record_bytes, header.records_per_page, header.pages_per_record) == (
        record_bytes,
        records_per_page,
        pages_per_record,
    )
    data = np.fromfile(path, np.uint8)
    used = np.zeros(len(data), bool)
    for row in range(n_rows):
        at = header.pages_at + (
            row // records_per_page * PAGE + row % records_per_page * record_bytes
            if pages_per_record == 1
            else row * pages_per_record * PAGE
        )
        assert np.array_equal(data[at : at + record_bytes], records[row])
        # no record straddles a page unless it is larger than one
        assert record_bytes > PAGE or at // PAGE == (at + record_bytes - 1) // PAGE
        used[at : at + record_bytes] = True
    pages = slice(header.pages_at, header.checksums_at)
    assert not data[pages][~used[pages]].any()
    assert header.n_pages * PAGE == header.checksums_at - header.pages_at
    assert len(data) == header.checksums_at + -(-4 * header.n_pages // PAGE) * PAGE
    for page in range(header.n_pages):
        page_data = data[header.pages_at + page * PAGE :][:PAGE]
        (entry,) = data[header.checksums_at + 4 * page :][:4].view("<u4")
        assert int(entry) == int(checksums.xxh64(page_data)) & 0xFFFFFFFF
    assert not data[header.checksums_at + 4 * header.n_pages :].any()
    assert read_header(path) == header
    assert np.array_equal(rows_at(path, records), records)


def test_header_fields_lie_where_the_document_says(tmp_path):
    path, records = tmp_path / "t.engram", some_records(40, 20, "fp8_e4m3")
    write(path, records, width=20, codec="fp8_e4m3", scale=0.3, identity=FACTS, made_by="me", note="näh")
    data = path.read_bytes()
    at = struct.unpack_from
    assert data[:8] == b"\x89ENGT\r\n\x1a"
    assert at("<II", data, 8) == (1, 4096)
    assert at("<QQQ", data, 16) == (0, 0, 40)
    assert at("<II", data, 40) == (20, 4)
    assert at("<f", data, 48)[0] == np.float32(0.3)
    assert at("<III", data, 52) == (20, 204, 1)
    assert at("<QQQ", data, 64) == (1, 4096, 8192)
    assert at("<Q", data, 88)[0] == int(checksums.xxh64(np.frombuffer(data[8192:], np.uint8)))
    assert data[96:128] == packed.identity_hash(FACTS)
    (json_bytes, zero) = at("<II", data, 128)
    assert zero == 0
    assert json.loads(data[136 : 136 + json_bytes]) == {"identity": FACTS, "made_by": "me", "note": "näh"}
    assert not any(data[136 + json_bytes : 4088])
    assert at("<Q", data, 4088)[0] == int(checksums.xxh64(np.frombuffer(data[:4088], np.uint8)))
    # the scale of a header is the float32 that a file keeps
    assert read_header(path).scale == float(np.float32(0.3))


def test_identity_hash_is_the_one_of_addressing():
    from engram_lm.addressing import Identity
    from engram_lm.addressing.identity import KEYS

    facts = {key: [n, None, "ä"] for n, key in enumerate(KEYS)}
    assert packed.identity_hash(facts) == bytes.fromhex(Identity(facts).hash)


@pytest.mark.parametrize(("codec", "width"), [("fp8_e4m3_e8m0", 256), ("fp32", 1100), ("bf16", 24)])
def test_uneven_pieces_write_the_same_file(codec, width, tmp_path):
    records = some_records(700, width, codec)
    write(tmp_path / "one", records, width=width, codec=codec)
    rng = np.random.default_rng(1)
    for trial in range(3):
        pieces = rng.multinomial(700, np.ones(9) / 9).tolist()
        pieces[trial] = 0
        pieces = [*pieces[:-1], 1, 0]
        write(tmp_path / "many", records, pieces=pieces, width=width, codec=codec)
        assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()


def test_rows_are_encoded_on_the_way(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    for name, codec in CODECS.items():
        with TableWriter(tmp_path / name, n_rows=50, width=64, codec=name) as writer:
            writer.add_rows(rows[:20])
            writer.add_rows(rows[20:])
            writer.finish()
        assert np.array_equal(rows_at(tmp_path / name, codec.encode(rows)), codec.encode(rows))


# ---- golden files ----------------------------------------------------------------------------------------------------


def golden_records(codec: str, width: int, n_rows: int) -> np.ndarray:
    """A fixed sequence that needs no library: byte i is the top of i * 2654435761 mod 2^32."""
    n_bytes = codec_named(codec).record_bytes(width)
    count = np.arange(n_rows * n_bytes, dtype=np.uint64)
    return (
        ((count * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(24))
        .astype(np.uint8)
        .reshape(n_rows, -1)
    )


GOLDEN_FILES = {
    "fp32": {"codec": "fp32", "width": 7},
    "bf16": {"codec": "bf16", "width": 13},
    "fp8_e4m3_e8m0": {"codec": "fp8_e4m3_e8m0", "width": 64},
    "fp8_e4m3": {"codec": "fp8_e4m3", "width": 10, "scale": 0.0625},
    "identity": {
        "codec": "bf16",
        "width": 3,
        "identity": FACTS,
        "made_by": "engram-lm 0.1.0",
        "note": "Größe: 3",
    },
    "large": {"codec": "fp32", "width": 1030},
}


def golden_rows(name: str) -> int:
    return 2 if name == "large" else 70


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_files_of_version_1_are_read_for_ever(name):
    options, path = GOLDEN_FILES[name], GOLDEN / f"{name}.engram"
    records = golden_records(options["codec"], options["width"], golden_rows(name))
    header = verify(path)
    assert header.identity == options.get("identity")
    assert header.note == options.get("note", "")
    assert header.scale == options.get("scale", 1.0)
    wanted = codec_named(options["codec"]).decode(records, scale=header.scale)
    layout, address = open_packed(path), np.arange(len(records))
    for store in (HostStore.load(layout), DiskStore(layout), DiskStore(layout, direct=False, depth=2)):
        found = np.zeros_like(records)
        store.read_records(address, found)
        assert np.array_equal(found, records)
        assert np.array_equal(store.gather(address), wanted, equal_nan=True)
        store.close()


@pytest.mark.parametrize("name", GOLDEN_FILES)
def test_the_writer_still_writes_version_1_byte_for_byte(name, tmp_path):
    options = GOLDEN_FILES[name]
    write(tmp_path / "t", golden_records(options["codec"], options["width"], golden_rows(name)), **options)
    assert (tmp_path / "t").read_bytes() == (GOLDEN / f"{name}.engram").read_bytes()


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of a header page, two pages and a page of checksums: (its bytes, its records)."""
    path, records = tmp_path_factory.mktemp("small") / "t", some_records(20, 128, "bf16")
    write(path, records, width=128, codec="bf16", identity=FACTS)
    return path.read_bytes(), records


def require_refused_or_right(path: Path, records: np.ndarray) -> str:
    """What `open` and `verify` say of a damaged file, and what reading gives: never a wrong row."""
    said = ""
    try:
        verify(path)
    except EngramError as error:
        said = str(error)
        assert str(path) in said
    try:
        found = rows_at(path, records)
    except EngramError:
        assert said
    else:
        assert np.array_equal(found, records)
    return said


@pytest.mark.parametrize("step", [67, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_refused(step, small, tmp_path):
    """Where nothing lies but zeros too. In steps of 67 and around every edge; of 1 where there is time."""
    data, records = small
    path = tmp_path / "t"
    path.write_bytes(data)
    assert require_refused_or_right(path, records) == ""
    assert len(data) == 4 * PAGE
    with open(path, "r+b", buffering=0) as file:
        for at in range(len(data)):
            at_an_edge = at < 140 or at % PAGE < 3 or at % PAGE > PAGE - 10
            if at % step and not at_an_edge:
                continue
            os.pwrite(file.fileno(), bytes([data[at] ^ (1 << at % 8)]), at)
            with pytest.raises(CheckpointError):
                verify(path)
            if step > 1 or at_an_edge or at % 5 == 0:
                require_refused_or_right(path, records)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert require_refused_or_right(path, records) == ""


def test_a_file_cut_short_or_appended_to_is_refused(small, tmp_path):
    data, records = small
    path = tmp_path / "t"
    lengths = {0, 1, 7, 8, 135, 136, 300, *range(PAGE, len(data), PAGE)}
    lengths |= {n + d for n in range(PAGE, len(data) + 1, PAGE) for d in (-1, 1)}
    for length in sorted(lengths):
        path.write_bytes(data[:length].ljust(length, b"\0"))
        assert require_refused_or_right(path, records)
    for more in (b"\0", b"x" * 3, bytes(PAGE), bytes(2 * PAGE)):
        path.write_bytes(data + more)
        assert "cut short, or appended to" in require_refused_or_right(path, records)


def test_two_pages_in_each_others_place_are_refused(small, tmp_path):
    data, records = small
    path = tmp_path / "t"
    path.write_bytes(data[:PAGE] + data[2 * PAGE : 3 * PAGE] + data[PAGE : 2 * PAGE] + data[3 * PAGE :])
    assert "page 0 (rows 0 to 15) is damaged" in require_refused_or_right(path, records)


def test_the_damaged_rows_are_named(small, tmp_path):
    data, _ = small
    path = tmp_path / "t"
    path.write_bytes(data[: 2 * PAGE] + b"x" + data[2 * PAGE + 1 :])
    with pytest.raises(CheckpointError, match=r"page 1 \(rows 16 to 19\) is damaged: its checksum is wrong"):
        verify(path)


def test_verify_reports_and_returns_the_header(tmp_path, monkeypatch):
    path, seen = tmp_path / "t", []
    header = write(path, some_records(9000, 1024, "fp8_e4m3"), width=1024, codec="fp8_e4m3")
    assert verify(path, report=lambda done, total: seen.append((done, total))) == header
    assert seen == [(2250, 2250)]
    write(path, some_records(5000, 1024, "fp32"), width=1024, codec="fp32")
    seen.clear()
    verify(path, report=lambda done, total: seen.append((done, total)))
    assert seen == [(4096, 5000), (5000, 5000)]


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "t"
    with pytest.raises(CheckpointError, match=r"t is missing"):
        read_header(path)
    path.write_bytes(b"PK\x03\x04" * 2000)
    with pytest.raises(CheckpointError, match="is no table file"):
        read_header(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)
    with TableWriter(path, n_rows=5, width=4, codec="fp32") as writer:
        writer.add_rows(np.zeros((2, 4), np.float32))
    with pytest.raises(CheckpointError, match="a table that was never finished"):
        read_header(writer.partial)
    # a copy in text mode
    data = MAGIC.replace(b"\r\n", b"\n") + bytes(8000)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is no table file"):
        read_header(path)


# ---- headers made to deceive: their checksum is right ----------------------------------------------------------------


def forged(data: bytes, changes: dict[int, bytes]) -> bytes:
    """The file with other bytes in its header and a header checksum that fits."""
    (header_bytes,) = struct.unpack_from("<I", data, 12)
    head = bytearray(data[:header_bytes])
    for at, value in changes.items():
        head[at : at + len(value)] = value
    head[-8:] = struct.pack("<Q", int(checksums.xxh64(np.frombuffer(bytes(head[:-8]), np.uint8))))
    return bytes(head) + data[header_bytes:]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


HOSTILE = {
    "another version": ({8: u32(2)}, "is of version 2 .* this build reads version 1 .*Upgrade"),
    "version 0": ({8: u32(0)}, "is of version 0"),
    "a required feature": ({16: u64(1 << 40)}, "required features 0x10000000000"),
    "no rows": ({32: u64(0)}, "header that cannot be"),
    "a page more": ({32: u64(33)}, "sizes do not follow"),
    "rows beyond files": ({32: u64(2**48)}, "sizes do not follow"),
    "most rows": ({32: u64(2**64 - 1)}, "header that cannot be"),
    "no width": ({40: u32(0)}, "header that cannot be"),
    "width beyond": ({40: u32(2**32 - 1)}, "header that cannot be"),
    "rows and width beyond": ({32: u64(2**48), 40: u32(2**24)}, "more than a file holds"),
    "another width": ({40: u32(127)}, "sizes do not follow"),
    "an unknown codec": ({44: u32(9)}, r"has codec 9; this build knows \[1, 2, 3, 4\]"),
    "another codec": ({44: u32(1)}, "sizes do not follow"),
    "blocks that do not fit": ({40: u32(100), 44: u32(3)}, "multiple of 32"),
    "scale nan": ({44: u32(4), 48: struct.pack("<f", np.nan)}, "scale is nan"),
    "scale 0": ({44: u32(4), 48: struct.pack("<f", 0.0)}, "scale is 0"),
    "scale below 0": ({44: u32(4), 48: struct.pack("<f", -1.0)}, "scale is -1"),
    "scale without effect": ({48: struct.pack("<f", 2.0)}, "without effect"),
    "record_bytes": ({52: u32(255)}, "sizes do not follow"),
    "records_per_page 0": ({56: u32(0)}, "sizes do not follow"),
    "pages_per_record": ({60: u32(2)}, "sizes do not follow"),
    "n_pages": ({64: u64(3)}, "sizes do not follow"),
    "n_pages huge": ({64: u64(2**63)}, "sizes do not follow"),
    "pages_at": ({72: u64(0)}, "sizes do not follow"),
    "checksums_at": ({80: u64(2 * PAGE)}, "sizes do not follow"),
    "another identity": ({96: bytes(32)}, "is marked with identity 000000000000, but its facts have"),
    "json_bytes too many": ({128: u32(2**32 - 1)}, "damaged"),
    "json_bytes beyond the header": ({128: u32(5000)}, "damaged"),
    "json_bytes cut": ({128: u32(20)}, "header that cannot be"),
    "reserved": ({132: u32(1)}, "sizes do not follow"),
    "no JSON": ({136: b"\xff\xfe"}, "header that cannot be"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_before_anything_is_allocated(name, small, tmp_path):
    changes, message = HOSTILE[name]
    path = tmp_path / "t"
    path.write_bytes(forged(small[0], changes))
    # whole and as a sparse file of any length that the header may ask for
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for length in (len(small[0]), 2**40):
        os.truncate(path, length)
        with pytest.raises((CheckpointError, IdentityError), match=message):
            read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert time.perf_counter() - started < 5
    os.truncate(path, len(small[0]))
    require_refused_or_right(path, small[1])


@pytest.mark.parametrize("header_bytes", [0, 8, 136, 4095, 4097, 8192, 2**31, 2**32 - 1])
def test_hostile_header_lengths(header_bytes, small, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(small[0][:12] + u32(header_bytes) + small[0][16:])
    with pytest.raises(CheckpointError, match="damaged"):
        read_header(path)


def header_with(text: bytes) -> bytes:
    """The header of a table of 20 rows, with this for its JSON."""
    header_bytes = -(-(136 + len(text) + 8) // PAGE) * PAGE
    start = bytearray(Header(n_rows=20, width=128, codec="bf16").to_bytes()[:136])
    start[12:16], start[128:132] = u32(header_bytes), u32(len(text))
    start[72:88] = u64(header_bytes) + u64(header_bytes + 2 * PAGE)
    return forged(bytes(start) + text.ljust(header_bytes - 136, b"\0"), {})


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"3",
        b'"identity made_by note"',
        b'{"identity": null, "made_by": ""}',
        b'{"identity": null, "made_by": 3, "note": ""}',
        b'{"identity": "all", "made_by": "", "note": ""}',
        b"[" * 200_000,
        b'{"identity": ' + b'{"a":' * 100_000,
        '{"identity": null, "made_by": "", "note": ""}'.encode("utf-16"),
        b'{"identity": null, "made_by": "\xe4", "note": ""}',
    ],
    ids=range(10),
)
def test_hostile_json_is_refused(text, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(header_with(text))
    with pytest.raises(CheckpointError, match="header that cannot be"):
        read_header(path)


def test_features_a_reader_may_ignore_are_ignored(small, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(forged(small[0], {24: u64(2**63 | 1)}))
    assert verify(path).n_rows == 20
    assert np.array_equal(rows_at(path, small[1]), small[1])


def test_json_may_be_spaced_otherwise_and_say_more(small, tmp_path):
    """A writer in another language need not know how Python spaces JSON."""
    path, data = tmp_path / "t", small[0]
    text = json.dumps(
        {"note": "größer", "license": "x", "made_by": "other", "identity": FACTS},
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    head = forged(data, {128: u32(len(text)), 136: text.ljust(600, b"\0")})
    path.write_bytes(head)
    header = verify(path)
    assert (header.note, header.made_by, header.identity) == ("größer", "other", FACTS)
    assert np.array_equal(rows_at(path, small[1]), small[1])
    assert header.to_bytes() == head[: header.pages_at]
    # what is said anew is written anew
    assert read_from(replace(header, note="", identity=None), tmp_path).identity is None


def read_from(header: Header, directory: Path) -> Header:
    path = directory / "again"
    path.write_bytes(header.to_bytes())
    os.truncate(path, header.file_bytes)
    return read_header(path)


def test_random_forgeries_never_give_a_wrong_row_or_another_exception(small, tmp_path):
    path, rng = tmp_path / "t", np.random.default_rng(0)
    for _ in range(120):
        at = int(rng.integers(8, 136))
        value = rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
        path.write_bytes(forged(small[0], {at: value}))
        require_refused_or_right(path, small[1])


# ---- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rows": 0}, "got 0 of 64"),
        ({"width": 0}, "got 5 of 0"),
        ({"codec": "int4"}, "Unknown codec 'int4'"),
        ({"width": 33, "codec": "fp8_e4m3_e8m0"}, "multiple of 32"),
        ({"scale": 0.0, "codec": "fp8_e4m3"}, "scale is 0.0"),
        ({"scale": 1e-60, "codec": "fp8_e4m3"}, "scale is 0.0; it must be a float32"),
        ({"scale": 1e60, "codec": "fp8_e4m3"}, "scale is inf"),
        ({"scale": 0.5}, "scale is 0.5 without effect"),
        ({"n_rows": 2**48, "width": 2**24}, "more than a file holds"),
        ({"identity": ["layer", 1]}, "must be a dict"),
        ({"note": "x" * 2**24}, "have 16,777,2.. bytes; at most 16,777,216"),
    ],
)
def test_tables_that_cannot_be_are_refused_before_a_file_is_made(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TableWriter(tmp_path / "t", **{"n_rows": 5, "width": 64, "codec": "fp32"} | options)
    assert list(tmp_path.iterdir()) == []


def test_records_of_another_kind_are_refused(tmp_path):
    with TableWriter(tmp_path / "t", n_rows=5, width=4, codec="fp32") as writer:
        for wrong in (np.zeros((2, 4), np.float32), np.zeros((2, 15), np.uint8), np.zeros(16, np.uint8)):
            with pytest.raises(ConfigError, match=r"takes records of uint8 \[N, 16\]; got"):
                writer.add(wrong)
        assert writer.rows_done == 0


def test_too_many_rows_and_missing_rows_are_refused(tmp_path):
    records = some_records(6, 4, "fp32")
    with TableWriter(tmp_path / "t", n_rows=5, width=4, codec="fp32") as writer:
        writer.add(records[:4])
        with pytest.raises(ConfigError, match="has 5 rows; 6 were added"):
            writer.add(records[:2])
        with pytest.raises(ConfigError, match="wants 5 rows; 4 were added"):
            writer.finish()
        # neither refusal changed anything
        writer.add(records[4:5])
        writer.finish()
    assert np.array_equal(rows_at(tmp_path / "t", records[:5]), records[:5])


def test_a_finished_or_closed_writer_says_so(tmp_path):
    records = some_records(5, 4, "fp32")
    with TableWriter(tmp_path / "t", n_rows=5, width=4, codec="fp32") as writer:
        writer.add(records)
        writer.finish()
        for call in (lambda: writer.add(records[:0]), writer.finish):
            with pytest.raises(CheckpointError, match="this writer was closed"):
                call()
        writer.discard()
    assert np.array_equal(rows_at(tmp_path / "t", records), records)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_layouts_that_do_not_cover_every_byte_once_are_refused(tmp_path):
    path = tmp_path / "t"
    write(path, some_records(20, 128, "bf16"), width=128, codec="bf16")
    layout = open_packed(path)
    (segment,) = layout.segments
    fields = {name: getattr(layout, name) for name in ("name", "n_rows", "width", "codec")}

    def halves(first, second):
        return Layout(**fields, segments=(replace(segment, **first), replace(segment, **second)))

    assert halves({"at": 0, "n_bytes": 100}, {"at": 100, "n_bytes": 156}).n_rows == 20
    assert halves({"n_rows": 8}, {"first_row": 8, "n_rows": 12}).n_rows == 20
    with pytest.raises(CheckpointError, match="20 rows of 256 bytes are wanted; the files hold 4,864"):
        Layout(**fields, segments=(replace(segment, n_rows=19),))
    with pytest.raises(CheckpointError, match="in two places, others nowhere"):
        halves({"n_rows": 10}, {"first_row": 9, "n_rows": 10})
    with pytest.raises(CheckpointError, match="in two places"):
        halves({"n_bytes": 128}, {"at": 100, "n_bytes": 128})
    with pytest.raises(CheckpointError, match="beyond the table"):
        halves({"n_rows": 10}, {"first_row": 11, "n_rows": 10})
    with pytest.raises(CheckpointError, match="beyond the table"):
        halves({"n_bytes": 128}, {"at": 130, "n_bytes": 128})
    for wrong in ({"offset": -1}, {"n_rows": 0}, {"group": 0}, {"stride": 255}, {"group_stride": 4000}):
        with pytest.raises(CheckpointError, match="rows cannot lie like this"):
            replace(segment, **wrong)
