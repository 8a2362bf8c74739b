"""Tables from one file format, or codec, to another: packed files from checkpoints, checkpoints from packed files.

Between formats bytes are copied: a way there and back gives the same tensors bit for bit. Between codecs rows are decoded
and encoded anew, to nearest; the report says how far the new numbers lie from the old and what the bound is.

A killed conversion goes on with the same command: packed files by their own `.partial`, safetensors files by a `.partial`
of full length beside a `.partial.rows` that says how many rows are in it for certain.
"""

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.storage import CODECS, Layout, TableWriter, names_of
from engram_lm.storage.codecs import E4M3_MAX, codec_named
from engram_lm.storage.safetensors import header_bytes
from engram_lm.storage.shipped import Names, shard_name, shard_rows
from engram_lm.storage.store import records_of
from engram_lm.tabletools.sources import Decoder

Report = Callable[[int, int], None]

# docs/format.md, in a line each
BOUNDS = {
    "fp32": "0",
    "bf16": "2^-8 |x|",
    "fp8_e4m3_e8m0": "2^-4 |x|, or 2^-17 of the largest of its 32 numbers where that is more",
    "fp8_e4m3": "2^-4 |x|, or 2^-10 of the scale where that is more",
}
_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp8_e4m3": "F8_E4M3", "fp8_e4m3_e8m0": "F8_E4M3"}
_SYNC_BYTES = 256 << 20


@dataclass(kw_only=True)
class Converted:
    """What was written. resumed_at: the row that an earlier, killed run had come to. largest_error: of the rows encoded in
    this run; None where bytes were copied."""

    path: Path
    n_rows: int
    codec: str
    scale: float
    n_bytes: int
    resumed_at: int = 0
    largest_error: float | None = None
    bound: str = "0"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "path": str(self.path)}


def _nothing(done: int, total: int) -> None: ...


def recoded(
    layout: Layout, *, codec: str | None, scale: float | None, report: Report = _nothing
) -> tuple[str, float]:
    """The codec and scale a conversion writes. A scale that is not given is found by reading the table once."""
    name = codec_named(codec or layout.codec).name
    CODECS[name].record_bytes(layout.width)
    if name != "fp8_e4m3":
        if scale is not None:
            raise ConfigError(f"--scale has no effect on {name}: only fp8_e4m3 has one scale for the table.")
        return name, 1.0
    if scale is not None:
        if not (scale > 0 and np.isfinite(scale)):
            raise ConfigError(f"--scale is {scale}; wanted a number above 0.")
        return name, float(np.float32(scale))
    if layout.codec == name:
        return name, layout.scale
    decoder, largest = Decoder(layout), 0.0
    for first, record_NR in records_of(layout):
        largest = max(largest, float(np.abs(decoder.rows(record_NR)).max()))
        report(first + len(record_NR), layout.n_rows)
    if not np.isfinite(largest):
        raise ConfigError(f"{layout.name} holds numbers that are not finite; {name} cannot.")
    scale = np.float32(largest / E4M3_MAX) if largest else np.float32(1.0)
    while largest > E4M3_MAX * float(scale):
        scale = np.nextafter(scale, np.float32(np.inf))
    return name, float(scale)


class _Recoder:
    """Records of one codec to records of another; keeps the largest error."""

    def __init__(self, layout: Layout, codec: str, scale: float) -> None:
        self.copies = (layout.codec, layout.scale) == (codec, scale)
        self.decoder, self.codec, self.scale = Decoder(layout), CODECS[codec], scale
        self.largest_error = None if self.copies else 0.0

    def __call__(self, record_NR: np.ndarray) -> np.ndarray:
        if self.copies:
            return record_NR
        rows_NW = self.decoder.rows(record_NR)
        encoded_NR = self.codec.encode(rows_NW, scale=self.scale)
        with np.errstate(invalid="ignore"):
            error_NW = self.codec.decode(encoded_NR, scale=self.scale) - rows_NW
        largest = max(float(error_NW.max()), -float(error_NW.min()))
        if not np.isfinite(largest):  # NaN stays NaN
            largest = float(np.abs(error_NW).max(where=np.isfinite(error_NW), initial=0.0))
        self.largest_error = max(self.largest_error, largest)
        return encoded_NR


def _finished(
    layout: Layout, path: Path, recode: _Recoder, *, codec: str, scale: float, resumed_at: int
) -> Converted:
    return Converted(
        path=path,
        n_rows=layout.n_rows,
        codec=codec,
        scale=scale,
        n_bytes=path.stat().st_size,
        resumed_at=resumed_at,
        largest_error=recode.largest_error,
        bound="0" if recode.copies else BOUNDS[codec],
    )


def to_packed(
    layout: Layout,
    path: Path,
    *,
    codec: str | None = None,
    scale: float | None = None,
    identity: dict[str, Any] | None = None,
    report: Report = _nothing,
) -> Converted:
    """Write a packed file. `identity`: facts to keep where the layout has none."""
    _refuse_own_file(layout, path)
    codec, scale = recoded(layout, codec=codec, scale=scale, report=report)
    recode = _Recoder(layout, codec, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = _mark_source(path, _source_key(layout))
    with TableWriter(
        path,
        n_rows=layout.n_rows,
        width=layout.width,
        codec=codec,
        scale=scale,
        identity=layout.identity or identity,
        note=_note(layout, codec),
    ) as writer:
        resumed_at = writer.rows_done
        for first, record_NR in records_of(layout, first=resumed_at):
            writer.add(recode(record_NR))
            report(first + len(record_NR), layout.n_rows)
        writer.finish()
    mark.unlink(missing_ok=True)
    return _finished(layout, path, recode, codec=codec, scale=scale, resumed_at=resumed_at)


def _source_key(layout: Layout) -> str:
    """What the rows are read from: a conversion goes on only with the same files."""
    stats = [
        (str(s.path.resolve()), s.path.stat().st_size, s.path.stat().st_mtime_ns, s.offset)
        for s in layout.segments
    ]
    return hashlib.sha256(repr((stats, layout.codec, layout.scale, layout.n_rows)).encode()).hexdigest()


def _mark_source(path: Path, key: str) -> Path:
    """Keep beside a `.partial` what it is made from; refuse one that is made from something else."""
    partial, mark = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.source")
    if partial.exists() and (not mark.exists() or mark.read_text() != key):
        raise CheckpointError(
            f"{partial} was begun from another source, or one that has changed. Remove it to begin anew."
        )
    with _told(mark):
        mark.write_text(key)
    return mark


def _note(layout: Layout, codec: str) -> str:
    """Names follow the rows to a file of the same codec; in another codec they would have other tensors."""
    names = names_of(layout)
    if names is None or codec == layout.codec:
        return layout.note
    return _names_for(names.codes, codec).note()


def _names_for(codes: str, codec: str) -> Names:
    """Names as the family of `codes` ships them."""
    prefix = codes.removesuffix(".weight")
    if codec == "fp8_e4m3_e8m0":
        return Names(codes=codes, scale=f"{prefix}.scale")
    if codec == "fp8_e4m3":
        # a float32 keeps the scale as it is; released files have bfloat16
        return Names(codes=codes, scale=f"{prefix}.weight_scale", scale_dtype="F32", scale_shape=(1,))
    return Names(codes=codes)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Bytes `at` to `at + n_bytes` of the records of rows `first` to `last`, as the tensor `name`."""

    name: str
    dtype: str
    first: int
    last: int
    at: int
    n_bytes: int
    columns: int


def to_safetensors(
    layout: Layout,
    path: Path,
    *,
    codec: str | None = None,
    scale: float | None = None,
    codes_name: str | None = None,
    shards: int | None = None,
    report: Report = _nothing,
) -> Converted:
    """Write one safetensors file with the names the family ships: those the table came with, or `codes_name`'s."""
    _refuse_own_file(layout, path)
    codec, scale = recoded(layout, codec=codec, scale=scale, report=report)
    names = _choose_names(layout, codec, codes_name, shards)
    pieces, tensors, extra = _plan(layout, names, codec, scale)
    head = header_bytes(tensors, {"format": "pt"})
    at, start_of = len(head) + len(extra), {}
    for piece in pieces:
        start_of[piece.name] = at
        at += (piece.last - piece.first) * piece.n_bytes
    recode = _Recoder(layout, codec, scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _Partial(path, head + extra, total=at, source=layout) as partial:
        resumed_at = row = partial.rows_done
        for first, record_NR in records_of(layout, first=row):
            encoded_NR, last = recode(record_NR), first + len(record_NR)
            for piece in pieces:
                low, high = max(first, piece.first), min(last, piece.last)
                if low < high:
                    part = encoded_NR[low - first : high - first, piece.at : piece.at + piece.n_bytes]
                    partial.write(
                        np.ascontiguousarray(part), start_of[piece.name] + (low - piece.first) * piece.n_bytes
                    )
            partial.did(last)
            report(last, layout.n_rows)
        partial.finish()
    return _finished(layout, path, recode, codec=codec, scale=scale, resumed_at=resumed_at)


def _choose_names(layout: Layout, codec: str, codes_name: str | None, shards: int | None) -> Names:
    kept = names_of(layout)
    if codes_name is None and kept is None:
        raise ConfigError(
            f"{layout.name} does not say what its tensor is called. Give --name, as in layers.1.engram.embed.weight."
        )
    codes = codes_name or kept.codes
    if not codes.endswith(".weight"):
        raise ConfigError(f"--name is {codes!r}; the tensor of the rows ends in .weight.")
    names = (
        kept
        if kept is not None and codes == kept.codes and codec == layout.codec
        else _names_for(codes, codec)
    )
    if codec == "fp8_e4m3_e8m0" and not codes.endswith(".engram.embed.weight"):
        raise ConfigError(f"{codec} ships as layers.N.engram.embed.weight; got {codes!r}.")
    if codec != "fp8_e4m3_e8m0" and not codes.endswith("ngram_embedding.weight"):
        raise ConfigError(f"{codec} ships as ….ngram_embedding.weight; got {codes!r}.")
    shards = names.shards if shards is None else shards
    if shards < 1 or (shards > 1 and codec == "fp8_e4m3_e8m0"):
        raise ConfigError(f"--shards is {shards}; wanted 1 or more, and 1 for {codec}.")
    return replace(names, shards=shards)


def _plan(
    layout: Layout, names: Names, codec: str, scale: float
) -> tuple[list[_Piece], dict[str, tuple[str, tuple[int, ...]]], bytes]:
    """The tensors in file order, and the bytes of those that are not rows, which come first."""
    n_rows, width, dtype = layout.n_rows, layout.width, _DTYPES[codec]
    row_bytes = CODECS[codec].record_bytes(width) - (width // 32 if codec == "fp8_e4m3_e8m0" else 0)
    whole = {"at": 0, "n_bytes": row_bytes, "columns": width, "dtype": dtype}
    if names.shards == 1:
        pieces = [_Piece(name=names.codes, first=0, last=n_rows, **whole)]
    else:
        pieces, first = [], 0
        for k, rows in enumerate(shard_rows(n_rows, names.shards)):
            pieces.append(_Piece(name=shard_name(names, k), first=first, last=first + rows, **whole))
            first += rows
    tensors, extra = {}, b""
    if codec == "fp8_e4m3_e8m0":
        pieces.append(
            _Piece(
                name=names.scale,
                dtype="F8_E8M0",
                first=0,
                last=n_rows,
                at=width,
                n_bytes=width // 32,
                columns=width // 32,
            )
        )
    elif names.scale is not None:
        extra = _number(scale, names.scale_dtype)
        tensors[names.scale] = (names.scale_dtype, names.scale_shape)
    tensors |= {piece.name: (piece.dtype, (piece.last - piece.first, piece.columns)) for piece in pieces}
    return pieces, tensors, extra


def _number(value: float, dtype: str) -> bytes:
    """One number; ConfigError where the dtype would change it."""
    single = np.float32(value)
    if dtype == "F32":
        return struct.pack("<f", single)
    if dtype == "BF16" and not int(single.view(np.uint32)) & 0xFFFF:
        return struct.pack("<H", int(single.view(np.uint32)) >> 16)
    if dtype == "F16" and float(np.float16(single)) == value:
        return struct.pack("<e", value)
    raise ConfigError(f"The scale {value} is no {dtype}; it would change every row.")


class _Partial:
    """A file of known length that is filled in row order and continues after a kill."""

    def __init__(self, path: Path, head: bytes, *, total: int, source: Layout) -> None:
        self.path, self.head, self.total = path, head, total
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".partial.rows")
        # what is being written, and from what
        self.key = hashlib.sha256(head + _source_key(source).encode()).digest()
        self.rows_done = self.unsynced = 0

    def __enter__(self) -> "_Partial":
        with _told(self.partial):
            self.file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
            if not durable.try_lock(self.file):
                os.close(self.file)
                raise CheckpointError(f"{self.partial} is being written by another process.")
            self._continue()
        return self

    def _continue(self) -> None:
        kept = self.journal.read_bytes() if self.journal.exists() else b""
        started = os.fstat(self.file).st_size > 0
        if len(kept) == 40 and kept[:32] == self.key and os.fstat(self.file).st_size == self.total:
            self.rows_done = struct.unpack("<Q", kept[32:])[0]
        elif started and kept and kept[:32] != self.key:
            os.close(self.file)
            raise CheckpointError(
                f"{self.partial} was begun from another source, or one that has changed. Remove it to begin anew."
            )
        else:
            os.ftruncate(self.file, self.total)
            self.write(np.frombuffer(self.head, np.uint8), 0)
            self._keep(0)

    def write(self, data: np.ndarray, at: int) -> None:
        with _told(self.partial):
            view = memoryview(data.reshape(-1)).cast("B")
            while view:
                n = os.pwrite(self.file, view, at)
                view, at = view[n:], at + n
                self.unsynced += n

    def did(self, rows_done: int) -> None:
        """Everything before row `rows_done` was written."""
        self.rows_done = rows_done
        if self.unsynced > _SYNC_BYTES:
            self._keep(rows_done)

    def _keep(self, rows_done: int) -> None:
        with _told(self.partial):
            durable.sync(self.file)
            durable.write_atomic(self.journal, self.key + struct.pack("<Q", rows_done))
        self.unsynced = 0

    def finish(self) -> None:
        with _told(self.partial):
            durable.sync(self.file)
            durable.rename(self.partial, self.path)
            self.journal.unlink()
            durable.sync_directory(self.path.parent)

    def __exit__(self, *error: Any) -> None:
        if self.journal.exists():
            with contextlib.suppress(CheckpointError):
                self._keep(self.rows_done)
        os.close(self.file)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None


def _refuse_own_file(layout: Layout, path: Path) -> None:
    for segment in layout.segments:
        if path.exists() and os.path.samefile(path, segment.path):
            raise ConfigError(f"{path} is the table that is read; write to another file.")


def targets(tables: Mapping[Any, Layout], out: Path) -> dict[Any, Path]:
    """Where each table goes: `out` itself, or files of their own in a directory."""
    if out.suffix in (".engram", ".safetensors"):
        if len(tables) > 1:
            raise ConfigError(
                f"{len(tables)} tables do not go into one {out.suffix} file. Name one with --layer, or give a directory."
            )
        return dict.fromkeys(tables, out)
    if out.suffix:
        raise ConfigError(f"{out} is neither .engram, .safetensors nor a directory.")
    return {key: out / f"{_file_name(key)}.engram" for key in tables}


def _file_name(key: Any) -> str:
    return f"layer-{key}" if isinstance(key, int) else str(key).replace("/", "_")
