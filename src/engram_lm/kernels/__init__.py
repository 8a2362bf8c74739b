"""CPU kernels in numba, each with a plain twin that the tests compare it with. Nothing here imports torch.

numba compiles into a kernel what it calls of other files, but asks of its own file alone whether it changed since. So in a
checkout, where a pull changes some files, what was compiled before is forgotten as a whole: old code would read by an old
layout, silently. (Not where NUMBA_CACHE_DIR names another place: empty that yourself.)
"""

import contextlib
import hashlib
from pathlib import Path

_STAMP = "kernels.sha256"


def forget_stale(directory: Path) -> bool:
    """Remove what was compiled of other sources than a directory's; whether that was so. Nothing where it may not write."""
    sources = b"\n".join(path.read_bytes() for path in sorted(directory.glob("*.py")))
    digest, compiled = hashlib.sha256(sources).hexdigest(), directory / "__pycache__"
    with contextlib.suppress(OSError):
        if (compiled / _STAMP).exists() and (compiled / _STAMP).read_text() == digest:
            return False
        compiled.mkdir(exist_ok=True)
        for path in compiled.glob("*.nb[ic]"):
            path.unlink(missing_ok=True)
        (compiled / _STAMP).write_text(digest)
        return True
    return False


forget_stale(Path(__file__).parent)
