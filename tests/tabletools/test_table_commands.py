"""`engram-lm table info|verify|stats|rows|diff|convert` and `engram-lm doctor`, on packed files and checkpoints alike."""

import hashlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import checkpoints
from checkpoints import QWEN, write_safetensors, write_sharded
from engram_lm import cli
from engram_lm.addressing import PROFILES, resolve
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.progress import Progress
from engram_lm.storage import CODECS, HostStore, TableWriter, open_packed, open_shipped, read_header
from engram_lm.storage.safetensors import file_tensors
from engram_lm.storage.store import records_of
from engram_lm.tabletools import convert as conversion
from engram_lm.tabletools.compare import compare, together
from engram_lm.tabletools.convert import to_packed, to_safetensors
from engram_lm.tabletools.measure import measure, row_norms
from engram_lm.tabletools.sources import open_source, sample_rows, sampled, whole

PROFILE = PROFILES["deepseek-v4.1"].replace(orders=(2, 3), heads=2, rows_per_head=97, head_width=64)
LAYERS = {s.layer: s.padded_rows for s in resolve(PROFILE, vocab_size=40, layers=(1, 14), fill_id=2)}


def write_v41(directory, *, layers=None, change=None, seed=0):
    """A V4.1 checkpoint with config.json; `change(tensors)` edits the tensors of both layers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"text_config": checkpoints.v41_config()}))
    tensors = {}
    for layer, n_rows in (layers or LAYERS).items():
        tensors[layer] = checkpoints.v41_tensors(layer, n_rows, seed=seed)
    if change is not None:
        change(tensors)
    return write_sharded(directory, {f"model-{layer}.safetensors": t for layer, t in tensors.items()})


@pytest.fixture(scope="module")
def v41(tmp_path_factory):
    return write_v41(tmp_path_factory.mktemp("v41"))


@pytest.fixture
def run(capsys):
    """Run a command line that must exit with `code`; its JSON where --json was asked for, else its text."""

    def run(*tokens, code=0):
        assert cli.run([str(token) for token in tokens]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        assert captured.err == ""
        return json.loads(captured.out) if "--json" in tokens else captured.out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command line that must be refused in one line, and return the line."""

    def refused(*tokens):
        assert cli.run([str(token) for token in tokens]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("engram-lm: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return refused


def tensor_bytes(path):
    """{name: (dtype, shape, bytes)} of one file."""
    data = path.read_bytes()
    return {
        name: (t.dtype, t.shape, data[t.offset : t.offset + t.n_bytes])
        for name, t in file_tensors(path).items()
    }


def table_of(rows, path, codec="fp32", **options):
    """A packed file of float32 rows."""
    with TableWriter(path, n_rows=len(rows), width=rows.shape[1], codec=codec, **options) as writer:
        writer.add_rows(rows)
        writer.finish()
    return open_packed(path)


# ---- info, verify, rows -----------------------------------------------------------------------------------------------


def test_info_reads_headers_alone(v41, run):
    told = run("table", "info", v41, "--json")
    assert list(told) == ["1", "14"]
    first = told["1"]
    assert (first["n_rows"], first["width"], first["codec"], first["format"]) == (
        408,
        64,
        "fp8_e4m3_e8m0",
        "safetensors",
    )
    assert first["tensor"] == "layers.1.engram.embed.weight"
    assert first["bytes"] == 408 * 66
    assert first["identity"] is None
    assert first["identity_missing"].startswith("no tokenizer.json")
    text = run("table", "info", v41, "--layer", 14)
    assert text.splitlines()[0] == "layer 14"
    assert "480 of 64 numbers" in text
    assert "layer 1\n" not in text


def test_verify_says_which_tables_are_equal(v41, run, tmp_path):
    run("table", "convert", v41, tmp_path / "packed")
    shipped, packed = (run("table", "verify", path, "--json") for path in (v41, tmp_path / "packed"))
    tensors = checkpoints.v41_tensors(1, 408)
    codes, scales = (tensors[f"layers.1.engram.embed.{part}"][1] for part in ("weight", "scale"))
    digest = hashlib.sha256(np.concatenate([codes, scales], axis=1).tobytes()).hexdigest()
    assert shipped["1"] == {"n_rows": 408, "checksums": None, "records_sha256": digest}
    assert packed["1"] == {"n_rows": 408, "checksums": "ok", "records_sha256": digest}
    assert packed["14"]["records_sha256"] == shipped["14"]["records_sha256"] != digest


def test_verify_finds_one_flipped_bit(v41, run, refused, tmp_path):
    path = tmp_path / "t.engram"
    run("table", "convert", v41, path, "--layer", 1)
    header, data = read_header(path), bytearray(path.read_bytes())
    data[header.pages_at + 4096 + 17] ^= 4
    path.write_bytes(data)
    assert "page 1 (rows 62 to 123) is damaged" in refused("table", "verify", path)
    assert "is damaged" in refused("table", "stats", path)
    assert "is damaged" in refused("table", "rows", path, "70")


def test_rows_are_read_where_they_lie(v41, run, refused, tmp_path):
    wanted = checkpoints.numbers_of_v41(checkpoints.v41_tensors(14, 480), 14)
    run("table", "convert", v41, tmp_path / "14.engram", "--layer", 14)
    for path in (v41, tmp_path / "14.engram"):
        told = run("table", "rows", path, "479,3,3", "--layer", 14, "--json")
        assert [row["address"] for row in told] == [479, 3, 3]
        for row in told:
            np.testing.assert_array_equal(row["row"], wanted[row["address"]])
            assert row["norm"] == pytest.approx(np.linalg.norm(wanted[row["address"]]))
    assert run("table", "rows", v41, "3", "--layer", 14).startswith("3: norm ")
    assert "Address 480 at place 1 is outside" in refused("table", "rows", v41, "0,480", "--layer", 14)
    assert "Address -1" in refused("table", "rows", v41, "-1", "--layer", 14)
    assert "has several tables: 1, 14. Name one with --layer" in refused("table", "rows", v41, "0")
    assert "no table for layer 2; it has 1, 14" in refused("table", "rows", v41, "0", "--layer", 2)


# ---- stats ------------------------------------------------------------------------------------------------------------


def test_stats_are_those_of_the_rows(run, tmp_path):
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(3000, 24)) * np.exp(rng.normal(size=(3000, 1)))).astype(np.float32)
    rows[[7, 100, 101, 102, 2999]] = 0
    rows[50, 3], rows[60] = np.nan, np.inf
    rows[70] = 1e30  # its square is beyond float32
    rows[80] = 1e-30  # and this one's is 0
    table_of(rows, tmp_path / "t.engram")
    stats = run("table", "stats", tmp_path / "t.engram", "--json")["t"]
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    good = norms[np.isfinite(norms) & (norms > 0)]
    assert (stats["zero_rows"], stats["first_zero_rows"]) == (5, [7, 100, 101, 102, 2999])
    assert stats["longest_zero_run"] == [100, 3]
    assert (stats["broken_rows"], stats["first_broken_rows"]) == (2, [50, 60])
    assert stats["min_norm"] == pytest.approx(good.min(), rel=1e-5)
    assert stats["max_norm"] == pytest.approx(good.max(), rel=1e-5)
    assert stats["mean_norm"] == pytest.approx(good.mean(), rel=1e-5)
    # bins of 1/64 octave
    assert stats["median_norm"] == pytest.approx(np.median(good), rel=0.0055)
    octaves = np.floor(np.log2(good)).astype(int)
    assert stats["norm_octaves"] == {str(k): int((octaves == k).sum()) for k in np.unique(octaves)}
    assert stats["largest"] == pytest.approx(1e30)
    text = run("table", "stats", tmp_path / "t.engram")
    assert "5, longest run 3 from row 100" in text
    assert "2 rows [50, 60]" in text


def test_stats_count_scales(v41, run):
    stats = run("table", "stats", v41, "--layer", 1, "--json")["1"]
    scales = checkpoints.v41_tensors(1, 408)["layers.1.engram.embed.scale"][1].astype(int) - 127
    assert stats["scale_counts"] == {str(k): int((scales == k).sum()) for k in np.unique(scales)}
    assert stats["nan_scales"] == 0


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
def test_runs_of_zero_rows_cross_the_parts_they_are_read_in(tmp_path, cut):
    rows = np.ones((40, 4), np.float32)
    rows[[0, 1, 5, 6, 7, 8, 9, 20, 39]] = 0
    layout = table_of(rows, tmp_path / "t.engram")
    parts = [
        (row[i : i + cut], record[i : i + cut])
        for row, record in whole(layout)
        for i in range(0, len(row), cut)
    ]
    stats = measure(layout, parts)
    assert stats.longest_zero_run == (5, 5)
    assert stats.zero_rows == 9


def test_a_sample_holds_both_ends_and_says_how_many_it_read(v41, run):
    layout = open_shipped(v41)[14]
    row_U = np.concatenate([row for row, _ in sampled(layout, 50)])
    assert {0, 479} <= set(row_U.tolist())
    assert len(row_U) <= 50
    assert (np.diff(row_U) > 0).all()
    for row, record in sampled(layout, 50):
        everything = HostStore.load(layout).record_RB
        np.testing.assert_array_equal(record, everything[row])
    np.testing.assert_array_equal(sample_rows(5, 50), np.arange(5))
    stats = run("table", "stats", v41, "--layer", 14, "--sample", 50, "--json")["14"]
    assert stats["rows_read"] == len(row_U)
    assert stats["longest_zero_run"] is None


# ---- diff -------------------------------------------------------------------------------------------------------------


def test_diff_names_the_rows(run, tmp_path):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(500, 8)).astype(np.float32)
    other = rows.copy()
    other[17, 2] += 0.5
    other[400] *= 3
    other[401, 0] = np.nan
    largest = float(np.abs(other[400] - rows[400]).max())
    table_of(rows, tmp_path / "a.engram")
    table_of(other, tmp_path / "b.engram")
    assert run("table", "diff", tmp_path / "a.engram", tmp_path / "a.engram").startswith(
        "layer a: 0 of 500 rows"
    )
    told = run("table", "diff", tmp_path / "a.engram", tmp_path / "b.engram", "--json", code=1)["a"]
    assert (told["rows_differing"], told["rows_compared"], told["by"]) == (3, 500, "bytes")
    assert (told["largest"], told["largest_row"]) == (pytest.approx(largest), 400)
    assert told["broken_on_one_side"] == 1
    assert [row["row"] for row in told["first_rows"]] == [17, 400, 401]
    assert told["first_rows"][0]["largest"] == pytest.approx(0.5)
    assert "401: NaN or infinity" in run(
        "table", "diff", tmp_path / "a.engram", tmp_path / "b.engram", code=1
    )


def test_diff_of_codecs_is_by_numbers(run, tmp_path):
    rows = np.float32([[1, 2], [0.1, -3], [np.nan, 0]])
    table_of(rows, tmp_path / "a.engram")
    table_of(rows, tmp_path / "b.engram", codec="bf16")
    told = run("table", "diff", tmp_path / "a.engram", tmp_path / "b.engram", "--json", code=1)["a"]
    assert (told["by"], told["rows_differing"], told["largest_row"]) == ("numbers", 1, 1)
    assert told["largest"] == pytest.approx(abs(float(np.float32(0.1)) - 0.10009765625))


def test_diff_of_different_shapes_is_refused(v41, refused, tmp_path):
    table_of(np.ones((408, 32), np.float32), tmp_path / "a.engram")
    assert "they cannot be compared row by row" in refused(
        "table", "diff", v41, tmp_path / "a.engram", "--layer", 1
    )
    assert "has tables 1, 14;" in refused("table", "diff", v41, tmp_path / "a.engram")


def test_streams_that_are_cut_differently_meet():
    def stream(cuts):
        rows = np.arange(20)
        for start, end in itertools.pairwise(cuts):
            yield rows[start:end], rows[start:end, None].astype(np.uint8)

    met = list(together(stream([0, 3, 20]), stream([0, 1, 10, 11, 20])))
    assert np.concatenate([row for row, _, _ in met]).tolist() == list(range(20))
    for row, a, b in met:
        assert a[:, 0].tolist() == b[:, 0].tolist() == row.tolist()


# ---- convert ----------------------------------------------------------------------------------------------------------


def qwen_file(path, kind, shards):
    bits = checkpoints.qwen_codes(130)
    codes = np.random.default_rng(2).integers(0, 255, (130, 20), dtype=np.uint8) & 0x7E
    dtype, array, scale = {
        "bf16": ("BF16", bits, None),
        "fp32": ("F32", checkpoints.bf16(bits), None),
        "fp8": ("F8_E4M3", codes, ("BF16", np.array([0x3B41], "<u2"))),
        "fp8 scalar": ("F8_E4M3", codes, ("F32", np.array(0.0123, "<f4"))),
        "fp8 half": ("F8_E4M3", codes, ("F16", np.array([0.25], "<f2"))),
    }[kind]
    tensors = {} if scale is None else {f"{QWEN}.weight_scale": scale}
    if shards == 1:
        tensors[f"{QWEN}.weight"] = (dtype, array)
    else:
        step = -(-130 // shards)
        tensors |= {
            f"{QWEN}.shard_{k}.weight": (dtype, array[step * k : step * k + step]) for k in range(shards)
        }
    return write_safetensors(path, tensors)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8", "fp8 scalar", "fp8 half"])
def test_qwen_there_and_back_bit_for_bit(run, tmp_path, kind, shards):
    shipped = qwen_file(tmp_path / "m.safetensors", kind, shards)
    run("table", "convert", shipped, tmp_path / "t.engram")
    run("table", "convert", tmp_path / "t.engram", tmp_path / "back.safetensors")
    assert tensor_bytes(tmp_path / "back.safetensors") == tensor_bytes(shipped)
    # and once more from the copy: the same packed file
    run("table", "convert", tmp_path / "back.safetensors", tmp_path / "again.engram")
    assert (tmp_path / "again.engram").read_bytes() == (tmp_path / "t.engram").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.engram", "back.safetensors", "m.safetensors", "t.engram"]


def test_v41_there_and_back_bit_for_bit(v41, run, tmp_path):
    run("table", "convert", v41, tmp_path / "packed")
    assert sorted(os.listdir(tmp_path / "packed")) == ["layer-1.engram", "layer-14.engram"]
    for layer in (1, 14):
        run("table", "convert", tmp_path / "packed", tmp_path / "back.safetensors", "--layer", layer)
        wanted = tensor_bytes(v41 / f"model-{layer}.safetensors")
        back = tensor_bytes(tmp_path / "back.safetensors")
        assert set(back) == {f"layers.{layer}.engram.embed.{part}" for part in ("weight", "scale")}
        assert all(wanted[name] == back[name] for name in back)


def test_the_safetensors_library_reads_what_is_written(run, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    run(
        "table",
        "convert",
        qwen_file(tmp_path / "m.safetensors", "bf16", 4),
        tmp_path / "one.safetensors",
        "--shards",
        1,
    )
    (name, tensor), *others = library.load_file(tmp_path / "one.safetensors").items()
    assert (name, others, tensor.dtype) == (f"{QWEN}.weight", [], torch.bfloat16)
    np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), checkpoints.qwen_codes(130))


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp8_e4m3_e8m0", "fp8_e4m3"])
def test_recoding_stays_within_its_bound_and_says_so(run, tmp_path, codec):
    rng = np.random.default_rng(7)
    rows = (rng.normal(size=(300, 64)) * np.exp(rng.normal(size=(300, 1)))).astype(np.float32)
    table_of(rows, tmp_path / "a.engram")
    told = run("table", "convert", tmp_path / "a.engram", tmp_path / "b.engram", "--codec", codec, "--json")[
        "a"
    ]
    layout = open_packed(tmp_path / "b.engram")
    decoded = HostStore.load(layout).gather(np.arange(300))
    error = np.abs(decoded.astype(np.float64) - rows)
    assert layout.codec == told["codec"] == codec
    assert (error <= CODECS[codec].error_bound(rows, scale=layout.scale)).all()
    if codec == "fp32":
        assert (told["largest_error"], told["bound"]) == (None, "0")
    else:
        assert told["largest_error"] == error.max() > 0
        assert told["bound"].startswith("2^-")
    if codec == "fp8_e4m3":
        # the least scale that holds the largest number
        assert (
            layout.scale * 448
            >= np.abs(rows).max()
            > np.nextafter(np.float32(layout.scale), np.float32(0)) * 447.9
        )


def test_a_checkpoint_in_another_codec_has_its_familys_names(run, tmp_path):
    shipped = qwen_file(tmp_path / "m.safetensors", "bf16", 4)
    run("table", "convert", shipped, tmp_path / "fp8.engram", "--codec", "fp8_e4m3")
    run("table", "convert", tmp_path / "fp8.engram", tmp_path / "fp8.safetensors", "--shards", 3)
    tensors = tensor_bytes(tmp_path / "fp8.safetensors")
    assert tensors[f"{QWEN}.weight_scale"][:2] == ("F32", (1,))
    assert [tensors[f"{QWEN}.shard_{k}.weight"][:2] for k in range(3)] == [
        ("F8_E4M3", (n, 20)) for n in (44, 44, 42)
    ]
    a, b = open_packed(tmp_path / "fp8.engram"), open_shipped(tmp_path / "fp8.safetensors")[1]
    assert compare(a, b).rows_differing == 0
    assert a.scale == b.scale


def test_a_table_without_names_is_given_one(run, refused, tmp_path):
    table_of(np.ones((9, 32), np.float32), tmp_path / "a.engram", codec="fp8_e4m3_e8m0")
    out = tmp_path / "a.safetensors"
    assert "does not say what its tensor is called. Give --name" in refused(
        "table", "convert", tmp_path / "a.engram", out
    )
    command = ("table", "convert", tmp_path / "a.engram", out, "--name")
    assert "ends in .weight" in refused(*command, "layers.3.engram.embed")
    assert "ships as layers.N.engram.embed.weight" in refused(*command, "x.ngram_embedding.weight")
    run(*command, "layers.3.engram.embed.weight")
    assert list(open_shipped(out)) == [3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["t.txt"], "is neither .engram, .safetensors nor a directory"),
        (["t.engram"], "2 tables do not go into one .engram file"),
        (["t.engram", "--layer", "1", "--scale", "2"], "--scale has no effect on fp8_e4m3_e8m0"),
        (["t.engram", "--layer", "1", "--codec", "fp8_e4m3", "--scale", "-1"], "wanted a number above 0"),
        (["t.engram", "--layer", "1", "--codec", "fp8_e4m3", "--scale", "1e-9"], "Use a scale of at least"),
        (["t.engram", "--layer", "1", "--shards", "2"], "have no effect on packed files"),
        (["t.safetensors", "--layer", "1", "--shards", "2"], "--shards is 2"),
        (["t.safetensors", "--layer", "1", "--codec", "bf16"], "bf16 ships as ….ngram_embedding.weight"),
        (["t.engram", "--layer", "1", "--codec", "fp4"], "fp4"),
    ],
)
def test_conversions_that_cannot_be_are_refused(v41, refused, tmp_path, options, told):
    assert told in refused("table", "convert", v41, tmp_path / options[0], *options[1:])
    assert not list(tmp_path.glob("t.safetensors*"))


def test_numbers_that_are_none_do_not_become_fp8(refused, tmp_path):
    table_of(np.full((3, 32), np.nan, np.float32), tmp_path / "a.engram")
    for codec in ("fp8_e4m3", "fp8_e4m3_e8m0"):
        out = tmp_path / f"{codec}.engram"
        assert "finite" in refused("table", "convert", tmp_path / "a.engram", out, "--codec", codec)
        assert not out.exists()


def test_a_table_is_not_written_over_itself(refused, tmp_path):
    table_of(np.ones((3, 32), np.float32), tmp_path / "a.engram")
    assert "is the table that is read" in refused(
        "table", "convert", tmp_path / "a.engram", tmp_path / "a.engram"
    )


@pytest.fixture
def small_steps(monkeypatch):
    """Conversions go a hundred rows at a time."""

    def in_steps(layout, *, first=0):
        for start in range(first, layout.n_rows, 100):
            yield from records_of(layout, first=start, last=min(start + 100, layout.n_rows))

    monkeypatch.setattr(conversion, "records_of", in_steps)


def stopping_at(row):
    def report(done, total):
        if done >= row:
            raise KeyboardInterrupt

    return report


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("write", [to_packed, to_safetensors])
def test_a_stopped_conversion_goes_on(tmp_path, write):
    rng = np.random.default_rng(1)
    directory = write_v41(tmp_path / "m", layers={1: 900})
    layout = open_shipped(directory)[1]
    out = tmp_path / ("t.engram" if write is to_packed else "t.safetensors")
    write(layout, tmp_path / f"whole-{out.name}")
    with pytest.raises(KeyboardInterrupt):
        write(layout, out, report=stopping_at(500))
    assert not out.exists()
    done = write(layout, out)
    assert 400 <= done.resumed_at <= 500
    assert out.read_bytes() == (tmp_path / f"whole-{out.name}").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"m", out.name, f"whole-{out.name}"}
    # another source, or one that changed, does not go on where this one was
    with pytest.raises(KeyboardInterrupt):
        write(layout, tmp_path / f"two-{out.name}", report=stopping_at(500))
    other = open_shipped(write_v41(tmp_path / "n", layers={1: 900}, seed=int(rng.integers(9, 99))))[1]
    with pytest.raises(CheckpointError, match="begun from another source"):
        write(other, tmp_path / f"two-{out.name}")


@pytest.mark.usefixtures("small_steps")
def test_a_partial_file_that_lost_its_journal_begins_anew(tmp_path):
    layout = open_shipped(write_v41(tmp_path / "m", layers={1: 900}))[1]
    with pytest.raises(KeyboardInterrupt):
        to_safetensors(layout, tmp_path / "t.safetensors", report=stopping_at(500))
    (tmp_path / "t.safetensors.partial.rows").unlink()
    assert to_safetensors(layout, tmp_path / "t.safetensors").resumed_at == 0
    assert compare(layout, open_shipped(tmp_path / "t.safetensors")[1]).rows_differing == 0


def test_one_conversion_of_a_file_at_a_time(tmp_path):
    layout = open_shipped(write_v41(tmp_path / "m", layers={1: 9}))[1]

    def again(done, total):
        with pytest.raises(CheckpointError, match="being written by another process"):
            to_safetensors(layout, tmp_path / "t.safetensors")

    assert to_safetensors(layout, tmp_path / "t.safetensors", report=again).n_rows == 9


def test_a_scale_that_the_dtype_cannot_hold_is_refused(tmp_path):
    layout = open_shipped(qwen_file(tmp_path / "m.safetensors", "fp8", 1))[1]
    with pytest.raises(ConfigError, match="is no BF16; it would change every row"):
        to_safetensors(layout, tmp_path / "t.safetensors", scale=0.0123)


# ---- doctor -----------------------------------------------------------------------------------------------------------


def findings(report, status=None):
    return {(f["layer"], f["check"]): f["text"] for f in report["findings"] if status in (None, f["status"])}


def test_doctor_finds_nothing_wrong_with_a_whole_checkpoint(v41, run):
    report = run("doctor", v41, "--json")
    assert report["wrong"] == 0
    assert (report["profile"], report["profile_from"]) == ("deepseek-v4.1", "config.json")
    told = findings(report, "ok")
    assert told[1, "rows"] == "4 moduli, 97 to 107, sum to 408"
    assert told[14, "rows"] == "4 moduli, 109 to 131, sum to 480"
    assert told[1, "scales"] == "2^-11 to 2^-2, no NaN"
    assert told[1, "holes"] == "none of 408 rows is zero"
    assert report["stats"]["14"]["rows_read"] == 480
    assert run("doctor", v41).splitlines()[-1] == "nothing wrong found"


def edit(layer, part, row, value):
    def change(tensors):
        tensors[layer][f"layers.{layer}.engram.embed.{part}"][1][row] = value

    return change


@pytest.mark.parametrize(
    ("options", "where", "told"),
    [
        (
            {"layers": {1: LAYERS[14], 14: LAYERS[1]}},
            (1, "rows"),
            "That is layer 14's: are the layers swapped?",
        ),
        ({"layers": {1: 408, 14: 479}}, (14, "rows"), "sum to 480; the table has 479."),
        ({"layers": {1: 408}}, (14, "rows"), "and there is no table"),
        ({"layers": LAYERS | {3: 50}}, (3, "rows"), "the model reads memory in layers 1, 14 alone"),
        ({"change": edit(14, "scale", 7, 255)}, (14, "scales"), "2 are NaN"),
        (
            {"change": edit(1, "weight", 9, 0x7F)},
            (1, "numbers"),
            "1 of 408 rows hold NaN or infinity, the first: 9",
        ),
        ({"change": edit(1, "weight", slice(None), 0)}, (1, "holes"), "all of 408 rows are zero"),
    ],
)
def test_doctor_names_what_is_wrong(run, tmp_path, options, where, told):
    report = run("doctor", write_v41(tmp_path, **options), "--json", code=1)
    assert told in findings(report, "wrong")[where]
    assert f"{report['wrong']} wrong" in run("doctor", tmp_path, code=1)


def test_doctor_notes_holes_without_calling_them_wrong(run, tmp_path):
    write_v41(tmp_path, change=edit(14, "weight", slice(100, 140), 0))
    report = run("doctor", tmp_path, "--json")
    assert (
        findings(report, "note")[14, "holes"]
        == "40 of 480 rows are zero; the longest run is 40 rows from 100"
    )


def test_doctor_sees_a_file_that_was_never_written(run, tmp_path):
    write_v41(tmp_path, layers={1: 40_000, 14: 480})
    path = tmp_path / "model-1.safetensors"
    with open(path, "r+b") as file:
        size = path.stat().st_size
        file.truncate(size // 2 // 4096 * 4096)
        file.truncate(size)
    report = run("doctor", tmp_path, "--json", code=1)
    told = [f["text"] for f in report["findings"] if f["check"] == "holes" and "never written" in f["text"]]
    assert len(told) == 1
    assert told[0].startswith("model-1.safetensors was never written at bytes ")


def test_doctor_compares_config_and_constants_with_the_table(run, tmp_path):
    write_v41(tmp_path / "v41")
    config = checkpoints.v41_config() | {"engram_num_embeddings": [408, 481]}
    (tmp_path / "v41" / "config.json").write_text(json.dumps(config))
    report = run("doctor", tmp_path / "v41", "--json", code=1)
    assert findings(report, "wrong")[14, "config"] == "config.json says 481 rows; the table has 480"

    config = {"vocab_size": 50, "ple_layer_ids": [2], "ngram_vocab_size_base": 101, "heads_per_ngram": 2}
    config |= {"eos_token_id": [3, 4], "make_ngram_vocab_size_divisible_by": 8, "ple_embed_dim": 80}
    profile = PROFILES["qwen-ple"].replace(heads=2, rows_per_head=101, row_multiple=8, head_width=20)
    (scheme,) = resolve(profile, vocab_size=50, layers=(1,), eos_ids=(3,))
    base = QWEN.removesuffix("ngram_embedding")
    bits = checkpoints.qwen_codes(scheme.padded_rows)
    bits[scheme.rows :] = 0
    tensors = {
        f"{base}layer_multipliers": ("I64", scheme.multipliers),
        f"{base}ngram_heads_offsets": ("I64", scheme.offsets),
        f"{QWEN}.weight": ("BF16", bits),
    }
    directory = tmp_path / "qwen"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"text_config": config}))
    write_safetensors(directory / "model.safetensors", tensors)
    told = findings(run("doctor", directory, "--json"), "ok")
    assert told[1, "rows"] == "4 moduli, 101 to 109, sum to 420, padded to 424"
    assert told[1, "constants"] == "multipliers, offsets in the checkpoint are those of config.json"
    assert told[1, "padding"] == "4 rows behind the last address, all zero"
    # another seed, and padding that is not zero
    tensors[f"{base}layer_multipliers"] = ("I64", scheme.multipliers + 2)
    bits[-1] = 1
    write_safetensors(directory / "model.safetensors", tensors)
    report = run("doctor", directory, "--json", code=1)
    assert (1, "multipliers") in findings(report, "wrong")
    assert "1 of them not zero" in findings(report, "note")[1, "padding"]


def test_doctor_against_a_released_model(v41, run):
    report = run("doctor", v41, "--profile", "deepseek-v4.1", "--json", code=1)
    wrong = findings(report, "wrong")
    assert wrong[1, "rows"] == "24 moduli, 16,000,057 to 16,000,463, sum to 384,006,168; the table has 408."
    assert wrong[14, "rows"] == "24 moduli, 16,000,477 to 16,000,889, sum to 384,016,682; the table has 480."
    assert wrong[1, "width"] == "64 numbers a row; wanted 256, by the released model's constants"


def test_doctor_says_what_a_release_changed(v41, run, tmp_path):
    new = write_v41(tmp_path / "new", change=edit(14, "weight", [3, 77], 0x38))
    report = run("doctor", v41, new, "--all", "--json")
    assert findings(report, "ok")[1, "releases"] == "the same rows of 408 compared"
    assert findings(report, "note")[14, "releases"].startswith("2 rows differ of 480 compared, by at most ")
    assert [row["row"] for row in report["differences"]["14"]["first_rows"]] == [3, 77]
    # and a packed copy is the same release
    run("table", "convert", v41, tmp_path / "packed")
    report = run("doctor", v41, tmp_path / "packed", "--json")
    assert findings(report, "ok")[14, "releases"] == "the same rows of 480 compared"
    one = write_v41(tmp_path / "one", layers={1: 408})
    assert findings(run("doctor", v41, one, "--json"), "note")[14, "releases"] == f"only in {v41}"


def test_doctor_takes_a_config_that_does_not_fit_as_no_config(run, tmp_path):
    write_v41(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.v41_config() | {"engram_n_heads": "8"}))
    told = findings(run("doctor", tmp_path, "--json"), "note")
    assert "config.json does not fit: engram_n_heads is '8'" in told[None, "profile"]


def test_packed_files_carry_the_identity_that_the_checkpoint_gives(run, tmp_path):
    write_v41(tmp_path / "m")
    checkpoints.write_tokenizer(tmp_path / "m", 40)
    told = run("table", "info", tmp_path / "m", "--json")
    run("table", "convert", tmp_path / "m", tmp_path / "packed")
    packed = run("table", "info", tmp_path / "packed", "--json")
    for layer in ("1", "14"):
        facts = told[layer]["identity_facts"]
        assert facts["layer"] == int(layer)
        assert told[layer]["identity"] == packed[layer]["identity"] is not None
        assert read_header(tmp_path / "packed" / f"layer-{layer}.engram").identity == facts
    told = findings(run("doctor", tmp_path / "packed", "--json"), "ok")
    assert "by the file itself" in told[1, "identity"]
    assert told[14, "rows"] == "4 moduli, 109 to 131, sum to 480; 0 rows of padding"
    # fewer rows than the moduli of its own identity
    facts = read_header(tmp_path / "packed" / "layer-1.engram").identity
    table_of(np.ones((407, 8), np.float32), tmp_path / "short.engram", identity=facts)
    wrong = findings(run("doctor", tmp_path / "short.engram", "--json", code=1), "wrong")
    assert "sum to 408; the table has 407: some addresses are outside" in wrong[1, "rows"]


# ---- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["info"], ["verify"], ["stats"], ["rows", "0"], ["convert", "out.engram"]]
)
def test_what_holds_no_table_is_refused_in_one_line(refused, tmp_path, command):
    name, *rest = command
    rest = [tmp_path / rest[0]] if name == "convert" else rest
    assert "is missing" in refused("table", name, tmp_path / "absent.engram", *rest)
    assert "cannot be read" in refused("table", name, tmp_path / "absent", *rest)
    (tmp_path / "text.safetensors").write_text("once upon a time")
    assert "is no safetensors file" in refused("table", name, tmp_path / "text.safetensors", *rest)
    (tmp_path / "text.engram").write_text("once upon a time")
    assert "is no table file" in refused("table", name, tmp_path / "text.engram", *rest)


def test_doctor_refuses_options_without_effect(v41, refused):
    assert "--sample has no effect with --all" in refused("doctor", v41, "--all", "--sample", 5)
    assert "at least one row; got 0" in refused("table", "stats", v41, "--sample", 0)
    assert "no profile 'x'" in refused("doctor", v41, "--profile", "x")


def runs_without_torch(lines):
    program = (
        "import sys\n"
        "from engram_lm import cli\n"
        "import engram_lm.tabletools.commands\n"
        f"codes = [cli.run(line) for line in {lines!r}]\n"
        "heavy = {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'{codes}, imported {sorted(heavy)}' if heavy or any(codes) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_do_not_import_torch(v41, tmp_path):
    packed = str(tmp_path / "t.engram")
    runs_without_torch(
        [
            ["table", "info", str(v41)],
            ["table", "convert", str(v41), packed, "--layer", "1"],
            ["table", "verify", packed],
            ["table", "diff", str(v41), packed, "--layer", "1"],
        ]
    )


@pytest.mark.slow
def test_commands_that_decode_do_not_import_torch(v41):
    runs_without_torch(
        [["table", "stats", str(v41)], ["table", "rows", str(v41), "3", "--layer", "1"], ["doctor", str(v41)]]
    )


class Screen:
    def __init__(self, live):
        self.live, self.text = live, ""

    def isatty(self):
        return self.live

    def write(self, text):
        self.text += text

    def flush(self): ...


@pytest.mark.parametrize("live", [True, False])
def test_progress_waits_before_it_speaks(monkeypatch, live):
    from engram_lm import progress as module

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    screen = Screen(live)
    progress = Progress("reading layer 1", stream=screen)
    progress(0, 1000)
    clock[0] = 1.9
    progress(100, 1000)
    assert screen.text == ""
    clock[0] = 12.0
    progress(250, 1000)
    assert "reading layer 1: 25 %, 36 s left" in screen.text
    said = len(screen.text)
    clock[0] = 12.1
    progress(260, 1000)
    assert len(screen.text) == said
    progress.end()
    assert screen.text.endswith("\r\x1b[K" if live else "\n")


def test_norms_of_rows_that_float32_squares_lose():
    rows = np.float32([[3, 4], [1e25, 0], [1e-25, 0], [0, 0], [np.nan, 0], [np.inf, 1]])
    with np.errstate(all="raise"):
        norms = row_norms(rows)
    np.testing.assert_allclose(norms[:4], [5, 1e25, 1e-25, 0], rtol=1e-6)
    assert np.isnan(norms[4])
    assert np.isinf(norms[5])


def test_a_directory_of_packed_files_is_a_source(v41, run, tmp_path):
    run("table", "convert", v41, tmp_path)
    source = open_source(tmp_path)
    assert source.packed
    assert list(source.tables) == [1, 14]
    assert source.one(14)[1].n_rows == 480


def test_a_checkpoint_of_the_released_size(run, tmp_path):
    """Both tables at full size, 188.8 GiB, in files that are holes but for a few rows."""
    rows = {1: 384_006_168, 14: 384_016_682}
    for layer, n_rows in rows.items():
        name = f"layers.{layer}.engram.embed"
        header = {
            f"{name}.weight": {"dtype": "F8_E4M3", "shape": [n_rows, 256], "data_offsets": [0, n_rows * 256]},
            f"{name}.scale": {
                "dtype": "F8_E8M0",
                "shape": [n_rows, 8],
                "data_offsets": [n_rows * 256, n_rows * 264],
            },
        }
        path = tmp_path / f"{layer}.safetensors"
        checkpoints.write_raw(path, header, b"")
        start = path.stat().st_size
        try:
            os.truncate(path, start + n_rows * 264)
        except OSError as error:
            pytest.skip(f"no sparse files of this size here: {error}")
        with open(path, "r+b") as file:
            for row, code in ((0, 0x38), (n_rows - 1, 0x40)):
                file.seek(start + row * 256)
                file.write(bytes([code]) * 256)
                file.seek(start + n_rows * 256 + row * 8)
                file.write(bytes([128]) * 8)
    told = run("table", "info", tmp_path, "--json")
    assert sum(table["bytes"] for table in told.values()) / 2**30 == pytest.approx(188.83, abs=0.005)
    last = run("table", "rows", tmp_path, f"{rows[14] - 1},0,7", "--layer", 14, "--json")
    assert [set(row["row"]) for row in last] == [{4.0}, {2.0}, {0.0}]
    report = run("doctor", tmp_path, "--sample", 500, "--json")
    told = findings(report)
    assert report["profile"] == "deepseek-v4.1"
    assert told[14, "rows"] == "24 moduli, 16,000,477 to 16,000,889, sum to 384,016,682"
    assert told[1, "norms"].startswith("32 to 64, ")
    assert any("was never written" in f["text"] for f in report["findings"])
