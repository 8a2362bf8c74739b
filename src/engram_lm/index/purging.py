"""Deleted documents taken out of the files, and the proof: their tokens stand nowhere in the directory (docs/store.md).

    report = purge(writer, "public")             # PurgeReport: documents, windows, files, ...
    Runs(runs_of([tokens])[0], dtype).places(data)     # where runs of some tokens stand in any bytes

Not an overwriting of the disk's blocks: removed files are removed, no more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.index.kernels import rescan
from engram_lm.index.manifest import Entry, Manifest, segment_name
from engram_lm.index.merger import rewritten
from engram_lm.index.segment import Segment, sha256_of
from engram_lm.index.segment_file import STRIDE, read, tokens_before
from engram_lm.index.snapshot import LiveSegment
from engram_lm.index.writer import IndexWriter, to_delete

WINDOW = 16  # tokens
DISTINCT = 8  # fewer different ones may stand together by chance, zeros between sections for one

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class PurgeReport:
    """What was taken out and how it was looked for.

    unproven: documents without a run of 16 tokens of which 8 differ: taken out, but not looked for.
    live_copies: runs that stand in a live document too.
    """

    generation: int
    documents: int
    tokens: int
    unproven: int
    runs: int
    live_copies: int
    segments: int
    files: int
    bytes_read: int
    bytes_freed: int


def purge(
    writer: IndexWriter,
    tenants: Sequence[str],
    ids: dict[str, Sequence[str]],
    progress: Progress | None = None,
) -> PurgeReport:
    """Rewrite all segments of these tenants that have deleted documents, and prove that nothing is left of those.

    Adds and deletes of other threads wait; readers do not. CheckpointError names what was found where.

    Args:
        ids: live documents, by tenant, that go as well.
    """
    with writer.changing:
        writer.require_writing()
        # files that are being written would be read too
        while writer.active:
            writer.changing.wait()
        before = writer.manifest
        views = _views_to_purge(writer, tenants, ids)
        tokens = [
            view.segment.document_tokens(n) for view in views.values() for n in sorted(view.dead_documents)
        ]
        run_RW, unproven = runs_of(tokens)
        runs = Runs(run_RW, np.dtype("<u2" if before.vocab_size < 2**16 else "<u4"))
        if views:
            _rewrite(writer, views, progress)
        n_files, n_bytes, copies = _prove(writer, runs, before, views, progress)
        freed = sum(e.bytes for _, e in before.entries()) - sum(e.bytes for _, e in writer.manifest.entries())
        return PurgeReport(
            generation=writer.manifest.generation, documents=len(tokens), tokens=sum(len(part) + 1 for part in tokens),
            unproven=unproven, runs=len(runs), live_copies=copies, segments=len(views), files=n_files,
            bytes_read=n_bytes, bytes_freed=freed,
        )  # fmt: skip


def _views_to_purge(
    writer: IndexWriter, tenants: Sequence[str], ids: dict[str, Sequence[str]]
) -> dict[int, LiveSegment]:
    """By segment's number: what is deleted in it, and what is to be."""
    views = {}
    for tenant, entries in writer.manifest.tenants.items():
        more = to_delete(writer.finder(tenant), tenant, ids.get(tenant, ()), "error")
        for entry in entries:
            view = writer.opened.view(entry)
            if entry.number in more:
                dead = view.dead_documents | more[entry.number]
                views[entry.number] = LiveSegment(view.segment, view.dead_rank, dead)
            elif entry.masks and tenant in tenants:
                views[entry.number] = view
    for tenant in ids.keys() - writer.manifest.tenants.keys():
        to_delete(writer.finder(tenant), tenant, ids[tenant], "error")
    return views


def _rewrite(writer: IndexWriter, views: dict[int, LiveSegment], progress: Progress | None) -> None:
    new: dict[int, Entry | None] = {}
    with writer.change() as files:
        for number, view in views.items():
            new[number], _ = rewritten(writer, [view], files)
            if progress is not None:
                progress("rewritten", len(new), len(views))
        writer.commit(
            {
                tenant: tuple(found for old in entries if (found := new.get(old.number, old)) is not None)
                for tenant, entries in writer.manifest.tenants.items()
            }
        )


def runs_of(token_lists: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Runs of WINDOW tokens that stand for each list, [runs, WINDOW], each once; and how many lists have none.

    One follows the other, the last ends with the list: whoever holds 2 · WINDOW - 1 tokens in a row holds one whole.
    """
    found, without = [np.empty((0, WINDOW), np.uint32)], 0
    for tokens_T in token_lists:
        n = len(tokens_T)
        start_R = (
            np.unique(np.append(np.arange(0, n - WINDOW + 1, WINDOW), n - WINDOW)) if n >= WINDOW else []
        )
        run_RW = (
            np.lib.stride_tricks.sliding_window_view(tokens_T, WINDOW)[start_R] if n >= WINDOW else found[0]
        )
        distinct_R = 1 + (np.diff(np.sort(run_RW, axis=1), axis=1) != 0).sum(axis=1)
        run_RW = run_RW[distinct_R >= DISTINCT]
        without += not len(run_RW)
        found.append(run_RW)
    return np.unique(np.concatenate(found), axis=0), without


class Runs:
    """Runs of tokens as the bytes they are in a segment, to be looked for in other bytes."""

    def __init__(self, run_RW: np.ndarray, dtype: np.dtype) -> None:
        self.width = WINDOW * dtype.itemsize
        data_RB = np.ascontiguousarray(run_RW, dtype).view(np.uint8).reshape(len(run_RW), self.width)
        self._wanted = {row.tobytes() for row in data_RB}
        self._hash_H = np.unique(np.array([rescan.hash_of(row) for row in data_RB], np.uint64))
        self._bits = min(28, max(16, (16 * len(run_RW)).bit_length()))
        self._seen = np.zeros(2**self._bits, np.uint8)
        rescan.mark(self._hash_H, self._seen, self._bits)

    def __len__(self) -> int:
        return len(self._wanted)

    def places(self, data_N: np.ndarray) -> list[int]:
        """Where in uint8 [N] a run begins."""
        out_C, at, found = np.empty(4096, np.int64), 0, []
        while self._wanted and at < len(data_N):
            n, at = rescan.candidates(data_N, self.width, self._hash_H, self._seen, self._bits, at, out_C)
            places = out_C[:n].tolist()
            found += [p for p in places if data_N[p : p + self.width].tobytes() in self._wanted]
        return found


def _prove(
    writer: IndexWriter,
    runs: Runs,
    before: Manifest,
    views: dict[int, LiveSegment],
    progress: Progress | None,
) -> tuple[int, int, int]:
    """Read every file; (files, bytes, runs that a live document has too). CheckpointError for what should not be there."""
    of_name = {segment_name(entry.number): (tenant, entry) for tenant, entry in writer.manifest.entries()}
    paths = sorted(path for path in writer.directory.rglob("*") if path.is_file() and not path.is_symlink())
    n_bytes = copies = 0
    for i, path in enumerate(paths):
        data_N = _bytes_of(path)
        places = runs.places(data_N)
        if path.parent == writer.directory and path.name in of_name:
            tenant, entry = of_name[path.name]
            segment = writer.opened.segment(entry)
            inside = runs.places(np.ascontiguousarray(segment.tokens).view(np.uint8))
            numbers = (
                np.searchsorted(
                    segment.document_at, np.array(inside, np.int64) // segment.tokens.itemsize, "right"
                )
                - 1
            )
            for number in np.unique(numbers).tolist():
                _require_live(path, tenant, segment, number, before, views, writer)
            copies += len(inside)
            if len(places) != len(inside) and _elsewhere(path, segment, places, inside, runs.width):
                raise CheckpointError(
                    f"{path} still holds tokens of a deleted document, outside its documents. Run verify."
                )
        elif places:
            raise CheckpointError(
                f"{path} still holds tokens of a deleted document, outside the documents of this index. Remove the file if "
                "it is none of the index's own; otherwise run verify."
            )
        n_bytes += len(data_N)
        if progress is not None:
            progress("read", i + 1, len(paths))
    return len(paths), n_bytes, copies


def _elsewhere(path: Path, segment: Segment, places: list[int], inside: list[int], width: int) -> list[int]:
    """Places in a segment's file that are neither in its tokens nor in what follows from them.

    Sorted tokens may happen to ascend as a deleted document did.
    """
    V, tokens_N, order_N = segment.vocab_size, segment.tokens, segment.order
    derived = {
        "next": lambda: tokens_N[order_N],
        "before": lambda: tokens_before(tokens_N, order_N[::STRIDE], end=V),
        "first_token": lambda: np.unique(tokens_N[tokens_N != V]),
    }
    facts, arrays = read(path, verify="none")
    at = {name: (start, start + n_bytes) for name, start, n_bytes in facts.places()}
    left = set(places) - {at["tokens"][0] + place for place in inside}
    for name, make in derived.items():
        start, stop = at.get(name, (0, 0))
        here = {place for place in left if start <= place <= stop - width}
        if here and np.array_equal(arrays[name], make()):
            left -= here
    return sorted(left)


def _require_live(
    path: Path, tenant: str, segment: Segment, number: int, before: Manifest, views: dict[int, LiveSegment],
    writer: IndexWriter,
) -> None:  # fmt: skip
    """The document that holds a deleted one's tokens was live before the purge, and is what it was."""
    document = segment.document(number)
    for entry in before.tenants.get(tenant, ()):
        view = views[entry.number] if entry.number in views else writer.opened.view(entry)
        there = view.segment.number_of(document.id)
        if there >= 0 and there not in view.dead_documents and view.segment.document(there) == document:
            if sha256_of(segment.document_tokens(number)) == document.sha256:
                return
    raise CheckpointError(
        f"{path} still holds the deleted document {document.id!r} of the tenant {tenant!r}. Purge that tenant too, or run "
        "verify."
    )


def _bytes_of(path: Path) -> np.ndarray:
    try:
        if not path.stat().st_size:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read, so nothing is proved: {error.strerror}.") from None
