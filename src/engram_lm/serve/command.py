"""`engram-lm serve`: check the options, listen, load, and say in the terminal what happens and how long it takes."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError, EngramError
from engram_lm.extras import missing
from engram_lm.generation.loading import require_parts
from engram_lm.serve.http_errors import LOG

if TYPE_CHECKING:
    from engram_lm.serve.service import Service

GRACE_SECONDS = 5
KEY_VARIABLE = "ENGRAM_SERVE_KEY"


def serve_command(
    model: str | None,
    *,
    index: Path | None,
    gate: Path | None,
    lam: float | None,
    quiz: Path | None,
    host: str,
    port: int,
    key: str | None,
    names: Sequence[str],
    open_page: bool,
    prepare_only: bool = False,
) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit code. prepare_only: load everything once, so that the next start is short."""
    steps = Steps()
    # before torch is there: threads that wait for each other by spinning take turns with browsers on a small machine, and a
    # token then costs eight times as much
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _require_options(model, index=index, gate=gate, lam=lam, quiz=quiz, port=port)
    try:
        import uvicorn

        from engram_lm.serve.access import Access
        from engram_lm.serve.app import create_app
        from engram_lm.serve.service import Service
    except ImportError as error:
        raise missing(f"The page needs fastapi and uvicorn ({error})", "serve") from error
    access = Access.of(host, key=key or os.environ.get(KEY_VARIABLE) or None, names=names)
    if model is not None:
        require_parts(model, index, gate=gate, lam=lam)
    preparing = Preparing(steps, model=model, index=index, gate=gate, lam=lam, quiz=quiz)
    if prepare_only:
        return _prepare_only(preparing)
    listening = listen(host, port)
    address = f"http://{_shown_host(host)}:{listening.getsockname()[1]}/"
    failures: list[BaseException] = []
    server: Any = None

    def failed(error: BaseException) -> None:
        failures.append(error)
        if server is not None:
            server.should_exit = True

    def announce(service: Service) -> None:
        if service.engine.closing:
            return
        steps.total(f"ready: open {address} in a browser" + (" (it asks for the key)" if access.key else ""))
        print("Ctrl-C stops the server.", flush=True)
        if open_page:
            import webbrowser

            webbrowser.open(address)
        warm_up(service)

    log_to_stderr()
    steps.say(f"listening at {address}, which says “loading” until the model is there")
    service = Service(preparing, warm=announce, failed=failed, begun=steps.begun)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            service.engine.begin_closing()  # streams end with a sentence, so that nobody is waited for
            await super().shutdown(sockets)

    server = Server(
        uvicorn.Config(
            create_app(service, access=access), log_level="warning", access_log=False, server_header=False,
            proxy_headers=False, http="h11", ws="none", loop="asyncio", lifespan="on", timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE_SECONDS, backlog=256,
        )
    )  # fmt: skip
    if failures:
        server.should_exit = True
    # uvicorn raises the signal that stopped it again, once it has stopped
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        service.close()
        preparing.end()
    if failures:
        raise (
            failures[0] if isinstance(failures[0], EngramError) else RuntimeError("loading failed")
        ) from failures[0]
    print("\nstopped", flush=True)
    return 0


def _prepare_only(preparing: Preparing) -> int:
    from engram_lm.serve.service import Service

    ended, failures = threading.Event(), []

    def failed(error: BaseException) -> None:
        failures.append(error)
        ended.set()

    def warm(service: Service) -> None:
        warm_up(service)
        ended.set()

    service = Service(preparing, warm=warm, failed=failed)
    try:
        ended.wait()
    finally:
        service.close()
        preparing.end()
    if failures:
        raise failures[0]
    preparing.steps.total("prepared: what is fetched and compiled once is there")
    return 0


class Preparing:
    """Loads the model and the index."""

    def __init__(
        self, steps: Steps, *, model: str | None, index: Path | None, gate: Path | None, lam: float | None,
        quiz: Path | None,
    ) -> None:  # fmt: skip
        from engram_lm.serve.demo import Demo
        from engram_lm.serve.quiz import Quiz

        self.steps, self.model, self.index = steps, model, index
        self.gate, self.lam = gate, lam
        self.demo = Demo.find() if model is None else None
        self.quiz = None if quiz is None else Quiz.read(quiz)
        self._made: Path | None = None

    def __call__(self, service: Service) -> None:
        from engram_lm.serve.examples import EXAMPLES, read_examples
        from engram_lm.serve.quiz import Quiz
        from engram_lm.serve.served_index import ServedIndex
        from engram_lm.serve.served_mixture import ServedMixture
        from engram_lm.serve.served_model import load, measure_share

        steps, demo = self.steps, self.demo
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise missing(f"A model needs torch and transformers ({error})", "hf") from error
        steps.say("torch and transformers are loaded")
        name = str(demo.memory) if demo else str(self.model)
        service.loaded = loaded = load(name, limits=service.limits)
        facts = loaded.facts()
        about = f"{facts['model']['parameters'] / 1e6:.0f} M parameters"
        if facts["tables"]:
            tables = facts["tables"]
            about += (
                f", tables of {tables['rows']:,} rows before blocks {', '.join(map(str, tables['layers']))}"
            )
        steps.say(f"the model is loaded: {about}")
        directory = self.index
        if demo:
            service.quiz = Quiz.read(demo.quiz)
            directory = self._made = Path(tempfile.mkdtemp(prefix="engram-demo-")) / "index"
            documents, tokens = demo.make_index(directory, encoder=loaded.encoder)
            steps.say(f"the handbook is indexed: {documents} documents, {tokens:,} tokens, in {directory}")
        if self.quiz is not None:
            service.quiz = self.quiz
        if directory is not None:
            service.shelf = ServedIndex(directory, encoder=loaded.encoder)
            service.mixed = ServedMixture(loaded, service.shelf, gate=self.gate, lam=self.lam)
            if not demo:
                steps.say(f"the index is open: {service.shelf.facts()['documents']:,} documents")
        service.examples = read_examples(demo.examples) if demo else EXAMPLES
        measure_share(loaded, [entry["text"] for entry in service.examples["look"]])
        steps.say("the examples were read once")

    def end(self) -> None:
        """Remove what was made for this run."""
        if self._made is not None:
            shutil.rmtree(self._made.parent, ignore_errors=True)


def warm_up(service: Service) -> None:
    """Answer one request of each kind, so that no visitor waits for first times: kernels are there, files are in memory."""
    from engram_lm.serve.generate import generate
    from engram_lm.serve.next_token import next_tokens
    from engram_lm.serve.schema import GenerateRequest, NextRequest
    from engram_lm.serve.trace import trace_text

    loaded, mixed = service.loaded, service.mixed

    def nothing(event: Any = None) -> None:
        return None

    trace_text(loaded, mixed, "Where is the", check=nothing)
    next_tokens(loaded, mixed, NextRequest(prompt="Where is the", candidates=["office"]), check=nothing)
    if mixed is not None:
        service.shelf.explain("Where is the")
        service.shelf.search("the", limit=1)
        kinds = [GenerateRequest(prompt="Where is the", arm="memory", max_tokens=1)]
        if loaded.can_chat:
            kinds.append(
                GenerateRequest(prompt="Where is the office?", chat=True, arm="memory", max_tokens=1)
            )
        for asked in kinds:
            generate(loaded, mixed, asked, emit=nothing)


class Steps:
    """Says what was done and how long it took since it last spoke."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()

    def say(self, what: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self.last:5.1f} s] {what}", flush=True)
        self.last = now

    def total(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.begun:5.1f} s in all] {what}", flush=True)


def log_to_stderr() -> None:
    """What was unexpected, with its trace, for who runs the server."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOG.addHandler(handler)
    LOG.propagate = False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. ConfigError where the port is taken or the host is not this machine's."""
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--host {host} is no address of this machine: {error.strerror or error}."
        ) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"Port {port} of {host} cannot be used ({error.strerror}). Choose another with --port, or 0 for any free one."
        ) from None
    with contextlib.suppress(OSError):
        listening.set_inheritable(False)
    return listening


def _require_options(
    model: str | None,
    *,
    index: Path | None,
    gate: Path | None,
    lam: float | None,
    quiz: Path | None,
    port: int,
) -> None:
    if not 0 <= port < 65_536:
        raise ConfigError(f"--port is 0 to 65535; got {port}.")
    if model is None and (index, gate, lam, quiz) != (None,) * 4:
        raise ConfigError(
            "Without MODEL the demo is served; --index, --gate, --lam and --quiz go with a model."
        )
    if index is None and (gate, lam) != (None, None):
        raise ConfigError("--gate and --lam belong to --index.")


def _shown_host(host: str) -> str:
    host = host.strip("[]")
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
