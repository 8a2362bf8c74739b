"""Compiled kernels on disk: which sources they were compiled from, and where they lie.

A kernel's directory is named by a digest of its own file and of every file of this package that it imports, directly or
not, with the versions of Python, numba, llvmlite and numpy. So a pull, an upgrade or a second version of the package finds
only what was compiled from the same sources. A file holds one kernel for one signature and one processor:

    PLACE/index.kernels.search-3f9c21d07ab4e655/walk-8d0c5f….kernel   sha256 of the rest, then what numba pickles

It is written beside its place and renamed: processes that compile the same kernel at once write equal files, and one that
is killed leaves none. A file whose sum is wrong is compiled anew. PLACE is `NUMBA_CACHE_DIR`/engram-lm where that is set.
Otherwise kernels are looked for in `__pycache__` beside their sources, then in `cache_directory()`/kernels, and written to
the first of the two that can be written. Of each module the directories used last are kept, KEPT of them.

    dispatcher._cache = DiskCache(function)
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from engram_lm import durable
from engram_lm.cache import cache_directory
from engram_lm.kernels import announcing

KEPT = 4
_PACKAGE = Path(__file__).parents[1]
# "from engram_lm.a.b import c, (d)": a.b, then c and d, each of which may be a file too
_IMPORTS = re.compile(
    r"^[ \t]*(?:from|import)[ \t]+engram_lm\b\.?([\w.]*)(?:[ \t]+import[ \t]+(\([^)]*\)|[^\n]*))?",
    re.MULTILINE,
)
_DAY_S = 86400
# A file that changed after this may not be what this process runs. File systems' clocks tick some milliseconds late.
_LOADED_NS = time.time_ns() - 20_000_000


class DiskCache(_Cache):
    """What numba asks for compiled forms of one function, and gives new ones to."""

    def __init__(self, function):
        self._function = function
        self._module = function.__module__.removeprefix("engram_lm.")
        self._enabled = True

    @property
    def cache_path(self):
        """The directory that is written to if it can be, for numba's statistics."""
        directories = self._directories()
        return str(directories[0]) if directories else None

    def enable(self):
        """Read and write from now on."""
        self._enabled = True

    def disable(self):
        """Neither read nor write from now on."""
        self._enabled = False

    def flush(self):
        """Forget every compiled form of the function."""
        for directory in self._directories():
            for path in directory.glob(f"{self._function.__qualname__}-*.kernel"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def load_overload(self, sig, target_context):
        """The compiled form for a signature, or None, and then numba compiles one."""
        target_context.refresh()
        name = self._file_name(sig, target_context.codegen())
        for directory in self._directories():
            payload = _read(directory / name)
            if payload is not None:
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        if announcing.listener is not None:
            announcing.listener.begins()
        return None

    def save_overload(self, sig, data):
        """Keep what numba compiled for a signature; where nothing can be written, only this process has it."""
        place = self._save(sig, data)
        if announcing.listener is not None:
            announcing.listener.ends(place=place)

    def _save(self, sig, data):
        if data.library.has_dynamic_globals or data.lifted:
            raise TypeError(
                f"Kernel {self._module}.{self._function.__qualname__} holds a pointer or a large array of this process, "
                "so it cannot be kept on disk. Name a C function with types.ExternalFunction; pass the array."
            )
        name, payload = self._file_name(sig, data.codegen), dumps(data._reduce())
        written = (directory.parent for directory in self._directories() if _write(directory, name, payload))
        return next(written, None)

    def _file_name(self, sig, codegen):
        key = hashlib.sha256(repr((sig, codegen.magic_tuple())).encode()).hexdigest()
        return f"{self._function.__qualname__}-{key[:32]}.kernel"

    def _directories(self):
        """Where compiled forms may lie, the best place first; none where it is not known what they would be of."""
        digest = _digest(self._function.__code__.co_filename) if self._enabled else None
        if digest is None:
            return []
        directories = [place / f"{self._module}-{digest[:16]}" for place in places()]
        for directory in directories:
            _mark_as_used(directory)
        return directories


def places():
    """Directories for compiled kernels, the best first."""
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR) / "engram-lm"]
    places = [_PACKAGE / "kernels" / "__pycache__" / "compiled"]
    # a user without a home has none
    with contextlib.suppress(RuntimeError):
        places.append(cache_directory() / "kernels")
    return places


# ---- which sources ------------------------------------------------------------------------------------------------------


@functools.cache
def _digest(file):
    """Of a kernel's file and what it imports; None where these cannot be read, or have changed since they were loaded."""
    try:
        sources = _sources(Path(file))
        changed_ns = max(path.stat().st_ctime_ns for path in sources)
    except OSError:
        return None
    if changed_ns > _LOADED_NS:
        return None
    versions = (sys.implementation.cache_tag, numba.__version__, llvmlite.__version__, np.__version__)
    settings = (config.OPT, config.BOUNDSCHECK, config.DEBUGINFO_DEFAULT)
    names = sorted((os.path.relpath(path, _PACKAGE), content) for path, content in sources.items())
    return hashlib.sha256(repr((versions, settings, names)).encode()).hexdigest()


def _sources(path):
    """{file: content} of a file and of all that it imports of this package."""
    sources, waiting = {}, [path]
    while waiting:
        path = waiting.pop()
        if path not in sources:
            sources[path] = path.read_bytes()
            for module, names in _IMPORTS.findall(sources[path].decode()):
                waiting += _files(module, names)
    return sources


def _files(module, names):
    """The files of this package that "from engram_lm.MODULE import NAMES" reads."""
    place = _PACKAGE.joinpath(*module.split("."))
    places = [place, *(place / name for name in re.findall(r"\w+", names))]
    files = [place.with_suffix(".py") for place in places] + [place / "__init__.py" for place in places]
    return [file for file in files if file.is_file()]


# ---- files --------------------------------------------------------------------------------------------------------------


def _read(path):
    """What was written, or None where it is not there whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(directory, name, payload):
    """Whether it could be written."""
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _remove_old(directory)
        handle, partial = tempfile.mkstemp(dir=directory, prefix=f".{name[:40]}-")
    except OSError:
        return False
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.chmod(partial, 0o644)
        durable.rename(partial, directory / name)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    return True


def _remove_old(directory):
    """Keep the KEPT directories of a module that were used last. Who still reads another compiles anew."""
    module = directory.name.rpartition("-")[0]
    found = [path for path in directory.parent.glob(f"{module}-*") if path != directory]
    for path in sorted(found, key=_used)[: 1 - KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _used(directory):
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0.0


def _mark_as_used(directory):
    """At most once a day, so that a version in use outlives others that were compiled later."""
    if 0.0 < _used(directory) < time.time() - _DAY_S:
        with contextlib.suppress(OSError):
            os.utime(directory)
