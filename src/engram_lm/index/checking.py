"""Every byte of an index against its checksums, and every mask against its segment (docs/store.md).

report = verify(opened, progress=print)      # CheckpointError names the file and what is wrong with it
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.index.manifest import Entry, mask_name, segment_name
from engram_lm.index.opened import Opened, open_segment, read_mask
from engram_lm.index.segment import Segment, sha256_of
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


def verify(opened: Opened, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read all of the newest generation. progress: (bytes read, bytes in all)."""
    while True:
        opened.reload()
        try:
            return _verify(opened, progress)
        except CheckpointError:
            # a writer removed what this generation names: look at the next one
            if opened.is_newest:
                raise


def _verify(opened: Opened, progress: Callable[[int, int], None] | None) -> VerifyReport:
    manifest, directory = opened.manifest, opened.directory
    total = sum(entry.bytes for _, entry in manifest.entries())
    done = masks = documents = tokens = 0
    live: dict[str, set[str]] = {}
    for tenant, entry in manifest.entries():
        path = directory / segment_name(entry.number)
        # mapped anew: what is being read is the file, whatever was open before
        segment = open_segment(directory, manifest, entry)
        segment.verify()
        dead: frozenset[int] = frozenset()
        if entry.masks:
            dead = _check_masks(opened, entry, segment)
            masks += len(entry.masks)
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
                raise CheckpointError(
                    f"{path}: the document {document.id!r} of {tenant!r} is in another segment too."
                )
            seen.add(document.id)
            documents += 1
        tokens += entry.live_tokens
        done += entry.bytes
        if progress is not None:
            progress(done, total)
    return VerifyReport(
        generation=manifest.generation, segments=sum(1 for _ in manifest.entries()), masks=masks, documents=documents,
        tokens=tokens, bytes_read=done,
    )  # fmt: skip


def _check_masks(opened: Opened, entry: Entry, segment: Segment) -> frozenset[int]:
    dead: set[int] = set()
    for mask in entry.masks:
        path = opened.directory / mask_name(mask.number)
        documents, rank = read_mask(opened.directory, entry, mask)
        numbers = documents.tolist()
        if not np.array_equal(rank, dead_ranks(segment, numbers)):
            raise CheckpointError(f"{path} hides other places than those of its {len(numbers):,} documents.")
        if not dead.isdisjoint(numbers):
            raise CheckpointError(f"{path} hides documents that another mask of its segment hides.")
        dead.update(numbers)
    return frozenset(dead)
