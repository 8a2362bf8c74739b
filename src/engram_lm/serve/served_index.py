"""The index as the server uses it: open to be read for as long as it runs, opened to be written for each change alone.

Readers hold snapshots, so a change waits for no generation and no generation for a change; and as the lock is free between
changes, `engram-lm index add` in another terminal works, and is seen at the next question (`Index.refresh`).

    shelf = Shelf(directory, encoder=loaded.encoder)
    shelf.add([Text(id="leave.md", text="Annual leave is 31 days.")], replace=True)
    shelf.delete(["leave.md"])                     # Refusal 404 where it is not there
    shelf.page(limit=50, after=None); shelf.search("annual leave"); shelf.explain("Annual leave is")
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError
from engram_lm.index.manifest import require_index
from engram_lm.index.store import PUBLIC, Index
from engram_lm.library.library import Hit, Library
from engram_lm.serve.http_errors import Refusal, shown

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library.encoding import TextEncoder
    from engram_lm.library.texts import Text

LOCK_SECONDS = 5.0  # another writer is waited for
MOST_SEARCHED = 4_000  # characters of a wording that is looked for
_TITLE = "title"


class ServedIndex:
    """One index directory, its public documents."""

    def __init__(self, directory: Path, *, encoder: TextEncoder) -> None:
        require_index(directory)
        self.directory = directory
        self.library = Library.open(directory, tokenizer=encoder.backend)
        self._listed: tuple[Snapshot, list[tuple[str, int, int]]] | None = None

    def close(self) -> None:
        self.library.store.close()

    def snapshot(self) -> Snapshot:
        """What the documents say now."""
        return self.library.store.snapshot(PUBLIC)

    def facts(self) -> dict[str, Any]:
        """For GET /api/about."""
        stats = self.library.store.stats()
        public = stats.tenants.get(PUBLIC)
        return {
            "documents": public.documents if public else 0,
            "tokens": public.tokens if public else 0,
            "generation": stats.generation,
            "bytes": stats.bytes,
        }

    # ---- changing -----------------------------------------------------------------------------------------------------

    def add(self, texts: list[Text], *, replace: bool) -> dict[str, Any]:
        """Index documents; known when it returns. Refusal 409 where an id is there already and may not be replaced."""
        begun = time.perf_counter()
        ids = [text.id for text in texts]
        twice = [name for name in dict.fromkeys(ids) if ids.count(name) > 1]
        if twice:
            raise Refusal(
                422, f"The id {shown(twice[0])} stands twice in this addition; ids name one document each."
            )
        held = [name for name in ids if self.library.store.get(name) is not None]
        if held and not replace:
            raise Refusal(
                409,
                f"There is a document {shown(held[0])} already. Add it with replace, or choose another id.",
            )
        with self._writing() as store:
            library = Library(store, self.library.encoder)
            tokenising = time.perf_counter()
            added = library.add(texts, existing="replace" if replace else "error")
            spent = time.perf_counter() - tokenising
            generation = store.generation
        ms = (time.perf_counter() - begun) * 1000
        names = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        log = [f"indexed {added.tokens:,} tokens of {names} in {_ms(spent * 1000)}"]
        if held:
            log.append(f"{len(held)} of them took the place of an earlier one")
        log.append(f"known from now on (generation {generation})")
        return {"ms": ms, "added": ids, "tokens": added.tokens, "generation": generation, "log": log}

    def delete(self, ids: list[str]) -> dict[str, Any]:
        """Take documents out of every count. Refusal 404 where one is not there; nothing is deleted then."""
        begun = time.perf_counter()
        ids = list(dict.fromkeys(ids))
        missing = [name for name in ids if self.library.store.get(name) is None]
        if missing:
            raise _not_there(missing[0])
        with self._writing() as store:
            try:
                generation = store.delete(ids)
            except ConfigError:  # another process was faster
                raise _not_there(ids[0]) from None
        ms = (time.perf_counter() - begun) * 1000
        names = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        log = [f"deleted {names} in {_ms(ms)}: in no count from now on (generation {generation})"]
        return {"ms": ms, "deleted": ids, "generation": generation, "log": log}

    def _writing(self) -> Index:
        return Index.open(
            self.directory, "write", tokenizer=self.library.store.tokenizer, merging="by hand",
            wait_seconds=LOCK_SECONDS,
        )  # fmt: skip

    def tidy(self) -> None:
        """Merge small segments where that is due; after a change, when its answer is out."""
        with self._writing() as store:
            store.merge(how="due")

    # ---- reading ------------------------------------------------------------------------------------------------------

    def page(self, *, limit: int, after: str | None) -> dict[str, Any]:
        """Documents in the order of their ids, behind `after`."""
        snapshot = self.snapshot()
        listed = self._listed
        if listed is None or listed[0] is not snapshot:
            listed = self._listed = snapshot, sorted(_live(snapshot))
        names = [entry for entry in listed[1] if after is None or entry[0] > after]
        found = []
        for name, s, number in names[:limit]:
            segment = snapshot.views[s].segment
            document = segment.document(number)
            tokens = int(segment.document_at[number + 1]) - int(segment.document_at[number]) - 1
            found.append(
                {
                    "id": name,
                    "title": document.extra.get(_TITLE),
                    "tokens": tokens,
                    "added": document.added or None,
                }
            )
        return {"documents": found, "next": names[limit - 1][0] if len(names) > limit else None}

    def search(self, text: str, *, limit: int) -> dict[str, Any]:
        """Which documents hold a wording, word for word."""
        begun = time.perf_counter()
        _require_short(text, "wording")
        if not text.strip():
            raise Refusal(422, "The wording is empty; write some words to look for.")
        total, hits = self.library.search(text, limit=limit)
        return {
            "ms": (time.perf_counter() - begun) * 1000,
            "count": total,
            "hits": [hit_facts(hit) for hit in hits],
        }

    def explain(self, text: str) -> dict[str, Any]:
        """What the index alone says comes after a text."""
        begun = time.perf_counter()
        _require_short(text, "text")
        if not text:
            raise Refusal(422, "The text is empty; write something first.")
        ids = self.library.encoder.encode(text)
        found = self.snapshot().distribution(ids)
        told = self.library.explain(text)
        orders = [
            {"order": n, "count": int(count), "distinct": int(distinct)}
            for n, (count, distinct) in enumerate(zip(found.count_D, found.distinct_D, strict=True))
        ]
        return {
            "ms": (time.perf_counter() - begun) * 1000,
            "depth": told.depth,
            "matched": told.matched,
            "orders": orders,
            "continuations": [{"text": one.text, "count": one.count, "p": one.p} for one in told.continuations],
            "documents": [hit_facts(hit) for hit in told.hits],
        }  # fmt: skip

    def passages(self, question: str, k: int) -> list[tuple[str, str]]:
        """(document, text) of the k passages that share most with a question, best first, for a prompt."""
        if not self.snapshot().n_documents:
            return []
        chooser = self.library.chooser()
        found = []
        for at, _, _ in chooser.ranked(question):
            passage = chooser.passages[at]
            held = self.library.store.get(passage.id)
            if held is not None:
                tokens = held[1][passage.begin : passage.end]
                found.append((passage.id, self.library.encoder.decode(tokens).strip()))
            if len(found) == k:
                break
        return found


def hit_facts(hit: Hit) -> dict[str, Any]:
    """A document that holds a wording: how often, its first passage, and what else is known of it."""
    passage = hit.passages[0] if hit.passages else ("", "", "")
    return {
        "document": hit.document.id,
        "count": hit.count,
        "title": hit.document.extra.get(_TITLE),
        "licence": hit.document.extra.get("licence") or hit.document.extra.get("license"),
        "passage": dict(zip(("before", "match", "after"), passage, strict=True)),
    }


def _live(snapshot: Snapshot) -> list[tuple[str, int, int]]:
    return [
        (view.segment.document(number).id, s, number)
        for s, view in enumerate(snapshot.views)
        for number in range(view.segment.n_documents)
        if number not in view.dead_documents
    ]


def _not_there(name: str) -> Refusal:
    return Refusal(
        404,
        f"There is no document {shown(name)} in the index; perhaps it was deleted before. Nothing was changed.",
    )


def _require_short(text: str, what: str) -> None:
    if len(text) > MOST_SEARCHED:
        raise Refusal(
            413, f"The {what} has {len(text):,} characters; at most {MOST_SEARCHED:,} are looked up."
        )


def _ms(ms: float) -> str:
    return f"{ms:.1f} ms" if ms < 100 else f"{ms:,.0f} ms" if ms < 10_000 else f"{ms / 1000:,.1f} s"
