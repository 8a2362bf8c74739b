"""How often a cache of rows hits: a token stream played through the addresses of one memory layer. Needs no weights.

What is counted. A server with `slots` slots reads requests as `cachesim.kernels.serve` says: a free slot takes the next
request, reads its prompt in one step and then one token a step; slots come in turn. A token looks up one row of every
column. Rows asked twice within a step are read once, so a step's reads are its different rows; hit rates are shares of
reads. The cache holds entries: single rows, or with `entry="ngram"` all rows of an n-gram together (no two n-grams then
share one). The caches start empty; the first `warm_up` share of the tokens fills them and is not counted. The end, where
too few requests remain for all slots, is left out: `tokens` counts what was played, `left_out` the rest.

    lru        exact for every size at once, by reuse distances
    lfu        LFU with dynamic aging           \\ of the given budgets, see `cachesim.kernels`
    tinylfu    LRU behind a TinyLFU admission   /
    static     the entries read most often among the counted reads, held from the start: hindsight, a bound for
               caches that never change
    pinned     the entries read most often in the warm-up, held for ever: what a static cache gets in practice
    limit      1 - first reads / reads: reads of what was never read before miss in every cache that starts empty

    scheme, = resolve(PROFILES["qwen-ple"], vocab_size=248_320, layers=(1,), eos_ids=(248_046,))
    found = simulate(requests, scheme, bytes_per_row=320, slots=8, budgets=[64_000_000])
    found.caches["all"].at[64_000_000].lru

Bytes are those of the rows; a cache needs some more to find them. One layer, one table, one cache; layers read the same
n-grams and differ by which of them share a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_lm.addressing import AddressScheme
from engram_lm.cachesim import kernels
from engram_lm.cachesim.requests import Requests
from engram_lm.errors import ConfigError

POLICIES = ("lru", "lfu", "tinylfu", "static", "pinned")
ENTRIES = ("row", "ngram")
TARGETS = (0.5, 0.8, 0.9)
# Sizes at which curves are kept, from a 2^16th of all entries to all.
_CURVE_POINTS = 65
# Tokens whose addresses are made at a time.
_CHUNK = 1 << 16
_LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """Hit rates of one size. Policies that were not run are None; so is what a cache of one order does not know."""

    entries: int
    bytes: int
    lru: float
    static: float
    pinned: float | None = None
    lfu: float | None = None
    tinylfu: float | None = None
    # In a cache for all orders: the hit rate of each order, and the share of steps in which nothing missed.
    lru_by_order: dict[str, float] | None = None
    whole_steps: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One cache over one stream: for all orders, or for one alone.

    reads: counted reads. entries: different entries of the whole stream. first_reads: counted reads that no cache
    holds. curve: ascending sizes. at: the budgets, by bytes. needed: bytes at which LRU reaches a hit rate, or None.
    """

    holds: str
    bytes_per_entry: int
    reads: int
    entries: int
    first_reads: int
    curve: tuple[Point, ...]
    at: dict[int, Point]
    needed: dict[float, int | None]
    needed_static: dict[float, int | None]

    @property
    def limit(self) -> float:
        """The hit rate of a cache that holds everything."""
        return 1 - self.first_reads / self.reads


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """One layer, one number of slots. lookups: rows or n-grams asked for in counted steps, before merging.

    tokens: played. left_out: tokens of the end, where a slot would stand idle.
    """

    layer: int
    slots: int
    steps: int
    counted_steps: int
    tokens: int
    left_out: int
    lookups: int
    table_bytes: int
    caches: dict[str, Cache] = field(default_factory=dict)

    @property
    def merged(self) -> float:
        """Share of lookups that another of the same step answers."""
        return 1 - self.caches["all"].reads / self.lookups


@dataclass(frozen=True)
class _Reads:
    entry_N: np.ndarray
    group_N: np.ndarray
    n_entries: int
    # First counted read.
    first: int


def simulate(
    requests: Requests,
    scheme: AddressScheme,
    *,
    bytes_per_row: int,
    slots: int = 1,
    budgets: Sequence[int] = (),
    policies: Sequence[str] = POLICIES[:3],
    entry: str = "row",
    warm_up: float = 0.0,
) -> Simulation:
    """Play `requests` (ids as the scheme hashes them) through caches. budgets: bytes of one layer's cache."""
    if slots < 1 or slots > len(requests):
        raise ConfigError(
            f"{slots} requests at a time, of {len(requests)} in {requests.name}; wanted 1 to {len(requests)}. "
            "A stream is cut into requests at --separator."
        )
    if not 0 <= warm_up < 1:
        raise ConfigError(f"warm_up is {warm_up}; wanted a share of the tokens, 0 to below 1.")
    if entry not in ENTRIES:
        raise ConfigError(f"entry is {entry!r}; wanted one of {', '.join(ENTRIES)}.")
    orders, heads = scheme.profile.orders, scheme.profile.heads
    names = [f"{order}-gram" for order in orders]
    entry_CL, n_entries = _entries(requests, scheme, entry)
    per_order = entry_CL.shape[0] // len(orders)
    bytes_per_entry = bytes_per_row * (heads if entry == "ngram" else 1)
    smallest = min(budgets, default=bytes_per_entry)
    if smallest < bytes_per_entry:
        raise ConfigError(f"a budget of {smallest} bytes holds no entry of {bytes_per_entry} bytes.")

    n_tokens = len(requests.ids_T)
    token_T, step_T = np.empty(n_tokens, dtype=np.int64), np.empty(n_tokens, dtype=np.int32)
    _, steps = kernels.serve(requests.tokens_Q, requests.prompt_Q, slots, token_T, step_T)
    played = int(np.searchsorted(step_T, steps))
    token_T, step_T = token_T[:played], step_T[:played]
    group_C = np.repeat(np.arange(len(orders), dtype=np.uint8), per_order)
    if entry_CL.size >= 2**31:
        raise ConfigError(
            f"{entry_CL.size} reads are more than one simulation takes (2^31). Use --limit, or --entry ngram."
        )
    most = played * entry_CL.shape[0]
    entry_N, group_N = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.uint8)
    reads_K = np.zeros(steps, dtype=np.int32)
    n = kernels.merge_reads(entry_CL, token_T, step_T, group_C, n_entries, entry_N, group_N, reads_K)
    skipped = int(step_T[int(played * warm_up)])
    first = int(reads_K[:skipped].sum())
    reads = _Reads(entry_N[:n], group_N[:n], n_entries, first)
    counted_tokens = int((step_T >= skipped).sum())
    found = Simulation(
        layer=scheme.layer,
        slots=slots,
        steps=steps,
        counted_steps=steps - skipped,
        tokens=played,
        left_out=n_tokens - played,
        lookups=counted_tokens * entry_CL.shape[0],
        table_bytes=scheme.padded_rows * bytes_per_row,
    )
    options: dict[str, Any] = {
        "bytes_per_entry": bytes_per_entry,
        "budgets": budgets,
        "policies": policies,
        "warm": skipped > 0,
    }
    found.caches["all"] = _play("all", reads, by_order=names, reads_K=reads_K, skipped=skipped, **options)
    for group, name in enumerate(names if len(names) > 1 else ()):
        of_order_N = reads.group_N == group
        alone = _Reads(
            reads.entry_N[of_order_N],
            reads.group_N[of_order_N],
            n_entries,
            int(of_order_N[:first].sum()),
        )
        found.caches[name] = _play(name, alone, **options)
    return found


def _entries(requests: Requests, scheme: AddressScheme, entry: str) -> tuple[np.ndarray, int]:
    """What every token asks for, numbered from 0 over all columns: int32 [columns, tokens], and how many there are."""
    orders, heads = scheme.profile.orders, scheme.profile.heads
    keys_CL = np.empty((len(orders) * (heads if entry == "row" else 1), len(requests.ids_T)), dtype=np.int64)
    starts_T, previous = requests.starts_T, None
    for at in range(0, len(requests.ids_T), _CHUNK):
        piece = slice(at, at + _CHUNK)
        marks = {"starts_BT": starts_T[piece], "previous_BP": previous}
        rows_TC = scheme.addresses(requests.ids_T[piece], **marks)
        previous = scheme.carry(requests.ids_T[piece], **marks)
        if entry == "row":
            keys_CL[:, piece] = rows_TC.T
            continue
        # Heads of an order share the mix: as many of their rows as fit 63 bits name the n-gram.
        rows_TC = rows_TC - scheme.offsets
        for group in range(len(orders)):
            key_T, size = np.zeros(len(rows_TC), dtype=np.int64), 1
            for c in range(group * heads, (group + 1) * heads):
                modulus = int(scheme.moduli[c])
                if size * modulus > _LARGEST:
                    break
                key_T = key_T * modulus + rows_TC[:, c]
                size *= modulus
            keys_CL[group, piece] = key_T
    entry_CL, n_entries = np.empty(keys_CL.shape, dtype=np.int32), 0
    for c, key_L in enumerate(keys_CL):
        different, entry_L = np.unique(key_L, return_inverse=True)
        entry_CL[c] = entry_L + n_entries
        n_entries += len(different)
    return entry_CL, n_entries


def _play(
    holds: str,
    reads: _Reads,
    *,
    bytes_per_entry: int,
    budgets: Sequence[int],
    policies: Sequence[str],
    warm: bool,
    by_order: Sequence[str] = (),
    reads_K: np.ndarray | None = None,
    skipped: int = 0,
) -> Cache:
    """All curves of one cache. by_order and reads_K: what a cache for all orders knows besides."""
    n = len(reads.entry_N)
    counted = n - reads.first
    distance_N = np.empty(n, dtype=np.int32)
    kernels.lru_distances(reads.entry_N, reads.n_entries, distance_N)
    # Entries this cache can ever be asked for.
    entries = int((distance_N < 0).sum())
    hits_E = _hits_by_size(distance_N, reads, -1, entries)
    static_E, pinned_E = _static(reads, warm)
    by_budget = {budget: min(budget // bytes_per_entry, entries) for budget in budgets}
    smallest = max(1, entries >> 16)
    grid = {round(size) for size in np.geomspace(smallest, entries, _CURVE_POINTS).tolist()}
    sizes = sorted(grid | set(by_budget.values()))
    at_K = np.array(sizes) - 1
    rate_K = {
        "lru": hits_E[at_K] / counted,
        "static": _taken(static_E, at_K) / counted,
    }
    if pinned_E is not None and "pinned" in policies:
        rate_K["pinned"] = _taken(pinned_E, at_K) / counted
    if reads_K is not None:
        rate_K["whole_steps"] = _whole_steps(distance_N, reads_K, skipped, entries)[at_K]
    order_K = {}
    for group, name in enumerate(by_order if len(by_order) > 1 else ()):
        of_order = int((reads.group_N[reads.first :] == group).sum())
        order_K[name] = _hits_by_size(distance_N, reads, group, entries)[at_K] / of_order

    def point(k: int, **more: Any) -> Point:
        values = {name: float(rate[k]) for name, rate in rate_K.items()}
        orders = {name: float(rate[k]) for name, rate in order_K.items()} or None
        return Point(
            entries=sizes[k], bytes=sizes[k] * bytes_per_entry, lru_by_order=orders, **values, **more
        )

    frequency = {"lfu": kernels.lfu_hits, "tinylfu": kernels.tinylfu_hits}
    at = {}
    for budget, size in by_budget.items():
        hits = {
            name: float(play(reads.entry_N, reads.n_entries, size, reads.first) / counted)
            for name, play in frequency.items()
            if name in policies
        }
        at[budget] = point(sizes.index(size), **hits)
    return Cache(
        holds=holds,
        bytes_per_entry=bytes_per_entry,
        reads=counted,
        entries=entries,
        first_reads=counted - int(hits_E[-1]),
        curve=tuple(point(k) for k, size in enumerate(sizes) if size in grid),
        at=at,
        needed={target: _needed(hits_E, target * counted, bytes_per_entry) for target in TARGETS},
        needed_static={target: _needed(static_E, target * counted, bytes_per_entry) for target in TARGETS},
    )


def _hits_by_size(distance_N: np.ndarray, reads: _Reads, group: int, entries: int) -> np.ndarray:
    """LRU hits of a cache of 1, 2, ... entries."""
    count_E = np.zeros(entries, dtype=np.int64)
    kernels.count_distances(distance_N, reads.group_N, group, reads.first, count_E)
    return np.cumsum(count_E)


def _whole_steps(distance_N: np.ndarray, reads_K: np.ndarray, skipped: int, entries: int) -> np.ndarray:
    """Share of counted steps without a miss in an LRU cache of 1, 2, ... entries."""
    longest_K = np.empty(len(reads_K), dtype=np.int64)
    kernels.longest_of_steps(distance_N, reads_K, entries, longest_K)
    count_E = np.bincount(longest_K[skipped:], minlength=entries + 1)
    return np.cumsum(count_E[:entries]) / (len(reads_K) - skipped)


def _static(reads: _Reads, warm: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Hits of caches that hold the 1, 2, ... entries read most often: among counted reads, and in the warm-up."""
    count_E = np.bincount(reads.entry_N[reads.first :], minlength=reads.n_entries)
    static_E = np.cumsum(-np.sort(-count_E[count_E > 0]))
    if not warm:
        return static_E, None
    warm_E = np.bincount(reads.entry_N[: reads.first], minlength=reads.n_entries)
    # Equal counts by entry number.
    order_E = np.argsort(-warm_E, kind="stable")[: int((warm_E > 0).sum())]
    return static_E, np.cumsum(count_E[order_E])


def _taken(hits_E: np.ndarray, at_K: np.ndarray) -> np.ndarray:
    """hits_E, which stays at its last value where a cache is larger than what there is to hold."""
    return hits_E[np.minimum(at_K, len(hits_E) - 1)] if len(hits_E) else np.zeros(len(at_K))


def _needed(hits_E: np.ndarray, wanted: float, bytes_per_entry: int) -> int | None:
    at = int(np.searchsorted(hits_E, wanted))
    return None if at == len(hits_E) else (at + 1) * bytes_per_entry
