"""Segments written anew without their deleted documents: merges, by hand or in a thread (docs/store.md).

    merge_next(writer)                   # the next group that is due; False: none
    merge_whole(writer, "public")        # everything of a tenant into one segment

Sorting runs while others add and delete. Documents that were deleted meanwhile are masked in the new segment by the same
generation that brings it in.
"""

import threading
from collections.abc import Sequence

import numpy as np

from engram_lm.index.manifest import Entry
from engram_lm.index.merge_policy import MOST_TOKENS, due, groups
from engram_lm.index.snapshot import LiveSegment
from engram_lm.index.writer import Files, IndexWriter


def merge_next(writer: IndexWriter, tenant: str | None = None) -> bool:
    """Merge the next group of segments that is due, of one tenant or of any."""
    with writer.changing:
        writer.require_writing()
        tenants = [(name, found) for name, found in writer.manifest.tenants.items() if tenant in (None, name)]
        found = next(
            ((name, group) for name, entries in tenants if (group := due(entries, writer.busy))), None
        )
        if found is None:
            return False
        tenant, group = found
        views = _begin(writer, group)
    _finish(writer, tenant, group, views)
    return True


def merge_whole(writer: IndexWriter, tenant: str) -> bool:
    """Make one segment of all of a tenant's, or several where one would be too large; False: that is how it is."""
    done = False
    while True:
        with writer.changing:
            writer.require_writing()
            while writer.busy:
                writer.changing.wait()
            for group in groups(writer.manifest.tenants.get(tenant, ()), MOST_TOKENS):
                if len(group) > 1 or group[0].masks:
                    views = _begin(writer, group)
                    break
            else:
                return done
        _finish(writer, tenant, group, views)
        done = True


def _begin(writer: IndexWriter, group: Sequence[Entry]) -> list[LiveSegment]:
    views = [writer.opened.view(entry) for entry in group]
    writer.busy |= {entry.number for entry in group}
    return views


def _finish(writer: IndexWriter, tenant: str, group: Sequence[Entry], views: Sequence[LiveSegment]) -> None:
    try:
        with writer.change() as files:
            entry, place = rewritten(writer, views, files)
            with writer.changing:
                if not _swap(writer, tenant, group, views, entry, place, files):
                    writer.remove_unnamed(files)
    finally:
        with writer.changing:
            writer.busy -= {entry.number for entry in group}
            writer.changing.notify_all()


def rewritten(
    writer: IndexWriter, views: Sequence[LiveSegment], files: Files
) -> tuple[Entry | None, list[np.ndarray]]:
    """A new segment of the live documents of some views, on disk; None where there are none.

    Also, for each view, the new number of each of its documents: int64, -1 where it was left out.
    """
    pairs, place = [], []
    for view in views:
        segment = view.segment
        new_D = np.full(segment.n_documents, -1, np.int64)
        for number in range(segment.n_documents):
            if number not in view.dead_documents:
                new_D[number] = len(pairs)
                pairs.append((segment.document(number), segment.document_tokens(number)))
        place.append(new_D)
    return (writer.write(pairs, files) if pairs else None), place


def _swap(
    writer: IndexWriter, tenant: str, group: Sequence[Entry], views: Sequence[LiveSegment], entry: Entry | None,
    place: Sequence[np.ndarray], files: Files,
) -> bool:  # fmt: skip
    """Put the new segment in the place of those it was made of; False where all of it was deleted meanwhile."""
    present = writer.manifest.tenants.get(tenant, ())
    now = {found.number: found for found in present}
    late = []
    for old, view, new_D in zip(group, views, place, strict=True):
        if old.number not in now:
            # all of its documents were deleted meanwhile
            late += new_D[new_D >= 0].tolist()
        elif now[old.number] != old:
            gone = writer.opened.view(now[old.number]).dead_documents - view.dead_documents
            late += new_D[sorted(gone)].tolist()
    new = []
    if entry is not None:
        left = writer.masked(entry, late, files)
        new = [left] if left is not None else []
    numbers = {old.number for old in group}
    at = next((i for i, found in enumerate(present) if found.number in numbers), 0)
    kept = [found for found in present[at:] if found.number not in numbers]
    writer.commit({**writer.manifest.tenants, tenant: (*present[:at], *new, *kept)})
    return bool(new)


class Background:
    """Merges what is due, in a thread that ends when nothing is. `error` is why the last one stopped, if it failed."""

    def __init__(self, writer: IndexWriter) -> None:
        self.writer = writer
        self.error = ""
        self._closing = False
        self._thread: threading.Thread | None = None

    def wake(self, behind: str | None = None) -> None:
        """Look whether something is due; returns at once, but for a tenant that has too many segments: that merges here."""
        if behind is not None:
            self._merge(behind)
        with self.writer.changing:
            if self._closing or (self._thread is not None and self._thread.is_alive()):
                return
            if any(due(entries, self.writer.busy) for entries in self.writer.manifest.tenants.values()):
                self._thread = threading.Thread(target=self._run, name="engram-lm index merge", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closing and self._merge():
            pass

    def _merge(self, tenant: str | None = None) -> bool:
        try:
            done = merge_next(self.writer, tenant)
        except Exception as error:
            # whatever woke it is done and on disk; the next change wakes it again, and stats show why
            self.error = str(error)
            return False
        self.error = "" if done else self.error
        return done

    def close(self) -> None:
        """Wait for the merge that is running; begin no other."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()
