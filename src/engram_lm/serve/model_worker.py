"""One thread that owns the model, and the line before it.

Requests come from an event loop; what the model does for them (`work`) runs here, one after the other, and says what happens
through `Job.emit`. A job that is cancelled ends at its next `check`: between tokens, and between the blocks of a forward
where the model was given `ModelWorker.check_running` as a hook.

    engine = Engine(waiting=64, prepare=load)           # on the thread itself, first of all
    job = engine.submit(lambda job: job.emit({"type": "token"}))      # Refusal 429 where too many wait
    async for event in job.events(): ...                              # {"type": "queued", "before": 2}, ...
    value = await job.result()                                        # for one answer instead of events
    engine.close()
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from engram_lm.serve.http_errors import Cancelled, Refusal

STOPPING = "The server is stopping."

Work = Callable[["Job"], Any]


class Job:
    """One request's turn at the model."""

    def __init__(self, engine: "ModelWorker", work: Work) -> None:
        self._engine, self._work = engine, work
        self._loop = asyncio.get_running_loop()
        self._happened: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._why: BaseException | None = None
        self.before = 0

    # ---- for who asked (event loop) -----------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What `work` emitted, and {"type": "queued", "before": n} whenever the number of jobs before this one changes."""
        if self.before:
            yield {"type": "queued", "before": self.before}
        while True:
            kind, value = await self._happened.get()
            if kind == "event":
                yield value
            elif kind == "error":
                raise value
            else:
                return

    async def result(self) -> Any:
        """What `work` returned."""
        while True:
            kind, value = await self._happened.get()
            if kind == "error":
                raise value
            if kind == "done":
                return value

    def cancel(self, why: BaseException | None = None) -> None:
        """End it at its next `check`, or before it begins."""
        self._why = self._why or why or Cancelled()
        self._engine.forget(self)

    # ---- for work (the engine's thread) -------------------------------------------------------------------------------

    def emit(self, event: dict[str, Any]) -> None:
        """Tell who asked; a place to stop, too."""
        self.check()
        self._tell("event", event)

    def check(self) -> None:
        """Raises what it was cancelled with."""
        if self._why is not None:
            raise self._why

    def _tell(self, kind: str, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._happened.put_nowait, (kind, value))

    def run(self) -> None:
        """On the engine's thread."""
        try:
            self.check()
            self._tell("done", self._work(self))
        except BaseException as error:
            self._tell("error", error)
        finally:
            self._work = (
                _nothing  # what it holds (texts, snapshots) goes now, not when the request is forgotten
            )


class ModelWorker:
    """The thread and its line. waiting: jobs in the line at most, the running one not counted. prepare: done first; where it
    raises, the thread ends and `failed` is told."""

    def __init__(
        self,
        *,
        waiting: int,
        prepare: Callable[[], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.most_waiting, self._prepare, self._failed = waiting, prepare, failed
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._turns, name="engram engine", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def waiting(self) -> int:
        return len(self._line)

    def submit(self, work: Work) -> Job:
        """Put a job in the line. Call from an event loop."""
        job = Job(self, work)
        with self._changed:
            if self._closing:
                raise Refusal(503, STOPPING)
            if len(self._line) >= self.most_waiting:
                raise Refusal(
                    429,
                    f"{len(self._line)} requests are waiting for the model already; try again in a moment.",
                )
            job.before = len(self._line) + (self._running is not None)
            self._line.append(job)
            self._changed.notify_all()
        return job

    def check_running(self, *_: Any) -> None:
        """A hook for the model's blocks: stops a forward whose job was cancelled. Other threads pass."""
        job = self._running
        if job is not None and threading.get_ident() == self._thread.ident:
            job.check()

    def forget(self, job: Job) -> None:
        """Take a cancelled job out of the line, if it has not begun."""
        with self._changed:
            if job in self._line:
                self._line.remove(job)
                self._tell_places()
                job.run()  # it only ends

    def close(self, *, seconds: float = 10.0) -> None:
        """End the running job and those that wait, and the thread."""
        with self._changed:
            self._closing = True
            jobs = [*self._line, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for job in jobs:
            job.cancel(Refusal(503, STOPPING))
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def begin_closing(self) -> None:
        """The same without waiting for the thread: for signal handlers."""
        self.close(seconds=0)

    def _tell_places(self) -> None:
        first = int(self._running is not None)
        for place, job in enumerate(self._line):
            if job.before != first + place:
                job.before = first + place
                if job.before:
                    job._tell("event", {"type": "queued", "before": job.before})

    def _turns(self) -> None:
        if self._prepare is not None:
            try:
                self._prepare()
            except BaseException as error:
                self.begin_closing()
                if self._failed is not None:
                    self._failed(error)
                return
        while True:
            with self._changed:
                while not self._line and not self._closing:
                    self._changed.wait()
                if not self._line:
                    return
                job = self._running = self._line.popleft()
                self._tell_places()
            try:
                job.run()
            finally:
                with self._changed:
                    self._running = None
            del job


def _nothing(job: Job) -> None:
    return None
