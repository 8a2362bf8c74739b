"""Names of a package that load their module when they are first used, so that importing the package is quick.

_HOME = {"Index": "store"}                       # name -> module of the package
__getattr__, __dir__ = exports(__name__, _HOME)
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exports(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(`__getattr__`, `__dir__`) of a package's module."""

    def load(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return load, lambda: sorted(home)
