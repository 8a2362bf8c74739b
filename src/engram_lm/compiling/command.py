"""`engram-lm compile`: every usual kernel compiled for this machine, the parts of `work` in processes side by side.

compile_kernels()          # Compiled(kernels=142, seconds=31.0, directory='…/kernels'); a second time, kernels=0
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from engram_lm.compiling.line import CompilingLine
from engram_lm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """kernels: how many had to be compiled, and directory: where they are kept, None for none; seconds: by the clock."""

    kernels: int
    seconds: float
    directory: str | None


def compile_command(*, as_json: bool) -> None:
    compiled = compile_kernels()
    if as_json:
        print(json.dumps(asdict(compiled)))
    elif compiled.kernels:
        print(f"compiled {compiled.kernels} kernels in {compiled.seconds:.0f} s, into {compiled.directory}")
    else:
        print("all kernels were compiled before")


def compile_kernels() -> Compiled:
    """Compile what is not compiled yet. ConfigError where it cannot be kept."""
    from engram_lm.compiling.work import PARTS

    started, line = time.monotonic(), CompilingLine()
    places: list[str] = []

    def compiled_one(place: str) -> None:
        places.append(place)
        line.show(len(places), time.monotonic() - started)

    with ThreadPoolExecutor(len(PARTS)) as pool:
        codes = list(pool.map(lambda part: _do(part, compiled_one), PARTS))
    line.clear()
    if any(codes):
        raise RuntimeError("A process that compiles kernels has failed; what it printed stands above.")
    if "" in places:
        raise ConfigError(
            "Compiled kernels cannot be kept: no directory for them can be written. Set ENGRAM_CACHE to one that can."
        )
    return Compiled(
        kernels=len(places), seconds=time.monotonic() - started, directory=places[0] if places else None
    )


def _do(part: str, compiled_one: Callable[[str], None]) -> int:
    """The exit code of a process that does one part of `work`."""
    command = [sys.executable, "-m", "engram_lm.compiling", part]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for place in process.stdout or ():
            compiled_one(place.strip())
    return process.returncode
