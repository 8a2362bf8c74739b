"""Session memory: what one request has said so far, as one more document of the index that it alone sees. No torch.

    session = SessionMemory(snapshot, cap=4096, given=len(prompt))
    snapshot_now = session.extended(ids)                # the index, and the last 4,096 tokens of this request

A token becomes something to be found once its whole block is there: with `block` 32, the prompt at once (`given` tokens),
then what was generated in steps of 32. Sorting 4,096 tokens and beginning a new snapshot costs about 2 ms, so a block of
32 costs under 0.1 ms a token; the lag means that the last 0 to 31 generated tokens are not found yet. block=1 has no lag.
Which tokens can be found follows from their number alone, never from the order of calls: beams, drafts and repeated runs
get the same answers. The oldest tokens fall out at the cap.

Hazard: the context is the end of this document itself. Its END is no event, the text has only stopped here, so that place
is dead; otherwise every context would be found whole, followed by END. An end-of-text token inside the conversation did
happen: it ends one document and begins the next, as it does in contexts (`reading.read_next`).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.index.live_segment import LiveSegment
from engram_lm.index.segment import HEAVY, MAX_ORDER, WIDE, Document, Segment

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot

NAME = "this conversation"


class SessionMemory:
    """A snapshot that grows with a request. cap: tokens of prompt and output that can be found, the newest.

    given: how many first tokens are found from the beginning on (the prompt); block: later ones come in steps of so many.
    eos_id: the token that stands for END in contexts (`TokenRules.eos_id`). kept: snapshots remembered, two a beam.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        cap: int = 4096,
        *,
        given: int = 0,
        block: int = 32,
        eos_id: int | None = None,
        kept: int = 2,
    ) -> None:
        for name, value, least in (
            ("cap", cap, 1),
            ("block", block, 1),
            ("kept", kept, 1),
            ("given", given, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(
                    f"{name} of a session memory is a whole number from {least} on; got {value!r}."
                )
        self.snapshot, self.cap, self.given, self.block = snapshot, int(cap), int(given), int(block)
        self.eos_id, self.kept = eos_id, int(kept)
        self._known: OrderedDict[bytes, Snapshot] = OrderedDict()

    def extended(self, ids: np.ndarray) -> Snapshot:
        """The index and this conversation's tokens, int [T], oldest first; the index itself where there are none yet."""
        said = np.ascontiguousarray(self.findable(ids), np.int64)
        if not len(said):
            return self.snapshot
        key = said.tobytes()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._built(said)
            if len(self._known) > self.kept:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return known

    def findable(self, ids: np.ndarray) -> np.ndarray:
        """Which of the tokens can be found: whole blocks, of those the last `cap`."""
        n = len(ids)
        if n > self.given:
            n = self.given + (n - self.given) // self.block * self.block
        return np.asarray(ids)[max(0, n - self.cap) : n]

    @property
    def most_bytes(self) -> int:
        """What one remembered snapshot may hold beyond the index, in bytes; up to `kept` + 1 of them live at once."""
        V, N = self.snapshot.vocab_size, self.cap + 1  # an end-of-text token becomes an END
        token = 2 if V < 2**16 else 4
        nodes = 24 * (MAX_ORDER + 1) * (N // WIDE + 1)
        # tokens, order, next; the documents' table; where first tokens begin; counts and probabilities of order 0
        return N * (2 * token + 4) + 112 * N + nodes + 28 * (V + 1)

    def _built(self, said: np.ndarray) -> Snapshot:
        V = self.snapshot.vocab_size
        # ids that the index has no number for (a model with more logits) break the text, as they break contexts
        foreign = (said < 0) | (said >= V)
        broken = foreign if self.eos_id is None else foreign | (said == self.eos_id)
        cut = np.flatnonzero(broken)
        pieces = np.split(said, cut)
        pieces = [pieces[0], *(piece[1:] for piece in pieces[1:])]
        segment = Segment.build(
            pieces,
            vocab_size=V,
            documents=[Document(id=NAME, source=NAME)] * len(pieces),
            heavy=max(HEAVY, self.cap + 1),  # read where they stand: no lists
            threads=1,
        )
        ends = segment.document_at[1:].astype(np.int64) - 1
        never_came = np.append(ends[:-1][foreign[cut]], ends[-1])
        dead = np.flatnonzero(np.isin(segment.order, never_came)).astype(np.uint32)
        return self.snapshot.with_segment(LiveSegment(segment, dead_rank=dead))
