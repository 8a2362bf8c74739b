"""What the endpoints share: the model once it is loaded, the index, the engine, and threads that read and change the index.

service = Service(prepare, limits=Limits())      # prepare(service) sets loaded, shelf, mixed, quiz, examples
service.require_ready()                          # Refusal 503 while it loads
await service.reading(shelf.search, "words", limit=5)
service.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engram_lm.serve.http_errors import LOG, Refusal
from engram_lm.serve.limits import Limits
from engram_lm.serve.model_worker import ModelWorker
from engram_lm.serve.quiz import Quiz

if TYPE_CHECKING:
    from engram_lm.serve.served_index import ServedIndex
    from engram_lm.serve.served_mixture import ServedMixture
    from engram_lm.serve.served_model import ServedModel

_READERS = 2


class Service:
    """prepare: loads everything, on the engine's thread. failed: told where it raises. warm: done there when all is ready and
    before the first request. begun: perf_counter of the command."""

    def __init__(
        self,
        prepare: Callable[[Service], None],
        *,
        limits: Limits | None = None,
        warm: Callable[[Service], None] | None = None,
        failed: Callable[[BaseException], None] | None = None,
        begun: float | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.loaded: ServedModel | None = None
        self.shelf: ServedIndex | None = None
        self.mixed: ServedMixture | None = None
        self.quiz = Quiz([])
        self.examples: dict[str, list[Any]] = {"look": [], "think": [], "ask": []}
        self.started_ms = 0.0
        self._begun = time.perf_counter() if begun is None else begun
        self._ready = False
        self._whole, self._warm = threading.Event(), warm
        self._pending, self._closing, self._changed = 0, False, False
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="engram reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="engram writer")
        self.engine = ModelWorker(
            waiting=self.limits.waiting, prepare=functools.partial(self._prepare, prepare), failed=failed
        )
        self._whole.set()

    def _prepare(self, prepare: Callable[[Service], None]) -> None:
        self._whole.wait()
        prepare(self)
        self._watch_blocks()
        self.started_ms = (time.perf_counter() - self._begun) * 1000
        self._ready = True
        if self._warm is not None:
            self._warm(self)
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._writer.submit(self._look_ahead)

    def _watch_blocks(self) -> None:
        """Let a long forward end between two blocks where nobody waits for it any more."""
        from engram_lm.attachment.structure import find_decoder

        for block in find_decoder(self.loaded.model).blocks:
            block.register_forward_pre_hook(self.engine.check_running)

    @property
    def status(self) -> str:
        return "ready" if self._ready else "loading"

    def require_ready(self) -> ServedModel:
        """The model. Refusal 503 while it loads."""
        if not self._ready:
            raise Refusal(503, "The model is still being loaded; try again in a few seconds.")
        return self.loaded

    def require_shelf(self) -> ServedIndex:
        """The index. Refusal 404 without one."""
        self.require_ready()
        if self.shelf is None:
            raise Refusal(404, "This server has no index; start it with --index DIR.")
        return self.shelf

    async def reading(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a question to the index beside the model's thread."""
        return await self._in(self._readers, functools.partial(call, *args, **kwargs))

    async def changing(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a change of the index, one after the other; small segments are merged when the answer is out."""
        self._changed = True
        found = await self._in(self._writer, functools.partial(call, *args, **kwargs))
        with contextlib.suppress(RuntimeError):  # closed meanwhile: the change is made, merging waits
            self._writer.submit(self._tidy)
        return found

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[[], Any]) -> Any:
        if self._pending >= self.limits.waiting:
            raise Refusal(
                429, f"{self._pending} requests are waiting for the index already; try again in a moment."
            )
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        finally:
            self._pending -= 1

    def _tidy(self) -> None:
        try:
            self.shelf.tidy()
        except Exception as error:  # the next change tries again
            LOG.warning("small segments of the index were not merged: %s", error)

    def _look_ahead(self) -> None:
        """Work out what questions will need of wide intervals, until the first change comes: it does not wait for this."""
        try:
            if self.mixed is not None:
                self.mixed.prepare(going=lambda: not (self._closing or self._changed))
        except Exception as error:  # questions work it out themselves
            LOG.warning("the index was not looked through beforehand: %s", error)

    def facts(self) -> dict[str, Any]:
        """For GET /api/about."""
        from engram_lm import __version__

        loaded = self.require_ready()
        return {
            **loaded.facts(),
            "index": None if self.shelf is None else self.shelf.facts(),
            "gate": None if self.mixed is None else {"name": self.mixed.gate_name},
            "limits": {
                name: getattr(self.limits, name) for name in ("body_bytes", "text_tokens", "new_tokens", "waiting")
            },
            "version": __version__,
            "examples": self.examples,
            "started_ms": self.started_ms,
        }  # fmt: skip

    def close(self) -> None:
        """End what runs and what waits; wait for changes of the index."""
        self._closing = True
        self.engine.close()
        self._readers.shutdown(cancel_futures=True)
        self._writer.shutdown()
        if self.shelf is not None:
            self.shelf.close()
