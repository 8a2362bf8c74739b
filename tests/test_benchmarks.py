"""The core benchmark runs and says what it should; no timing is checked here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench

CORE = Path(__file__).resolve().parent.parent / "benchmarks" / "core.py"


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
    assert [found["tokens"] for found in report["addresses"]] == [8_192, 16_384]
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
