"""Every byte of an index against its checksums, and every mask against its segment (docs/store.md).

report = verify(opened, progress=print)      # CheckpointError names the file and what is wrong with it
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.index.deletes import Dead
from engram_lm.index.manifest import Entry, mask_name, segment_name
from engram_lm.index.reader import IndexReader, open_segment, read_mask
from engram_lm.index.segment import Segment, sha256_of
from engram_lm.index.segment_file import Facts, read, require_checksums, wrong_inside
from engram_lm.index.snapshot import dead_ranks


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was read and found right."""

    generation: int
    segments: int
    masks: int
    documents: int
    tokens: int
    bytes_read: int


def verify(opened: IndexReader, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read all of the newest generation. progress: (bytes read, bytes in all)."""
    while True:
        opened.reload()
        try:
            return _verify(opened, progress)
        except CheckpointError:
            # a writer removed what this generation names: look at the next one
            if opened.is_newest:
                raise


def _verify(opened: IndexReader, progress: Callable[[int, int], None] | None) -> VerifyReport:
    manifest, directory = opened.manifest, opened.directory
    total = sum(entry.bytes for _, entry in manifest.entries())
    # all are mapped before any is read: a writer may remove them, and reading takes long
    mapped = [(tenant, entry, *_mapped(opened, entry)) for tenant, entry in manifest.entries()]
    done = masks = documents = tokens = 0
    live: dict[str, set[str]] = {}
    for tenant, entry, segment, facts, dead_parts in mapped:
        path = directory / segment_name(entry.number)
        require_checksums(path, facts, segment.arrays)
        if wrong := wrong_inside(segment.arrays, segment.vocab_size):
            raise CheckpointError(f"{path} is damaged: {wrong}.")
        dead = _check_masks(directory, entry, segment, dead_parts)
        seen = live.setdefault(tenant, set())
        for number in range(segment.n_documents):
            document = segment.document(number)
            if sha256_of(segment.document_tokens(number)) != document.sha256:
                raise CheckpointError(
                    f"{path}: the tokens of the document {document.id!r} are not those of its sha256."
                )
            if number in dead:
                continue
            if document.id in seen:
                raise CheckpointError(f"{path}: {tenant!r} has another live document {document.id!r}.")
            seen.add(document.id)
            documents += 1
        masks += len(dead_parts)
        tokens += entry.live_tokens
        done += entry.bytes
        if progress is not None:
            progress(done, total)
    return VerifyReport(
        generation=manifest.generation, segments=len(mapped), masks=masks, documents=documents, tokens=tokens,
        bytes_read=done,
    )  # fmt: skip


def _mapped(opened: IndexReader, entry: Entry) -> tuple[Segment, Facts, list[Dead]]:
    segment = open_segment(opened.directory, opened.manifest, entry)
    facts, _ = read(opened.directory / segment_name(entry.number), verify="none")
    return segment, facts, [read_mask(opened.directory, entry, mask) for mask in entry.masks]


def _check_masks(directory: Path, entry: Entry, segment: Segment, parts: list[Dead]) -> set[int]:
    """The documents that are dead."""
    dead: set[int] = set()
    for mask, (documents, rank) in zip(entry.masks, parts, strict=True):
        path, numbers = directory / mask_name(mask.number), documents.tolist()
        if not np.array_equal(rank, dead_ranks(segment, numbers)):
            raise CheckpointError(f"{path} hides other places than those of its {len(numbers):,} documents.")
        if not dead.isdisjoint(numbers):
            raise CheckpointError(f"{path} hides documents that another mask of its segment hides.")
        dead.update(numbers)
    return dead
