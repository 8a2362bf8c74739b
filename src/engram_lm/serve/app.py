"""The endpoints (docs/serve.md), as an ASGI application.

    app = create_app(service, access=Access.of("127.0.0.1"), page=PAGE)

Every body is JSON in UTF-8 and read whole before anything else; every error is {"error": one sentence}. Interactive
documentation that fetches scripts from elsewhere is off; the description is at /api/openapi.json.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from engram_lm import __version__
from engram_lm.serve import schema as m
from engram_lm.serve.access import COOKIE, Access, same
from engram_lm.serve.http_errors import Refusal, shown
from engram_lm.serve.middleware import Middleware
from engram_lm.serve.page import PAGE, PageFiles, login
from engram_lm.serve.service import Service
from engram_lm.serve.streaming import error_answer, event_lines, json_answer, one_answer

WRONG_KEY_SECONDS, MOST_WRONG_KEYS, MOST_LOGIN_BYTES = 1.0, 8, 4096


def create_app(service: Service, *, access: Access, page: Path = PAGE) -> Middleware:
    """The whole server but the sockets."""
    app = FastAPI(
        title="engram-lm serve", version=__version__, openapi_url="/api/openapi.json", docs_url=None, redoc_url=None,
        lifespan=_lifespan(service),
        description="One model, its memories and one index. POSTs need the header X-Engram-Token (from the page) "
        "or Authorization: Bearer KEY.",
    )  # fmt: skip
    app.router.route_class = JsonRoute
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    _add_page(app, access, PageFiles(page))
    _add_facts(app, service)
    _add_model(app, service)
    _add_index(app, service)
    _add_quiz(app, service)
    return Middleware(app, access=access, limits=service.limits)


class JsonRoute(APIRoute):
    """Reads and checks the body before FastAPI does, and answers every error in one sentence."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            try:
                if self.body_field is not None:
                    await _require_json(request)
                return await handle(request)
            except (HTTPException, RequestValidationError):
                raise
            except Exception as error:
                return error_answer(error)

        return checked


async def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"The body is to be JSON (Content-Type: application/json); got {shown(kind)}.")
    data = await request.body()
    try:
        text = data.decode("utf8")
    except UnicodeDecodeError as error:
        raise Refusal(
            422,
            f"Byte {error.start:,} of the request is not UTF-8 ({error.reason}); convert the text to UTF-8.",
        ) from None
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode("utf8")
    except UnicodeEncodeError:
        raise Refusal(
            422, "The body holds half a surrogate pair (\\ud800 to \\udfff), which is no character."
        ) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"The body is no JSON: {str(error)[:120]}.") from None


def _answers(model: Any, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of an endpoint's answers."""
    told = {status: {"model": m.ErrorAnswer} for status in (403, 413, 422, 503, *statuses)}
    return {200: {"model": model}, **told}


# ---- the page ---------------------------------------------------------------------------------------------------------


def _add_page(app: FastAPI, access: Access, files: PageFiles) -> None:
    wrong = 0  # keys whose answer is waited for

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(files.index(access.token))

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str, request: Request) -> Response:
        data, kind, tag = files.file(name)
        headers = {"cache-control": "no-cache", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    @app.get("/login", include_in_schema=False)
    async def form() -> Response:
        return RedirectResponse("/", 303) if access.key is None else HTMLResponse(login())

    @app.post("/login", include_in_schema=False)
    async def log_in(request: Request) -> Response:
        if access.key is None:
            return RedirectResponse("/", 303)
        nonlocal wrong
        data = await request.body()
        if len(data) > MOST_LOGIN_BYTES:
            raise Refusal(413, f"A key has less than {MOST_LOGIN_BYTES:,} bytes; got {len(data):,}.")
        given = parse_qs(data.decode("utf8", "replace")).get("key", [""])[0]
        if not same(given, access.key):
            if wrong >= MOST_WRONG_KEYS:
                raise Refusal(429, "Too many wrong keys are being tried; try again in a moment.")
            wrong += 1
            try:
                await asyncio.sleep(WRONG_KEY_SECONDS)
            finally:
                wrong -= 1
            return HTMLResponse(login("That is not the key. 密钥不对。"), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, access.session, httponly=True, samesite="strict", path="/")
        return answer


# ---- what there is ----------------------------------------------------------------------------------------------------


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/api/health", response_model=None, responses=_answers(m.Health))
    async def health() -> Response:
        """Whether the model is loaded, whether it computes, and how many requests wait for it."""
        engine = service.engine
        return json_answer({"status": service.status, "busy": engine.busy, "waiting": engine.waiting})

    @app.get("/api/about", response_model=None, responses=_answers(m.About))
    async def about() -> Response:
        """The model, its tables, the index, the limits, and examples to begin with."""
        service.require_ready()
        return json_answer(await service.reading(service.facts))


# ---- the model --------------------------------------------------------------------------------------------------------


def _add_model(app: FastAPI, service: Service) -> None:
    @app.post("/api/trace", response_model=None, responses=_answers(m.Trace, 429))
    async def trace(body: m.TraceRequest, request: Request) -> Response:
        """A text token by token: what tables and index did at each."""
        from engram_lm.serve.trace import trace_text

        loaded = service.require_ready()

        def work(job: Any) -> dict[str, Any]:
            return trace_text(loaded, service.mixed, body.text, check=job.check, without=body.without)

        return await one_answer(request, service.engine.submit(work))

    @app.post("/api/losses", response_model=None, responses=_answers(m.Losses, 429))
    async def losses(body: m.LossesRequest, request: Request) -> Response:
        """The loss of each token by the model alone, with its tables or without them."""
        from engram_lm.serve.trace import losses_of

        loaded = service.require_ready()
        job = service.engine.submit(lambda _: losses_of(loaded, body.text, tables=body.tables))
        return await one_answer(request, job)

    @app.post("/api/next", response_model=None, responses=_answers(m.Next, 429))
    async def next_token(body: m.NextRequest, request: Request) -> Response:
        """The next token: of the model, of memory, of both; and what whole candidates get."""
        from engram_lm.serve.next_token import next_tokens

        loaded = service.require_ready()
        job = service.engine.submit(lambda job: next_tokens(loaded, service.mixed, body, check=job.check))
        return await one_answer(request, job)

    @app.post(
        "/api/generate", response_model=None, response_class=_Lines, responses=_answers(m.Event, 404, 429)
    )
    async def generate(body: m.GenerateRequest, request: Request) -> Response:
        """Go on with a prompt, an event a line: queued while others compute, start, token after token, done or error."""
        from engram_lm.serve.generate import generate, require_possible

        loaded = service.require_ready()
        require_possible(loaded, service.mixed, body)

        def work(job: Any) -> None:
            generate(loaded, service.mixed, body, emit=job.emit)

        return await event_lines(request, service.engine.submit(work))


class _Lines(Response):
    media_type = "application/x-ndjson"


# ---- the index --------------------------------------------------------------------------------------------------------


def _add_index(app: FastAPI, service: Service) -> None:
    @app.post("/api/index/add", response_model=None, responses=_answers(m.Added, 404, 409, 429))
    async def add(body: m.AddRequest) -> Response:
        """Index documents: known when this answers, with no training."""
        shelf = service.require_shelf()
        texts = [_text_of(document) for document in body.documents]
        return json_answer(await service.changing(shelf.add, texts, replace=body.replace))

    @app.post("/api/index/delete", response_model=None, responses=_answers(m.Deleted, 404, 429))
    async def delete(body: m.DeleteRequest) -> Response:
        """Take documents out of every count; all of them or, where one is not there, none."""
        return json_answer(await service.changing(service.require_shelf().delete, body.ids))

    @app.get("/api/index/documents", response_model=None, responses=_answers(m.Documents, 404))
    async def documents(limit: int = 50, after: str | None = None) -> Response:
        """The documents, in the order of their ids."""
        if not 1 <= limit <= 1000:
            raise Refusal(422, f"limit is 1 to 1000 documents; got {limit}.")
        return json_answer(await service.reading(service.require_shelf().page, limit=limit, after=after))

    @app.post("/api/index/search", response_model=None, responses=_answers(m.Found, 404, 429))
    async def search(body: m.SearchRequest) -> Response:
        """Where a wording stands, word for word."""
        return json_answer(await service.reading(service.require_shelf().search, body.text, limit=body.limit))

    @app.post("/api/index/explain", response_model=None, responses=_answers(m.Explained, 404, 429))
    async def explain(body: m.ExplainRequest) -> Response:
        """What the index alone says comes after a text, and from where it has that."""
        return json_answer(await service.reading(service.require_shelf().explain, body.text))


def _text_of(document: m.NewDocument) -> Any:
    from engram_lm.library.texts import Text

    if not document.id.strip() or not document.id.isprintable():
        raise Refusal(422, f"The id of a document is printable text; got {shown(document.id)}.")
    if not document.text.strip():
        raise Refusal(422, f"The document {shown(document.id)} is empty; there is nothing to index.")
    extra = {name: value for name in ("title", "licence") if (value := getattr(document, name))}
    for name, value in extra.items():
        if not value.isprintable():
            raise Refusal(422, f"The {name} of a document is printable text on one line; got {shown(value)}.")
    return Text(id=document.id, text=document.text, source="page", extra=extra)


# ---- the quiz ---------------------------------------------------------------------------------------------------------


def _add_quiz(app: FastAPI, service: Service) -> None:
    @app.get("/api/quiz", response_model=None, responses=_answers(m.Quiz))
    async def quiz() -> Response:
        """Questions about the documents, without their answers; none where the server has no quiz."""
        return json_answer({"questions": [one.facts() for one in service.quiz.questions.values()]})

    @app.post("/api/quiz/answer", response_model=None, responses=_answers(m.QuizAnswered, 404, 429))
    async def answer(body: m.QuizAnswerRequest, request: Request) -> Response:
        """Let the model answer a question (tables off, so that the arms differ in the index alone), or check one's own."""
        from engram_lm.serve.generate import generate

        loaded = service.require_ready()
        question = service.quiz.question(body.id)
        if (body.arm is None) == (body.answer is None):
            raise Refusal(422, "Give either arm, to let the model answer, or answer, your own.")
        if body.answer is not None:
            return json_answer(
                {"right": question.is_answered_by(body.answer), "expected": question.answers[0]}
            )
        asked = m.GenerateRequest(
            prompt=question.prompt, chat=question.chat, max_tokens=question.max_tokens, arm=body.arm, tables=False
        )  # fmt: skip

        def work(job: Any) -> dict[str, Any]:
            pieces: list[str] = []

            def emit(event: dict[str, Any]) -> None:
                job.check()
                pieces.append(event.get("text", ""))

            done = generate(loaded, service.mixed, asked, emit=emit)
            text = "".join(pieces).strip()
            return {
                "answer": text,
                "right": question.is_answered_by(text),
                "expected": question.answers[0],
                "ms": done["ms"],
                "prompt_tokens": done["prompt_tokens"],
            }

        return await one_answer(request, service.engine.submit(work))


# ---- errors and the end -----------------------------------------------------------------------------------------------


async def _http_error(request: Request, error: HTTPException) -> Response:
    told = {
        404: f"There is nothing at {shown(request.url.path)}.",
        405: f"{request.method} is not used at {shown(request.url.path)}.",
    }
    return json_answer({"error": told.get(error.status_code, str(error.detail))}, error.status_code)


async def _wrong_body(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
    said = first["msg"][:1].lower() + first["msg"][1:]
    about = f"The field {where} of the request" if where else "The request"
    return json_answer({"error": f"{about} is not what is wanted: {said}."}, 422)


def _lifespan(service: Service) -> Callable[[FastAPI], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    return lifespan
