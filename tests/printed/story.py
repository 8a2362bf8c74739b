"""The blocks of one page, run in order as one story: in an empty home, in a directory of their own.

Commands of all console blocks go to one bash, so that a variable set in one block is there in the next; Python blocks share
one interpreter and its names. Both are processes of their own, with this environment's `bin` first on the path.

A console block is commands after "$ " (a line that ends with a backslash goes on in the next one) and, after each, what it
prints on standard output. What is printed must come out, line by line, once what differs from run to run is masked:

    a number with its unit of time or of size, and hexadecimal digits, 8 or more of them

A command that prints nothing on the page may print anything; it must end with exit code 0.
"""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from printed.pages import Block, PageError

# Longer than any of them takes on a busy machine.
SECONDS = 400
_INTERPRETER = Path(__file__).with_name("interpreter.py")
_VARYING = re.compile(
    r"\d[\d.,]* (?:ns|µs|ms|s|min|h|B|kB|MB|GB|KiB|MiB|GiB)\b|\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b"
)


@dataclass(frozen=True)
class Command:
    """A command of a console block, on one line and without its comment, and the lines that are printed below it."""

    line: int
    text: str
    output: str


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block."""
    lines = block.source.splitlines()
    if not lines or not lines[0].startswith("$ "):
        raise PageError(f"{block.page}:{block.line}: a console block begins with “$ ” and a command.")
    found: list[Command] = []
    at = 0
    while at < len(lines):
        first = at
        while lines[at].endswith("\\") and at + 1 < len(lines):
            at += 1
        text = " ".join(line.rstrip("\\").strip() for line in lines[first : at + 1]).removeprefix("$ ")
        at += 1
        output = list(itertools.takewhile(lambda line: not line.startswith("$ "), lines[at:]))
        at += len(output)
        found.append(Command(block.line + 1 + first, without_comment(text), "\n".join(output)))
    return found


def without_comment(text: str) -> str:
    """The command without what a shell would not read, and without blanks that line up comments."""
    return re.sub(r"\s+#\s.*$", "", text).strip()


def masked(text: str) -> str:
    """Text without what differs from run to run (see above), and without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in _VARYING.sub("•", text).strip("\n").split("\n"))


def empty_home(home: Path) -> dict[str, str]:
    """This process's environment with nothing in it that leads to what an earlier run kept."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ENGRAM_"))}
    # the user's own settings of pip are in the home that is taken away
    settings = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "pip" / "pip.conf"
    if settings.exists():
        kept.setdefault("PIP_CONFIG_FILE", str(settings))
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    # two workers, two cores; on one thread each a tiny model is faster than on two that wait for each other
    return kept | {"HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Story:
    """One page's processes. `took`: (seconds, what) of each command and Python block.

    instead: {command as printed: what is run for it}. codes: {command: exit code}, of commands that do not end with 0.
    python: the interpreter of the Python blocks.
    """

    def __init__(
        self, directory: Path, environment: dict[str, str], *, instead: dict[str, str] | None = None,
        codes: dict[str, int] | None = None, python: str = sys.executable,
    ) -> None:  # fmt: skip
        self.directory, self.environment, self.python = directory, environment, python
        self.instead, self.codes = instead or {}, codes or {}
        self.took: list[tuple[float, str]] = []
        self._shell: subprocess.Popen | None = None
        self._interpreter: subprocess.Popen | None = None

    def __enter__(self) -> "Story":
        return self

    def __exit__(self, *error: object) -> None:
        for process in (self._shell, self._interpreter):
            if process is not None:
                _end(process)
                process.stdin.close(), process.stdout.close()

    def run(self, block: Block) -> str | None:
        """What went wrong, or None."""
        return self._console(block) if block.language == "console" else self._code(block)

    def _console(self, block: Block) -> str | None:
        for command in commands_of(block):
            code, out, err = self._command(command.text)
            told = f"{block.page}:{command.line}: $ {command.text}\n"
            wanted = self.codes.get(command.text, 0)
            if code != wanted:
                return f"{told}exit code {code}, wanted {wanted}\n{out}{err}"
            if command.output and masked(out) != masked(command.output):
                return f"{told}printed on the page:\n{command.output}\ncame out:\n{out}{err}"
        return None

    def _command(self, text: str) -> tuple[int, str, str]:
        if self._shell is None:
            self._shell = self._start("bash", "--noprofile", "--norc")
        out, err = (self.directory / f".printed.{stream}" for stream in ("out", "err"))
        for stream in (out, err):
            stream.write_text("")
        places = f">{shlex.quote(str(out))} 2>{shlex.quote(str(err))} </dev/null"
        started = time.perf_counter()
        code = _ask(self._shell, f"{{ {self.instead.get(text, text)}\n}} {places}; echo $?\n")
        self.took.append((time.perf_counter() - started, text))
        return (
            int(code) if code.strip() else -1,
            out.read_text(encoding="utf8"),
            err.read_text(encoding="utf8"),
        )

    def _code(self, block: Block) -> str | None:
        if self._interpreter is None:
            self._interpreter = self._start(self.python, "-P", str(_INTERPRETER))
        name = f"{block.page}:{block.line}"
        # blank lines first, so that a traceback names lines of the page
        question = {"name": block.page, "source": "\n" * block.line + block.source}
        started = time.perf_counter()
        answer = _ask(self._interpreter, json.dumps(question) + "\n")
        self.took.append((time.perf_counter() - started, name))
        return json.loads(answer)["error"] if answer.strip() else f"{name}: the interpreter ended"

    def _start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=self.directory, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip


def _ask(process: subprocess.Popen, question: str) -> str:
    """A line for a line; "" where the process ended, or was ended for taking too long."""
    timer = threading.Timer(SECONDS, _end, [process])
    timer.start()
    try:
        process.stdin.write(question)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        timer.cancel()


def _end(process: subprocess.Popen) -> None:
    """The process and what it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
