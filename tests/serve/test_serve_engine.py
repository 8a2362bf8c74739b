"""The line before the model: order, places told, what is cancelled, what is refused; and many visitors at once."""

import asyncio
import gc
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from engram_lm.serve.access import Access  # noqa: E402
from engram_lm.serve.app import create_app  # noqa: E402
from engram_lm.serve.http_errors import Cancelled, Refusal  # noqa: E402
from engram_lm.serve.model_worker import ModelWorker  # noqa: E402
from serve_support import Site, make_service, served  # noqa: E402

SECONDS = 30


def with_engine(test, **options):
    """Run a coroutine of an engine on a loop of its own."""

    async def run():
        engine = ModelWorker(**{"waiting": 4, **options})
        try:
            return await asyncio.wait_for(test(engine), SECONDS)
        finally:
            engine.close()

    return asyncio.run(run())


def test_jobs_run_in_order_and_give_what_they_return():
    async def test(engine):
        ran = []
        jobs = [engine.submit(lambda job, n=n: ran.append(n) or n * n) for n in range(4)]
        assert await asyncio.gather(*(job.result() for job in jobs)) == [0, 1, 4, 9]
        assert ran == [0, 1, 2, 3]

    with_engine(test)


def test_those_who_wait_are_told_how_many_are_before_them():
    async def test(engine):
        go = threading.Event()
        first = engine.submit(lambda job: go.wait(SECONDS))
        others = [engine.submit(lambda job: job.emit({"type": "token"})) for _ in range(3)]

        async def seen(job):
            return [event async for event in job.events()]

        tasks = [asyncio.ensure_future(seen(job)) for job in others]
        await asyncio.sleep(0.05)
        go.set()
        told = await asyncio.gather(*tasks)
        assert await first.result()
        places = [[event["before"] for event in events if event["type"] == "queued"] for events in told]
        assert [place[0] for place in places] == [1, 2, 3]
        assert all(place == sorted(place, reverse=True) for place in places)
        assert all(events[-1] == {"type": "token"} for events in told)

    with_engine(test)


def test_too_many_are_refused_and_others_are_not():
    async def test(engine):
        go = threading.Event()
        running = engine.submit(lambda job: go.wait(SECONDS))
        while not engine.busy:
            await asyncio.sleep(0.001)
        waiting = [engine.submit(lambda job: "done") for _ in range(2)]
        with pytest.raises(Refusal, match="2 requests are waiting") as told:
            engine.submit(lambda job: None)
        assert told.value.status == 429
        assert engine.waiting == 2
        go.set()
        await running.result()
        assert [await job.result() for job in waiting] == ["done", "done"]

    with_engine(test, waiting=2)


def test_a_cancelled_job_stops_at_its_next_token_and_one_that_waits_never_begins():
    async def test(engine):
        begun, ran = threading.Event(), []

        def endless(job):
            while True:
                begun.set()
                job.emit({"type": "token"})
                time.sleep(0.001)

        running = engine.submit(endless)
        waiting = engine.submit(lambda job: ran.append("never"))
        behind = engine.submit(lambda job: "behind")
        await asyncio.to_thread(begun.wait)
        waiting.cancel()
        with pytest.raises(Cancelled):
            await waiting.result()
        running.cancel()
        assert await behind.result() == "behind"
        assert not ran
        with pytest.raises(Cancelled):
            await running.result()

    with_engine(test)


def test_an_error_is_its_jobs_own():
    async def test(engine):
        wrong = engine.submit(lambda job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await wrong.result()
        assert await engine.submit(lambda job: 5).result() == 5

    with_engine(test)


def test_closing_ends_what_runs_and_what_waits():
    async def test(engine):
        def endless(job):
            while True:
                job.check()
                time.sleep(0.001)

        jobs = [engine.submit(endless) for _ in range(3)]
        await asyncio.to_thread(engine.close)
        for job in jobs:
            with pytest.raises(Refusal, match="stopping"):
                await job.result()
        with pytest.raises(Refusal, match="stopping"):
            engine.submit(endless)
        assert not engine.busy

    with_engine(test)


def test_a_failed_preparation_is_told_and_ends_the_engine():
    told = []

    async def test(engine):
        while not told:
            await asyncio.sleep(0.001)
        assert isinstance(told[0], ZeroDivisionError)
        with pytest.raises(Refusal):
            engine.submit(lambda job: None)

    with_engine(test, prepare=lambda: 1 / 0, failed=told.append)


def test_a_finished_job_holds_nothing():
    class Text:
        pass

    async def test(engine):
        text = Text()
        gone = weakref.ref(text)
        job = engine.submit(lambda job, text=text: None)
        del text
        await job.result()
        gc.collect()
        assert gone() is None
        assert job is not None

    with_engine(test)


# ---- the model's own blocks -------------------------------------------------------------------------------------------


def test_a_forward_stops_between_blocks_and_the_model_works_on(tmp_path):
    with served(tmp_path) as site:
        loaded, reached = site.service.loaded, []
        blocks = loaded.model.model.layers
        handle = blocks[2].register_forward_pre_hook(lambda *_: reached.append(2))
        stop = blocks[1].register_forward_pre_hook(lambda *_: site.service.engine._running.cancel())
        body = {"text": "The office dog"}
        assert site.post("/api/trace", body).status_code == 499
        assert reached == []
        stop.remove()
        assert site.post("/api/trace", body).status_code == 200
        assert reached
        handle.remove()


# ---- over sockets -----------------------------------------------------------------------------------------------------


class Running:
    """A server on a socket of this machine, in a thread."""

    def __init__(self, service):
        self.service, self.access = service, Access()
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(create_app(service, access=self.access), log_level="error", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()

    def send(self, path, body, **headers):
        """A connection on which a POST was sent."""
        data = json.dumps(body).encode() if not isinstance(body, bytes) else body
        sent = {
            "host": f"127.0.0.1:{self.port}",
            "content-type": "application/json",
            "content-length": len(data),
            "x-engram-token": self.access.token,
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items() if value is not None)
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        return connection


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    found = Running(make_service(tmp_path_factory.mktemp("running")))
    yield found
    found.stop()


def until(condition):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < SECONDS, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def slow_tokens(running):
    """Every forward takes 20 ms; the number of forwards so far."""
    forwards = []
    block = running.service.loaded.model.model.layers[0]

    def slow(*_):
        forwards.append(1)
        time.sleep(0.02)

    handle = block.register_forward_pre_hook(slow)
    yield forwards
    handle.remove()


ENDLESS = {"prompt": "The cat", "max_tokens": 64, "temperature": 2.0, "seed": 1}


@pytest.mark.parametrize("path", ["/api/generate", "/api/trace"])
def test_a_client_that_goes_away_stops_the_computation(running, slow_tokens, path):
    engine = running.service.engine
    body = ENDLESS if path == "/api/generate" else {"text": "x" * 90}
    connection = running.send(path, body)
    until(lambda: engine.busy)
    if path == "/api/generate":
        assert b"200 OK" in connection.recv(4096)
    connection.close()
    until(lambda: not engine.busy)
    assert len(slow_tokens) < 40


def test_a_client_that_goes_away_while_it_waits_leaves_the_line(running, slow_tokens):
    engine = running.service.engine
    first = running.send("/api/generate", ENDLESS)
    until(lambda: engine.busy)
    second = running.send("/api/generate", ENDLESS)
    until(lambda: engine.waiting == 1)
    assert b'"queued", "before": 1' in second.recv(65536) + second.recv(65536)
    second.close()
    until(lambda: engine.waiting == 0)
    assert engine.busy, "the first one goes on"
    first.close()
    until(lambda: not engine.busy)


def test_a_large_body_is_refused_while_it_is_read(running):
    most = running.service.limits.body_bytes
    claimed = running.send("/api/trace", b"x", **{"content-length": most + 1})
    assert b"413" in claimed.recv(65536)
    chunked = running.send("/api/trace", b"", **{"content-length": None, "transfer-encoding": "chunked"})
    answer = b""
    try:
        for _ in range(most // 1000 + 500):
            chunked.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        answer = chunked.recv(65536)
    except (BrokenPipeError, ConnectionResetError):
        answer = b" 413 "  # it had closed before all was sent
    assert b" 413 " in answer
    for connection in (claimed, chunked):
        connection.close()


def test_a_stream_ends_with_a_sentence_when_the_server_stops(tmp_path):
    own = Running(make_service(tmp_path, tables=False))
    block = own.service.loaded.model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    connection = own.send("/api/generate", ENDLESS)
    until(lambda: own.service.engine.busy)
    own.service.engine.begin_closing()
    own.stop()
    data = b""
    while piece := connection.recv(65536):
        data += piece
    assert b'{"type": "error", "error": "The server is stopping."}' in data
    assert not own.service.engine._thread.is_alive()
    connection.close()


# ---- many at once -----------------------------------------------------------------------------------------------------


def test_eight_visitors_at_once_get_their_own_answers(tmp_path):
    with served(tmp_path) as site:
        for n in range(8):
            text = f"Drawer {n} holds thing {n}{n}{n}."
            site.post("/api/index/add", {"documents": [{"id": f"{n}.md", "text": text}]})

        def visit(n):
            wrong = 0
            for _ in range(3):
                events = site.events(prompt=f"Drawer {n} holds thing ", arm="memory", max_tokens=3)
                wrong += "".join(event.get("text", "") for event in events) != str(n) * 3
                text = f"visitor {n}"
                tokens = site.post("/api/trace", {"text": text}).json()["tokens"]
                wrong += "".join(token["text"] for token in tokens) != text
                wrong += site.post("/api/index/search", {"text": f"Drawer {n}"}).json()["count"] != 1
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(visit, range(8))) == [0] * 8
        assert site.get("/api/health").json() == {"status": "ready", "busy": False, "waiting": 0}


def test_changes_of_the_index_wait_for_no_generation(tmp_path):
    with served(tmp_path) as site:
        go, began = threading.Event(), threading.Event()
        block = site.service.loaded.model.model.layers[0]

        def hold(*_):
            began.set()
            go.wait(SECONDS)

        handle = block.register_forward_pre_hook(hold)
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(site.events, prompt="The cat", arm="memory", max_tokens=2)
            assert began.wait(SECONDS)
            added = site.post("/api/index/add", {"documents": [{"id": "new.md", "text": "A new thing."}]})
            assert added.status_code == 200
            assert site.post("/api/index/search", {"text": "new thing"}).json()["count"] == 1
            assert not generating.done()
            go.set()
            assert generating.result()[-1]["type"] == "done"
        handle.remove()


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_requests(tmp_path):
    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    with served(tmp_path) as site:
        hundreds = []
        for n in range(1100):
            _one_of_each(site, n)
            if n % 100 == 99:
                hundreds.append(resident())
        # the first hundred fill caches
        assert hundreds[-1] - hundreds[0] < 20e6, hundreds


def _one_of_each(site: Site, n: int) -> None:
    kind = n % 5
    if kind == 0:
        answer = site.post("/api/trace", {"text": f"The office dog number {n}"})
    elif kind == 1:
        answer = site.post("/api/next", {"prompt": "The office dog is", "candidates": [f"called {n}"]})
    elif kind == 2:
        answer = site.post(
            "/api/generate", {"prompt": f"The {n}", "arm": "memory", "max_tokens": 4, "chat": n % 2 == 0}
        )
    elif kind == 3:
        document = {"id": "same.md", "text": f"The number is {n}."}
        answer = site.post("/api/index/add", {"documents": [document], "replace": True})
    else:
        answer = site.post("/api/index/explain", {"text": "The number is"})
    assert answer.status_code == 200, answer.text
