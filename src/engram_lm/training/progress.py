"""How a run is shown while it goes: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Protocol


class Progress(Protocol):
    """What a run tells as it goes."""

    def say(self, line: str) -> None:
        """One line that stays."""

    def begin(self, *, step: int, steps: int, tokens_per_step: int) -> None:
        """Training starts, or goes on, after `step` of `steps`."""

    def advance(self, step: int, *, loss: float | None) -> None:
        """`step` steps are done; `loss` where it was just measured."""

    def end(self) -> None:
        """Training is over, however it went."""


class Quiet:
    """Tells nothing: for library calls and tests."""

    def say(self, line: str) -> None: ...

    def begin(self, *, step: int, steps: int, tokens_per_step: int) -> None: ...

    def advance(self, step: int, *, loss: float | None) -> None: ...

    def end(self) -> None: ...


class Lines:
    """A line now and then, no more often than every `every_s` seconds."""

    def __init__(self, *, every_s: float = 5.0, stream: Any = None) -> None:
        self.every_s, self.stream = every_s, stream or sys.stderr

    def say(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()

    def begin(self, *, step: int, steps: int, tokens_per_step: int) -> None:
        self.pace = Pace(step, steps, tokens_per_step)
        self.said = time.perf_counter()

    def advance(self, step: int, *, loss: float | None) -> None:
        now = time.perf_counter()
        if loss is not None and (now - self.said >= self.every_s or step == self.pace.steps):
            self.said = now
            self.say(f"step {step:,}/{self.pace.steps:,}  loss {loss:.3f}  {self.pace.told(step)}")

    def end(self) -> None: ...


class Bar:
    """A tqdm bar on stderr."""

    def say(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

    def begin(self, *, step: int, steps: int, tokens_per_step: int) -> None:
        from tqdm import tqdm

        self.pace = Pace(step, steps, tokens_per_step)
        form = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        self.bar = tqdm(total=steps, initial=step, file=sys.stderr, bar_format=form, dynamic_ncols=True)
        self.loss = ""

    def advance(self, step: int, *, loss: float | None) -> None:
        self.loss = self.loss if loss is None else f"loss {loss:.3f}, "
        self.bar.set_postfix_str(self.loss + self.pace.told(step), refresh=False)
        self.bar.update(step - self.bar.n)

    def end(self) -> None:
        self.bar.close()


class Pace:
    """Tokens a second and the time left, from the steps of this call."""

    def __init__(self, step: int, steps: int, tokens_per_step: int) -> None:
        self.first, self.steps, self.tokens_per_step = step, steps, tokens_per_step
        self.start = time.perf_counter()

    def told(self, step: int) -> str:
        done = step - self.first
        seconds = time.perf_counter() - self.start
        if not done or not seconds:
            return ""
        left = seconds / done * (self.steps - step)
        return f"{done * self.tokens_per_step / seconds:,.0f} tokens/s, {duration(left)} left"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shown_progress() -> Progress:
    """A bar where stderr is a terminal of some size, else lines."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return Lines()
    # a terminal without anyone before it, as in containers, is of size 0 and tqdm draws nothing there
    return Bar() if sys.stderr.isatty() and size.columns and size.lines else Lines()
