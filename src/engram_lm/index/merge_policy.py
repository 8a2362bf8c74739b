"""Which segments to merge (docs/store.md): few segments for a reader, few rewrites for a writer. Pure functions.

    for group in due(entries): ...        # groups of segments of one tenant, each to become one

Size-tiered, as in log-structured stores (O'Neil et al. 1996; Cassandra's size-tiered compaction): FAN segments of one
tier make one of about the next.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from engram_lm.index.manifest import Entry

FAN = 4
FIRST_TIER = 4096  # live tokens
MOST_DEAD = 1 / 3
MOST_TOKENS = 2**28  # of a merged segment
MOST_SEGMENTS = 32  # beyond these whoever adds merges first


def tier(live_tokens: int) -> int:
    """0 below FIRST_TIER tokens, one more for each FAN times as many."""
    found, limit = 0, FIRST_TIER
    while live_tokens >= limit:
        found, limit = found + 1, limit * FAN
    return found


def due(entries: Iterable[Entry], busy: Collection[int] = (), most: int = MOST_TOKENS) -> tuple[Entry, ...]:
    """The next group to merge, smallest segments first; empty where nothing is due.

    Args:
        entries: of one tenant, oldest first. Those whose number is `busy` are left alone.
        most: live tokens of the merged segment.
    """
    tiers: dict[int, list[Entry]] = defaultdict(list)
    free = [entry for entry in entries if entry.number not in busy]
    for entry in free:
        tiers[tier(entry.live_tokens)].append(entry)
    for _, group in sorted(tiers.items()):
        fitting = fit(group, most)
        if len(fitting) >= FAN:
            return fitting
    for entry in free:
        if entry.dead_tokens > MOST_DEAD * entry.tokens:
            return (entry,)
    return ()


def fit(entries: Iterable[Entry], most: int) -> tuple[Entry, ...]:
    """The first segments that together have no more than `most` live tokens."""
    group, total = [], 0
    for entry in entries:
        if total + entry.live_tokens <= most:
            group.append(entry)
            total += entry.live_tokens
    return tuple(group)


def groups(entries: Iterable[Entry], most: int) -> Iterator[tuple[Entry, ...]]:
    """All segments, in as few groups of no more than `most` live tokens as going through them once gives."""
    waiting = list(entries)
    while waiting:
        group = fit(waiting, most) or (waiting[0],)
        waiting = [entry for entry in waiting if entry not in group]
        yield group
