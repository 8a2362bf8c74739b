"""The sentence about an extra that is not installed: what needs it, and a command that installs it here.

The command names the libraries, as this installation's own metadata lists them, and not "engram-lm[hf]": so it is right
for an installation from a clone, a wheel or an sdist alike, whether or not a package index has engram-lm.

    raise missing("The page needs fastapi and uvicorn", "serve") from error
    # The page needs fastapi and uvicorn, which are not installed (the extra "serve"). Install them: pip install ...
"""

import re
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from engram_lm.errors import MissingExtraError


def missing(what: str, extra: str) -> MissingExtraError:
    """To be raised where a library of an extra cannot be imported. what: "The page needs fastapi and uvicorn"."""
    command = install_command(extra)
    return MissingExtraError(f'{what}, the extra "{extra}" of engram-lm. Install it: {command}')


def install_command(extra: str) -> str:
    """What installs an extra's libraries into this Python's environment."""
    libraries = requirements_of(extra)
    if not libraries:
        return f'install engram-lm, not its source alone, with the extra "{extra}"'
    return " ".join([_pip(), "install", *(f'"{library}"' for library in libraries)])


def requirements_of(extra: str) -> list[str]:
    """An extra's libraries with their versions; empty where engram-lm runs from its source and is not installed."""
    try:
        lines = requires("engram-lm") or []
    except PackageNotFoundError:
        return []
    ours = re.compile(rf"\s*extra\s*==\s*(['\"]){re.escape(extra)}\1\s*")
    pairs = (line.partition(";") for line in lines)
    return [library.strip() for library, _, marker in pairs if ours.fullmatch(marker)]


def _pip() -> str:
    """pip, if that is this Python's own; else Python's name before it: another pip would install elsewhere."""
    found, own = shutil.which("pip"), Path(sys.executable).parent
    if found is not None and Path(found).parent == own:
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"
