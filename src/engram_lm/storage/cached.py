"""Hot rows of a slower store in memory, within a stated number of bytes.

    store = CachedStore(DiskStore(layout), budget_bytes=2 << 30)

The budget holds records (as they are on disk) and the directory that finds them (see `kernels.cache_sets`). The rows are
the slower store's, bit for bit; only the time changes.
"""

import threading

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.storage.kernels import cache_sets
from engram_lm.storage.kernels import rows as row_kernels
from engram_lm.storage.store import RowStore

POLICIES = {"lru": cache_sets.LRU, "frequency": cache_sets.FREQUENCY}
_DIRECTORY_BYTES = 8 + 8 + 1  # key, stamp, count of a slot
_SET_BYTES = 4


class CachedStore(RowStore):
    """A store that keeps rows of `slow` which were asked for.

    Args:
        budget_bytes: of records and directory together; at least one set of 16 rows.
        policy: "frequency" or "lru", which row makes room.
    """

    def __init__(self, slow: RowStore, *, budget_bytes: int, policy: str = "frequency") -> None:
        super().__init__(
            name=slow.name, n_rows=slow.n_rows, width=slow.width, codec=slow.codec.name, scale=slow.scale,
            identity=slow.identity,
        )  # fmt: skip
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}; wanted {' or '.join(POLICIES)}.")
        per_set = cache_sets.WAYS * (self.record_bytes + _DIRECTORY_BYTES) + _SET_BYTES
        n_sets = min(budget_bytes // per_set, -(-slow.n_rows // cache_sets.WAYS) * 2)
        if n_sets < 1:
            raise ConfigError(
                f"A cache of {budget_bytes:,} bytes holds no set of rows; give at least {per_set:,}."
            )
        self.slow, self.policy = slow, policy
        self.capacity, self.bytes_held = n_sets * cache_sets.WAYS, n_sets * per_set
        pages = row_kernels.zero_pages(self.capacity * self.record_bytes)
        self._record_CR = np.frombuffer(pages, np.uint8, count=self.capacity * self.record_bytes).reshape(
            self.capacity, self.record_bytes
        )
        self._key_SW = np.full((n_sets, cache_sets.WAYS), -1, np.int64)
        self._stamp_SW = np.zeros((n_sets, cache_sets.WAYS), np.int64)
        self._count_SW = np.zeros((n_sets, cache_sets.WAYS), np.uint8)
        self._taken_S = np.zeros(n_sets, np.int32)
        self._now = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0  # rows, each once a gather

    def read_records(self, row_U: np.ndarray, out_UR: np.ndarray) -> None:
        slot_U = np.empty(len(row_U), np.int64)
        with self._lock:
            self._now += 1
            now = self._now
            n_found = cache_sets.look_up(row_U, self._key_SW, self._stamp_SW, self._count_SW, now, slot_U)
            found_U = slot_U >= 0
            if n_found == len(row_U):
                row_kernels.gather(self._record_CR.ctypes.data, slot_U, out_UR.ctypes.data, self.record_bytes)
            elif n_found:
                out_UR[found_U] = self._record_CR[slot_U[found_U]]
            self.hits += n_found
            self.misses += len(row_U) - n_found
        if n_found == len(row_U):
            return
        row_M = row_U[~found_U]
        record_MR = np.empty((len(row_M), self.record_bytes), np.uint8)
        self.slow.read_records(row_M, record_MR)
        out_UR[~found_U] = record_MR
        slot_M = np.empty(len(row_M), np.int64)
        with self._lock:
            cache_sets.admit(
                row_M, self._key_SW, self._stamp_SW, self._count_SW, self._taken_S, now, POLICIES[self.policy], slot_M
            )  # fmt: skip
            # several rows of one gather may have taken the same slot: the last one is in the directory, and is written last
            self._record_CR[slot_M] = record_MR

    def forget(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._key_SW.fill(-1)
            self._count_SW.fill(0)

    def close(self) -> None:
        self.slow.close()
        # what is not found here is asked of the slower store, which says that it was closed
        self.forget()
