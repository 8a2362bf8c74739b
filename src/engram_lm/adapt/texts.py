"""Documents in two halves, indexed and unseen, and the windows of them that a model reads.

    indexed, unseen = split(documents, seed=0)            # names, whole documents; a smaller index is the first of these
    window = window_of(ids, kind="unseen", id="leave.md")
    copied(window.ids, snapshot)                          # share of its tokens that the index holds word for word

Unseen text that stands in the index as well, boilerplate or a second copy, would be no unseen text: what is copied for
more than MOST_COPIED of its tokens, in runs of RUN tokens or more (13 as in Brown et al. 2020), is left out.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot

WINDOW, LEAST = 320, 48
GIVEN = 5  # the first fifth of a window is its prompt
RUN, MOST_COPIED = 13, 0.2

Kind = Literal["indexed", "unseen", "general"]


@dataclass(frozen=True)
class Window:
    """ids: int64 [T] of a document; the first `given` are read only, the others are scored. domain: a word for tables."""

    ids: np.ndarray
    given: int
    kind: Kind
    id: str
    domain: str = "documents"

    @property
    def scored(self) -> int:
        return len(self.ids) - self.given

    @property
    def key(self) -> str:
        """The window's name among all of a run."""
        return f"{self.domain}/{self.kind}/{self.id}"


def split(names: Iterable[str], *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Two halves at random; in the order of the draw, so that the first n are an index of n documents."""
    names = list(names)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    half = (len(order) + 1) // 2
    return order[:half], order[half:]


def window_of(ids: np.ndarray, *, kind: Kind, id: str, domain: str = "documents") -> Window | None:
    """A window at a place that depends on the id alone; None for fewer than LEAST tokens."""
    if len(ids) < LEAST:
        return None
    most = max(len(ids) - WINDOW, 0)
    start = int(
        np.random.default_rng(zlib.crc32(id.encode("utf8", "backslashreplace"))).integers(0, most + 1)
    )
    cut = np.asarray(ids[start : start + WINDOW], np.int64)
    return Window(cut, len(cut) // GIVEN, kind, id, domain)


def copied(ids: np.ndarray, snapshot: "Snapshot", *, run: int = RUN) -> float:
    """The share of tokens that stand in runs of `run` or more which the index holds too."""
    # END behind the last token: row t of the scores knows the match of ids[:t]
    depth_T = snapshot.score(np.append(np.asarray(ids, np.int64), snapshot.end)).depth
    inside = np.zeros(len(ids), bool)
    for t in np.flatnonzero(depth_T >= run):
        inside[t - depth_T[t] : t] = True
    return float(inside.mean()) if len(ids) else 0.0
