"""What a path given to `engram-lm table` holds: packed files, a saved memory or a shipped checkpoint, as layouts by block.

source = open_source("model/")                  # a checkpoint, an index, one .safetensors, one .engram, or many
key, layout = source.one(layer=1)
for row_U, record_UR in sampled(layout, 4096): ...
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.storage import DiskStore, Layout, RowStore, names_of, open_packed, open_shipped
from engram_lm.storage.format import MAGIC, PARTIAL_MAGIC, SUFFIX
from engram_lm.storage.saved import MANIFEST, saved_tables
from engram_lm.storage.store import decode, records_of

STEP_BYTES = 4 << 20

Key = int | str


@dataclass(frozen=True, kw_only=True)
class Source:
    """`tables` by block from 0; by file or tensor name where no block is known."""

    path: Path
    packed: bool
    tables: dict[Key, Layout]

    @property
    def directory(self) -> Path:
        """Where config.json and the tokenizer would be."""
        return self.path if self.path.is_dir() else self.path.parent

    def named(self, layer: Any = None) -> dict[Key, Layout]:
        """All tables, or the one of `layer`. ConfigError lists what there is."""
        if layer is None:
            return self.tables
        for key, layout in self.tables.items():
            if str(key) == str(layer):
                return {key: layout}
        raise ConfigError(f"{self.path} has no table for layer {layer}; it has {self._listed()}.")

    def one(self, layer: Any = None) -> tuple[Key, Layout]:
        """The table of `layer`; without one, the only table."""
        tables = self.named(layer)
        if len(tables) > 1:
            raise ConfigError(f"{self.path} has several tables: {self._listed()}. Name one with --layer.")
        return next(iter(tables.items()))

    def _listed(self) -> str:
        return ", ".join(map(str, self.tables))


def open_source(path: str | os.PathLike) -> Source:
    """Headers alone are read. CheckpointError where there is no table."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return Source(path=path, packed=False, tables=saved_tables(path))
    if path.is_dir():
        files = sorted(path.glob("*" + SUFFIX))
        if files and not list(path.glob("*.safetensors")):
            return Source(path=path, packed=True, tables=_by_block([open_packed(file) for file in files]))
    elif path.suffix == SUFFIX or _magic(path) in (MAGIC, PARTIAL_MAGIC):
        return Source(path=path, packed=True, tables=_by_block([open_packed(path)]))
    return Source(path=path, packed=False, tables=open_shipped(path))


def _magic(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def _by_block(layouts: list[Layout]) -> dict[Key, Layout]:
    blocks = [block_of(layout) for layout in layouts]
    return {
        block if block is not None and blocks.count(block) == 1 else Path(layout.name).stem: layout
        for block, layout in zip(blocks, layouts, strict=True)
    }


def block_of(layout: Layout) -> int | None:
    """The block that a packed table says it belongs to: by its identity, else by the names it came from."""
    if layout.identity is not None and isinstance(layout.identity.get("layer"), int):
        return layout.identity["layer"]
    names = names_of(layout)
    parts = names.codes.split(".") if names else []
    after = [parts[i + 1] for i, part in enumerate(parts[:-1]) if part == "layers"]
    return int(after[-1]) if after and after[-1].isdecimal() else None


class Decoder:
    """Records to rows: float32 [N, width], the kernel that stores use."""

    def __init__(self, layout: Layout) -> None:
        self._store = RowStore(
            name=layout.name, n_rows=layout.n_rows, width=layout.width, codec=layout.codec, scale=layout.scale
        )

    def rows(self, record_NR: np.ndarray) -> np.ndarray:
        out = np.empty((len(record_NR), self._store.width), np.float32)
        decode(self._store, np.ascontiguousarray(record_NR), np.arange(len(record_NR)), out, "fp32")
        return out


def whole(layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows int64 [N], records uint8 [N, record_bytes]) of every row in order, some MB at a time, checksums checked."""
    for first, record_NR in records_of(layout):
        step = max(1, STEP_BYTES // layout.record_bytes)
        for start in range(0, len(record_NR), step):
            part = record_NR[start : start + step]
            yield np.arange(first + start, first + start + len(part)), part


def sampled(layout: Layout, n: int, *, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `whole`, of `n` rows drawn at random with the first and the last among them, ascending."""
    yield from chosen(layout, sample_rows(layout.n_rows, n, seed=seed))


def sample_rows(n_rows: int, n: int, *, seed: int = 0) -> np.ndarray:
    """Up to `n` different rows, ascending; int64."""
    if n < 1:
        raise ConfigError(f"A sample has at least one row; got {n}.")
    if n >= n_rows:
        return np.arange(n_rows)
    drawn = np.random.default_rng(seed).integers(0, n_rows, n)
    drawn[:2] = (0, n_rows - 1)[: min(2, n)]
    return np.unique(drawn)


def chosen(layout: Layout, row_U: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `whole`, of ascending rows, read one by one past the page cache."""
    store = DiskStore(layout)
    step = max(1, STEP_BYTES // layout.record_bytes)
    try:
        for start in range(0, len(row_U), step):
            part_U = row_U[start : start + step]
            record_UR = np.empty((len(part_U), layout.record_bytes), np.uint8)
            store.read_records(part_U, record_UR)
            yield part_U, record_UR
    finally:
        store.close()


def size_told(n_bytes: int) -> str:
    """26.30 KiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.2f} {unit}"
    return f"{n_bytes} B"
