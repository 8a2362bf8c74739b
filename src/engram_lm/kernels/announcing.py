"""Who is told that kernels are being compiled. A library says nothing; the command line sets a listener (`compiling.line`).

Loading this module loads no numba.

    announcing.listener = CompilingLine()
"""

from pathlib import Path
from typing import Protocol


class Listener(Protocol):
    """Calls come in pairs and nest: compiling a kernel compiles the kernels it calls."""

    def begins(self) -> None:
        """A kernel is about to be compiled."""

    def ends(self, *, place: Path | None) -> None:
        """It is compiled. place: where it is kept, a directory; None where none can be written, so for this process alone."""


listener: Listener | None = None
