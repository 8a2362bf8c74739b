"""Where and when a number was measured: what stands beside every result.

Import it before the first measure: the commit is that of the process's start, as the checkout may move on while it runs.
"""

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engram_lm import __version__


def circumstances() -> dict[str, Any]:
    """Machine, threads, versions, commit and whether tracked files differed from it, date and load.

    commit and dirty are as at the import of this module; None outside a checkout of this package.
    """
    import torch

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"engram-lm": __version__, **{n: _version(n) for n in ("torch", "transformers", "peft")}},
        **_CHECKOUT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def described(files: list[Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of files."""
    found = []
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf8") as lines:
            names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _checkout() -> dict[str, Any]:
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


_CHECKOUT = _checkout()
