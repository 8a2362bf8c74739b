"""Some deleted documents of one segment, as a file (docs/store.md).

data = mask_to_bytes(7, dead_documents, dead_rank)
dead_documents, dead_rank = mask_from_bytes(data, path, entry, mask)
    merged([(dead_documents, dead_rank), ...])
"""

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.index.manifest import Entry, Mask
from engram_lm.kernels import checksums

MAGIC = b"\x89ENGM\r\n\x1a"
VERSION = 1
_HEAD = struct.Struct("<8sIIQQ")
_SUM = struct.Struct("<Q")

# document numbers and places in `order`, uint32, each ascending
Dead = tuple[np.ndarray, np.ndarray]


def mask_to_bytes(segment: int, dead_documents: np.ndarray, dead_rank: np.ndarray) -> bytes:
    """Document numbers and places in `order`, both ascending; segment: its file's number."""
    head = _HEAD.pack(MAGIC, VERSION, len(dead_documents), segment, len(dead_rank))
    body = np.concatenate([dead_documents, dead_rank], dtype="<u4", casting="unsafe").tobytes()
    return head + _SUM.pack(_hash(head + body)) + body


def mask_from_bytes(data: bytes, path: object, entry: Entry, mask: Mask) -> Dead:
    """Dead documents and dead places of the segment `entry` names, as `mask` says.

    Raises: CheckpointError for a mask of another segment, one that is damaged, and places outside the segment.
    """
    body = data[_HEAD.size + _SUM.size :]
    if len(data) < _HEAD.size + _SUM.size or data[:8] != MAGIC:
        raise CheckpointError(f"{path} is no mask (it begins with {data[:8]!r}).")
    _, version, n_documents, segment, n_ranks = _HEAD.unpack(data[: _HEAD.size])
    if version != VERSION:
        raise CheckpointError(f"{path} is a mask of version {version}; this build reads version {VERSION}.")
    (wanted,) = _SUM.unpack(data[_HEAD.size : _HEAD.size + _SUM.size])
    if _hash(data[: _HEAD.size] + body) != wanted or len(body) != 4 * (n_documents + n_ranks):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong.")
    if (segment, n_documents, n_ranks) != (entry.number, mask.documents, mask.tokens):
        raise CheckpointError(
            f"{path} masks {n_documents:,} documents of segment {segment} ({n_ranks:,} tokens), which is not what the "
            "manifest says."
        )
    dead_documents = np.frombuffer(body, "<u4", n_documents)
    dead_rank = np.frombuffer(body, "<u4", n_ranks, 4 * n_documents)
    for numbers, limit in ((dead_documents, entry.documents), (dead_rank, entry.tokens)):
        if len(numbers) and (int(numbers[-1]) >= limit or (numbers[1:] <= numbers[:-1]).any()):
            raise CheckpointError(f"{path} points outside its segment, or is not in order.")
    return dead_documents, dead_rank


def merged(parts: Iterable[Dead]) -> Dead:
    """All of some masks of one segment."""
    documents, ranks = zip(*parts, strict=True)
    return _merged(documents), _merged(ranks)


def _merged(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    found = np.concatenate(parts)
    # runs that ascend already: a stable sort merges them
    found.sort(kind="stable")
    return found


def _hash(data: bytes) -> int:
    return int(checksums.xxh64(np.frombuffer(data, np.uint8)))
