"""README and docs, as Sybil reads them: the fenced blocks of a page in order, and which are not run, and why.

A block is exempt where a comment stands just above it, and nothing else exempts it:

    <!-- not run: starts a server -->
    <!-- not run without ENGRAM_VLLM_PYTHON: needs an environment of its own -->

The second kind is run where that variable is set, or, in small letters, where that module can be imported. A comment that
no block follows is an error, as it exempts nothing.

    for block in blocks_of(ROOT / "README.md"):
        print(block.line, block.language, block.reason)
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sybil import Document, Region
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# json is data that a command reads: a page may show it, and stand_ins.py lays it out
RUN, SHOWN = ("console", "python"), ("json",)

_FENCES = FencedCodeBlockLexer(r"[\w-]*")
_EXEMPTIONS = DirectiveInHTMLCommentLexer(r"not run(?P<without> without \w+)?")
# What would be run, had it been fenced.
_CODE = re.compile(
    r"\$ |engram-lm |pip |python |from \S+ import |import |[A-Z_]+=\S+ \S|[\w, ]+ = [a-zA-Z_.]{3,}\("
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block. `reason`: why it is not run, None where it is. `without`: the variable or module that has it run."""

    page: str
    line: int
    language: str
    source: str
    reason: str | None = None
    without: str | None = None

    @property
    def is_run(self) -> bool:
        if self.language not in RUN:
            return False
        return self.reason is None or (self.without is not None and _is_there(self.without))


class PageError(ValueError):
    """A page that cannot be run as it is written."""


def name_of(path: Path) -> str:
    """README.md, docs/eval.md."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def parse(document: Document) -> Iterator[Region]:
    """Sybil's parser: one region a fenced block, its `parsed` a Block."""
    # by where a block has to begin: on the line below the comment
    exemptions = {document.text.index("-->", one.end) + len("-->\n"): one for one in _EXEMPTIONS(document)}
    for fence in _FENCES(document):
        exemption = exemptions.pop(fence.start, None)
        block = Block(
            page=name_of(Path(document.path)),
            line=_line(document, fence.start),
            language=fence.lexemes["language"],
            source=fence.lexemes["source"],
            **({} if exemption is None else _read(exemption)),
        )
        _require_language(block)
        yield Region(fence.start, fence.end, parsed=block)
    for start in exemptions:
        raise PageError(
            f"{document.path}:{_line(document, start)}: no fenced block begins below this “not run”."
        )


def _line(document: Document, at: int) -> int:
    return document.text.count("\n", 0, at) + 1


def _is_there(name: str) -> bool:
    return bool(os.environ.get(name)) if name.isupper() else find_spec(name) is not None


def _read(exemption: Region) -> dict[str, str | None]:
    without = exemption.lexemes["without"]
    reason = exemption.lexemes["arguments"].strip()
    if not reason:
        raise PageError("A “not run” without a reason: <!-- not run: starts a server -->")
    return {"reason": reason, "without": without and without.split()[-1]}


def _require_language(block: Block) -> None:
    if block.language not in RUN + SHOWN:
        raise PageError(
            f"{block.page}:{block.line}: a fenced block is {', '.join(RUN + SHOWN)}; got {block.language!r}."
        )


def blocks_of(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [example.region.parsed for example in Document.parse(str(path), parse)]


def unfenced_code(path: Path) -> list[str]:
    """Lines of indented blocks that look like commands or Python: they would be printed and never run."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf8"), flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^|\n\n)((?: {4}.*(?:\n|$))+)", text)
    return [
        line
        for block in indented
        for line in re.sub("^ {4}", "", block, flags=re.M).splitlines()
        if _CODE.match(line)
    ]
