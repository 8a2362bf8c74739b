"""Answers that take a while: one JSON answer, or events line by line; and the end of the computation where nobody waits.

return await one_answer(request, engine.submit(work))
return await event_lines(request, engine.submit(work))         # application/x-ndjson
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from engram_lm.serve.http_errors import Cancelled, answer_to
from engram_lm.serve.model_worker import Job

CLIENT_IS_GONE = 499


def json_answer(content: Any, status: int = 200) -> JSONResponse:
    return JSONResponse(content, status_code=status)


def error_answer(error: BaseException) -> JSONResponse:
    """{"error": sentence} with the status that fits."""
    status, sentence = answer_to(error)
    return JSONResponse({"error": sentence}, status_code=status)


async def one_answer(request: Request, job: Job) -> Response:
    """What the job returns. Cancels it where the client goes away."""
    gone = asyncio.ensure_future(_until_gone(request.receive))
    result = asyncio.ensure_future(job.result())
    try:
        await asyncio.wait({gone, result}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            job.cancel()
        return json_answer(await result)
    except Cancelled:
        return Response(status_code=CLIENT_IS_GONE)
    finally:
        job.cancel()
        gone.cancel()
        result.cancel()


async def event_lines(request: Request, job: Job) -> Response:
    """The job's events. An error that comes first is an HTTP answer of its own, a later one an event."""
    gone = asyncio.ensure_future(_until_gone(request.receive))
    events = job.events()
    first = asyncio.ensure_future(anext(events, None))
    try:
        await asyncio.wait({gone, first}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            job.cancel()
        event = await first
    except Cancelled:
        gone.cancel()
        return Response(status_code=CLIENT_IS_GONE)
    except BaseException:
        job.cancel()
        gone.cancel()
        first.cancel()
        raise
    return EventLines(job, event, events, gone)


class EventLines(Response):
    """Lines of JSON as they come."""

    media_type = "application/x-ndjson"

    def __init__(self, job: Job, first: Any, events: AsyncIterator[Any], gone: asyncio.Future) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._job, self._first, self._events, self._gone = job, first, events, gone
        gone.add_done_callback(lambda _: job.cancel())

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def line(event: Any) -> None:
            data = json.dumps(event, ensure_ascii=False, allow_nan=False).encode("utf8") + b"\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                if self._first is not None:
                    await line(self._first)
                    async for event in self._events:
                        await line(event)
            except Cancelled:
                return
            except Exception as error:
                await line({"type": "error", "error": answer_to(error)[1]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client went away while it was written to
            return
        finally:
            self._job.cancel()
            self._gone.cancel()
            with contextlib.suppress(BaseException):
                await self._events.aclose()


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
