"""Reading training text: documents out of .txt and .jsonl files, either of them plain, .gz or .xz, streamed.

.jsonl: one JSON object a line, the text in `field`; blank lines are skipped. .txt: the whole file is one document, or
each line, or each paragraph (lines up to a blank one). Lines end at \\n alone: U+2028 and its kin are text. A
byte-order mark at the start of a file is dropped. Documents without text are given to the caller like any other.

Text is strict UTF-8. What cannot be read raises DataError with file and line, or file and byte offset (unpacked).

    for document in read_documents(["corpus/*.jsonl.xz", "notes.txt"]):
        print(document.file, document.line, document.text[:60])
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engram_lm.errors import ConfigError, DataError

TxtDocuments = Literal["file", "line", "paragraph"]
Files = str | Path | Sequence[str | Path]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and where it begins (line counts from 1)."""

    text: str
    file: Path
    line: int


class _Line(NamedTuple):
    text: str
    number: int


def find_files(files: Files) -> list[Path]:
    """Files and globs → existing files with a readable ending: in the order given, globs sorted, none twice."""
    found: dict[Path, None] = {}
    for pattern in [files] if isinstance(files, str | Path) else files:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f'{path} is a directory; name files or a glob, such as "{path}/*.jsonl.xz"')
        matches = [path] if path.exists() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        matches = [match for match in matches if not match.is_dir()]
        if not matches:
            raise DataError(f"{path}: no such file, and nothing matches it as a glob")
        for match in matches:
            kind_of(match)
            found.setdefault(match)
    if not found:
        raise DataError("no files of text were named")
    return list(found)


def read_documents(
    files: Files, *, field: str = "text", txt_documents: TxtDocuments = "file"
) -> Iterator[Document]:
    """Every document of every file, in order. Files are looked up at once, read as the iterator is drawn."""
    if txt_documents not in ("file", "line", "paragraph"):
        raise ConfigError(f'txt_documents is "file", "line" or "paragraph"; got {txt_documents!r}')
    paths = find_files(files)

    def documents() -> Iterator[Document]:
        for path in paths:
            count = 0
            lines = read_lines(path)
            parts = (
                ((record[field], number) for record, number in json_lines(lines, path, field))
                if kind_of(path) == ".jsonl"
                else _from_txt(lines, txt_documents)
            )
            for text, line in parts:
                count += 1
                yield Document(text, path, line)
            if not count:
                raise DataError(f"{path} is empty: it holds no document")

    return documents()


def require_documents(files: Files, *, field: str = "text") -> list[Path]:
    """`find_files`, and the beginning of each read: DataError where one cannot be read, is empty, or has not the field.

    It costs a page a file, so that a mistyped name or field is said before a model is loaded.
    """
    paths = find_files(files)
    for path in paths:
        lines = read_lines(path)
        first = json_lines(lines, path, field) if kind_of(path) == ".jsonl" else lines
        if next(iter(first), None) is None:
            raise DataError(f"{path} is empty: it holds no document")
    return paths


def kind_of(path: Path) -> Literal[".txt", ".jsonl"]:
    """How a file is read, by its name without .gz or .xz."""
    inner = path.with_suffix("") if path.suffix in (".gz", ".xz") else path
    if inner.suffix == ".txt":
        return ".txt"
    if inner.suffix == ".jsonl":
        return ".jsonl"
    raise DataError(f"{path}: text is read from .txt and .jsonl files, plain or with .gz or .xz after it")


def read_lines(path: Path) -> Iterator[_Line]:
    """The lines of a file and their numbers, from 1. DataError where they are not UTF-8."""
    openers = {".gz": gzip.open, ".xz": lzma.open}
    offset = number = 0
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            for raw in file:
                number += 1
                text = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
                try:
                    yield _Line(text.decode("utf8"), number)
                except UnicodeDecodeError as error:
                    at = offset + len(raw) - len(text) + error.start
                    raise DataError(
                        f"{path}: byte {at} (line {number}) is not UTF-8 ({error.reason}); convert the file to UTF-8"
                    ) from None
                offset += len(raw)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short after line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def json_lines(lines: Iterable[_Line], path: Path, field: str) -> Iterator[tuple[dict[str, Any], int]]:
    """JSON objects that have text in `field`, and their lines' numbers; blank lines are skipped."""
    for text, number in lines:
        if not text.strip(" \t\r\n"):
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: broken JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__}, wanted an object with the field {field!r}"
            )
        if field not in record:
            raise DataError(
                f"{where}: no field {field!r}; there are: {', '.join(map(repr, record)) or 'none'}"
            )
        value = record[field]
        if not isinstance(value, str):
            raise DataError(f"{where}: field {field!r} is a {type(value).__name__}, wanted a string")
        # JSON can spell half a surrogate pair, which is no character and which no tokenizer takes.
        try:
            value.encode("utf8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: field {field!r} holds {value[error.start]!r}, half a surrogate pair"
            ) from None
        yield record, number


def _from_txt(lines: Iterable[_Line], documents: TxtDocuments) -> Iterator[tuple[str, int]]:
    if documents == "line":
        for text, number in lines:
            if text := text.rstrip("\r\n"):
                yield text, number
        return
    held: list[str] = []
    start = 1
    for text, number in lines:
        blank = documents == "paragraph" and not text.strip()
        if not blank:
            start = start if held else number
            held.append(text)
        elif held:
            yield "".join(held).rstrip("\r\n"), start
            held = []
    if held:
        whole = "".join(held)
        yield (whole if documents == "file" else whole.rstrip("\r\n")), start
