"""A server that answers as `engram-lm serve` does, without a model: for building the page and for its tests.

Its numbers are drawn from the texts themselves, the same in every run; its documents come and go as the real ones do.

    python tests/support/page_server.py        # the page at http://127.0.0.1:8765/

    with PageServer() as server:
        page.goto(server.url)
        server.refuse("/api/trace", 429, "Too many requests wait.")
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from places import ROOT

PAGE = ROOT / "src" / "engram_lm" / "serve" / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TOKEN = "a-token-of-this-run"
HANDBOOK = (
    "Annual leave at Brindle & Ash is 27 days, and five of them move into the next year. The office cat is called "
    "Quillon, and she sleeps on the third floor. Expenses are handed in by the ninth of the month to Marit Oduya."
)
QUIZ = [
    ("q1", "verbatim", "Annual leave at Brindle & Ash is", "27 days"),
    ("q2", "paraphrased", "How much holiday does someone at Brindle & Ash get in a year?", "27 days"),
    ("q3", "verbatim", "The office cat is called", "Quillon"),
    ("q4", "paraphrased", "What name does the animal on the third floor answer to?", "Quillon"),
]
ABOUT = {
    "model": {"name": "SmolLM2-135M", "parameters": 134_515_008, "vocab_size": 49_152, "device": "cpu", "chat": True},
    "tables": {
        "layers": [1, 8], "branches": 2, "orders": [2, 3], "heads": 4, "rows": 464_504, "bytes": 29_728_256,
        "trained_on": "250 encyclopaedia articles",
    },
    "gate": {"name": "smollm2"},
    "limits": {"body_bytes": 300_000, "text_tokens": 1024, "new_tokens": 256, "waiting": 8},
    "version": "0.1.0",
    "started_ms": 4200,
    "examples": {
        "look": [
            {"name": {"en": "A page of the handbook", "zh": "手册的一页"}, "text": HANDBOOK},
            {"name": {"en": "Names, east and west", "zh": "东西方的名字"},
             "text": "四大发明 和 张仲景 beside Alexander the Great and the Princess of Wales."},
        ],
        "think": [
            {
                "name": {"en": "Who was the first US president?", "zh": "美国第一任总统是谁？"},
                "prompt": "The first president of the United States was",
                "candidates": ["George Washington", "Thomas Jefferson", "John Hanson"],
            },
            {
                "name": {"en": "Names, east and west", "zh": "东西方的名字"},
                "prompt": "四大发明, 张仲景, Alexander the Great and the Princess of",
                "candidates": ["Wales", "Denmark", "威尔士"],
            },
        ],
        "ask": [{"name": {"en": "How long is leave?", "zh": "年假有几天？"}, "prompt": "Annual leave at Brindle & Ash is"}],
    },
}  # fmt: skip


def tokens_of(text: str) -> list[str]:
    """Pieces of at most seven characters, a space in front of the word that it stands before."""
    words = re.findall(r"\s*\w+|\s*[^\w\s]|\s+", text)
    return [piece for word in words for piece in re.findall(r"(?s).{1,7}", word)]


def draw(*keys: object) -> float:
    """A number from 0 to 1 that the keys decide."""
    return zlib.crc32(repr(keys).encode()) / 2**32


class Refusal(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class PageServer:
    """token_s: seconds between generated tokens. answer_s: before every answer in one piece. before: how many requests a
    generation waits for, told one by one, a second each."""

    def __init__(self, *, port: int = 0, token_s: float = 0.0, before: int = 0, memory: bool = True) -> None:
        self.token_s, self.before, self.memory = token_s, before, memory
        self.documents = {"handbook.md": HANDBOOK} if memory else {}
        self.status, self.waiting, self.generation = "ready", 0, 1
        self.answer_s = 0.0
        self.asked: list[tuple[str, dict]] = []
        self.cut_short = 0
        self._refusals: dict[str, Refusal] = {}
        self._port = port

    def __enter__(self) -> PageServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; on the same port again after a stop."""
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}/"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Answer nobody any more."""
        self._http.shutdown()
        self._http.server_close()

    def refuse(self, path: str, status: int, sentence: str) -> None:
        """Refuse what is asked of `path` from now on."""
        self._refusals[path] = Refusal(status, sentence)

    def allow(self, path: str) -> None:
        self._refusals.pop(path, None)

    # ---- answers

    def about(self) -> dict:
        index = {
            "documents": len(self.documents),
            "tokens": self.size(),
            "generation": self.generation,
            "bytes": 9000,
        }
        return ABOUT | {
            "index": index if self.memory else None,
            "tables": ABOUT["tables"] if self.memory else None,
        }

    def size(self) -> int:
        return sum(len(tokens_of(text)) for text in self.documents.values())

    def trace(self, body: dict) -> dict:
        pieces = tokens_of(body["text"])
        if len(pieces) > ABOUT["limits"]["text_tokens"]:
            raise Refusal(413, f"The text has {len(pieces)} tokens; this server traces at most 1024 at once.")
        tokens = [self._traced(pieces, i) for i in range(len(pieces))]
        if not body["without"]:
            tokens = [token | {"loss_off": None} if token["tables"] else token for token in tokens]
        return {"ms": 41.7, "tokens": tokens}

    def losses(self, body: dict) -> dict:
        tokens = self.trace(body | {"without": True})["tokens"]
        return {
            "ms": 20.1,
            "losses": [token["loss_tables" if body["tables"] else "loss_off"] for token in tokens],
        }

    def _traced(self, pieces: list[str], i: int) -> dict:
        text = pieces[i]
        known = any(text.strip() and text.strip() in document for document in self.documents.values())
        off = None if i == 0 else 0.3 + 6 * draw(text, i)
        r = (0.55 + 0.44 * draw(text, "r")) if known else 0.2 * draw(text, "r") ** 3
        tables = off and off - 1.4 * (draw(text, i, "t") - 0.35)
        both = off and tables * (1 - 0.8 * r)
        layers = [
            {
                "layer": layer,
                "gates": [draw(text, i, layer, branch) ** 2 for branch in range(2)],
                "added": 0.3 * draw(text, layer),
                "ngrams": [
                    {
                        "order": order, "text": "".join(pieces[max(0, i - order + 1) : i + 1]),
                        "addresses": [int(29_000 * draw(text, layer, order, head)) for head in range(4)],
                        "norm": 2 * draw(text, order),
                    }
                    for order in (2, 3) if i + 1 >= order
                ],
            }
            for layer in (1, 8)
        ]  # fmt: skip
        depth = min(i, 1 + int(12 * draw(text, "d"))) if known else 0
        index = None if i == 0 else {
            "depth": depth, "count": 1 + int(5 * draw(text, "c")) if depth else 0, "distinct": int(depth > 0),
            "documents": int(depth > 0), "lambda": 0.9 * r, "p_model": math.exp(-tables), "p_memory": 0.97 if known else 0.0,
            "p": math.exp(-both), "r": r,
        }  # fmt: skip
        seen = [
            {"order": order, "count": int(10 ** (4 * draw(text, order, "seen"))) - 1} for order in (1, 2, 3)
        ]
        if not self.memory:
            layers, index, tables, both = None, None, off, off
        return {
            "id": zlib.crc32(text.encode()) % 49_152, "text": text, "loss_off": off, "loss_tables": tables, "loss": both,
            "tables": layers, "index": index, "seen": seen,
        }  # fmt: skip

    def next(self, body: dict) -> dict:
        prompt = body["prompt"]
        gate = 0.62 if body["index"] else 0.0
        lam = body["lam"] if body["lam"] is not None and body["index"] else gate
        words = [
            " George",
            " the",
            " James",
            " John",
            " a",
            " not",
            " elected",
            " inaugurated",
            " born",
            " Thomas",
        ]
        weights = [draw(prompt, word) ** 3 + 0.01 for word in words]
        model = {word: weight / sum(weights) * 0.8 for word, weight in zip(words, weights, strict=True)}
        memory = {" George": 0.9, " General": 0.07, "\n": 0.03} if body["index"] else {}
        mix = {
            word: (1 - lam) * model.get(word, 0.001) + lam * memory.get(word, 0)
            for word in {**model, **memory}
        }
        first = next(iter(self.documents), None)
        source = {
            "before": "In 1789 ",
            "match": "the first president of the United States was",
            "after": " George <b>Washington</b>, twice.",
        }
        return {
            "ms": 33.0, "lambda": lam,
            "match": {"depth": 7, "count": 3, "distinct": 3, "documents": 2, "text": prompt[-40:]} if body["index"] else None,
            "model": _ranked(model, body["k"]), "memory": _ranked(memory, body["k"]), "mix": _ranked(mix, body["k"]),
            "candidates": [
                {
                    "text": candidate,
                    "tokens": [
                        {
                            "id": n, "text": piece, "p_model": 0.02 + 0.5 * draw(piece, prompt), "lambda": gate,
                            "p_memory": (0.92 if at == 0 else 0.05 / (1 + n)) if body["index"] else 0.0,
                        }
                        for n, piece in enumerate(tokens_of(" " + candidate))
                    ],
                }
                for at, candidate in enumerate(body["candidates"])
            ],
            "sources": [{"document": first, "count": 3, "passage": source}] if body["index"] and first else [],
        }  # fmt: skip

    def generate(self, body: dict):
        """Events of the stream, one after the other."""
        for before in range(self.before, 0, -1):
            yield {"type": "queued", "before": before}
            time.sleep(1)
        arm, prompt = body["arm"], body["prompt"]
        prompt_tokens = len(tokens_of(prompt)) + (180 if arm == "retrieval" else 0)
        yield {
            "type": "start",
            "prompt_tokens": prompt_tokens,
            "retrieved": list(self.documents)[:3] if arm == "retrieval" else [],
        }
        answer, known = self._said(prompt, arm)
        pieces = tokens_of(answer)[: body["max_tokens"]]
        for i, piece in enumerate(pieces):
            time.sleep(self.token_s)
            r = 0.55 + 0.44 * draw(piece, i) if known else 0.0
            yield {
                "type": "token", "id": i, "text": piece, "r": r, "tables": draw(piece, i, "t") if body["tables"] else None,
                "lambda": body["lam"] if body["lam"] is not None else r, "depth": 7 * known, "count": int(known),
                "documents": int(known),
            }  # fmt: skip
        told = (
            ["no document is about this question; the whole index answers"]
            if arm == "memory" and not known
            else []
        )
        yield {
            "type": "done",
            "ms": 412.0,
            "tokens": len(pieces),
            "prompt_tokens": prompt_tokens,
            "first_token_ms": 96.0,
            "text": "",
            "told": told,
        }

    def _said(self, prompt: str, arm: str) -> tuple[str, bool]:
        words = set(re.findall(r"\w{4,}", prompt.lower()))
        for text in self.documents.values() if arm != "alone" else ():
            sentences = re.split(r"(?<=\.) ", text)
            for n, sentence in enumerate(sentences):
                if len(words & set(re.findall(r"\w{4,}", sentence.lower()))) >= 2:
                    return " " + " ".join(sentences[n:]).removeprefix(prompt).strip(), arm == "memory"
        return " a matter of some debate, and it has been for as long as anyone there can remember.", False

    def add(self, body: dict) -> dict:
        log = []
        for one in body["documents"]:
            self.documents[one["id"]] = one["text"]
            log.append(f"indexed {len(tokens_of(one['text']))} tokens in 1.3 ms")
        self.generation += 1
        return {
            "ms": 1.3,
            "added": [one["id"] for one in body["documents"]],
            "tokens": self.size(),
            "generation": self.generation,
            "log": log,
        }

    def delete(self, body: dict) -> dict:
        for name in body["ids"]:
            if self.documents.pop(name, None) is None:
                raise Refusal(404, f"No document {name!r} is in the index; it may have been deleted already.")
        self.generation += 1
        return {
            "ms": 0.9,
            "deleted": body["ids"],
            "generation": self.generation,
            "log": [f"deleted {name} in 0.9 ms" for name in body["ids"]],
        }

    def list(self, limit: int, after: str | None) -> dict:
        names = [name for name in sorted(self.documents) if after is None or name > after]
        shown = [
            {"id": name, "title": name, "tokens": len(tokens_of(self.documents[name])), "added": None}
            for name in names[:limit]
        ]
        return {"documents": shown, "next": names[limit - 1] if len(names) > limit else None}

    def search(self, body: dict) -> dict:
        hits = [
            {
                "document": name, "count": text.count(body["text"]),
                "passage": dict(zip(("before", "match", "after"), text.partition(body["text"]), strict=True)),
            }
            for name, text in self.documents.items() if body["text"] in text
        ]  # fmt: skip
        return {"ms": 0.4, "hits": hits[: body["limit"]]}

    def quiz_answer(self, body: dict) -> dict:
        _, kind, _, expected = next(question for question in QUIZ if question[0] == body["id"])
        if "arm" in body:
            right = body["arm"] == "retrieval" or (body["arm"] == "memory" and kind == "verbatim")
            answer = f" {expected}" if right else " a matter of debate"
            return {
                "answer": answer,
                "right": right,
                "expected": expected,
                "ms": 350.0,
                "prompt_tokens": 190 if body["arm"] == "retrieval" else 9,
            }
        return {"right": expected.lower() in body["answer"].lower(), "expected": expected}


def _ranked(chances: dict[str, float], k: int) -> list[dict]:
    best = sorted(chances.items(), key=lambda one: -one[1])[:k]
    return [{"id": zlib.crc32(text.encode()) % 49_152, "text": text, "p": p} for text, p in best]


class _Handler(BaseHTTPRequestHandler):
    server_of: PageServer  # HTTP/1.0: no connection outlives its answer, so a stopped server is gone

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.server_of.cut_short += 1

    def do_GET(self) -> None:
        owner, url = self.server_of, urlsplit(self.path)
        if url.path == "/":
            page = (PAGE / "index.html").read_text().replace("{{token}}", TOKEN)
            self._send(200, page.encode(), "text/html; charset=utf-8")
        elif url.path.startswith("/static/") and (file := PAGE / Path(url.path).name).is_file():
            self._send(200, file.read_bytes(), TYPES[file.suffix] + "; charset=utf-8")
        elif url.path == "/api/health":
            self._json(200, {"status": owner.status, "busy": owner.waiting > 0, "waiting": owner.waiting})
        elif url.path == "/api/about":
            self._answer(url.path, lambda _: owner.about())
        elif url.path == "/api/index/documents":
            asked = parse_qs(url.query)
            self._answer(
                url.path, lambda _: owner.list(int(asked["limit"][0]), asked.get("after", [None])[0])
            )
        elif url.path == "/api/quiz":
            questions = [
                {"id": a, "kind": b, "prompt": c, "document": "handbook.md", "chat": False}
                for a, b, c, _ in QUIZ
            ]
            self._answer(url.path, lambda _: {"questions": questions})
        else:
            self._json(404, {"error": f"There is nothing at {url.path}."})

    def do_POST(self) -> None:
        owner = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.asked.append((self.path, body))
        if self.headers.get("X-Engram-Token") != TOKEN:
            self._json(403, {"error": "The token of this page is not the one of this run."})
            return
        if self.path == "/api/generate":
            self._stream(body)
            return
        answers = {
            "/api/trace": owner.trace, "/api/losses": owner.losses, "/api/next": owner.next, "/api/index/add": owner.add,
            "/api/index/delete": owner.delete,
            "/api/index/search": owner.search, "/api/quiz/answer": owner.quiz_answer,
        }  # fmt: skip
        self._answer(self.path, answers[self.path], body)

    def _answer(self, path: str, answer, body: dict | None = None) -> None:
        try:
            time.sleep(self.server_of.answer_s)
            if path in self.server_of._refusals:
                raise self.server_of._refusals[path]
            self._json(200, answer(body))
        except Refusal as refusal:
            self._json(refusal.status, {"error": str(refusal)})

    def _stream(self, body: dict) -> None:
        if refusal := self.server_of._refusals.get("/api/generate"):
            self._json(refusal.status, {"error": str(refusal)})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        for event in self.server_of.generate(body):
            self.wfile.write(json.dumps(event).encode() + b"\n")
            self.wfile.flush()

    def _json(self, status: int, answer: dict) -> None:
        self._send(status, json.dumps(answer).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    with PageServer(port=8765, token_s=0.08) as running:
        print(running.url)
        threading.Event().wait()
