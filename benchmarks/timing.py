"""CPU seconds of things that take turns, and of parts inside them. Standard library alone: any interpreter can use it.

    one_thread()                        # before NumPy and torch are imported
    seconds = alternate({"bare": run_bare, "zipf": run_zipf}, repeats=5)
    summary(seconds)["zipf"]["added_s"]

CPU time and not wall time, because machines are shared; arms take turns, because their speed drifts: a difference or a
ratio is taken within a repeat, and its median reported with the least and the most.
"""

import ctypes
import os
import statistics
import time
from collections.abc import Callable


def one_thread() -> None:
    """One thread in every library that reads its number at import, and no network."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of returning each to the kernel: page faults were a third of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def alternate(
    arms: dict[str, Callable[[int], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    settle: int = 0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """CPU seconds of each arm's repeats. An arm is called with the number of the repeat; the warm-up is -1.

    settle: untimed calls right before each timed one, so that a short arm finds the caches as it leaves them itself.
    """
    seconds = {name: [] for name in arms}
    for repeat in range(-warm_up, repeats):
        for name, run in arms.items():
            for _ in range(settle):
                run(repeat)
            start = clock()
            run(repeat)
            if repeat >= 0:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float], unit: str = "s") -> dict[str, float]:
    """Median, least and most."""
    return {
        f"median_{unit}": statistics.median(values),
        f"min_{unit}": min(values),
        f"max_{unit}": max(values),
        "repeats": len(values),
    }


def summary(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """`spread` of each arm; added time is the median of the differences from "bare" within a repeat."""
    out = {name: spread(spent) for name, spent in seconds.items()}
    for name, spent in seconds.items():
        if name != "bare" and "bare" in seconds:
            added = [a - b for a, b in zip(spent, seconds["bare"], strict=True)]
            out[name].update(added_s=statistics.median(added), added_min_s=min(added), added_max_s=max(added))
    return out


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """`spread` of one arm over another, taken within a repeat."""
    return spread([a / b for a, b in zip(seconds[name], seconds[base], strict=True)], "ratio")


class Parts:
    """CPU seconds inside pieces of a model, by wrapping methods of objects; used in passes of their own.

    pieces: (object, method name, name of the part); parts of one name are added up.
    """

    def __init__(self, pieces: list[tuple[object, str, str]]) -> None:
        self.seconds: dict[str, float] = {}
        self._wrapped = []
        for owner, method, part in pieces:
            self._wrap(owner, method, part)

    def _wrap(self, owner: object, method: str, part: str) -> None:
        plain = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start

        setattr(owner, method, timed)
        self._wrapped.append((owner, method))

    def per_call(self, calls: int) -> dict[str, float]:
        """Unwrap, and give the seconds of each part divided by the calls made."""
        for owner, method in self._wrapped:
            delattr(owner, method)
        return {part: seconds / calls for part, seconds in self.seconds.items()}
