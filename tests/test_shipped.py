"""Shipped checkpoints read in place: every layout against its definition, hostile files, and transformers' own model."""

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
from engram_lm.errors import CheckpointError, ConfigError, ModelError
from engram_lm.operate.identify import expect
from engram_lm.operate.sources import open_source
from engram_lm.tables import DiskStore, HostStore, names_of, open_shipped
from engram_lm.tables.safetensors import checkpoint_tensors, file_tensors
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
    monkeypatch.setattr("engram_lm.tables.disk.STAGE_BYTES", rows_a_round * 8192)
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
        "from engram_lm.tables import open_shipped\n"
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


# ---- in transformers' own model ---------------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 3, 7, 7, 22, 60, 3, 41], [11, 12, 13, 14, 15, 16, 17, 18, 3]])


def tiny_qwen(**changes):
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [2, 3],
        "ple_embed_dim": 24,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 8,
        "eos_token_id": 3,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "initializer_range": 0.15,
        "split_ngram_parts": 1,
    }
    model = hf.Qwen4ExpForCausalLM(hf.Qwen4ExpTextConfig(**options | changes)).eval()
    for module in model.modules():
        if hasattr(module, "ngram_embedding"):
            # so that the rows are heard: a new conv is zero, and new rows are small
            torch.nn.init.normal_(module.ngram_embedding.weight)
    return model


@pytest.fixture(scope="module", params=[1, 12], ids=["one tensor", "twelve shards"])
def checkpoint(request, tmp_path_factory):
    """A random Qwen4-Exp as transformers saves it, and its logits."""
    torch.manual_seed(1)
    model = tiny_qwen(split_ngram_parts=request.param)
    directory = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(directory, max_shard_size="60KB")
    with torch.no_grad():
        return directory, model(IDS).logits, model.generate(IDS, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("rows", ["disk", "host"])
def test_logits_do_not_change(checkpoint, rows):
    from engram_lm import load_shipped

    directory, logits, generated = checkpoint
    model = load_shipped(directory, rows=rows).eval()
    assert not any("ngram_embedding" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), generated)
        # and the rows are what makes them: another row, other logits
        store = model.model.layers[1].ple.ple_embedding.ngram_embedding.store
        gather = store.gather
        store.gather = lambda *args, **kwargs: gather(*args, **kwargs) + 1
        assert not torch.equal(model(IDS).logits, logits)


def test_logits_do_not_change_in_half_precision(checkpoint):
    from engram_lm import load_shipped

    in_one = len(open_shipped(checkpoint[0])[1].segments) == 1
    dtype = torch.bfloat16 if in_one else torch.float16
    with torch.no_grad():
        wanted = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=dtype)(IDS).logits
        assert torch.equal(load_shipped(checkpoint[0], dtype=dtype)(IDS).logits, wanted)
        cast = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0]).to(dtype)
        assert torch.equal(load_shipped(checkpoint[0]).to(dtype)(IDS).logits, cast(IDS).logits)


def test_a_loaded_model_gives_its_rows_back(checkpoint):
    from engram_lm.attachment.shipped import leave_rows

    directory, logits, _ = checkpoint
    model = leave_rows(hf.AutoModelForCausalLM.from_pretrained(directory), directory)
    assert not any("ngram_embedding" in name for name in model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_loading_leaves_transformers_as_it_was(checkpoint):
    from engram_lm import load_shipped

    load_shipped(checkpoint[0])
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoint[0])
    assert type(model.model.layers[1].ple.ple_embedding.ngram_embedding) is torch.nn.Embedding
    assert not any("ngram" in name for name in type(model)._keys_to_ignore_on_load_unexpected)


def test_an_fp8_table_as_transformers_reads_it(tmp_path):
    """`FP8Embedding`: bfloat16 rows times a bfloat16 scale."""
    from transformers.integrations.finegrained_fp8 import FP8Embedding

    from engram_lm.attachment.shipped import leave_rows

    codes = torch.randn(424, 6).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.0371], dtype=torch.bfloat16)
    model = tiny_qwen(ple_layer_ids=[2]).to(torch.bfloat16)
    embedding = FP8Embedding(424, 6)
    embedding.weight.data, embedding.weight_scale.data = codes, scale
    model.model.layers[1].ple.ple_embedding.ngram_embedding = embedding
    prefix = "model.layers.1.ple.ple_embedding.ngram_embedding"
    tensors = {
        f"{prefix}.weight_scale": ("BF16", scale.view(torch.uint16).numpy()),
        f"{prefix}.weight": ("F8_E4M3", codes.view(torch.uint8).numpy()),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with torch.no_grad():
        wanted = model(IDS).logits
        assert wanted.isfinite().all()
        assert torch.equal(leave_rows(model, tmp_path)(IDS).logits, wanted)


@pytest.mark.parametrize("scale_dtype", ["BF16", "F32"])
def test_an_fp8_checkpoint_as_transformers_loads_it(tmp_path, scale_dtype):
    """One scale a table; in a bfloat16 model transformers rounds a float32 one."""
    from safetensors.torch import load_file

    from engram_lm import load_shipped

    tiny_qwen(split_ngram_parts=4).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors, scale = {}, torch.tensor([0.0123])
    scale = ("F32", scale) if scale_dtype == "F32" else ("BF16", scale.bfloat16().view(torch.uint16))
    names = {torch.bfloat16: "BF16", torch.int64: "I64", torch.float32: "F32"}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if "ngram_embedding" in name:
            codes = (tensor.float() * 80).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name] = ("F8_E4M3", codes.view(torch.uint8))
            tensors[name.split("shard_")[0] + "weight_scale"] = scale
        else:
            is_bf16 = tensor.dtype == torch.bfloat16
            tensors[name] = (names[tensor.dtype], tensor.view(torch.uint16) if is_bf16 else tensor)
    tensors = {name: (dtype, tensor.numpy()) for name, (dtype, tensor) in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    kept = ["proj", "lm_head", "mlp", "linear_attn", "self_attn", "hyper"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "modules_to_convert": ["ngram_embedding"],
        "modules_to_not_convert": kept,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded.model.layers[1].ple.ple_embedding.ngram_embedding).__name__ == "FP8Embedding"
    with torch.no_grad():
        wanted = loaded(IDS).logits
        assert torch.equal(load_shipped(tmp_path, dtype=torch.bfloat16)(IDS).logits, wanted)
        assert torch.equal(load_shipped(tmp_path, rows="host", dtype=torch.bfloat16)(IDS).logits, wanted)


def test_what_cannot_be_done_with_rows_in_files(checkpoint, tmp_path):
    import pickle

    from engram_lm import load_shipped
    from engram_lm.attachment.shipped import leave_rows

    model = load_shipped(checkpoint[0])
    with pytest.raises(CheckpointError, match="saving it would lose them"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        pickle.dumps(model.model.layers[1].ple.ple_embedding.ngram_embedding)
    with pytest.raises(ConfigError, match="wanted 'disk', 'host'"):
        load_shipped(checkpoint[0], rows="gpu")
    other = tiny_qwen(ngram_vocab_size_base=103)
    with pytest.raises(CheckpointError, match="rows of 6 numbers; the model wants"):
        leave_rows(other, checkpoint[0])
    with pytest.raises(CheckpointError, match="has tables for layers 1, 2"):
        leave_rows(tiny_qwen(ple_layer_ids=[1]), checkpoint[0])
    hf.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a llama"):
        load_shipped(tmp_path)


def test_constants_in_the_checkpoint_are_those_of_its_config(checkpoint):
    from engram_lm.operate.doctor import examine

    report = examine(open_source(checkpoint[0]), sample=None)
    assert report.wrong == []
    told = [f.text for f in report.findings if f.check == "constants"]
    assert told == ["multipliers, offsets, moduli in the checkpoint are those of config.json"] * 2
