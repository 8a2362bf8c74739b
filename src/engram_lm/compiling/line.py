"""What the command line says on stderr while it compiles kernels, which happens once on a machine.

One line, when compiling has taken half a second; on a terminal another below it, rewritten and taken away at the end. What
is compiled already is loaded without a word. A program that uses the library sees nothing of this.

    announcing.listener = CompilingLine()          # the command line does
"""

import sys
import time
from pathlib import Path
from typing import Any

QUIET_S = 0.5
_FIRST = "engram-lm: compiling kernels, once for this machine: up to a minute, longer if it is busy ..."
_LOST = (
    "engram-lm: compiled kernels cannot be kept, so every command compiles them again. "
    "Set ENGRAM_CACHE to a directory that can be written."
)


class CompilingLine:
    """A listener (`kernels.announcing`)."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr
        self._depth = self._kernels = 0
        self._began = self._spent_s = 0.0
        self._said: set[str] = set()

    def begins(self) -> None:
        if self._depth == 0:
            self._began = time.monotonic()
        self._depth += 1
        self._show()

    def ends(self, *, place: Path | None) -> None:
        self._kernels += 1
        self._depth -= 1
        self._show()
        if self._depth == 0:
            self._spent_s += time.monotonic() - self._began
            self.clear()
        if place is None:
            self._say_once(_LOST)

    def _show(self) -> None:
        seconds = self._spent_s + time.monotonic() - self._began
        if seconds >= QUIET_S:
            self.show(self._kernels, seconds)

    def show(self, kernels: int, seconds: float) -> None:
        """So many kernels after so many seconds."""
        self._say_once(_FIRST)
        if self._stream.isatty():
            self._write(f"\r\x1b[K{kernels} compiled, {seconds:.0f} s")

    def clear(self) -> None:
        """Take the second line away, for others to write there."""
        if self._stream.isatty():
            self._write("\r\x1b[K")

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.clear()
            self._write(line + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
