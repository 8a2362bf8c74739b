"""Hundreds of additions, replacements and deletions with merges beside them: no stale answer, never three times the bytes."""

import json
import subprocess
import sys

import pytest

from places import ROOT

BENCHMARK = ROOT / "benchmarks" / "index_updates.py"


@pytest.mark.slow
def test_documents_that_live_are_answered_from_as_they_are_now(tmp_path):
    out = tmp_path / "updates.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--updates", "700", "--documents", "200", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf8"))
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert found["answers"]["wrong"] == 0
    assert found["answers"]["looked_at"] > 1400
    assert found["bytes"]["most_over_live"] <= 3
    assert found["bytes"]["looks"] >= 700
    assert not found["merge_error"]
    assert {kind: found["change"][kind]["n"] > 50 for kind in ("add", "delete", "replace")} == dict.fromkeys(
        ("add", "delete", "replace"), True
    )
    assert all(row["met"] for row in found["wanted"])
