"""The benchmarks run and say what they should; no timing is checked here."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from places import ROOT

pytestmark = pytest.mark.bench

BENCHMARKS = ROOT / "benchmarks"
CORE, OFFLOAD = BENCHMARKS / "core.py", BENCHMARKS / "offload_gpu.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "core.json"
    environment = {name: value for name, value in os.environ.items() if name != "ENGRAM_PEFT_PYTHON"}
    done = subprocess.run(
        [sys.executable, str(CORE), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(out.read_text(encoding="utf8"))
    assert "ENGRAM_PEFT_PYTHON" in done.stdout
    return json.loads(out.read_text(encoding="utf8"))


def test_circumstances_stand_beside_the_numbers(report):
    for key in (
        "cpu",
        "cores",
        "memory_bytes",
        "commit",
        "dirty",
        "date",
        "versions",
        "load_average",
        "threads",
    ):
        assert key in report


def test_every_measurement_is_there(report):
    assert [found["tokens"] for found in report["addresses"]] == [2_048, 8_192, 16_384]
    assert {"zipf", "text"} == set(report["layer"])
    assert {"forward", "decode_step", "training_step", "layer_alone"} <= set(report["llama"])


def test_without_a_peer_its_numbers_are_null(report):
    assert report["peer"] is None
    of_peer = [row for row in report["wanted"] if "peer" in row["what"]]
    assert len(of_peer) == 9
    assert all(row["value"] is None and row["met"] is None for row in of_peer)


def test_cached_decoding_is_the_full_forward(report):
    step = report["llama"]["decode_step"]["zipf"]
    assert step["max_logit_error"] < 1e-4 * max(1.0, step["max_logit"])


# ---- rows in host memory for a model on a GPU -------------------------------------------------------------------------


def offload_gpu(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(OFFLOAD), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def offload():
    done = offload_gpu("--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_offload_states_its_circumstances_and_settings(offload):
    assert {"cpu", "memory_bytes", "commit", "date", "versions", "gpu", "process_memory"} <= set(offload)
    assert {"request_tokens", "batch", "generated", "host_margin_bytes", "shapes"} <= set(offload["settings"])


def test_offload_times_every_arm_and_gives_an_interval(offload):
    (model,) = offload["models"]
    assert set(model["speed"]) == {"none", "host", "host, no prefetch", "device"}
    assert {"host against none", "host, no prefetch against none", "host against device"} <= set(
        model["lost"]
    )
    for share in model["lost"].values():
        assert set(share) == {"all", "prefill", "steps"}
        assert all(each["low"] <= each["share"] <= each["high"] < 1 for each in share.values())


def test_where_rows_lie_changes_no_token_and_memory_does(offload):
    (model,) = offload["models"]
    assert set(model["same_tokens_as_host"].values()) == {True}
    assert not model["same_tokens_as_none"]


def test_the_share_lost_is_of_throughput(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from offload_gpu import lost

    base = np.array([[1.0, 2.0], [1.1, 2.1], [0.9, 1.9]])
    assert lost(base, base) == {"share": 0.0, "low": 0.0, "high": 0.0, "repeats": 3}
    # twice the time is half the throughput
    assert lost(base, 2 * base)["share"] == pytest.approx(0.5)


def test_offload_without_a_gpu_says_so_in_one_line():
    done = offload_gpu(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "needs a CUDA GPU" in line
    assert "--quick" in line
