"""An index of texts: a `Index` of token ids and the tokenizer beside it (see the package)."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.index.manifest import require_index
from engram_lm.index.segment import Document
from engram_lm.index.store import PUBLIC, Index
from engram_lm.library.encoding import TextEncoder, encoder_of
from engram_lm.library.texts import FILE_HASH, FOLDER, Text, file_hash, find_below, folder_name, texts_of

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library.choosing import Chooser, Chosen, Sentence

Existing = Literal["error", "skip", "replace"]

# A commit of a long addition: what is lost where it is stopped, and what is held meanwhile.
COMMIT_CHARACTERS = 16 << 20
MOST_ORDER = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A document that holds what was looked for: how often, and the first of its passages, as (before, found, after)."""

    document: Document
    count: int
    passages: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What may come next. count: how often it followed the longest match; p: of the whole chain of orders."""

    token_id: int
    text: str
    count: int
    p: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What memory knows of how a text goes on. counts: how often its last 0 .. depth tokens occur."""

    depth: int
    matched: str
    counts: tuple[int, ...]
    continuations: tuple[Continuation, ...]
    hits: tuple[Hit, ...]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What an addition came to."""

    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    replaced: int = 0


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What a folder's index had to change."""

    added: int
    changed: int
    removed: int
    unchanged: int
    tokens: int


class Library:
    """Made by `create` and `open`; `store` is the index itself."""

    def __init__(self, store: Index, encoder: TextEncoder) -> None:
        self.store, self.encoder = store, encoder
        self._choosers: dict[str, tuple[Snapshot, Chooser]] = {}

    @classmethod
    def create(cls, directory: str | os.PathLike, *, tokenizer: Any, **options: Any) -> "Library":
        """Make an empty index for texts of a tokenizer (see `TextEncoder.of`). options: of `Index.create`."""
        encoder = TextEncoder.of(tokenizer)
        store = Index.create(
            directory, vocab_size=encoder.vocab_size, tokenizer=encoder.first_print, **options
        )
        try:
            encoder.save(Path(directory))
        except BaseException:
            store.close()
            raise
        return cls(store, encoder)

    @classmethod
    def open(
        cls, directory: str | os.PathLike, mode: Literal["read", "write"] = "read", *, tokenizer: Any = None, **options: Any
    ) -> "Library":  # fmt: skip
        """Open an index, read by the tokenizer in its directory. tokenizer: the caller's, for which the index must be; it
        reads an index whose directory holds none."""
        require_index(Path(directory))
        store = Index.open(directory, mode, **options)
        try:
            return cls(store, encoder_of(store, tokenizer))
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *error: Any) -> None:
        self.store.close()

    # ---- changing -----------------------------------------------------------------------------------------------------

    def add(
        self, texts: Iterable[Text], *, tenant: str = PUBLIC, existing: Existing = "error",
        report: Callable[[int, int], None] | None = None,
    ) -> Added:  # fmt: skip
        """Add texts, some MB a commit: what was committed stays where a long addition is stopped.

        Args:
            existing: what to do with an id that is there: refuse, leave the old document, or put the new one in its place.
            report: called after each commit with (documents, tokens) so far.
        """
        if existing not in ("error", "skip", "replace"):
            raise ConfigError(f"existing is error, skip or replace; got {existing!r}.")
        known = set() if existing == "error" else {document.id for document in self.store.documents(tenant)}
        documents = tokens = skipped = replaced = 0
        for batch in _batches(texts):
            if existing == "skip":
                before, batch = len(batch), [text for text in batch if text.id not in known]
                skipped += before - len(batch)
            elif existing == "replace":
                replaced += sum(text.id in known for text in batch)
            items = self._items(batch)
            if items:
                self.store.add(items, tenant=tenant, replace="yes" if existing == "replace" else "no")
            known.update(text.id for text in batch)
            documents, tokens = documents + len(items), tokens + sum(len(ids) for _, ids in items)
            if report is not None:
                report(documents, tokens)
        return Added(documents=documents, tokens=tokens, skipped=skipped, replaced=replaced)

    def delete(
        self, ids: Iterable[str], *, tenant: str = PUBLIC, missing: Literal["error", "ignore"] = "error"
    ) -> int:
        """Take documents out of every count; the generation."""
        return self.store.delete(ids, tenant=tenant, missing=missing)

    def sync(self, folder: str | os.PathLike, *, tenant: str = PUBLIC, field: str = "text") -> Synced:
        """Make the index agree with a folder: changed files replaced, removed ones deleted, in one generation.

        Only documents that came from this folder are touched. A file whose bytes are unchanged is not read further.
        """
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise DataError(f"{folder} is no folder.")
        path = folder_name(root)
        held: set[str] = set()
        of_file: dict[tuple[str, str], set[str]] = {}
        for document in self.store.documents(tenant):
            if document.extra.get(FOLDER) == path:
                held.add(document.id)
                of_file.setdefault((document.source, document.extra.get(FILE_HASH, "")), set()).add(
                    document.id
                )
        present: set[str] = set()
        news: list[Text] = []
        for found in find_below(root):
            same = of_file.get((found.id, file_hash(found.path)), set())
            texts = [] if same else list(texts_of(found, field=field))
            present.update(same, (text.id for text in texts))
            news += texts
        unchanged = len(present) - len(news)
        gone = sorted(held - present)
        changed = sum(text.id in held for text in news)
        items = self._items(news)
        if items or gone:
            self.store.update(add=items, delete=gone, tenant=tenant, replace="yes")
        return Synced(
            added=len(items) - changed, changed=changed, removed=len(gone), unchanged=unchanged,
            tokens=sum(len(ids) for _, ids in items),
        )  # fmt: skip

    def _items(self, texts: list[Text]) -> list[tuple[Document, np.ndarray]]:
        encoded = self.encoder.encode_all(text.text for text in texts)
        return [
            (Document(id=text.id, source=text.source, extra=text.extra), ids)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    # ---- asking -------------------------------------------------------------------------------------------------------

    def search(
        self, text: str, *, tenant: str = PUBLIC, limit: int = 10, around: int = 24
    ) -> tuple[int, list[Hit]]:
        """How often a wording occurs, and the documents that hold it most often. `around`: tokens shown on each side.

        Wording is compared token by token, at the start of a line and inside one; half a word at its end finds nothing.
        """
        if not text.strip():
            raise ConfigError("There is nothing to search for: the text is empty.")
        snapshot = self.store.snapshot(tenant)
        total, hits = 0, {}
        wordings = [self.encoder.encode(wording) for wording in dict.fromkeys((text, f" {text.lstrip()}"))]
        # where the second ends in the first (tokens of a byte, say), the first finds all
        if len(wordings) == 2 and np.array_equal(wordings[1][-len(wordings[0]) :], wordings[0]):
            wordings.pop()
        for ids in wordings:
            match = snapshot.match(ids, max_order=min(len(ids), MOST_ORDER))
            if match.depth < len(ids):
                continue
            total += int(match.counts[-1])
            for document, count in snapshot.documents_of(match, match.depth, limit=limit):
                before = hits.get(document.id)
                found = self._hit(document, count, ids, tenant, around)
                hits[document.id] = (
                    found if before is None else Hit(
                        document=document, count=before.count + count, passages=before.passages + found.passages
                    )
                )  # fmt: skip
        return total, sorted(hits.values(), key=lambda hit: -hit.count)[:limit]

    def explain(
        self, text: str, *, tenant: str = PUBLIC, limit: int = 5, around: int = 24, max_order: int = 64
    ) -> Explanation:
        """What memory alone says comes after a text, and the documents it has that from."""
        ids = self.encoder.encode(text)
        snapshot = self.store.snapshot(tenant)
        found = snapshot.distribution(ids, max_order=max_order)
        match = snapshot.match(ids, max_order=max_order)
        hits, told = [], []
        if match.counts[0]:
            token_I, count_I = snapshot.continuations(match, match.depth)
            by = np.lexsort((token_I, -found.p[token_I]))[:limit]
            told = [
                Continuation(
                    token_id=int(token_I[i]),
                    text="" if token_I[i] == snapshot.end else self.encoder.decode([token_I[i]]),
                    count=int(count_I[i]),
                    p=float(found.p[token_I[i]]),
                )
                for i in by
            ]
        last = ids[len(ids) - match.depth :]
        if match.depth:
            hits = [
                self._hit(document, count, last, tenant, around)
                for document, count in snapshot.documents_of(match, match.depth, limit=limit)
            ]
        return Explanation(
            depth=match.depth, matched=self.encoder.decode(last), counts=tuple(int(c) for c in match.counts),
            continuations=tuple(told), hits=tuple(hits),
        )  # fmt: skip

    def chosen(self, question: str, k: int = 3, *, tenant: str = PUBLIC) -> "list[Chosen]":
        """At most k documents that a question is about, best first (`library.choosing`); needs the extra `retrieval`.

        The first call of a generation reads the texts that are new in it.
        """
        return self.chooser(tenant).chosen(question, k)

    def focus(
        self, question: str, ids: Iterable[str], *, tenant: str = PUBLIC, most: int = 1
    ) -> "tuple[Sentence, ...]":
        """The sentences of these documents that share most with a question, for `mixing.pointing`."""
        return self.chooser(tenant).focus(question, ids, most=most)

    def chooser(self, tenant: str = PUBLIC) -> "Chooser":
        """What chooses among the documents of the newest generation; kept until there is a newer one."""
        from engram_lm.library.choosing import Chooser

        snapshot = self.store.snapshot(tenant)
        before, chooser = self._choosers.get(tenant, (None, None))
        if chooser is None or before is not snapshot:
            chooser = Chooser(snapshot, self.encoder, words=None if chooser is None else chooser.words)
            self._choosers[tenant] = snapshot, chooser
        return chooser

    def _hit(self, document: Document, count: int, ids: np.ndarray, tenant: str, around: int) -> Hit:
        """The first passage of a document that holds the ids."""
        kept = self.store.get(document.id, tenant)
        passages = []
        for at in [] if kept is None else _places(kept[1], ids)[:1]:
            tokens, end = kept[1], at + len(ids)
            passages.append(
                tuple(
                    self.encoder.decode(part)
                    for part in (tokens[max(0, at - around) : at], tokens[at:end], tokens[end : end + around])
                )
            )
        return Hit(document=document, count=count, passages=tuple(passages))


def _places(tokens: np.ndarray, ids: np.ndarray) -> list[int]:
    """Where ids stand in tokens."""
    n = len(tokens) - len(ids) + 1
    if n <= 0 or len(ids) == 0:
        return []
    at = np.flatnonzero(tokens[:n] == ids[0])
    for k in range(1, len(ids)):
        at = at[tokens[at + k] == ids[k]]
    return at.tolist()


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Texts of some MB together."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text.text)
        if size >= COMMIT_CHARACTERS:
            yield held
            held, size = [], 0
    if held:
        yield held
