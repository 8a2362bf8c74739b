"""`engram-lm serve` as a user runs it: the process, its terminal, its signals, and the command lines it refuses."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from engram_lm import cli
from serve_support import make_index, words

SECONDS = 120


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["tiny", "--host", "0.0.0.0", "--index", "x"], "--key"),
        (["--index", "notes"], "go with a model"),
        (["smollm2", "--lam", "0.3"], "belong to --index"),
        (["smollm2", "--port", "70000"], "--port is 0 to 65535"),
        (["smollm2", "--key", "short"], "at least 16"),
        (["smollm2", "--host", "no.such.host.invalid", "--key", "a" * 20], "no address of this machine"),
    ],
)
def test_options_that_cannot_be(options, told, capsys):
    assert cli.run(["serve", *options]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(["serve", "smollm2", "--port", str(port)]) == 2
    assert "--port" in capsys.readouterr().err


def start(*options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENGRAM_SERVE_KEY": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "engram_lm.cli", "serve", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model's directory and an index for it."""
    from models import build

    directory = tmp_path_factory.mktemp("tiny")
    build("llama").save_pretrained(directory / "model")
    words().save_pretrained(directory / "model")
    return str(directory / "model"), str(make_index(directory / "index"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_and_stops_when_asked(tiny, number):
    model, index = tiny
    process = start(model, "--index", index, "--lam", "0.9", "--port", "0")
    try:
        lines, address = [], None
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"in all\] ready: open (http://127\.0\.0\.1:\d+/)", line):
                address = found[1]
                break
        assert address, "".join(lines) + process.stderr.read()
        assert all(re.match(r"\[ *\d+\.\d s", line) for line in lines), lines

        def ask(path, body=None, **headers):
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.read().decode()

        token = re.search('engram-token" content="([^"]+)"', ask(""))[1]
        headers = {"X-Engram-Token": token, "Content-Type": "application/json"}
        asked = {"prompt": "The office dog is called", "arm": "memory", "max_tokens": 9}
        events = [json.loads(line) for line in ask("api/generate", asked, **headers).splitlines()]
        assert "".join(event.get("text", "") for event in events) == " Orlando."
        with pytest.raises(urllib.error.HTTPError, match="403"):
            ask("api/generate", asked, **{**headers, "X-Engram-Token": "another"})
        # another process changes the index while this one runs
        assert cli.run(["index", "delete", index, "dogs.md"]) == 0
        assert json.loads(ask("api/index/search", {"text": "Orlando"}, **headers))["count"] == 0
        document = {"id": "dogs.md", "text": "The office dog is called Orlando."}
        ask("api/index/add", {"documents": [document]}, **headers)
        began = time.monotonic()
        process.send_signal(number)
        out, error = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, error
        assert out.endswith("stopped\n")
        assert "Traceback" not in error
        assert time.monotonic() - began < 30
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    """One that is not there is said before a port is opened; one that is damaged, while its page says that it loads."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    for name, listens in (("nothing", False), ("damaged", True)):
        process = start(str(tmp_path / name), "--port", "0")
        out, error = process.communicate(timeout=SECONDS)
        assert process.returncode == 2
        assert error.count("\n") == 1
        assert name in error
        assert ("loading" in out) == listens


@pytest.mark.slow
def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    (tmp_path / "modeling_own.py").write_text(f"open({str(touched)!r}, 'w').close()\n")
    config = {
        "model_type": "own", "architectures": ["Own"],
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = start(str(tmp_path), "--port", "0")
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, error
    assert not touched.exists()
