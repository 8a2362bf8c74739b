"""How far a long read has come, on stderr: nothing for the first seconds, then one line that is rewritten on a terminal
and a line now and then elsewhere."""

import sys
import time
from typing import Any


def report_to_stderr(line: str) -> None:
    """The default of what reports in lines."""
    sys.stderr.write(line + "\n")


class Progress:
    """report(done, total) with `done` of `total` bytes or rows, as often as one likes; `end()` leaves a clean line."""

    def __init__(self, what: str, *, stream: Any = None, quiet_s: float = 2.0) -> None:
        self.what, self.stream, self.quiet_s = what, stream or sys.stderr, quiet_s
        self.started = self.said = time.monotonic()
        self.first: int | None = None
        self.live = self.stream.isatty()
        self.shown = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if now - self.started < self.quiet_s or now - self.said < (0.2 if self.live else 10.0):
            return
        self.said, self.shown = now, True
        speed = (done - self.first) / (now - self.started)
        left = f", {_told((total - done) / speed)} left" if speed > 0 else ""
        self._write(f"{self.what}: {100 * done / max(total, 1):.0f} %{left}")

    def end(self) -> None:
        """Take the line away."""
        if self.shown and self.live:
            self._write("")
        self.shown = False

    def _write(self, line: str) -> None:
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()


def _told(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min" if whole < 6000 else f"{whole / 3600:.1f} h"
