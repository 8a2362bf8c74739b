"""The `engram-lm` command: one thin function a command, each importing what it needs when it is called.

Nothing here computes. `engram-lm --help` answers without importing torch, numba or numpy; tests hold it to that.

Exit codes: 0 done; 2 refused, with one line on stderr that starts with `engram-lm:`; 130 interrupted; 141 when the
reader of a pipe has gone. Anything else is a bug of ours and keeps its traceback.

    engram-lm addresses --profile deepseek-v4.1 --layer 1 --canonical --ids 0,5,17,-1,42 --json
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from engram_lm import __version__
from engram_lm.errors import EngramError

REFUSED, INTERRUPTED, READER_GONE = 2, 130, 141

app = App(
    name="engram-lm",
    help="Memory for language models that is looked up, not computed.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

# A list of ids may begin with -1.
IdList = Annotated[str, Parameter(allow_leading_hyphen=True)]
# Off unless given: there is no --no-json.
Flag = Annotated[bool, Parameter(negative="")]


@app.command
def addresses(
    *,
    profile: str,
    layer: int,
    ids: IdList,
    canonical: Flag = False,
    json: Flag = False,
    layers: IdList | None = None,
    rows_per_head: int | None = None,
    vocab_size: int | None = None,
    fill_id: int | None = None,
    eos_ids: IdList | None = None,
) -> None:
    """Print the table rows that token ids read, head by head, counted within each head.

    Parameters
    ----------
    profile
        Address scheme: paper, deepseek-v4.1, qwen-ple or longcat.
    layer
        Block that reads the memory, from 0.
    ids
        Token ids with commas between them, such as 0,5,17,-1,42.
    canonical
        The ids are canonical ones; -1 is a dead token.
    json
        Print JSON, one list of rows a token, instead of a table.
    layers
        All blocks that read the memory, if not the released model's: moduli depend on them.
    rows_per_head
        Rows wanted of each head, if not the profile's.
    vocab_size
        Number of ids that are hashed, if not the released model's.
    fill_id
        Id that stands before the start, if not the released model's.
    eos_ids
        Ids that end a text, for profiles that stop there.
    """
    from engram_lm.addressing.command import addresses_command, parse_ids

    printed = addresses_command(
        profile=profile,
        layer=layer,
        ids=ids,
        canonical=canonical,
        json=json,
        layers=None if layers is None else parse_ids(layers),
        rows_per_head=rows_per_head,
        vocab_size=vocab_size,
        fill_id=fill_id,
        eos_ids=() if eos_ids is None else parse_ids(eos_ids),
    )
    print(printed)


# Commands on a model go here, one function each: train, generate, trace, demo.


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
    sys.exit(run())


if __name__ == "__main__":
    main()
