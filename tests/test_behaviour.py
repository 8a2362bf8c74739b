"""Commands, models and the server say on small stand-ins what they said before the code was moved: golden/behaviour.json.

What changes on purpose is recorded again: `python tests/support/behaviour.py tests/golden/behaviour.json`, and stands in
CHANGELOG.md.
"""

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastapi")

from behaviour import differences, record  # noqa: E402
from places import GOLDEN  # noqa: E402


@pytest.mark.slow
def test_what_is_said_is_what_was_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    wanted = json.loads((GOLDEN / "behaviour.json").read_text(encoding="utf8"))
    found = json.loads(json.dumps(record(tmp_path / "here")))
    told = list(differences(wanted, found, close=1e-5))
    assert not told, "\n".join(told[:40])


def test_a_difference_is_told():
    old = {"a": [1.0, 2], "b": "took 1.50 nats", "c": {"d": True}}
    assert list(differences(old, old)) == []
    assert list(differences(old, {**old, "a": [1.0 + 1e-7, 2]}, close=1e-5)) == []
    for new, where in (
        ({**old, "a": [1.1, 2]}, ".a[0]"),
        ({**old, "a": [1.0]}, ".a"),
        ({**old, "b": "took 1.60 nats"}, ".b"),
        ({**old, "b": "took 1.50 bits"}, ".b"),
        ({**old, "c": {}}, ".c.d"),
        ({**old, "a": [1.0, 3]}, ".a[1]"),
    ):
        (told,) = differences(old, new, close=1e-5)
        assert told.startswith(where)
