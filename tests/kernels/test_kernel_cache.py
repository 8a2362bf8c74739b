"""Compiled kernels on disk: found by every later process, never by one whose sources are others."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engram_lm
from engram_lm.compiling.work import PARTS
from engram_lm.kernels import announcing, compiled, disk_cache

PACKAGE = Path(engram_lm.__file__).parent
KERNEL_FILES = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if "from engram_lm.kernels.compiled import kernel" in path.read_text()
)

INNER = "from engram_lm.kernels.compiled import kernel\n\n@kernel\ndef inner(x):\n    return x + 1\n"
OUTER = (
    "from engram_lm.kernels.compiled import kernel\n"
    "from engram_lm.kernels.inner import inner\n\n"
    "@kernel\ndef outer(x):\n    return 10 * inner(x)\n"
)
# prints the answer and how many functions were compiled for it
ASK = """
import sys
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    from engram_lm.kernels.outer import outer
    answer = outer(1)
print(answer, sum(e.is_start for _, e in recorder.buffer if "engram_lm" in e.data["dispatcher"].py_func.__module__))
"""


# ---- a copy of the package with two kernels, one of which calls the other ----------------------------------------------


class Copy:
    """The package's kernels' machinery with `outer` and `inner`, in a directory; `place`: where compiled kernels go."""

    def __init__(self, directory: Path, place: str):
        self.kernels, self.home = directory / "engram_lm" / "kernels", directory / "home"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("NUMBA_CACHE_DIR", "ENGRAM_CACHE")
        } | {"PYTHONPATH": str(directory), "HOME": str(self.home)}
        self.kernels.mkdir(parents=True)
        for name in ("__init__.py", "errors.py", "lazy.py", "durable.py", "cache.py"):
            shutil.copy(PACKAGE / name, self.kernels.parent)
        for name in ("__init__.py", "announcing.py", "compiled.py", "disk_cache.py"):
            shutil.copy(PACKAGE / "kernels" / name, self.kernels)
        self.write(inner=INNER, outer=OUTER)
        self.place = self.kernels / "__pycache__" / "compiled"
        if place == "the user's cache":
            # as where an installed package belongs to somebody else; whoever runs the tests may be allowed everything
            self.place.parent.mkdir()
            self.place.write_text("no directory")
            self.place = self.home / ".cache" / "engram-lm" / "kernels"
        if place == "NUMBA_CACHE_DIR":
            self.place = directory / "numba" / "engram-lm"
            self.environment["NUMBA_CACHE_DIR"] = str(self.place.parent)

    def write(self, **sources: str) -> None:
        for name, source in sources.items():
            (self.kernels / f"{name}.py").write_text(source)

    def start(self, code: str = ASK) -> subprocess.Popen:
        return subprocess.Popen(
            # -B: Python itself would take a source of the same second and size for one that it has compiled
            [sys.executable, "-W", "error", "-B", "-c", code],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def ask(self, code: str = ASK) -> tuple[int, int]:
        """(what outer(1) is, how many kernels had to be compiled) in a new process."""
        return self.told(self.start(code))

    def told(self, process: subprocess.Popen) -> tuple[int, int]:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        answer, n_compiled = out.split()
        return int(answer), int(n_compiled)

    def files(self) -> list[Path]:
        return sorted(self.place.rglob("*.kernel"))


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("beside the sources", marks=pytest.mark.slow),
        "the user's cache",
        pytest.param("NUMBA_CACHE_DIR", marks=pytest.mark.slow),
    ],
)
def test_a_kernel_is_compiled_once_and_again_when_one_that_it_calls_has_changed(place, tmp_path):
    copy = Copy(tmp_path, place)
    assert copy.ask() == (20, 2)
    assert [path.name.partition("-")[0] for path in copy.files()] == ["inner", "outer"]
    copy.write(inner=INNER.replace("x + 1", "x + 5"))
    assert copy.ask() == (60, 2)
    # what was compiled of the first sources is there still, as where two versions share a user's cache
    copy.write(inner=INNER)
    assert copy.ask() == (20, 0)


def test_processes_that_compile_at_once_and_one_that_is_killed_leave_whole_files(tmp_path):
    copy = Copy(tmp_path, "NUMBA_CACHE_DIR")
    killed = f"import os\nos.replace = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})\n" + ASK
    # alone: another process that was quicker would leave it nothing to compile and to be killed at
    process = copy.start(killed)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert copy.files() == []
    assert [copy.told(process)[0] for process in [copy.start(), copy.start()]] == [20, 20]
    assert copy.ask() == (20, 0)
    assert len(copy.files()) == 2


# ---- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """fresh(): a kernel that squares, new to this process; kept in `places`, which a test may change."""

    def squared(x):
        return x * x

    squared.__qualname__ = "squared"
    # of the file that this is: its digest, as if it had not changed since
    monkeypatch.setattr(disk_cache, "_digest", lambda file: "0" * 64)
    places = [tmp_path / "first", tmp_path / "second"]
    monkeypatch.setattr(disk_cache, "places", lambda: places)

    def made():
        return compiled.kernel(squared)

    made.places = places
    return made


def hits(kernel) -> int:
    """How many compiled forms were loaded, after it squared 3."""
    assert kernel(3) == 9
    return sum(kernel.stats.cache_hits.values())


def files_in(place: Path) -> list[Path]:
    return sorted(place.rglob("*.kernel"))


def test_a_damaged_file_is_compiled_anew(fresh):
    assert hits(fresh()) == 0
    (file,) = files_in(fresh.places[0])
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        file.write_bytes(damaged)
        assert hits(fresh()) == 0
        assert hits(fresh()) == 1


def test_every_type_of_argument_has_a_file(fresh):
    kernel = fresh()
    assert (kernel(3), kernel(1.5)) == (9, 2.25)
    files = files_in(fresh.places[0])
    assert len(files) == 2
    # others than who compiled them may read them
    assert [file.stat().st_mode & 0o777 for file in files] == [0o644] * 2
    again = fresh()
    assert (again(1.5), again(3)) == (2.25, 9)
    assert sum(again.stats.cache_hits.values()) == 2


def test_the_next_place_is_written_to_where_the_first_cannot_be(fresh):
    fresh.places[0].write_text("no directory")
    assert hits(fresh()) == 0
    assert len(files_in(fresh.places[1])) == 1
    assert hits(fresh()) == 1


def test_a_place_that_cannot_be_written_is_read_all_the_same(fresh, monkeypatch):
    """As where root ran "engram-lm compile" when it made a container's image, and somebody else runs it."""
    assert hits(fresh()) == 0
    monkeypatch.setattr(disk_cache, "_write", lambda *_: pytest.fail("written"))
    assert hits(fresh()) == 1


class Heard:
    def __init__(self):
        self.calls = []

    def begins(self):
        self.calls.append("begins")

    def ends(self, *, place):
        self.calls.append(place)


def test_who_listens_is_told_of_what_is_compiled_and_where_it_is_kept(fresh, monkeypatch):
    monkeypatch.setattr(announcing, "listener", Heard())
    fresh()(3)
    fresh()(3)
    assert announcing.listener.calls == ["begins", fresh.places[0]]
    for place in fresh.places:
        shutil.rmtree(place, ignore_errors=True)
        place.write_text("no directory")
    assert hits(fresh()) == hits(fresh()) == 0
    assert announcing.listener.calls[2:] == ["begins", None] * 2


def test_a_user_without_a_home_has_one_place_less(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(disk_cache.config, "CACHE_DIR", "")
    monkeypatch.setenv("ENGRAM_CACHE", "/somewhere")
    assert disk_cache.places()[1] == Path("/somewhere/kernels")
    monkeypatch.delenv("ENGRAM_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    assert [place.name for place in disk_cache.places()] == ["compiled"]


def test_flush_forgets_what_was_compiled(fresh):
    kernel = fresh()
    assert hits(kernel) == 0
    kernel._cache.flush()
    assert files_in(fresh.places[0]) == []


# ---- which sources -----------------------------------------------------------------------------------------------------


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports, as Python's own parser reads it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which the cache does not follow"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "engram_lm":
                place = PACKAGE.joinpath(*name.split(".")[1:])
                found |= {
                    file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()
                }
    return found


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_the_sources_of_a_kernel_are_its_file_and_all_that_it_imports(path):
    wanted, waiting = set(), [path]
    while waiting:
        path_now = waiting.pop()
        if path_now not in wanted:
            wanted.add(path_now)
            waiting += imported(path_now)
    assert set(disk_cache._sources(path)) == wanted


def test_every_kernel_of_the_package_is_made_by_the_one_decorator():
    assert len(KERNEL_FILES) > 15
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "compiled.py":
            assert "njit" not in path.read_text(), path


def test_what_changed_since_this_process_began_is_not_taken_for_what_it_runs(tmp_path):
    path = tmp_path / "late.py"
    path.write_text("")
    os.utime(path, (0, 0))
    assert disk_cache._digest(str(path)) is None
    assert disk_cache._digest(disk_cache.__file__) is not None
    assert disk_cache._digest(str(tmp_path / "missing.py")) is None


def test_versions_and_settings_are_part_of_the_digest(monkeypatch):
    of, file = disk_cache._digest.__wrapped__, disk_cache.__file__
    found = {of(file)}
    for place, name in ((disk_cache.numba, "__version__"), (disk_cache.config, "BOUNDSCHECK")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, "other")
            found.add(of(file))
    assert len(found) == 3


# ---- which directories stay --------------------------------------------------------------------------------------------


def test_the_directories_used_last_are_kept(tmp_path):
    for age in range(6):
        directory = tmp_path / f"kernels.walks-{age}"
        assert disk_cache._write(directory, "f.kernel", b"")
        os.utime(directory, (1e9 - age, 1e9 - age))
    (tmp_path / "kernels.other-0").mkdir()
    assert disk_cache._write(tmp_path / "kernels.walks-new", "f.kernel", b"")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["kernels.other-0", *(f"kernels.walks-{name}" for name in (0, 1, 2, "new"))]


def test_a_directory_that_is_read_counts_as_used(tmp_path):
    long_ago = 1e9
    os.utime(tmp_path, (long_ago, long_ago))
    disk_cache._mark_as_used(tmp_path)
    assert disk_cache._used(tmp_path) > long_ago
    disk_cache._mark_as_used(tmp_path / "missing")


# ---- what may be a kernel ----------------------------------------------------------------------------------------------


def test_kernels_of_one_name_are_refused():
    def made(by):
        def function(x):
            return x + by

        return function

    with pytest.raises(TypeError, match="is made by another function"):
        compiled.kernel(made(1))


def test_a_kernel_with_a_pointer_of_this_process_is_refused():
    large = np.zeros(2_000_000)

    def pointed(i):
        return large[i]

    pointed.__qualname__ = "pointed"
    with pytest.raises(TypeError, match="cannot be kept on disk"):
        compiled.kernel(pointed)(3)


# ---- the package's own kernels in a second process ---------------------------------------------------------------------

WORK = """
import sys, json
from pathlib import Path
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    from engram_lm.compiling import work
    work.PARTS[sys.argv[1]](Path(sys.argv[2]))
print(json.dumps([e.data["dispatcher"].py_func.__qualname__ for _, e in recorder.buffer if e.is_start]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_compiled_in_a_second_process(part, tmp_path):
    """Where the first compiled everything, or loaded what an earlier one did."""
    for attempt in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", WORK, part, str(tmp_path / attempt)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
