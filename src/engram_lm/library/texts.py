"""Texts to be indexed, each with an id: files, folders, JSON lines, standard input; others through a converter.

.txt, .md and .rst are a document each; .jsonl (plain, .gz or .xz) is one a line; .pdf, .docx, .html and .pptx are converted
by markitdown (the extra `documents`). A folder gives every such file below it, hidden ones left out.

    for text in read_texts(["handbook/", "faq.jsonl.xz"]):
        print(text.id, len(text.text))

The id of a file is its path below the folder that was named, or its path as named; of a JSON line its field `id`, or
file:line. Title, url, licence and attribution of a JSON line are kept.
"""

import hashlib
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram_lm.corpus.text import json_lines, kind_of, read_lines
from engram_lm.errors import DataError
from engram_lm.extras import missing

STDIN = "-"
PLAIN = (".txt", ".md", ".rst")
# markitdown's own converter of each, by name: asked what a file is, it takes broken ones for plain text
_CONVERTERS = {
    ".pdf": "PdfConverter", ".docx": "DocxConverter", ".html": "HtmlConverter", ".htm": "HtmlConverter",
    ".pptx": "PptxConverter",
}  # fmt: skip
CONVERTED = tuple(_CONVERTERS)
KEPT = ("title", "url", "licence", "license", "attribution", "author", "date")
FILE_HASH, FOLDER = "file_sha256", "folder"


@dataclass(frozen=True, kw_only=True)
class Text:
    """One document to be: its id, where it came from, its words, and what else is to be told of it."""

    id: str
    text: str
    source: str = ""
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file and the ids its texts begin with. folder: the one that was named, resolved; empty for a file."""

    path: Path
    id: str
    folder: str = ""


def read_texts(
    paths: Iterable[str | Path],
    *,
    field: str = "text",
    id: str | None = None,
    extra: dict[str, str] | None = None,
) -> Iterator[Text]:
    """Texts of files, folders and "-" (standard input, which needs `id`), in order. DataError names what cannot be read."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found = [STDIN if str(path) == STDIN else path for path in paths]
    files = list(find(path for path in found if path != STDIN))
    single = len(files) + found.count(STDIN) == 1
    if id is not None and not single:
        raise DataError(
            f"One id ({id}) cannot name {len(files) + found.count(STDIN)} documents; name one file."
        )
    for path in found:
        if path == STDIN:
            if id is None:
                raise DataError("A document from standard input needs an id: --id NAME.")
            yield Text(
                id=id,
                text=_decoded(sys.stdin.buffer.read(), "standard input"),
                source="stdin",
                extra=extra or {},
            )
    for one in files:
        yield from texts_of(one, field=field, id=id, extra=extra)


def find(paths: Iterable[str | Path]) -> Iterator[Found]:
    """Readable files of files and folders; a folder's in the order of their names."""
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            readable = find_below(path)
            if not readable:
                raise DataError(
                    f"{path} holds no file that can be read ({', '.join((*PLAIN, '.jsonl', *CONVERTED))})."
                )
            yield from readable
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder.")
        elif not _reader_of(path):
            raise DataError(
                f"{path}: texts are read from {', '.join(PLAIN)} and .jsonl files, and {', '.join(CONVERTED)} with the extra "
                "documents."
            )
        else:
            yield Found(path=path, id=_name(path))


def find_below(folder: Path) -> list[Found]:
    """Readable files below a folder, hidden ones and those in hidden folders left out."""
    return [
        Found(path=file, id=_name(file.relative_to(folder)), folder=folder_name(folder))
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and _reader_of(file)
    ]


def texts_of(
    found: Found, *, field: str = "text", id: str | None = None, extra: dict[str, str] | None = None
) -> Iterator[Text]:
    """The texts of one file; a hash of its bytes is kept with each, so that a change is seen."""
    facts = {**(extra or {}), FILE_HASH: file_hash(found.path)}
    if found.folder:
        facts[FOLDER] = found.folder
    name = id or found.id
    if _reader_of(found.path) == "jsonl":
        for record, number in json_lines(read_lines(found.path), found.path, field):
            own = record.get("id")
            kept = {key: record[key] for key in KEPT if isinstance(record.get(key), str)}
            yield Text(
                id=str(own) if isinstance(own, str | int) and own != "" else f"{name}:{number}",
                text=record[field],
                source=name,
                extra={**kept, **facts},
            )
        return
    if _reader_of(found.path) == "plain":
        try:
            text = _decoded(found.path.read_bytes(), found.path)
        except OSError as error:
            raise DataError(f"{found.path} cannot be read: {error.strerror}.") from None
    else:
        text = _converted(found.path)
    yield Text(id=name, text=text, source=name, extra=facts)


def folder_name(folder: Path) -> str:
    """What documents of a folder remember of it."""
    return _name(folder.resolve())


def _name(path: Path) -> str:
    """A path as text; bytes of its name that are no UTF-8 as \\udcXX."""
    return path.as_posix().encode("utf8", "backslashreplace").decode("utf8")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _reader_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in PLAIN:
        return "plain"
    if suffix in CONVERTED:
        return "converted"
    try:
        return "jsonl" if kind_of(path) == ".jsonl" else "plain" if not path.suffix.endswith("z") else ""
    except DataError:
        return ""


def _decoded(data: bytes, where: Any) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} is not UTF-8 ({error.reason}); convert the text to UTF-8."
        ) from None


def _converted(path: Path) -> str:
    suffix = path.suffix.lower()
    try:
        from markitdown import MissingDependencyException, StreamInfo, converters
    except ImportError:
        raise missing(f"{path} is converted by markitdown", "documents") from None
    try:
        data = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return getattr(converters, _CONVERTERS[suffix])().convert(data, StreamInfo(extension=suffix)).markdown
    except MissingDependencyException:
        raise missing(f"{path}: markitdown lacks what {suffix} needs", "documents") from None
    except Exception as error:  # whatever a converter of foreign formats raises
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be converted: {why}") from None
