"""Codecs: the stated error holds, bytes of others stay theirs, and the kernels give the plain codecs' bits."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.storage import TableWriter, open_packed
from engram_lm.storage.codecs import (
    CODEC_BY_ID,
    CODECS,
    E4M3,
    bf16_bits,
    bf16_values,
    codec_named,
    e4m3_codes,
    e8m0_values,
)
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.kernels.decode import KERNELS
from engram_lm.storage.store import HostStore

TINY = float(np.finfo(np.float32).tiny)
LEAST = 2.0**-149
# Blocks of one size each, from subnormal to the edge of float32, beside any finite number.
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1.0, 1.0, width=32),
    st.sampled_from([0.0, -0.0, LEAST, -LEAST, TINY, -TINY, 448.0, 464.0, 1.0, 2.0**-9, 2.0**-10, 3e38]),
)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit; a NaN is equal to any NaN of its type (its payload is the processor's)."""
    if a.dtype == np.uint16:
        nan_a, nan_b = ((x & 0x7FFF) > 0x7F80 for x in (a, b))
    else:
        nan_a, nan_b = np.isnan(a), np.isnan(b)
        a, b = a.view(np.uint32), b.view(np.uint32)
    return np.array_equal(nan_a, nan_b) and np.array_equal(a[~nan_a], b[~nan_b])


def require_bound(codec, rows, scale: float = 1.0) -> None:
    back = codec.decode(codec.encode(rows, scale=scale), scale=scale)
    assert back.dtype == np.float32
    error = np.abs(back.astype(np.float64) - rows.astype(np.float64))
    assert (error <= codec.error_bound(rows, scale=scale)).all()
    # a sign is kept even where the number becomes zero
    assert np.array_equal(np.signbit(back), np.signbit(rows))


# ---- the stated error ------------------------------------------------------------------------------------------------


@given(st.lists(numbers, min_size=32, max_size=32), st.integers(-150, 128))
@example([0.0] * 32, 0)
@example([-0.0] * 31 + [LEAST], 0)
@example([448.0] * 32, 0)
@example([TINY / 2] * 32, 0)
@settings(max_examples=120)
def test_every_number_comes_back_within_the_bound(values, exponent):
    exact = np.array(values, np.float64)
    largest = np.abs(exact).max()
    if largest > 0:
        # the same numbers at another size
        exact = exact * 2.0 ** (exponent - np.ceil(np.log2(largest)))
    rows = np.clip(exact, -3.29e38, 3.29e38).astype(np.float32).reshape(1, 32)
    for name in ("fp32", "bf16", "fp8_e4m3_e8m0"):
        require_bound(codec_named(name), rows)
    assert np.array_equal(
        CODECS["fp32"].decode(CODECS["fp32"].encode(rows)).view(np.uint32), rows.view(np.uint32)
    )


@given(
    st.lists(st.floats(-448.0, 448.0, width=32), min_size=1, max_size=20),
    st.floats(2.0**-149, 2.0**119, width=32, allow_subnormal=True),
)
@example([5.5 * 2.0**-9, 6.5 * 2.0**-9, 17.0, 19.0], 1.1)
@example([0.3, 100.0], 3 * LEAST)
@settings(max_examples=120)
def test_one_scale_for_all_keeps_its_bound(values, scale):
    rows = (np.array(values) * float(np.float32(scale))).astype(np.float32).reshape(1, -1)
    rows = rows[:, np.abs(rows[0].astype(np.float64)) <= 448 * float(np.float32(scale))]
    require_bound(CODECS["fp8_e4m3"], rows, scale)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_is_reached_so_it_says_something(seed):
    """Within 7 % of the bound on ordinary rows: a looser one would hide a lost bit."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((400, 64)).astype(np.float32)
    for codec in (CODECS["bf16"], CODECS["fp8_e4m3_e8m0"], CODECS["fp8_e4m3"]):
        error = np.abs(codec.decode(codec.encode(rows)).astype(np.float64) - rows)
        assert 0.93 < (error / codec.error_bound(rows)).max() <= 1.0


def test_a_block_scale_is_the_smallest_that_fits():
    codec = CODECS["fp8_e4m3_e8m0"]
    rows = np.zeros((6, 32), np.float32)
    rows[:, 3] = [0, 448, np.nextafter(np.float32(448), np.float32(1000)), 1.75, 2.0**-149, 3.29e38]
    scales = codec.encode(rows)[:, 32].astype(int) - 127
    assert scales.tolist() == [0, 0, 1, -8, -127, 120]


# ---- types of torch ----------------------------------------------------------------------------------------------------


def test_the_fp8_tables_are_torchs():
    codes = np.arange(256, dtype=np.uint8)
    e4m3 = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    e8m0 = torch.from_numpy(codes.copy()).view(torch.float8_e8m0fnu).float().numpy()
    assert same(E4M3, e4m3)
    assert same(e8m0_values(codes), e8m0)


def test_every_code_encodes_to_itself_and_ties_go_to_the_even_one():
    finite = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    assert np.array_equal(e4m3_codes(E4M3[finite].astype(np.float64)), finite)
    positive = E4M3[:127].astype(np.float64)
    between = (positive[1:] + positive[:-1]) / 2
    even = np.where(np.arange(126) % 2 == 0, np.arange(126), np.arange(126) + 1)
    assert np.array_equal(e4m3_codes(between), even)
    assert np.array_equal(e4m3_codes(-between), even + 128)
    assert np.array_equal(e4m3_codes(np.nextafter(between, np.inf)), np.arange(1, 127))
    assert np.array_equal(e4m3_codes(np.nextafter(between, 0)), np.arange(126))


def test_e4m3_codes_are_torchs():
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * np.float32(30)
    values = np.concatenate([values, values * np.float32(2.0**-9), [0.0, -0.0, 448.0, -448.0]]).astype(
        np.float32
    )
    values = np.clip(values, -448, 448)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(e4m3_codes(values.astype(np.float64)), theirs)


def test_bf16_is_torchs():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    edges = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array(
        [0, 0x7FFF, 0x8000, 0x8001], np.uint32
    )
    values = np.concatenate([bits, edges.reshape(-1)]).view(np.float32)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert same(bf16_bits(values), theirs.view(torch.int16).numpy().view(np.uint16))
    codes = np.arange(2**16, dtype=np.uint16)
    assert same(bf16_values(codes), torch.from_numpy(codes).view(torch.bfloat16).float().numpy())


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_e4m3_e8m0", "fp8_e4m3"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fp8_holds_finite_numbers(name, value):
    rows = np.zeros((2, 32), np.float32)
    rows[1, 5] = value
    with pytest.raises(ConfigError, match=f"{name} holds finite numbers; got -?(nan|inf)"):
        codec_named(name).encode(rows)


def test_a_number_beyond_the_scale_is_refused_with_a_scale_that_fits():
    rows = np.array([[1.0, -45.1]], np.float32)
    with pytest.raises(
        ConfigError, match=r"up to 44.8; got 45.1. Use a scale of at least ([\d.e-]+)\."
    ) as caught:
        CODECS["fp8_e4m3"].encode(rows, scale=0.1)
    advised = float(str(caught.value).split()[-1].rstrip("."))
    require_bound(CODECS["fp8_e4m3"], rows, advised)


@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3_e8m0", "fp8_e4m3"])
def test_a_number_that_would_come_back_infinite_is_refused(name):
    scale = 1e36 if name == "fp8_e4m3" else 1.0
    rows = np.full((1, 32), np.finfo(np.float32).max, np.float32)
    with pytest.raises(ConfigError, match=f"{name} (holds numbers up to|would round) 3[.]"):
        codec_named(name).encode(rows, scale=scale)
    rows[:] = 3.29e38
    assert np.isfinite(
        codec_named(name).decode(codec_named(name).encode(rows, scale=scale), scale=scale)
    ).all()


def test_infinities_and_nan_pass_through_bf16():
    rows = np.array([[np.inf, -np.inf, np.nan]], np.float32)
    assert same(CODECS["bf16"].decode(CODECS["bf16"].encode(rows)), rows)


@pytest.mark.parametrize("width", [1, 31, 33, 65])
def test_a_block_codec_wants_whole_blocks(width):
    with pytest.raises(ConfigError, match=f"a multiple of 32 numbers; got {width}"):
        CODECS["fp8_e4m3_e8m0"].record_bytes(width)
    with pytest.raises(ConfigError, match="multiple of 32"):
        CODECS["fp8_e4m3_e8m0"].encode(np.zeros((1, width), np.float32))


def test_names_and_ids_are_those_of_the_format():
    assert {codec.id: codec.name for codec in CODEC_BY_ID.values()} == {
        1: "fp32",
        2: "bf16",
        3: "fp8_e4m3_e8m0",
        4: "fp8_e4m3",
    }
    with pytest.raises(ConfigError, match="Unknown codec 'int4'; this build has fp32, bf16"):
        codec_named("int4")


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_are_no_bytes(name):
    codec, rows = codec_named(name), np.zeros((0, 64), np.float32)
    records = codec.encode(rows)
    assert records.shape == (0, codec.record_bytes(64))
    assert codec.decode(records).shape == (0, 64)
    assert codec.error_bound(rows).shape == (0, 64)


# ---- bytes of others ---------------------------------------------------------------------------------------------------


def every_code_and_scale() -> np.ndarray:
    """Records of 64 numbers: all 256 codes under all 256 scales, NaN codes and NaN scales included."""
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    pairs = [(c, [s, 255 - s]) for s in range(256) for c in codes]
    return np.array([[*c, *s] for c, s in pairs], np.uint8)


@pytest.mark.slow
def test_every_code_and_scale_goes_through_a_file_byte_for_byte(tmp_path):
    records = every_code_and_scale()
    path = tmp_path / "v41.engram"
    with TableWriter(path, n_rows=len(records), width=64, codec="fp8_e4m3_e8m0") as writer:
        writer.add(records)
        writer.finish()
    layout, row_U = open_packed(path), np.arange(len(records))
    for store in (HostStore.load(layout), DiskStore(layout)):
        found = np.zeros_like(records)
        store.read_records(row_U, found)
        assert np.array_equal(found, records)
        assert same(store.gather(row_U), CODECS["fp8_e4m3_e8m0"].decode(records))
        store.close()


def test_decoding_is_torchs_product_of_codes_and_scales():
    records = every_code_and_scale()
    codes = torch.from_numpy(records[:, :64].copy()).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(records[:, 64:].copy()).view(torch.float8_e8m0fnu).float()
    wanted = (codes.reshape(-1, 2, 32) * scales[..., None]).reshape(-1, 64).numpy()
    assert same(CODECS["fp8_e4m3_e8m0"].decode(records), wanted)


# ---- fused kernels -----------------------------------------------------------------------------------------------------


def fused(codec, records, address, width, put, scale=1.0) -> np.ndarray:
    out = np.zeros((len(address), width), {"fp32": np.float32, "bf16": np.uint16}[put])
    kernel = KERNELS.get((codec.name, put))
    if kernel is None:
        row_kernels.gather(records.ctypes.data, address, out.ctypes.data, records.shape[1])
    else:
        kernel(records.ctypes.data, address, out.ctypes.data, width, np.float32(scale))
    return out


def plain(codec, records, address, put, scale=1.0) -> np.ndarray:
    rows = codec.decode(records[address], scale=scale)
    return rows if put == "fp32" else bf16_bits(rows)


@pytest.mark.parametrize("put", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CODECS)
def test_kernels_give_the_plain_codecs_bits(name, put):
    """Random bytes: every code, NaN, infinities and subnormals; widths with and without numbers left over."""
    codec, rng = codec_named(name), np.random.default_rng(0)
    widths = [32, 64, 96, 256] if name == "fp8_e4m3_e8m0" else [1, 2, 5, 31, 32, 33, 64, 95, 257]
    for width in widths:
        records = rng.integers(0, 256, (70, codec.record_bytes(width)), dtype=np.uint8)
        for scale in (1.0, 0.1, 2.0**-140, 1e37) if name == "fp8_e4m3" else (1.0,):
            for address in (
                rng.integers(0, 70, 200),
                np.arange(70),
                np.full(40, 69),
                np.array([0]),
                np.array([], np.int64),
            ):
                address = address.astype(np.int64)
                found = fused(codec, records, address, width, put, scale)
                assert same(found, plain(codec, records, address, put, scale))


@pytest.mark.parametrize("put", ["fp32", "bf16"])
def test_kernels_know_every_code_under_every_scale(put):
    records, codec = every_code_and_scale(), CODECS["fp8_e4m3_e8m0"]
    address = np.arange(len(records))[::-1].copy()
    assert same(fused(codec, records, address, 64, put), plain(codec, records, address, put))


def test_kernels_round_every_float32_to_bf16_as_torch_does():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (300, 96), dtype=np.uint64).astype(np.uint32)
    bits[:100] = (bits[:100] & 0xFFFF0000) | 0x8000
    found = fused(CODECS["fp32"], bits.view(np.uint8), np.arange(300), 96, "bf16")
    theirs = (
        torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    assert same(found, theirs)


@pytest.mark.parametrize("name", CODECS)
def test_kernels_write_their_rows_and_nothing_beside_them(name):
    codec, width = codec_named(name), 96
    records = np.random.default_rng(0).integers(0, 256, (9, codec.record_bytes(width)), dtype=np.uint8)
    for put, dtype in (("fp32", np.uint32), ("bf16", np.uint16)):
        room = np.full((5, width), 0xABCD, dtype)
        target, kernel = room[1:4], KERNELS.get((name, put))
        address = np.array([8, 0, 8])
        if kernel is None:
            row_kernels.gather(records.ctypes.data, address, target.ctypes.data, records.shape[1])
        else:
            kernel(records.ctypes.data, address, target.ctypes.data, width, np.float32(1))
        assert (room[0] == 0xABCD).all()
        assert (room[4] == 0xABCD).all()
        assert np.array_equal(room[1], room[3])
