"""The files of an index's newest generation, mapped once each (docs/store.md). A reader's side: it takes no lock.

    opened = Opened(directory)                 # reads the manifest
    opened.reload()                            # False: it is still the newest generation
    views = opened.views(("public",))          # CheckpointError where a file is gone or damaged

What is mapped stays readable after its file was removed.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from engram_lm.errors import CheckpointError
from engram_lm.index.durable import same_file
from engram_lm.index.manifest import (
    MANIFEST,
    MOST_BYTES,
    SEALED,
    Entry,
    Manifest,
    mask_name,
    seal,
    segment_name,
)
from engram_lm.index.masks import mask_from_bytes
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import View


class Opened:
    """One generation, its manifest's open file, and the segments and masks that were asked for so far."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._views: dict[tuple[str, str], View] = {}
        self.manifest, self._file = read_manifest(directory)

    @property
    def is_newest(self) -> bool:
        """Whether no newer manifest has taken this one's place."""
        return same_file(self.directory / MANIFEST, self._file)

    def reload(self) -> bool:
        """Go to the newest generation; whether there was another."""
        with self._lock:
            if self.is_newest:
                return False
            self.go_to(*read_manifest(self.directory))
            return True

    def go_to(self, manifest: Manifest, file: int) -> None:
        """This generation from now on. file: its manifest, open; closed when the next one comes."""
        with self._lock:
            os.close(self._file)
            self.manifest, self._file = manifest, file
            entries = [entry for _, entry in manifest.entries()]
            segments, views = {entry.seal for entry in entries}, {_key(entry) for entry in entries}
            self._segments = {name: found for name, found in self._segments.items() if name in segments}
            self._views = {name: found for name, found in self._views.items() if name in views}

    def views(self, tenants: Sequence[str]) -> list[View]:
        """What these tenants have, in the order of the manifest."""
        with self._lock:
            return [self.view(entry) for tenant in tenants for entry in self.manifest.tenants.get(tenant, ())]

    def segment(self, entry: Entry) -> Segment:
        """The mapped file of an entry."""
        with self._lock:
            if entry.seal not in self._segments:
                self._segments[entry.seal] = open_segment(self.directory, self.manifest, entry)
            return self._segments[entry.seal]

    def view(self, entry: Entry) -> View:
        """A segment and its mask."""
        with self._lock:
            key = _key(entry)
            if key not in self._views:
                segment = self.segment(entry)
                if entry.mask is None:
                    self._views[key] = View(segment, dead_documents=())
                else:
                    dead_documents, dead_rank = read_mask(self.directory, entry)
                    self._views[key] = View(segment, dead_rank, dead_documents)
            return self._views[key]

    def close(self) -> None:
        """Forget the files; snapshots keep what they have mapped."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._segments, self._views = {}, {}

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def _key(entry: Entry) -> tuple[str, str]:
    return entry.seal, entry.mask.seal if entry.mask else ""


def read_manifest(directory: Path) -> tuple[Manifest, int]:
    """The newest generation, and its file, open."""
    path = directory / MANIFEST
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(
            f'{directory} holds no index (there is no {MANIFEST} in it). Make one with "engram-lm index create".'
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        size = os.fstat(file).st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes; a manifest has at most {MOST_BYTES:,}.")
        with open(file, "rb", closefd=False) as reader:
            return Manifest.from_bytes(reader.read(), path), file
    except BaseException as error:
        os.close(file)
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        raise


def open_segment(directory: Path, manifest: Manifest, entry: Entry) -> Segment:
    """Map a segment that is what the manifest says."""
    path = directory / segment_name(entry.number)
    size, start = _start(path)
    if (size, start) != (entry.bytes, entry.seal):
        raise CheckpointError(f"{path} is not the file that the manifest names: restore it, or run verify.")
    segment = Segment.open(path)
    for what, found, wanted in (
        ("vocabulary", segment.vocab_size, manifest.vocab_size),
        ("tokenizer", segment.tokenizer, manifest.tokenizer),
        ("number of tokens", len(segment), entry.tokens),
        ("number of documents", segment.n_documents, entry.documents),
    ):
        if found != wanted:
            raise CheckpointError(f"{path} has the {what} {found!r}; the manifest says {wanted!r}.")
    return segment


def read_mask(directory: Path, entry: Entry) -> tuple:
    """Dead documents and dead places of an entry that has a mask."""
    mask = entry.mask
    path = directory / mask_name(mask.number)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if seal(data) != mask.seal:
        raise CheckpointError(f"{path} is not the file that the manifest names: restore it, or run verify.")
    return mask_from_bytes(data, path, entry)


def sealed(path: Path, number: int, segment: Segment) -> Entry:
    """The entry of a segment that was just written."""
    size, start = _start(path)
    return Entry(number=number, tokens=len(segment), documents=segment.n_documents, bytes=size, seal=start)


def _start(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size, seal(file.read(SEALED))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
