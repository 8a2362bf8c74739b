"""A server around a tiny random model with tables and an index, for tests: no process, no socket.

with served(tmp_path) as site:
    site.post("/api/trace", {"text": "The office dog"}).json()
    site.service.shelf.facts()
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from engram_lm.library import Library, Text
from engram_lm.serve.access import Access
from engram_lm.serve.app import create_app
from engram_lm.serve.limits import Limits
from engram_lm.serve.quiz import Question, Quiz
from engram_lm.serve.served_index import ServedIndex
from engram_lm.serve.served_mixture import ServedMixture
from engram_lm.serve.served_model import ServedModel
from engram_lm.serve.service import Service
from models import build, give_memory, tokenizer

HERE = "127.0.0.1:7860"
TEMPLATE = "{% for turn in messages %}Q: {{ turn.content }}\nA:{% endfor %}"
# the tiny model reads 128 tokens, and its tokens are bytes
LIMITS = Limits(text_tokens=100, new_tokens=64, waiting=16, body_bytes=100_000)
DOCUMENTS = {
    "dogs.md": "The office dog is called Orlando.",
    "leave.md": "Annual leave is 31 days. Every day counts.",
}
QUIZ = Quiz(
    [
        Question(id="dog", kind="verbatim", prompt="The office dog is called", document="dogs.md", answers=("Orlando",)),
        Question(id="leave", kind="paraphrased", prompt="How many days is leave?", document="leave.md", answers=("31",)),
    ]
)  # fmt: skip
_TOKENIZER: list[Any] = []


def words() -> Any:
    """The tiny tokenizer, with a chat template."""
    if not _TOKENIZER:
        _TOKENIZER.append(tokenizer())
        _TOKENIZER[0].chat_template = TEMPLATE
    return _TOKENIZER[0]


def make_index(directory: Path, documents: dict[str, str] | None = None) -> Path:
    with Library.create(directory, tokenizer=words(), merging="by hand") as library:
        library.add(Text(id=name, text=text) for name, text in (documents or DOCUMENTS).items())
    return directory


def make_service(
    directory: Path, *, tables: bool = True, index: bool = True, lam: float = 0.9, limits: Limits = LIMITS
) -> Service:
    """Ready when this returns."""
    ready = threading.Event()

    def prepare(service: Service) -> None:
        model = build("llama")
        if tables:
            give_memory(model, tokenizer=words())
        service.loaded = ServedModel(name="tiny", model=model, tokenizer=words(), limits=limits)
        if index:
            service.shelf = ServedIndex(make_index(directory / "index"), encoder=service.loaded.encoder)
            service.mixed = ServedMixture(service.loaded, service.shelf, gate=None, lam=lam)
            service.quiz = QUIZ

    errors: list[BaseException] = []

    def failed(error: BaseException) -> None:
        errors.append(error)
        ready.set()

    service = Service(lambda service: (prepare(service), ready.set()), limits=limits, failed=failed)
    ready.wait(60)
    if errors:
        raise errors[0]
    while service.status != "ready":
        threading.Event().wait(0.001)
    return service


class Site:
    """A client of one server, with the token of the page."""

    def __init__(self, service: Service, access: Access, client: TestClient) -> None:
        self.service, self.access, self.client = service, access, client

    def post(self, path: str, body: Any, **headers: str) -> Any:
        given = {"x-engram-token": self.access.token, **headers}
        return self.client.post(path, json=body, headers=given)

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(path, headers=headers)

    def events(self, **body: Any) -> list[dict[str, Any]]:
        """The events of one generation, but that it waited: the request before may not be off the line yet."""
        answer = self.post("/api/generate", body)
        assert answer.status_code == 200, answer.text
        events = [json.loads(line) for line in answer.text.splitlines()]
        return [event for event in events if event["type"] != "queued"]


@contextlib.contextmanager
def served(directory: Path, *, access: Access | None = None, **options: Any) -> Iterator[Site]:
    service = make_service(directory, **options)
    access = access or Access()
    with TestClient(create_app(service, access=access), base_url=f"http://{HERE}") as client:
        yield Site(service, access, client)
