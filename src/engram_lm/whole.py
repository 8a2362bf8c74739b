"""A small file that is there whole or as it was: `write_whole(path, text)`."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a small file: the old one or the new one is there, never half of either."""
    beside = path.with_name(f".{path.name}")
    with open(beside, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
