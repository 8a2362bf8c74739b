"""README's section on what memory does is what the result files say."""

import json
import sys

import pytest

pytest.importorskip("torch")

from engram_lm.errors import DataError
from places import ROOT

EXPERIMENTS = ROOT / "experiments"


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import figures

    yield figures
    del sys.modules["figures"]


def test_readme_says_what_the_files_say(figures, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 0, capsys.readouterr().out


def test_a_changed_number_is_seen_and_a_turned_finding_refused(figures, monkeypatch):
    readme = (figures.ROOT / "README.md").read_text(encoding="utf8")
    real = figures.read

    def changed(bits):
        def read(path):
            found = json.loads(json.dumps(real(path)))
            if path.name.startswith("cpu-memory-"):
                found["asked"]["plain"]["all"]["bits"] = bits
            return found

        return read

    monkeypatch.setattr(figures, "read", changed(44.4))
    assert figures.redrawn(readme) != readme
    assert "44.4" in figures.redrawn(readme)
    monkeypatch.setattr(figures, "read", changed(1.0))
    with pytest.raises(DataError, match="memory learns more than experts"):
        figures.redrawn(readme)


def test_a_missing_section_or_file_is_said(figures, tmp_path):
    with pytest.raises(DataError, match="no section"):
        figures.redrawn("# Something else")
    with pytest.raises(DataError, match="run the experiment"):
        figures.read(tmp_path / "results.json")
