"""Which documents a gate was fitted on, and whether they are still there. No torch.

    facts = {"documents": fingerprints(snapshot)}     # kept in the gate's `trained_on`
    gone(gate, snapshot)                              # (documents it was fitted on, how many of them are gone)
    told(gate, snapshot)                              # a sentence where some are gone, else ""

Every document of the index takes part in fitting: some are read, all are looked up in. What a gate keeps of one is 12
hexadecimal digits of sha256 over its id and the hash of its tokens: neither words nor names. A document that was changed
is another one. Weights fitted on a deleted document are not undone by deleting it: fit again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot

DIGITS = 12


def fingerprints(snapshot: Snapshot) -> list[str]:
    """Of all live documents, sorted."""
    found = []
    for view in snapshot.views:
        for number in range(view.segment.n_documents):
            if number not in view.dead_documents:
                document = view.segment.document(number)
                facts = f"{document.id}\0{document.sha256}".encode()
                found.append(hashlib.sha256(facts).hexdigest()[:DIGITS])
    return sorted(found)


def gone(gate: Any, snapshot: Snapshot) -> tuple[int, int]:
    """How many documents the gate was fitted on, as far as it tells, and how many of them this snapshot does not hold."""
    fitted = getattr(gate, "trained_on", {}).get("documents", [])
    if not fitted:
        return 0, 0
    return len(fitted), len(set(fitted) - set(fingerprints(snapshot)))


def told(gate: Any, snapshot: Snapshot) -> str:
    """One sentence where documents are gone; empty where none is, or the gate names none."""
    n, missing = gone(gate, snapshot)
    if not missing:
        return ""
    verb = "is" if missing == 1 else "are"
    return (
        f"The gate was fitted on {n:,} documents, of which {missing:,} {verb} no longer in this index as fitted (deleted or "
        "changed): fit it again with engram-lm gate fit."
    )
