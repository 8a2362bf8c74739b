"""The files of an index's newest generation, mapped once each (docs/store.md). A reader's side: it takes no lock.

    opened = Opened(directory)                 # reads the manifest
    opened.reload()                            # False: it is still the newest generation
    views = opened.views(("public",))          # CheckpointError where a file is gone or damaged

What is mapped stays readable after its file was removed.
"""

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_lm.durable import same_file
from engram_lm.errors import CheckpointError
from engram_lm.index.deletes import Dead, mask_from_bytes, merged
from engram_lm.index.manifest import (
    MANIFEST,
    MOST_BYTES,
    SEALED,
    Entry,
    Manifest,
    Mask,
    mask_name,
    seal,
    segment_name,
)
from engram_lm.index.segment import Segment
from engram_lm.index.snapshot import LiveSegment


class IndexReader:
    """One generation, its manifest's open file, and the segments and masks that were asked for so far."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.RLock()
        self._segments: dict[str, Segment] = {}
        self._masks: dict[str, Dead] = {}
        self._views: dict[tuple[str, ...], LiveSegment] = {}
        self._dead: dict[tuple[str, ...], frozenset[int]] = {}
        self.manifest, self._file = read_manifest(directory)

    @property
    def is_newest(self) -> bool:
        """Whether no newer manifest has taken this one's place."""
        with self._lock:
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
            old, self.manifest, self._file = self._file, manifest, file
            os.close(old)
            entries = [entry for _, entry in manifest.entries()]
            segments, views = {entry.seal for entry in entries}, {_key(entry) for entry in entries}
            masks = {mask.seal for entry in entries for mask in entry.masks}
            self._segments = {name: found for name, found in self._segments.items() if name in segments}
            self._masks = {name: found for name, found in self._masks.items() if name in masks}
            self._views = {name: found for name, found in self._views.items() if name in views}
            self._dead = {name: found for name, found in self._dead.items() if name in views}

    def views(self, tenants: Sequence[str]) -> list[LiveSegment]:
        """What these tenants have, in the order of the manifest."""
        with self._lock:
            return [self.view(entry) for tenant in tenants for entry in self.manifest.tenants.get(tenant, ())]

    def segment(self, entry: Entry) -> Segment:
        """The mapped file of an entry."""
        with self._lock:
            if entry.seal not in self._segments:
                self._segments[entry.seal] = open_segment(self.directory, self.manifest, entry)
            return self._segments[entry.seal]

    def view(self, entry: Entry) -> LiveSegment:
        """A segment without its deleted documents."""
        with self._lock:
            key = _key(entry)
            if key not in self._views:
                documents, rank = merged([_NONE, *(self.mask(entry, mask) for mask in entry.masks)])
                if (rank[1:] == rank[:-1]).any():
                    raise CheckpointError(
                        f"{self.directory / segment_name(entry.number)} has masks that hide the same places. Run verify."
                    )
                self._views[key] = LiveSegment(self.segment(entry), rank, documents)
            return self._views[key]

    def dead_documents(self, entry: Entry) -> frozenset[int]:
        """Numbers of the deleted documents of a segment, without looking at its places."""
        with self._lock:
            key = _key(entry)
            if key not in self._dead:
                parts = [self.mask(entry, mask)[0] for mask in entry.masks]
                self._dead[key] = frozenset(itertools.chain.from_iterable(part.tolist() for part in parts))
            return self._dead[key]

    def mask(self, entry: Entry, mask: Mask) -> Dead:
        """What a mask of an entry says."""
        with self._lock:
            if mask.seal not in self._masks:
                self._masks[mask.seal] = read_mask(self.directory, entry, mask)
            return self._masks[mask.seal]

    def keep_segment(self, entry: Entry, segment: Segment) -> None:
        """A segment that was just written: it need not be read."""
        with self._lock:
            self._segments[entry.seal] = segment

    def keep_mask(self, mask: Mask, dead: Dead) -> None:
        """What a mask says that was just written."""
        with self._lock:
            self._masks[mask.seal] = dead

    def close(self) -> None:
        """Forget the files; snapshots keep what they have mapped."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._segments, self._masks, self._views, self._dead = {}, {}, {}, {}

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


_NONE: Dead = (np.empty(0, np.uint32), np.empty(0, np.uint32))


def _key(entry: Entry) -> tuple[str, ...]:
    return entry.seal, *(mask.seal for mask in entry.masks)


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


def read_mask(directory: Path, entry: Entry, mask: Mask) -> Dead:
    """Dead documents and dead places of an entry's mask."""
    path = directory / mask_name(mask.number)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if seal(data) != mask.seal:
        raise CheckpointError(f"{path} is not the file that the manifest names: restore it, or run verify.")
    return mask_from_bytes(data, path, entry, mask)


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
