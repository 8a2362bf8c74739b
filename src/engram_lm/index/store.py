"""An index: a directory of documents that is read by many, written by one, and never seen half changed (docs/store.md).

    with Store.create("notes", vocab_size=49_152, tokenizer=fingerprint) as store:
        store.add([("a.txt", [5, 9, 2, 7], "notes/a.txt")])      # on disk when it returns
        store.delete("a.txt")                                    # in no count when it returns
        store.purge()                                            # out of the files, proved by reading them
    with Store.open("notes") as store:                           # any number of readers, without a lock
        store.snapshot().distribution([5, 9])

Token ids only: texts and tokenizers are the caller's.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError, IdentityError
from engram_lm.index.checking import VerifyReport, verify
from engram_lm.index.locking import WriterLock
from engram_lm.index.manifest import MANIFEST, Entry, Manifest, require_new, require_tenant
from engram_lm.index.merge_policy import MOST_SEGMENTS
from engram_lm.index.merger import Background, merge_next, merge_whole
from engram_lm.index.purging import Progress, PurgeReport, purge
from engram_lm.index.reader import IndexReader
from engram_lm.index.segment import Document
from engram_lm.index.snapshot import Snapshot
from engram_lm.index.writer import IndexWriter, Item, is_ours

PUBLIC = "public"
LOCK = "lock"

Tenant = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TenantStats:
    """Documents and tokens are live ones, ENDs included; dead ones wait in their segments for a merge or a purge."""

    documents: int
    tokens: int
    dead_documents: int
    dead_tokens: int
    segments: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Stats(TenantStats):
    """Sums over `tenants`; bytes: of all files in the directory; merge_error: why the last background merge failed."""

    generation: int
    vocab_size: int
    tokenizer: str
    tenants: dict[str, TenantStats]
    merge_error: str = ""

    @property
    def bytes_per_token(self) -> float:
        """Of the directory, a live token; 0 for none."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def dead_share(self) -> float:
        """Of all tokens in segments, 0 to 1."""
        return self.dead_tokens / max(1, self.tokens + self.dead_tokens)


class Index:
    """Made by `create` and `open`. Threads may share one; only the writer's process changes anything."""

    def __init__(self, opened: IndexReader, writer: IndexWriter | None, merging: str) -> None:
        self.directory = opened.directory
        self._opened, self._writer = opened, writer
        self._background = Background(writer) if writer is not None and merging == "background" else None
        self._lock = threading.RLock()
        self._snapshots: tuple[Manifest, dict[tuple[str, ...], Snapshot]] = (opened.manifest, {})
        self._closed = False

    # ---- opening and closing ------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, directory: str | os.PathLike, *, vocab_size: int, tokenizer: str = "",
        merging: Literal["background", "by hand"] = "background", wait_seconds: float = 0.0,
    ) -> "Index":  # fmt: skip
        """Make an empty index and open it to write.

        Args:
            directory: made where it is missing; one that holds an index is refused.
            tokenizer: fingerprint of the tokenizer whose ids the index will hold.
        """
        directory = Path(directory)
        if not isinstance(tokenizer, str) or not tokenizer.isprintable():
            raise ConfigError(f"tokenizer is a fingerprint, printable text; got {tokenizer!r}.")
        if type(vocab_size) is not int or not 0 < vocab_size < 2**31:
            raise ConfigError(f"vocab_size is a whole number from 1 to 2^31 - 1; got {vocab_size!r}.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be made: {error.strerror}.") from None
        lock = WriterLock(directory / LOCK, wait_seconds=wait_seconds)
        try:
            require_new(directory)
            if found := [
                path.name
                for path in directory.iterdir()
                if is_ours(path.name) and not path.name.startswith(MANIFEST)
            ]:
                raise CheckpointError(
                    f"{directory} holds {sorted(found)[0]} but no {MANIFEST}: an index that lost it. Restore the {MANIFEST}, "
                    "or name another directory."
                )
            data = Manifest(vocab_size=vocab_size, tokenizer=tokenizer).to_bytes()
            beside = directory / f"{MANIFEST}.new"
            durable.remove(beside)
            os.close(durable.write_new(beside, data))
            try:
                durable.rename(beside, directory / MANIFEST)
                durable.sync_directory(directory)
            except OSError as error:
                raise CheckpointError(f"{directory} cannot be written: {error.strerror}.") from None
            # the directory's own name; one that may not be opened is synced by whoever may
            with contextlib.suppress(OSError):
                durable.sync_directory(directory.parent)
            return cls(*_for_writing(directory, lock), merging=_known(merging))
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(
        cls, directory: str | os.PathLike, mode: Literal["read", "write"] = "read", *, tokenizer: str | None = None,
        vocab_size: int | None = None, merging: Literal["background", "by hand"] = "background",
        wait_seconds: float = 0.0,
    ) -> "Index":  # fmt: skip
        """Open an index.

        Args:
            tokenizer: the caller's fingerprint, and `vocab_size`: IdentityError where the index has another.
            wait_seconds: how long another writer is waited for.

        Raises: CheckpointError where there is no index, it is damaged, or another process writes it.
        """
        directory = Path(directory)
        if mode not in ("read", "write"):
            raise ConfigError(f"mode is 'read' or 'write'; got {mode!r}.")
        lock = None
        opened = IndexReader(directory)
        try:
            _require_same(directory, opened.manifest, tokenizer, vocab_size)
            if mode == "read":
                return cls(opened, None, merging=_known(merging))
            lock = WriterLock(directory / LOCK, wait_seconds=wait_seconds)
            opened.reload()
            _require_same(directory, opened.manifest, tokenizer, vocab_size)
            return cls(opened, IndexWriter(opened, lock), merging=_known(merging))
        except BaseException:
            opened.close()
            if lock is not None:
                lock.release()
            raise

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the merge that is running, and let others write. Snapshots stay."""
        if self._closed:
            return
        self._closed = True
        if self._background is not None:
            self._background.close()
        if self._writer is not None:
            self._writer.close()
        self._opened.close()

    # ---- reading ------------------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """How many changes led to what is seen now."""
        return self._opened.manifest.generation

    @property
    def vocab_size(self) -> int:
        return self._opened.manifest.vocab_size

    @property
    def tokenizer(self) -> str:
        """The fingerprint."""
        return self._opened.manifest.tokenizer

    @property
    def tenants(self) -> tuple[str, ...]:
        """Those that have documents."""
        self.refresh()
        return tuple(self._opened.manifest.tenants)

    def refresh(self) -> bool:
        """Go to the newest generation, if there is a newer one. One stat of a file where there is none."""
        self._require_open()
        return self._writer is None and self._opened.reload()

    def snapshot(self, tenant: Tenant = PUBLIC) -> Snapshot:
        """What these tenants' documents say now; it never changes. A tenant without documents sees nothing."""
        names = tuple(dict.fromkeys([tenant] if isinstance(tenant, str) else tenant))
        for name in names:
            require_tenant(name)

        def make(opened: IndexReader) -> Snapshot:
            manifest, made = self._snapshots
            if manifest is not opened.manifest:
                made = {}
                self._snapshots = (opened.manifest, made)
            if names not in made:
                made[names] = Snapshot(opened.views(names), vocab_size=opened.manifest.vocab_size)
            return made[names]

        return self._newest(make)

    def documents(self, tenant: str = PUBLIC) -> Iterator[Document]:
        """Facts of all live documents of a tenant."""
        require_tenant(tenant)
        for view in self._newest(lambda opened: opened.views([tenant])):
            for number in range(view.segment.n_documents):
                if number not in view.dead_documents:
                    yield view.segment.document(number)

    def get(self, document_id: str, tenant: str = PUBLIC) -> tuple[Document, np.ndarray] | None:
        """A live document and its tokens; None where there is none."""
        require_tenant(tenant)
        for view in self._newest(lambda opened: opened.views([tenant])):
            number = view.segment.number_of(document_id)
            if number >= 0 and number not in view.dead_documents:
                return view.segment.document(number), view.segment.document_tokens(number)
        return None

    def stats(self) -> Stats:
        """Sizes by tenant and of all; deleted documents count as dead until they are merged away."""
        self.refresh()
        manifest = self._opened.manifest
        tenants = {name: _stats_of(entries) for name, entries in manifest.tenants.items()}
        names = ("documents", "tokens", "dead_documents", "dead_tokens", "segments")
        sums = {name: sum(getattr(found, name) for found in tenants.values()) for name in names}
        return Stats(
            **sums, bytes=_bytes_in(self.directory), generation=manifest.generation, vocab_size=manifest.vocab_size,
            tokenizer=manifest.tokenizer, tenants=tenants, merge_error=self._background.error if self._background else "",
        )  # fmt: skip

    def verify(self, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every byte and check it. CheckpointError names the file. progress: (bytes read, bytes in all)."""
        self._require_open()
        # an Opened of its own: a writer's must not move to another generation
        opened = IndexReader(self.directory)
        try:
            return verify(opened, progress)
        finally:
            opened.close()

    def _newest(self, make: Callable[[IndexReader], Any]) -> Any:
        """`make` of the newest generation; again where a writer removed its files in the meantime."""
        while True:
            with self._lock:
                self.refresh()
                try:
                    return make(self._opened)
                except CheckpointError:
                    if self._opened.is_newest:
                        raise

    # ---- changing -----------------------------------------------------------------------------------------------------

    def add(
        self, documents: Iterable[Item], *, tenant: str = PUBLIC, replace: Literal["no", "yes"] = "no"
    ) -> int:
        """Add documents, all in one generation, on disk when this returns; the generation.

        Args:
            documents: (id, token ids), (id, token ids, source) or (Document, token ids) each. May be a generator: more than
                2^26 tokens become several segments, each written as soon as it is full.
            replace: "yes" deletes documents of the same ids in the same generation.

        Raises: ConfigError for an id that is there already, TokenIdError for a token outside the vocabulary,
            CheckpointError where the disk is full. Nothing has changed then.
        """
        return self.update(add=documents, tenant=tenant, replace=replace)

    def delete(
        self, ids: str | Iterable[str], *, tenant: str = PUBLIC, missing: Literal["error", "ignore"] = "error"
    ) -> int:
        """Take documents out of every count, from now on; the generation. ConfigError names an id that is not there."""
        return self.update(delete=ids, tenant=tenant, missing=missing)

    def update(
        self, *, add: Iterable[Item] = (), delete: str | Iterable[str] = (), tenant: str = PUBLIC,
        replace: Literal["no", "yes"] = "no", missing: Literal["error", "ignore"] = "error",
    ) -> int:  # fmt: skip
        """Delete some documents and add others: a reader sees both or neither."""
        writer = self._writing()
        generation = writer.update(
            require_tenant(tenant), add=add, delete=delete, replace=replace, missing=missing
        )
        if self._background is not None:
            # the thread may be behind, with a large merge perhaps
            self._background.wake(
                tenant if len(writer.manifest.tenants.get(tenant, ())) >= MOST_SEGMENTS else None
            )
        return generation

    def merge(self, tenant: Tenant | None = None, *, how: Literal["whole", "due"] = "whole") -> bool:
        """Merge now: all segments of each tenant (or of those named) into one, or only what is due. False: nothing to do."""
        writer, done = self._writing(), False
        if how == "due" and tenant is None:
            while merge_next(writer):
                done = True
        elif how == "whole":
            for name in self._names(tenant):
                done = merge_whole(writer, name) or done
        else:
            raise ConfigError(f'how is "whole", or "due" for all tenants; got {how!r} and tenant {tenant!r}.')
        return done

    def purge(
        self, ids: str | Iterable[str] = (), *, tenant: Tenant | None = None, progress: Progress | None = None
    ) -> PurgeReport:
        """Rewrite all segments that have deleted documents, and prove by reading every file that nothing of them is left.

        Args:
            ids: documents to delete first, of the one tenant named (default: "public"); proved like the others.
            progress: (what: "rewritten" or "read", done, of).

        Raises: CheckpointError that names a file which still holds tokens of a deleted document.
        """
        writer = self._writing()
        ids = [ids] if isinstance(ids, str) else list(ids)
        if ids and tenant is not None and not isinstance(tenant, str):
            raise ConfigError("Documents to purge by id are of one tenant; name it.")
        return purge(
            writer, self._names(tenant), {require_tenant(tenant or PUBLIC): ids} if ids else {}, progress
        )

    def _names(self, tenant: Tenant | None) -> list[str]:
        if tenant is None:
            return list(self._opened.manifest.tenants)
        return [require_tenant(name) for name in ([tenant] if isinstance(tenant, str) else tenant)]

    def _writing(self) -> IndexWriter:
        self._require_open()
        if self._writer is None:
            raise ConfigError(f'{self.directory} is open to read. Open it with mode="write" to change it.')
        return self._writer

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError(f"{self.directory} is closed.")


def _for_writing(directory: Path, lock: WriterLock) -> tuple[IndexReader, IndexWriter]:
    opened = IndexReader(directory)
    return opened, IndexWriter(opened, lock)


def _known(merging: str) -> str:
    if merging not in ("background", "by hand"):
        raise ConfigError(f"merging is 'background' or 'by hand'; got {merging!r}.")
    return merging


def _require_same(directory: Path, manifest: Manifest, tokenizer: str | None, vocab_size: int | None) -> None:
    if tokenizer is not None and tokenizer != manifest.tokenizer:
        raise IdentityError(
            f"{directory} holds tokens of the tokenizer {manifest.tokenizer!r}; yours is {tokenizer!r}. The same numbers are "
            "other words: use its tokenizer, or index the texts anew."
        )
    if vocab_size is not None and vocab_size != manifest.vocab_size:
        raise IdentityError(
            f"{directory} has a vocabulary of {manifest.vocab_size:,}; yours has {vocab_size:,}."
        )


def _stats_of(entries: Sequence[Entry]) -> TenantStats:
    return TenantStats(
        documents=sum(entry.documents - entry.dead_documents for entry in entries),
        tokens=sum(entry.live_tokens for entry in entries),
        dead_documents=sum(entry.dead_documents for entry in entries),
        dead_tokens=sum(entry.dead_tokens for entry in entries),
        segments=len(entries),
        bytes=sum(entry.bytes for entry in entries),
    )


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
