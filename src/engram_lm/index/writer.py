"""Changes of an index by its one writer: each is one generation, on disk when it returns (docs/store.md).

    writer = Writer(opened, lock)
    writer.update("public", add=[("a.txt", [5, 9, 2], "notes")], delete=["b.txt"], replace="no", missing="error")

Building and sorting run outside the lock that changes share; what they made becomes known in `commit`.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError, TokenIdError
from engram_lm.index.by_id import Finder
from engram_lm.index.deletes import mask_to_bytes, merged
from engram_lm.index.locking import WriterLock
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
from engram_lm.index.reader import IndexReader, read_manifest, sealed
from engram_lm.index.segment import Document, Segment, write_segment
from engram_lm.index.segment_file import token_dtype
from engram_lm.index.snapshot import dead_ranks

SEGMENT_TOKENS = 2**26  # an add of more becomes several segments
IN_MEMORY_TOKENS = 2**20  # more are written part by part as they are sorted
MOST_ID = 4096

Tokens = Sequence[int] | np.ndarray
Item = tuple[str, Tokens] | tuple[str, Tokens, str] | tuple[Document, Tokens]
Tenants = dict[str, tuple[Entry, ...]]


@dataclass
class Files:
    """Files that a change has written so far."""

    paths: list[Path] = field(default_factory=list)


class IndexWriter:
    """The lock on a directory, the newest generation, and the next file's number.

    changing: held while a generation is worked out and committed.
    active: changes that are writing files, merges too; `changing` is notified when one ends.
    busy: numbers of segments that a merge is reading.
    """

    def __init__(self, opened: IndexReader, lock: WriterLock) -> None:
        self.opened, self.lock, self.directory = opened, lock, opened.directory
        self.changing = threading.Condition(threading.RLock())
        self.active, self.busy = 0, set[int]()
        self.unknown = ""
        self._next = self.manifest.next
        self._remove_leftovers()

    @property
    def manifest(self) -> Manifest:
        return self.opened.manifest

    def _remove_leftovers(self) -> None:
        """Files of changes that never came to be."""
        kept = self.manifest.files()
        for path in self.directory.iterdir():
            if is_ours(path.name) and path.name not in kept:
                with contextlib.suppress(OSError):
                    durable.remove(path)

    def require_writing(self) -> None:
        """CheckpointError where no change may be made."""
        self.lock.require_held()
        if self.unknown:
            raise CheckpointError(self.unknown)

    def new_number(self) -> int:
        """Of the next file; no other file ever gets it."""
        with self.changing:
            # a number that is given out without the lock may be another writer's
            self.lock.require_held()
            self._next += 1
            return self._next - 1

    @contextlib.contextmanager
    def change(self) -> Iterator[Files]:
        """Around everything that writes files for one generation."""
        files = Files()
        with self.changing:
            self.active += 1
        try:
            yield files
        except BaseException:
            self.remove_unnamed(files)
            raise
        finally:
            with self.changing:
                self.active -= 1
                self.changing.notify_all()

    def remove_unnamed(self, files: Files) -> None:
        """Whatever went wrong, and wherever: the manifest on the disk decides which files there are."""
        with contextlib.suppress(CheckpointError, OSError):
            manifest, file = read_manifest(self.directory)
            os.close(file)
            named = manifest.files()
            for path in files.paths:
                if path.name not in named:
                    durable.remove(path)

    def close(self) -> None:
        """Let others write, once no thread of this process does."""
        with self.changing:
            while self.active:
                self.changing.wait()
            self.lock.release()

    # ---- one generation -----------------------------------------------------------------------------------------------

    def commit(self, tenants: Tenants) -> int:
        """Make these segments the newest generation; its number. Its files must be on disk. Call with `changing` held."""
        self.require_writing()
        old, path = self.manifest, self.directory / MANIFEST
        if not self.opened.is_newest:
            raise CheckpointError(f"{path} is not the one that this writer wrote last. Open the index again.")
        kept = {name: entries for name, entries in tenants.items() if entries}
        manifest = replace(old, generation=old.generation + 1, next=self._next, tenants=kept)
        beside = self.directory / f"{MANIFEST}.new"
        data = manifest.to_bytes()
        if len(data) > MOST_BYTES:
            raise ConfigError(
                f"{path} would have {len(data):,} bytes; it has at most {MOST_BYTES:,}. Merge segments first."
            )
        durable.remove(beside)
        file = durable.write_new(beside, data)
        try:
            durable.rename(beside, path)
            durable.sync_directory(self.directory)
        except BaseException as error:
            renamed = durable.same_file(path, file)
            os.close(file)
            if renamed:
                self.unknown = f"{path} was replaced, but whether that lasts is not known ({error}). Open the index again."
            else:
                with contextlib.suppress(OSError):
                    durable.remove(beside)
            if isinstance(error, OSError):
                raise CheckpointError(
                    self.unknown or f"{path} cannot be replaced: {error.strerror}."
                ) from None
            raise
        self.opened.go_to(manifest, file)
        for name in old.files() - manifest.files():
            with contextlib.suppress(OSError):
                durable.remove(self.directory / name)
        return manifest.generation

    def update(
        self,
        tenant: str,
        *,
        add: Iterable[Item],
        delete: Iterable[str],
        replace: Literal["no", "yes"],
        missing: Literal["error", "ignore"],
    ) -> int:
        """Delete documents and add others, in one generation."""
        for name, value, known in (
            ("replace", replace, ("no", "yes")),
            ("missing", missing, ("error", "ignore")),
        ):
            if value not in known:
                raise ConfigError(f"{name} is one of {', '.join(map(repr, known))}; got {value!r}.")
        delete = [delete] if isinstance(delete, str) else list(delete)
        self.require_writing()
        with self.change() as files:
            finder, added, entries = self.finder(tenant), set[str](), []
            for segment, ids in self._segments(
                tenant, add, delete if replace == "no" else None, finder, added, files
            ):
                entries.append(segment)
                added |= ids
            with self.changing:
                present = self.manifest.tenants.get(tenant, ())
                looked = replace == "no" and present == finder.entries
                if present != finder.entries:
                    finder = self.finder(tenant)
                dead = to_delete(finder, tenant, delete, missing)
                for id in added if not looked else ():
                    place = finder.find(id)
                    if place is not None and place[1] not in dead.get(place[0].number, ()):
                        if replace == "no":
                            raise _duplicate(id, tenant)
                        dead.setdefault(place[0].number, set()).add(place[1])
                if not dead and not entries:
                    return self.manifest.generation
                kept = [self.masked(entry, dead.get(entry.number, ()), files) for entry in present]
                left = tuple(entry for entry in kept if entry is not None)
                return self.commit({**self.manifest.tenants, tenant: (*left, *entries)})

    # ---- adding -------------------------------------------------------------------------------------------------------

    def _segments(
        self, tenant: str, add: Iterable[Item], going: Iterable[str] | None, finder: Finder, added: set[str], files: Files
    ) -> Iterator[tuple[Entry, set[str]]]:  # fmt: skip
        """Segments of the documents to add and their ids. A duplicate is refused before anything is sorted.

        going: ids that may be there already; None: all may.
        """
        may, now = set(going or ()), time.time()
        ids, pairs, total = set[str](), [], 0
        for item in add:
            document, given = described(item, now)
            if document.id in ids or document.id in added:
                raise ConfigError(
                    f"The document {document.id!r} is there twice in one add. Give each its own id."
                )
            if going is not None and document.id not in may and finder.find(document.id) is not None:
                raise _duplicate(document.id, tenant)
            ids.add(document.id)
            tokens = compact(given, self.manifest.vocab_size)
            pairs.append((document, tokens))
            total += len(tokens) + 1
            if total >= SEGMENT_TOKENS:
                yield self.write(pairs, files), ids
                ids, pairs, total = set(), [], 0
        if pairs:
            yield self.write(pairs, files), ids

    def write(self, pairs: Sequence[tuple[Document, Tokens]], files: Files) -> Entry:
        """Sort documents into a segment on disk; its name in the directory is synced by `commit`."""
        facts = {"vocab_size": self.manifest.vocab_size, "tokenizer": self.manifest.tokenizer}
        number = self.new_number()
        path = self.directory / segment_name(number)
        files.paths.append(path)
        if sum(len(tokens) for _, tokens in pairs) > IN_MEMORY_TOKENS:
            segment = write_segment(path, pairs, **facts, sync="file")
            entry = sealed(path, number, segment)
        else:
            documents, lists = [document for document, _ in pairs], [tokens for _, tokens in pairs]
            segment = Segment.build(lists, documents=documents, **facts)
            data = segment.to_bytes()
            # nobody knows of the number before the manifest names it: no other name first
            os.close(durable.write_new(path, data.data))
            entry = Entry(
                number=number, tokens=len(segment), documents=segment.n_documents, bytes=len(data),
                seal=seal(data[:SEALED].tobytes()),
            )  # fmt: skip
        self.opened.keep_segment(entry, segment)
        return entry

    # ---- deleting -----------------------------------------------------------------------------------------------------

    def finder(self, tenant: str) -> Finder:
        """Of the documents that a tenant has now."""
        with self.changing:
            return Finder(self.opened, self.manifest.tenants.get(tenant, ()))

    def masked(self, entry: Entry, numbers: Iterable[int], files: Files) -> Entry | None:
        """The entry with these live documents deleted as well, its mask on disk; None where nothing of it lives on.

        The last masks are taken into the new one while they are not much larger: there are few, and each token is written
        few times.
        """
        documents = np.array(sorted(numbers), np.uint32)
        if not len(documents):
            return entry
        if entry.dead_documents + len(documents) == entry.documents:
            return None
        dead = documents, dead_ranks(self.opened.segment(entry), documents.tolist())
        masks = list(entry.masks)
        while masks and masks[-1].tokens <= 2 * len(dead[1]):
            dead = merged([self.opened.mask(entry, masks.pop()), dead])
        number = self.new_number()
        path = self.directory / mask_name(number)
        data = mask_to_bytes(entry.number, *dead)
        files.paths.append(path)
        os.close(durable.write_new(path, data))
        mask = Mask(number=number, documents=len(dead[0]), tokens=len(dead[1]), seal=seal(data))
        self.opened.keep_mask(mask, dead)
        return replace(entry, masks=(*masks, mask))


def to_delete(finder: Finder, tenant: str, delete: Iterable[str], missing: str) -> dict[int, set[int]]:
    """Numbers of these documents, by segment. ConfigError names one that is not there, unless `missing` is "ignore"."""
    dead: dict[int, set[int]] = {}
    unknown = []
    for id in dict.fromkeys(delete):
        place = finder.find(id)
        if place is None:
            unknown.append(id)
        else:
            dead.setdefault(place[0].number, set()).add(place[1])
    if unknown and missing == "error":
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"There is no document {unknown[0]!r}{more} in the tenant {tenant!r} (never added, or deleted already). "
            'Nothing was deleted; missing="ignore" passes over such ids.'
        )
    return dead


def described(item: Item, now: float) -> tuple[Document, Tokens]:
    """A document's facts and tokens, from what `add` takes."""
    wanted = "A document is (id, tokens), (id, tokens, source) or (Document, tokens)"
    if not isinstance(item, tuple | list) or not 2 <= len(item) <= 3:
        raise ConfigError(f"{wanted}; got {type(item).__name__} {str(item)[:60]!r}.")
    first, tokens, source = item[0], item[1], item[2] if len(item) == 3 else ""
    if isinstance(first, Document) and len(item) == 2:
        document = first if first.added else replace(first, added=now)
    elif isinstance(first, str) and isinstance(source, str):
        document = Document(id=first, source=source, added=now)
    else:
        raise ConfigError(
            f"{wanted}; got an id of {type(first).__name__} and a source of {type(source).__name__}."
        )
    if not 0 < len(document.id) <= MOST_ID:
        raise ConfigError(
            f"A document's id has 1 to {MOST_ID:,} characters; {document.id[:30]!r} has {len(document.id):,}."
        )
    if isinstance(tokens, str | bytes):
        raise ConfigError(
            f"The document {document.id!r} is text; the index takes token ids. Tokenize it first."
        )
    if not hasattr(tokens, "__len__"):
        raise TokenIdError(
            f"Token ids are a list or an array; the document {document.id!r} has {type(tokens).__name__}."
        )
    return document, tokens


def compact(tokens: Tokens, vocab_size: int) -> np.ndarray:
    """Ids in as few bytes as a segment keeps them in; wrong ones stay as they are, to be refused when they are sorted."""
    found = np.asarray(tokens).reshape(-1)
    if found.dtype.kind in "iu" and found.size and found.min() >= 0 and found.max() < vocab_size:
        return found.astype(token_dtype(vocab_size), copy=False)
    return found


def _duplicate(document_id: str, tenant: str) -> ConfigError:
    return ConfigError(
        f'The document {document_id!r} is in the tenant {tenant!r} already. Delete it first, or add with replace="yes".'
    )


def is_ours(name: str) -> bool:
    """Whether a file of a directory is a segment, a mask, or one being written."""
    stem, _, suffix = name.lstrip(".").partition(".")
    return name == f"{MANIFEST}.new" or (
        len(stem) == 12 and stem.isdigit() and suffix.split(".")[0] in ("segment", "mask")
    )
