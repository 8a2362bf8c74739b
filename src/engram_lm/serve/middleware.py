"""Around every request, before anything reads it: names, key, token, size and number; and the headers of every answer.

Pure ASGI: bodies are counted while they are read (a length that is claimed, missing or wrong changes nothing), streams
pass through as they come, and an answer to a request that is refused says why in {"error": sentence}.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from engram_lm.serve.access import TOKEN_HEADER, Access
from engram_lm.serve.http_errors import Refusal, answer_to
from engram_lm.serve.limits import Limits

Scope, Message = dict[str, Any], dict[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action {form}; frame-ancestors 'none'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer browsers send a form with Origin: null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
# what a browser needs before it is logged in
OPEN_PATHS = ("/login", "/static/style.css", "/static/icon.svg")


class Middleware:
    """ASGI middleware; `active` counts the requests that are open."""

    def __init__(self, app: Any, *, access: Access, limits: Limits) -> None:
        self.app, self.access, self.limits = app, access, limits
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
                return
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", ()), *self._headers(scope)]}
            await send(message)

        self.active += 1
        try:
            headers = _read_headers(scope)
            scope = self._check(scope, headers)
            await self.app(scope, self._counted(receive, headers), send_with_headers)
        except Refusal as refusal:
            if started:
                raise
            await refuse(refusal, send_with_headers)
        finally:
            self.active -= 1

    def _headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        form = "'self'" if scope["path"] == "/login" or self.access.key is not None else "'none'"
        given = {**HEADERS, "content-security-policy": POLICY.format(form=form)}
        if not scope["path"].startswith("/static/"):
            given["cache-control"] = "no-store"
        return [(name.encode(), value.encode()) for name, value in given.items()]

    def _check(self, scope: Scope, headers: dict[str, str]) -> Scope:
        """The scope; the login form's where the page is asked for without a key."""
        path, method = scope["path"], scope["method"]
        self.access.check_names(
            host=headers.get("host"), origin=headers.get("origin"), site=_site(headers, method, path)
        )
        if self.active > self.limits.requests:
            raise Refusal(503, f"{self.limits.requests} requests are open already; close some and try again.")
        if method not in ("GET", "POST"):
            raise Refusal(405, f"{method} is not used here; GET and POST are.")
        holds_key = self.access.holds_key(headers.get("authorization"))
        if self.access.key is not None and path not in OPEN_PATHS and not holds_key:
            if not self.access.is_logged_in(headers.get("cookie")):
                if path == "/" and method == "GET":
                    return {**scope, "path": "/login", "raw_path": b"/login"}
                raise Refusal(
                    401,
                    "This server wants a key: log in at /login, or send the header Authorization: Bearer KEY.",
                )
        # a key in a header is sent by no browser on its own, so it stands for the token too
        if method == "POST" and path != "/login" and not holds_key:
            self.access.check_token(headers.get(TOKEN_HEADER))
        return scope

    def _counted(self, receive: Receive, headers: dict[str, str]) -> Receive:
        most, got, late = self.limits.body_bytes, 0, None
        too_large = Refusal(413, f"The request is larger than {_size(most)}, the most that is read here.")
        claimed = headers.get("content-length", "")
        if claimed.isdigit() and int(claimed) > most:
            raise too_large
        done = False

        async def counted() -> Message:
            nonlocal got, done, late
            if done:  # what comes now is the end of the connection
                return await receive()
            loop = asyncio.get_running_loop()
            late = late or loop.time() + self.limits.body_seconds
            try:
                async with asyncio.timeout_at(late):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408, f"The request did not arrive within {self.limits.body_seconds:g} seconds."
                ) from None
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                if got > most:
                    raise too_large
                done = not message.get("more_body", False)
            return message

        return counted


async def refuse(error: BaseException, send: Send) -> None:
    """The answer to what is refused."""
    status, sentence = answer_to(error)
    body = json.dumps({"error": sentence}, ensure_ascii=False).encode("utf8", "replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _read_headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin1").lower()
        if key in found and key in ("host", "origin", "content-length", "authorization", TOKEN_HEADER):
            raise Refusal(400, f"The header {key} stands twice in the request.")
        text = value.decode("latin1")
        found[key] = f"{found[key]}; {text}" if key in found else text
    return found


def _site(headers: dict[str, str], method: str, path: str) -> str | None:
    """Sec-Fetch-Site, but a link from elsewhere may lead to the page itself."""
    if method == "GET" and not path.startswith("/api/"):
        return None
    return headers.get("sec-fetch-site")


def _size(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n:,} bytes"
