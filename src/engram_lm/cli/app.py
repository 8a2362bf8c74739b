"""The app that commands hang on, options that several share, and how a command line ends."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict, get_origin

from cyclopts import App, CycloptsError, Parameter

from engram_lm import __version__
from engram_lm.errors import EngramError

REFUSED, INTERRUPTED, READER_GONE = 2, 130, 141

app = App(
    name="engram-lm",
    help="Memory for language models that is looked up, not computed.",
    version=f"engram-lm {__version__}",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

# A list of ids may begin with -1.
IdList = Annotated[str, Parameter(allow_leading_hyphen=True)]
# Off unless given: there is no --no-json.
Flag = Annotated[bool, Parameter(negative="")]
# --data a.txt b.txt
FileList = Annotated[list[str], Parameter(consume_multiple=True, negative="")]


def options_of(config: type, names: Sequence[str] | None = None, **helps: str) -> Any:
    """The fields of a config as options of a command, those alone that are given: a TypedDict for `Parameter(name="*")`.

    names: of the fields (default: all that have a help). helps: other words for some of them, in this command.
    """
    from dataclasses import fields

    from engram_lm.training.config import kinds_of

    kinds = kinds_of(config)
    found = {}
    for field in fields(config):
        if not field.metadata or (names is not None and field.name not in names):
            continue
        kind = kinds[field.name][0]
        # several numbers are written with commas between them
        kind = str if get_origin(kind) is tuple else kind
        found[field.name] = Annotated[kind, Parameter(help=helps.get(field.name, field.metadata["help"]))]
    return Annotated[TypedDict(config.__name__, found, total=False), Parameter(name="*")]


@app.command
def version() -> None:
    """Print the versions of engram-lm, Python and the libraries whose arithmetic it uses."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    print(f"engram-lm {__version__}")
    print(f"python {platform.python_version()}")
    for name in ("numpy", "numba", "tokenizers", "torch", "transformers", "triton", "vllm"):
        try:
            print(f"{name} {version_of(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")


def run(tokens: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    try:
        result = app(
            tokens, exit_on_error=False, print_error=False, help_on_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except (EngramError, CycloptsError) as refusal:
        print(f"engram-lm: {' '.join(str(refusal).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("engram-lm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `engram-lm` command."""
    from engram_lm.compiling.line import CompilingLine
    from engram_lm.kernels import announcing

    announcing.listener = CompilingLine()
    sys.exit(run())
