"""python -m engram_lm.compiling PART: do one part of `work`; a line on stdout for every kernel that had to be compiled."""

import sys
import tempfile
from pathlib import Path

from engram_lm.compiling.work import PARTS
from engram_lm.kernels import announcing


class _Lines:
    """Where each kernel is kept, or an empty line."""

    def begins(self) -> None:
        pass

    def ends(self, *, place: Path | None) -> None:
        sys.stdout.write(f"{place or ''}\n")
        sys.stdout.flush()


announcing.listener = _Lines()
with tempfile.TemporaryDirectory() as directory:
    PARTS[sys.argv[1]](Path(directory) / "work")
