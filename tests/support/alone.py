"""Code that needs a process of its own: to be killed, to fork with one thread, to measure its memory."""

import os
import subprocess
import sys
from pathlib import Path


def started(code: str, *arguments: object, **options) -> subprocess.Popen:
    """Python with this code, which may import the tests' modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def run_alone(code: str, *arguments: object) -> str:
    """What it prints. AssertionError, with its errors, where it fails."""
    with started(code, *arguments, stderr=subprocess.PIPE) as process:
        out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out
