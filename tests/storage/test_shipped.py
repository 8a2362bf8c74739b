"""Shipped checkpoints read in place: every layout against its definition, hostile files, identities."""

import json
import os
import struct
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import checkpoints
from checkpoints import QWEN, write_raw, write_safetensors, write_sharded, write_tokenizer
from engram_lm.addressing import PROFILES, resolve
from engram_lm.errors import CheckpointError
from engram_lm.storage import DiskStore, HostStore, names_of, open_shipped
from engram_lm.storage.safetensors import checkpoint_tensors, file_tensors
from engram_lm.tabletools.identify import expect
from engram_lm.tabletools.sources import open_source
from engram_lm.vocab import TokenMap


def rows_of(layout):
    """All rows, the same from host memory and from disk."""
    disk = DiskStore(layout)
    address = np.arange(layout.n_rows)
    rows = disk.gather(address)
    disk.close()
    np.testing.assert_array_equal(HostStore.load(layout).gather(address), rows)
    return rows


# ---- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file", "index", "two files"])
def test_v41_rows_are_codes_times_scales(tmp_path, form):
    tensors = {1: checkpoints.v41_tensors(1, 211), 14: checkpoints.v41_tensors(14, 307)}
    path = tmp_path
    if form == "file":
        path = write_safetensors(
            tmp_path / "model.safetensors", tensors[1] | tensors[14], metadata={"format": "pt"}
        )
    elif form == "index":
        codes = "layers.1.engram.embed.weight"
        rest = {name: tensor for name, tensor in tensors[1].items() if name != codes} | tensors[14]
        write_sharded(tmp_path, {"a.safetensors": {codes: tensors[1][codes]}, "b.safetensors": rest})
    else:
        for layer in tensors:
            write_safetensors(tmp_path / f"engram-{layer}.safetensors", tensors[layer])
    tables = open_shipped(path)
    assert list(tables) == [1, 14]
    for layer, layout in tables.items():
        assert (layout.codec, layout.width, layout.identity) == ("fp8_e4m3_e8m0", 64, None)
        np.testing.assert_array_equal(rows_of(layout), checkpoints.numbers_of_v41(tensors[layer], layer))


@pytest.mark.parametrize(("dtype", "codec"), [("BF16", "bf16"), ("F32", "fp32")])
@pytest.mark.parametrize("shards", [1, 12])
def test_qwen_rows(tmp_path, dtype, codec, shards):
    bits = checkpoints.qwen_codes(130)
    values = checkpoints.bf16(bits)
    array = bits if dtype == "BF16" else values
    if shards == 1:
        write_safetensors(tmp_path / "model.safetensors", {f"{QWEN}.weight": (dtype, array)})
    else:
        # sorted by name, so that shard_10 comes before shard_2; over two files; the last is smaller
        named = {f"{QWEN}.shard_{k}.weight": (dtype, array[11 * k : 11 * k + 11]) for k in range(12)}
        ordered = {name: named[name] for name in sorted(named)}
        halves = [dict(list(ordered.items())[:5]), dict(list(ordered.items())[5:])]
        write_sharded(tmp_path, {"m-1.safetensors": halves[0], "m-2.safetensors": halves[1]})
    (layer, layout), *others = open_shipped(tmp_path).items()
    assert (layer, others, layout.codec, layout.n_rows) == (1, [], codec, 130)
    np.testing.assert_array_equal(rows_of(layout), values)
    assert names_of(layout).shards == shards


@pytest.mark.parametrize(
    ("name", "dtype", "scale", "value"),
    [
        ("weight_scale", "BF16", np.array([0x3B41], "<u2"), 0.002944946),
        ("weight_scale", "F32", np.array(0.0123, "<f4"), 0.0123),
        ("weight_scale_inv", "F16", np.array([0.25], "<f2"), 0.25),
    ],
)
def test_qwen_fp8_rows_have_one_scale(tmp_path, name, dtype, scale, value):
    codes = np.arange(256, dtype=np.uint8).repeat(5).reshape(64, 20)
    codes[(codes & 0x7F) == 0x7F] = 0
    tensors = {
        f"{QWEN}.shard_0.weight": ("F8_E4M3", codes[:40]),
        f"{QWEN}.shard_1.weight": ("F8_E4M3", codes[40:]),
        f"{QWEN}.{name}": (dtype, scale),
        f"{QWEN.removesuffix('ngram_embedding')}layer_multipliers": ("I64", np.arange(3)),
    }
    layout = open_shipped(write_safetensors(tmp_path / "m.safetensors", tensors))[1]
    assert layout.codec == "fp8_e4m3"
    assert layout.scale == pytest.approx(value, rel=1e-6)
    # the exact product, rounded once
    np.testing.assert_array_equal(
        rows_of(layout), (checkpoints.e4m3(codes) * layout.scale).astype(np.float32)
    )


def test_shards_that_follow_one_another_are_read_as_one_run(tmp_path):
    bits = checkpoints.qwen_codes(90)
    tensors = {f"{QWEN}.shard_{k}.weight": ("BF16", bits[30 * k : 30 * k + 30]) for k in range(3)}
    layout = open_shipped(write_safetensors(tmp_path / "m.safetensors", tensors))[1]
    assert len(layout.segments) == 1
    swapped = {name: tensors[name] for name in reversed(tensors)}
    apart = open_shipped(write_safetensors(tmp_path / "n.safetensors", swapped))[1]
    assert len(apart.segments) == 3
    np.testing.assert_array_equal(rows_of(apart), rows_of(layout))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("rows_a_round", [1, 3, 50])
def test_one_round_reads_rows_of_many_segments(tmp_path, monkeypatch, direct, rows_a_round):
    monkeypatch.setattr("engram_lm.storage.disk.STAGE_BYTES", rows_a_round * 8192)
    bits = checkpoints.qwen_codes(130)
    files = {
        f"{k}.safetensors": {f"{QWEN}.shard_{k}.weight": ("BF16", bits[11 * k : 11 * k + 11])}
        for k in range(12)
    }
    (tmp_path / "qwen").mkdir()
    store = DiskStore(open_shipped(write_sharded(tmp_path / "qwen", files))[1], direct=direct)
    address = np.array([[129, 0, 64, 11], [10, 129, 22, 121]])
    np.testing.assert_array_equal(store.gather(address), checkpoints.bf16(bits)[address])
    # seven rows in five files; rounds of one row read each by itself
    assert store.reads == {1: 7, 3: 6, 50: 5}[rows_a_round]
    tensors = checkpoints.v41_tensors(1, 300)
    layout = open_shipped(write_safetensors(tmp_path / "m.safetensors", tensors))[1]
    rows = DiskStore(layout, direct=direct).gather(np.arange(300))
    np.testing.assert_array_equal(rows, checkpoints.numbers_of_v41(tensors, 1))
    os.truncate(tmp_path / "qwen" / "10.safetensors", 300)
    with pytest.raises(CheckpointError, match=r"10\.safetensors ends at byte .*cut short while open"):
        store.gather([129, 0, 121, 115])


def test_tables_without_a_block_are_called_by_name(tmp_path):
    bits = checkpoints.qwen_codes(10)
    tensors = {
        "ngram_embedding.weight": ("BF16", bits),
        "mtp.layers.0.x.ngram_embedding.weight": ("BF16", bits),
    }
    tables = open_shipped(write_safetensors(tmp_path / "m.safetensors", tensors))
    assert list(tables) == ["ngram_embedding"]


def test_only_headers_that_matter_are_read(tmp_path):
    write_sharded(
        tmp_path,
        {"a.safetensors": checkpoints.v41_tensors(1, 20), "b.safetensors": {"x": ("F32", np.zeros(3))}},
    )
    (tmp_path / "b.safetensors").unlink()
    assert open_shipped(tmp_path)[1].n_rows == 20
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        checkpoint_tensors(tmp_path)


def test_files_of_the_safetensors_library_are_read_alike(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    values = torch.randn(96, 64)
    tensors = {
        "layers.3.engram.embed.weight": values.to(torch.float8_e4m3fn),
        "layers.3.engram.embed.scale": torch.full((96, 2), 0.25).to(torch.float8_e8m0fnu),
        "layers.5.ple.ple_embedding.ngram_embedding.weight": values.to(torch.bfloat16),
        "other": torch.arange(5),
    }
    library.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tables = open_shipped(tmp_path)
    np.testing.assert_array_equal(
        rows_of(tables[3]), tensors["layers.3.engram.embed.weight"].float().numpy() * np.float32(0.25)
    )
    np.testing.assert_array_equal(rows_of(tables[5]), values.to(torch.bfloat16).float().numpy())


# ---- refused ----------------------------------------------------------------------------------------------------------


def entry(dtype="U8", shape=(4,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"x": entry(span=(0, 5))}, "cut short, or a hostile header"),
        ({"x": entry(span=(4, 0))}, "cut short, or a hostile header"),
        ({"x": entry(span=(-4, 0))}, "is not a tensor's"),
        ({"x": entry(shape=(True, 4))}, "is not a tensor's"),
        ({"x": entry(shape=(4.0,))}, "is not a tensor's"),
        ({"x": entry(shape=(2**63,))}, "is not a tensor's"),
        ({"x": entry(shape=(1,) * 17)}, "is not a tensor's"),
        ({"x": {**entry(), "data_offsets": [0]}}, "is not a tensor's"),
        ({"x": {"dtype": "U8"}}, "is not a tensor's"),
        ({"x": [1, 2]}, "is not a tensor's"),
        ({"x": entry("F32", (4,))}, "takes 16 bytes; its range holds 4"),
        ({"x": entry("U8", (2**31, 2**31))}, "its range holds 4"),
        ({"x": entry(), "y": entry()}, "overlaps the tensor before it"),
        ({"x": entry(shape=(3,), span=(0, 3)), "y": entry(shape=(2,), span=(2, 4))}, "overlaps"),
        ({"x": entry(shape=(2,), span=(2, 4))}, "has a gap before it"),
        ({"x": entry(shape=(3,), span=(0, 3))}, "1 bytes behind its last tensor"),
        ({}, "4 bytes behind its last tensor"),
        (b'{"x":1,"x":2}', "a name twice"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[]", "is no JSON object"),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path, header, told):
    path = tmp_path / "m.safetensors"
    write_raw(path, header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=told):
        file_tensors(path)


@pytest.mark.parametrize(
    "data", [b"", b"\x02", struct.pack("<Q", 2), struct.pack("<Q", 2**63) + b"{}", b"\xff" * 64]
)
def test_lengths_that_cannot_be_are_refused(tmp_path, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        file_tensors(path)


def test_a_header_beyond_the_formats_limit_is_refused_unread(tmp_path):
    path = tmp_path / "m.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a hole: nothing is written
    with pytest.raises(CheckpointError, match="says that its header takes 200,000,000"):
        file_tensors(path)


@hypothesis.given(st.data())
def test_damaged_headers_are_refused_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    write_safetensors(path, checkpoints.v41_tensors(1, 3))
    damaged = bytearray(path.read_bytes())
    n_header = 8 + struct.unpack("<Q", damaged[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, n_header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        tables = open_shipped(path)
    except CheckpointError:
        return
    for layout in tables.values():
        assert all(s.offset >= 0 and s.end <= len(damaged) for s in layout.segments)


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ({"ngram_embedding.weight": "../m.safetensors"}, "wanted a .safetensors file beside it"),
        ({"ngram_embedding.weight": "/m.safetensors"}, "wanted a .safetensors file beside it"),
        ({"ngram_embedding.weight": "m.bin"}, "wanted a .safetensors file beside it"),
        ({"ngram_embedding.weight": 3}, "no weight_map"),
        ({"ngram_embedding.weight": "absent.safetensors"}, "absent.safetensors is missing"),
        ({"ngram_embedding.weight": "m.safetensors"}, "which does not hold it"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, places, told):
    write_safetensors(tmp_path / "m.safetensors", {"x": ("F32", np.zeros(2))})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=told):
        open_shipped(tmp_path)


CODES, SCALES = np.zeros((8, 64), np.uint8), np.full((8, 2), 127, np.uint8)
V41 = {"layers.1.engram.embed.weight": ("F8_E4M3", CODES), "layers.1.engram.embed.scale": ("F8_E8M0", SCALES)}
FP8 = {f"{QWEN}.weight": ("F8_E4M3", CODES)}
ROWS = {f"{QWEN}.shard_{k}.weight": ("BF16", np.zeros((4, 20), "<u2")) for k in range(3)}
ONE = np.ones(1, "<f4")


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(part)}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            V41 | {"layers.1.engram.embed.scale": ("F8_E8M0", SCALES[:7])},
            r"8 rows of 64 codes have F8_E8M0 \[8, 2\]",
        ),
        (V41 | {"layers.1.engram.embed.scale": ("F8_E8M0", SCALES[:, :1])}, r"have F8_E8M0 \[8, 2\]"),
        (V41 | {"layers.1.engram.embed.scale": ("U8", SCALES)}, "scale is U8"),
        (V41 | {"layers.1.engram.embed.weight": ("BF16", CODES)}, "wanted F8_E4M3"),
        (V41 | {"layers.1.engram.embed.weight": ("F8_E4M3", CODES[:, :40])}, "multiple of 32"),
        (
            V41 | {"layers.1.engram.embed.weight": ("F8_E4M3", CODES.reshape(-1))},
            r"wanted F8_E4M3 \[rows, width\]",
        ),
        (V41 | {"layers.1.engram.embed.bias": ("F32", ONE)}, "embed.bias is no tensor of a layout"),
        (without(V41, "scale"), "embed.scale is missing"),
        (without(V41, "weight"), "embed.weight is missing"),
        (without(ROWS, "shard_1.weight"), "shard_1.weight is missing; there are shards to 2"),
        (without(ROWS, "shard_0.weight"), "shard_0.weight is missing"),
        (ROWS | {f"{QWEN}.weight": ("BF16", np.zeros((4, 20)))}, "has its rows twice"),
        (ROWS | {f"{QWEN}.shard_01.weight": ("BF16", np.zeros((4, 20)))}, "a shard under two numbers"),
        (ROWS | {f"{QWEN}.shard_2.weight": ("BF16", np.zeros((4, 21)))}, "is 21 wide"),
        (ROWS | {f"{QWEN}.shard_2.weight": ("F32", np.zeros((4, 20)))}, "wanted BF16"),
        (ROWS | {f"{QWEN}.shard_2.weight": ("BF16", np.zeros((0, 20)))}, r"wanted BF16 \[rows, width\]"),
        (ROWS | {f"{QWEN}.weight_scale": ("F32", ONE)}, "without effect: the rows are BF16"),
        (
            ROWS | {f"{QWEN}.shard_0.weight_packed": ("U8", CODES)},
            "no tensor of a layout that this build knows",
        ),
        (ROWS | {f"{QWEN}.shard_1234567890.weight": ("BF16", CODES)}, "no tensor of a layout"),
        ({f"{QWEN}.weight": ("F16", np.zeros((4, 20)))}, "is F16; this build reads BF16, F32, F8_E4M3"),
        (FP8, "has 0 of weight_scale, weight_scale_inv"),
        (FP8 | {f"{QWEN}.weight_scale": ("F32", ONE), f"{QWEN}.weight_scale_inv": ("F32", ONE)}, "has 2 of"),
        (FP8 | {f"{QWEN}.weight_scale": ("F32", np.ones(8))}, "wanted one number for the table"),
        (FP8 | {f"{QWEN}.weight_scale": ("U8", np.ones(1))}, "wanted one number for the table"),
        (FP8 | {f"{QWEN}.weight_scale": ("F32", np.zeros(1))}, "wanted a number above 0"),
        (FP8 | {f"{QWEN}.weight_scale": ("F32", np.full(1, np.nan))}, "wanted a number above 0"),
        ({"x": ("F32", ONE)}, "holds no table"),
    ],
)
def test_layouts_that_would_be_read_wrong_are_refused(tmp_path, tensors, told):
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=told):
        open_shipped(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", V41)
    with pytest.raises(CheckpointError, match=r"in a\.safetensors and in b\.safetensors"):
        open_shipped(tmp_path)


def test_a_directory_without_files_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors\.index\.json"):
        open_shipped(tmp_path)


def test_opening_needs_neither_torch_nor_safetensors(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", V41)
    program = (
        "import sys\n"
        "from engram_lm.storage import open_shipped\n"
        f"assert open_shipped({str(tmp_path)!r})[1].n_rows == 8\n"
        "heavy = {'torch', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- identity ---------------------------------------------------------------------------------------------------------


def test_identity_of_a_v41_checkpoint(tmp_path):
    config = checkpoints.v41_config(vocab_size=40)
    profile = PROFILES["deepseek-v4.1"].replace(orders=(2, 3), heads=2, rows_per_head=97, head_width=64)
    token_map = TokenMap.from_tokenizer(write_tokenizer(tmp_path, 40))
    schemes = resolve(
        profile,
        vocab_size=40,
        layers=(1, 14),
        fill_id=int(token_map.canonical[2]),
        token_map_hash=token_map.fingerprint,
        tokenizer_fingerprint=token_map.tokenizer_fingerprint,
    )
    for scheme in schemes:
        tensors = checkpoints.v41_tensors(scheme.layer, scheme.padded_rows)
        write_safetensors(tmp_path / f"{scheme.layer}.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    source = open_source(tmp_path)
    expected = expect(tmp_path, source.tables)
    assert expected.why == ""
    assert expected.identities == {scheme.layer: dict(scheme.identity.facts) for scheme in schemes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "engram_compressed_vocab_size": 39}))
    assert "gives 40 ids to hash; the checkpoint was made for 39" in expect(tmp_path, source.tables).why


def test_released_row_counts_name_their_profile_without_a_config(tmp_path):
    tables = {1: type("Rows", (), {"n_rows": 384_006_168}), 14: type("Rows", (), {"n_rows": 384_016_682})}
    expected = expect(tmp_path, tables)
    assert expected.profile == "deepseek-v4.1"
    assert expected.identities == {}
    assert expected.why.startswith("no tokenizer.json")
    assert expect(tmp_path, {1: type("Rows", (), {"n_rows": 320_001_536})}).profile == "qwen-ple"
    unknown = expect(tmp_path, {1: type("Rows", (), {"n_rows": 320_001_446})})
    assert unknown.profile is None
    assert "no released model has these row counts" in unknown.why
