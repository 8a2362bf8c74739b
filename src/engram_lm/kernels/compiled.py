"""The decorator of every kernel: numba's njit without the interpreter's lock, compiled once for all processes.

What was compiled is found by the sources that it was compiled from (`disk_cache`), which numba's own `cache=True` does not:
that one looks at the file of a kernel alone, and goes on with old code where a kernel that it calls has changed.

A kernel must hold no pointer of its process, or no other process could use it: name a C function with
`types.ExternalFunction`, not with ctypes.

    @kernel
    def total(x_N): ...

    @kernel(fastmath=True)
    def mean(x_N): ...
"""

import functools

from numba import njit
from numba.core.dispatcher import Dispatcher

from engram_lm.kernels.disk_cache import DiskCache


def kernel(function=None, **options):
    """`function`, compiled at its first call for each signature, or loaded. Options are those of njit."""
    if function is None:
        return functools.partial(kernel, **options)
    if "<locals>" in function.__qualname__:
        raise TypeError(
            f"{function.__qualname__} is made by another function, so several kernels may have its name, and numba "
            "tells compiled code apart by names. Give each a __qualname__ of its own first."
        )
    dispatcher = njit(nogil=True, **options)(function)
    # with NUMBA_DISABLE_JIT it is the function itself
    if isinstance(dispatcher, Dispatcher):
        dispatcher._cache = DiskCache(function)
    return dispatcher
