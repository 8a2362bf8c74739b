"""Who is told that kernels are being compiled. A library says nothing; the command line sets a listener (`cli.compiling`).

Loading this module loads no numba.

    announcing.listener = ProgressLine(sys.stderr)
"""

from typing import Protocol


class Listener(Protocol):
    """Calls come in pairs and nest: compiling a kernel compiles the kernels it calls."""

    def begins(self) -> None:
        """A kernel is about to be compiled."""

    def ends(self, *, kept: bool) -> None:
        """It is compiled; kept: the next process will find it on disk."""


listener: Listener | None = None
