"""Live documents by id, in the segments of one tenant.

finder = Finder(opened, entries)
finder.find("a.txt")            # (entry, number), or None
"""

import json
from collections.abc import Sequence

from engram_lm.errors import CheckpointError
from engram_lm.index.manifest import Entry
from engram_lm.index.reader import IndexReader
from engram_lm.index.segment import Segment

_FEW = 16
_SHARE = 64  # looking one up costs about as much as reading this many lines with all others


class Finder:
    """Looks ids up one by one, until it has been asked so often that reading a segment's ids all at once is cheaper.

    It holds the segments: made while nothing changes, it may be asked while others commit and their files go.
    """

    def __init__(self, opened: IndexReader, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._places = [
            (entry, opened.segment(entry), opened.dead_documents(entry)) for entry in reversed(self.entries)
        ]
        self._asked = 0
        self._numbers: dict[int, dict[str, int]] = {}

    def find(self, document_id: str) -> tuple[Entry, int] | None:
        """The segment of a live document and its number there."""
        self._asked += 1
        for entry, segment, dead in self._places:
            number = self._number_of(entry, segment, document_id)
            if number >= 0 and number not in dead:
                return entry, number
        return None

    def _number_of(self, entry: Entry, segment: Segment, document_id: str) -> int:
        if entry.number in self._numbers:
            return self._numbers[entry.number].get(document_id, -1)
        if self._asked > max(_FEW, segment.n_documents // _SHARE):
            self._numbers[entry.number] = numbers_of(segment)
        return segment.number_of(document_id)


def numbers_of(segment: Segment) -> dict[str, int]:
    """All documents of a segment by id, dead ones too."""
    lines = segment.arrays["documents"].tobytes()
    try:
        facts = json.loads(b"[" + lines.rstrip(b"\n").replace(b"\n", b",") + b"]")
        return {found["id"]: number for number, found in enumerate(facts)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{segment.path} is damaged: its table of documents says {error!r}.") from None
