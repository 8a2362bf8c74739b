"""The demo's server from outside: start, first token, trace, eight visitors at once, a thousand requests, the quiz.

    python benchmarks/serve.py                        # minutes on two quiet cores
    python benchmarks/serve.py --requests 0 --no-quiz --repeats 3

The server runs in a process of its own (`engram-lm serve`), is asked over HTTP, and its CPU seconds and memory are read from
/proc. Wall times on a busy machine are upper bounds; the load stands beside them. Writes benchmarks/results/serve.json; the
last line is JSON.
"""

import argparse
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from machine import circumstances
from timing import spread

from engram_lm.demo import documents

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "serve.json"
WISHES = {"ready_s": 15.0, "first_token_ms": 500.0, "trace_ms": 1000.0}
# 20 tokens of SmolLM2's tokenizer
PROMPT = "The company was sold for one crown in 1952 and bought back by its own workers"
AT_ONCE, TABS = 8, 56
TICKS = os.sysconf("SC_CLK_TCK")


class Served:
    """`engram-lm serve` on a free port."""

    def __init__(self) -> None:
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engram_lm.cli", "serve", "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.steps, self.port = [], 0
        for line in self.process.stdout:
            self.steps.append(re.sub(r", in /\S+$", "", line.rstrip()))
            if found := re.search(r"ready: open http://[^:]+:(\d+)/", line):
                self.port = int(found[1])
                break
        if not self.port:
            raise SystemExit("the server did not start:\n" + "\n".join(self.steps))
        self.ready_s = time.perf_counter() - began
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        page = self._asked("GET", "/", None).read().decode()
        self.token = re.search('engram-token" content="([^"]+)"', page)[1]

    def _asked(self, method, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        headers = {"content-type": "application/json", "x-engram-token": getattr(self, "token", "")}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()

    def ask(self, path, body=None):
        answer = self._asked("GET" if body is None else "POST", path, body)
        found = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {found}")
        return found

    def generate(self, **body):
        """(text, seconds to the first token, its event "done")."""
        began, first, pieces, done = time.perf_counter(), None, [], None
        for line in self._asked("POST", "/api/generate", body):
            event = json.loads(line)
            if event["type"] == "error":
                raise RuntimeError(event["error"])
            if event["type"] == "token" and first is None:
                first = time.perf_counter() - began
            pieces.append(event.get("text", ""))
            done = event
        assert done["type"] == "done", done
        return "".join(pieces), first, done

    def cpu_s(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def resident_bytes(self):
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    def stop(self):
        began = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        return {"exit_code": code, "seconds": time.perf_counter() - began}


def timed(server, repeats, run):
    """Wall ms and CPU ms of the server, each repeat after the other; the first is not counted."""
    walls, cpus = [], []
    for repeat in range(-1, repeats):
        cpu, began = server.cpu_s(), time.perf_counter()
        found = run()
        if repeat >= 0:
            walls.append(1000 * (time.perf_counter() - began if found is None else found))
            cpus.append(1000 * (server.cpu_s() - cpu))
    return {"wall": spread(walls, "ms"), "cpu": spread(cpus, "ms")}


def at_once(server, questions):
    """TABS requests from AT_ONCE threads; each is compared with the same request asked alone."""
    prompts = [question["prompt"] for question in questions if question["kind"] == "verbatim"]
    bodies = [
        {"prompt": prompt, "arm": "memory", "tables": False, "max_tokens": 6} for prompt in prompts[:AT_ONCE]
    ]
    alone = [server.generate(**body)[0] for body in bodies]
    wrong, waits, left, lock = [], [], list(range(TABS)), threading.Lock()

    def visit():
        while True:
            with lock:
                if not left:
                    return
                n = left.pop()
            try:
                text, first, _ = server.generate(**bodies[n % len(bodies)])
                waits.append(first)
                if text != alone[n % len(bodies)]:
                    wrong.append((n, text))
                own = f"tab {n}"
                tokens = server.ask("/api/trace", {"text": own})["tokens"]
                if "".join(token["text"] for token in tokens) != own:
                    wrong.append((n, own))
            except Exception as error:
                wrong.append((n, repr(error)))

    began = time.perf_counter()
    threads = [threading.Thread(target=visit) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "requests": 2 * TABS,
        "at_once": AT_ONCE,
        "lost_or_mixed_up": len(wrong),
        "examples": [str(one) for one in wrong[:3]],
        "seconds": time.perf_counter() - began,
        "first_token_s": spread(waits, "s"),
    }


def many(server, requests):
    """Memory of the server after every hundred requests."""
    held = []
    for n in range(requests):
        kind = n % 5
        if kind == 0:
            server.ask("/api/trace", {"text": f"The office dog, for the {n}th time"})
        elif kind == 1:
            server.ask("/api/next", {"prompt": f"Number {n} is", "candidates": ["the dog"]})
        elif kind == 2:
            server.generate(prompt="Where is it?" if n % 2 else f"It is {n}", arm="memory", max_tokens=2)
        elif kind == 3:
            document = {"id": "same.md", "text": f"The number of today is {n}."}
            server.ask("/api/index/add", {"documents": [document], "replace": True})
        else:
            server.ask("/api/index/search", {"text": "The number of today"})
        if n % 100 == 99:
            held.append(server.resident_bytes())
            print(f"  {n + 1} requests, {held[-1] / 1e6:,.0f} MB", flush=True)
    server.ask("/api/index/delete", {"ids": ["same.md"]})
    return {"requests": requests, "resident_bytes_by_hundred": held, "grown_bytes": held[-1] - held[0]}


def quiz(server, questions):
    """Questions that each arm answers, by kind."""
    found = {}
    for arm in ("alone", "retrieval", "memory"):
        answers = [
            (question["kind"], server.ask("/api/quiz/answer", {"id": question["id"], "arm": arm}))
            for question in questions
        ]
        found[arm] = {
            kind: {
                "right": sum(answer["right"] for of, answer in answers if of == kind),
                "of": sum(of == kind for of, _ in answers),
                "prompt_tokens": statistics.mean(
                    answer["prompt_tokens"] for of, answer in answers if of == kind
                ),
            }
            for kind in ("verbatim", "paraphrased")
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--no-quiz", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    report = {"circumstances": circumstances("torch", "transformers", "fastapi", "uvicorn"), "wishes": WISHES}
    server = Served()
    report["start"] = {"ready_s": server.ready_s, "cpu_s": server.cpu_s(), "steps": server.steps}
    print(f"ready after {server.ready_s:.1f} s", flush=True)
    try:
        questions = server.ask("/api/quiz")["questions"]
        arms = {"memory": {"arm": "memory"}, "alone": {"arm": "alone", "tables": False}}
        report["first_token"] = {
            name: timed(
                server,
                options.repeats,
                lambda body=body: server.generate(prompt=PROMPT, max_tokens=1, **body)[1],
            )
            for name, body in arms.items()
        }
        report["first_token"]["prompt_tokens"] = server.generate(prompt=PROMPT, max_tokens=1)[2][
            "prompt_tokens"
        ]
        text = (documents() / "safety.md").read_text(encoding="utf8")
        text += (documents() / "house.md").read_text(encoding="utf8")
        tokens = server.ask("/api/trace", {"text": text})["tokens"][:200]
        text = "".join(token["text"] for token in tokens)
        bodies = {
            # what the page asks for first, then for the losses without tables; and both in one answer
            "trace": ("/api/trace", {"text": text, "without": False}),
            "losses": ("/api/losses", {"text": text, "tables": False}),
            "trace_with_losses": ("/api/trace", {"text": text}),
        }
        for name, (path, body) in bodies.items():
            report[name] = timed(
                server, options.repeats, lambda path=path, body=body: server.ask(path, body) and None
            )
        report["trace"]["tokens"] = len(server.ask("/api/trace", {"text": text})["tokens"])
        for name in ("first_token", *bodies):
            print(name, json.dumps(report[name]), flush=True)
        report["at_once"] = at_once(server, questions)
        print("at once", json.dumps(report["at_once"]), flush=True)
        if not options.no_quiz:
            report["quiz"] = quiz(server, questions)
            print("quiz", json.dumps(report["quiz"]), flush=True)
        if options.requests:
            report["many"] = many(server, options.requests)
    finally:
        report["stop"] = server.stop()
    report["load_average_at_end"] = os.getloadavg()[0]
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
