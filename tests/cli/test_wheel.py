"""sdist and wheel: what is in them, and that engram-lm works where only the wheel is.

The environment of the last test is new, lies in a path with a blank and has an empty home. Third-party libraries are lent to
it from this one, by their directory alone: pointers in that directory, such as an editable installation's, do not count.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

from places import ROOT

pytest.importorskip("hatchling")
pytestmark = pytest.mark.slow

HANDBOOK = "The office dog of the cooperative is called Orlando Quickpaw and sleeps under the second desk.\n"
ASKED = "The office dog of the cooperative is called"
OURS = ("ENGRAM_", "PYTEST", "PYTHON", "NUMBA_", "XDG_", "HF_HOME", "VIRTUAL_ENV")


def build(source, out, *targets):
    """What hatchling makes of a source tree: as `make dist` does, and as pip does with an sdist."""
    chosen = [option for target in targets for option in ("-t", target)]
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out), *chosen], cwd=source, check=True,
        capture_output=True,
    )  # fmt: skip
    return sorted(out.iterdir())


def held(wheel):
    """sha256 of every file of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel) of this tree."""
    wheel, sdist = build(ROOT, tmp_path_factory.mktemp("dist"), "sdist", "wheel")
    return sdist, wheel


def test_a_wheel_holds_the_whole_package_and_the_sdist_makes_the_same_one(distributions, tmp_path):
    sdist, wheel = distributions
    found = held(wheel)
    package = ROOT / "src" / "engram_lm"
    # kernels that were compiled beside their sources lie in a directory of __pycache__
    passed_over = {"__pycache__", ".nbi", ".nbc"}
    files = [
        path for path in package.rglob("*")
        if path.is_file() and not passed_over & {*path.relative_to(package).parts, path.suffix}
    ]  # fmt: skip
    wanted = {
        str(Path("engram_lm") / path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert {name: digest for name, digest in found.items() if name.startswith("engram_lm/")} == wanted
    for name in (
        "py.typed", "serve/page/index.html", "serve/page/style.css", "mixing/gate-smollm2.json", "demo/documents/quiz.json",
        "demo/memory/memory.json", "demo/memory/ATTRIBUTION.md",
    ):  # fmt: skip
        assert f"engram_lm/{name}" in wanted
    licences = [name.rpartition("/")[2] for name in found if "/licenses/" in name]
    assert sorted(licences) == ["ATTRIBUTION.md", "LICENSE"]
    assert all(name.startswith(("engram_lm/", "engram_lm-")) for name in found)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert held(build(unpacked, tmp_path / "again", "wheel")[0]) == found
    # what the tests read beside the package
    for name in (
        "README.md",
        "Makefile",
        "constraints.txt",
        "docs",
        "benchmarks",
        "experiments",
        "tests/golden",
    ):
        assert (unpacked / name).exists()


class Place:
    """A new environment with the wheel in it, and a command line in an empty home."""

    def __init__(self, root, wheel):
        self.work, home, env = root / "work", root / "home", root / "an environment"
        for directory in (self.work, home):
            directory.mkdir(parents=True)
        self.bin = env / "bin"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(OURS)
        } | {"HOME": str(home), "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}
        settings = Path.home() / ".config" / "pip" / "pip.conf"
        if settings.exists():
            self.environment.setdefault("PIP_CONFIG_FILE", str(settings))
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True, env=self.environment)
        self.run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
        # after the installation: pip would take what is lent for its own
        (packages,) = env.glob("lib/python*/site-packages")
        lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "lent.pth").write_text("".join(f"{path}\n" for path in lent))

    def command(self, program, *options):
        return [str(self.bin / program), *options]

    def run(self, program, *options):
        """What a program of the environment prints. AssertionError with its errors where it fails."""
        done = subprocess.run(
            self.command(program, *options), cwd=self.work, env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{program} {' '.join(options)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def engram_lm(self, *options):
        return self.run("engram-lm", *options)


@pytest.mark.network
def test_everything_works_where_only_the_wheel_is(distributions, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("fastapi")
    place = Place(tmp_path / "a path with blanks", distributions[1])
    imported = place.run(
        "python", "-c", "import sys, engram_lm; print(engram_lm.__file__, *sys.path, sep='\\n')"
    )
    assert Path(imported.splitlines()[0]).is_relative_to(tmp_path)
    assert str(ROOT / "src") not in imported.splitlines()
    said = place.engram_lm("--version")
    assert said == place.run("python", "-m", "engram_lm", "--version")
    assert said.startswith("engram-lm ")

    (place.work / "handbook").mkdir()
    (place.work / "handbook" / "dog.md").write_text(HANDBOOK)
    assert "49,152 token ids" in place.engram_lm("index", "create", "notes", "--model", "smollm2")
    assert "1 document" in place.engram_lm("index", "add", "notes", "handbook")
    assert "dog.md" in place.engram_lm("index", "search", "notes", "office dog")
    assert " Orlando" in place.engram_lm("index", "explain", "notes", ASKED)
    told = place.engram_lm("generate", "smollm2", ASKED, "--index", "notes", "--max-new-tokens", "5")
    assert told.startswith(f"{ASKED} Orlando Quickpaw")

    (place.work / "text.txt").write_text("".join(f"{n}. {HANDBOOK}\n" for n in range(400)))
    small = ["--tokens", "4096", "--sequence-length", "64", "--rows-per-head", "101"]
    told = place.engram_lm("train", "scratch:tiny", "--data", "text.txt", "--out", "a run", *small)
    assert "held-out loss" in told
    assert place.engram_lm("generate", "a run", ASKED, "--max-new-tokens", "3").startswith(ASKED)

    place.engram_lm("serve", "--prepare")
    serves(place)


def serves(place):
    """The page, a file of it and /api/health answer, and it stops when asked."""
    process = subprocess.Popen(
        place.command("engram-lm", "serve", "--port", "0"), cwd=place.work, env=place.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines, address = [], None
        for line in process.stdout:
            lines.append(line)
            if ready := re.search(r"ready: open (http://\S+/)", line):
                address = ready[1]
                break
        assert address, "".join(lines) + process.stderr.read()
        answers = {}
        for path in ("", "static/app.js", "api/health", "api/about"):
            with urllib.request.urlopen(address + path, timeout=60) as answer:
                answers[path] = answer.read().decode()
        assert "<html" in answers[""]
        assert "import" in answers["static/app.js"]
        assert json.loads(answers["api/health"])["status"] == "ready"
        about = json.loads(answers["api/about"])
        assert about["index"]["documents"] > 10
        assert about["tables"]["rows"] > 400_000
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out.splitlines()[-1]) == (0, "stopped"), errors
    finally:
        process.kill()
        process.communicate()
