"""The file of a segment, byte for byte as docs/index.md says: written front to back, checked before it is used. No torch.

    with SegmentFile.create(path, vocab_size=V, wide=256) as file:
        file.put("tokens", tokens_N)             # sections in their order; a section may come in parts
        ...
        file.finish(heavy=8192, sync="all")             # the header, sync, rename; left without it, nothing remains
    facts, arrays = read(path, verify="small")

A section is what its place in `SECTIONS` says; a file says only how many bytes each has. Letters: N positions, F last tokens
that occur, H nodes, C their continuations, D documents. Version 1 had all sections but the last, and is read as well.
"""

import contextlib
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from engram_lm import durable
from engram_lm.errors import CheckpointError
from engram_lm.kernels import checksums

MAGIC = b"\x89ENGS\r\n\x1a"
VERSION = 2
ALIGNMENT = 64
SMALL_BYTES = 2**20  # files up to this are read and checked as a whole when they are opened
# "t": as tokens
SECTIONS = {
    "tokens": "t", "order": "u4", "next": "t", "first_token": "t", "first_at": "u4",
    "node_low": "u4", "node_high": "u4", "node_distinct": "u4", "node_at": "u4", "node_token": "t", "node_count": "u4",
    "document_at": "u4", "document_line": "u8", "document_by_id": "u4", "document_sha256": "u1", "documents": "u1",
    "tokenizer": "u1", "before": "t",
}  # fmt: skip
_N_SECTIONS = {1: len(SECTIONS) - 1, VERSION: len(SECTIONS)}
STRIDE = 32  # ranks from one number of `before` to the next

Verify = Literal["small", "all", "none"]
Sync = Literal["all", "file", "none"]

_START = struct.Struct("<8sIIQIIII")
_ROW = struct.Struct("<QQ")
_LONGEST_HEADER = _START.size + _ROW.size * len(SECTIONS)
_HASHED_FROM = 24


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The numbers of a header. rows: bytes and checksum of each section."""

    vocab_size: int
    heavy: int
    wide: int
    rows: tuple[tuple[int, int], ...]

    def to_bytes(self) -> bytes:
        rows = b"".join(_ROW.pack(*row) for row in self.rows)
        rest = _START.pack(b"", 0, 0, 0, self.vocab_size, self.heavy, self.wide, 0)[_HASHED_FROM:] + rows
        checksum = _xxh64(np.frombuffer(rest, np.uint8))
        version = next(version for version, n in _N_SECTIONS.items() if n == len(self.rows))
        return _START.pack(MAGIC, version, len(self.rows), checksum, 0, 0, 0, 0)[:_HASHED_FROM] + rest

    @property
    def first_byte(self) -> int:
        """Of the first section."""
        return _aligned(_START.size + _ROW.size * len(self.rows))

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Name, first byte and bytes of every section."""
        at = self.first_byte
        for name, (n_bytes, _) in zip(SECTIONS, self.rows, strict=False):
            yield name, at, n_bytes
            at += _aligned(n_bytes)

    @property
    def file_bytes(self) -> int:
        return self.first_byte + sum(_aligned(n_bytes) for n_bytes, _ in self.rows)


def token_dtype(vocab_size: int) -> np.dtype:
    """How token ids up to `vocab_size`, which is END, are kept."""
    return np.dtype("<u2") if vocab_size < 2**16 else np.dtype("<u4")


def tokens_before(tokens_N: np.ndarray, position_I: np.ndarray, *, end: int) -> np.ndarray:
    """The token two before each position, END where its document has not begun by then; of order[::STRIDE], `before`."""
    at_I = position_I.astype(np.int64)
    # a position comes from a file that may not have been verified
    none_I = (at_I < 2) | (tokens_N.take(at_I - 1, mode="clip") == end)
    return np.where(none_I, tokens_N.dtype.type(end), tokens_N.take(at_I - 2, mode="clip"))


def _dtype(name: str, vocab_size: int) -> np.dtype:
    return token_dtype(vocab_size) if SECTIONS[name] == "t" else np.dtype("<" + SECTIONS[name])


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _xxh64(data: np.ndarray) -> int:
    return int(checksums.xxh64(np.ascontiguousarray(data).view(np.uint8).reshape(-1)))


# ---- writing ----------------------------------------------------------------------------------------------------------


def to_bytes(arrays: dict[str, np.ndarray], *, vocab_size: int, heavy: int, wide: int) -> np.ndarray:
    """The whole file of these sections, uint8: for small ones, where eighteen writes cost more than a copy."""
    parts = {
        name: np.ascontiguousarray(arrays[name], _dtype(name, vocab_size)).reshape(-1).view(np.uint8)
        for name in SECTIONS
    }
    rows = tuple((len(part), _xxh64(part)) for part in parts.values())
    facts = Facts(vocab_size=vocab_size, heavy=heavy, wide=wide, rows=rows)
    header = np.frombuffer(facts.to_bytes(), np.uint8)
    data = np.zeros(facts.file_bytes, np.uint8)
    data[: len(header)] = header
    for name, at, n_bytes in facts.places():
        data[at : at + n_bytes] = parts[name]
    return data


class SegmentFile:
    """A segment being written beside its target. CheckpointError for what the system refuses."""

    def __init__(self, path: Path, file: int, beside: Path, vocab_size: int, wide: int) -> None:
        self.path, self._file, self._beside = path, file, beside
        self._vocab_size, self._wide = vocab_size, wide
        self._rows: list[tuple[int, int | None]] = []
        self._at = _aligned(_LONGEST_HEADER)
        self._done = False

    @classmethod
    def create(cls, path: str | os.PathLike, *, vocab_size: int, wide: int) -> Self:
        """Begin a file."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with _refused(path):
            file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return cls(path, file, beside, vocab_size, wide)

    def put(self, name: str, parts: np.ndarray | Iterable[np.ndarray]) -> None:
        """The next section, one array or its parts."""
        if len(self._rows) == len(SECTIONS) or list(SECTIONS)[len(self._rows)] != name:
            raise ValueError(f"The section {name} does not come here.")
        whole = isinstance(parts, np.ndarray)
        n_bytes = 0
        with _refused(self.path):
            for part in (parts,) if whole else parts:
                data = np.ascontiguousarray(part, _dtype(name, self._vocab_size)).reshape(-1).view(np.uint8)
                _write(self._file, data, self._at + n_bytes)
                n_bytes += len(data)
        # what comes in parts is read again when everything is written
        self._rows.append((n_bytes, _xxh64(data) if whole else None))
        self._at += _aligned(n_bytes)

    def _mapped(self, at: int, n_bytes: int) -> np.ndarray:
        if n_bytes == 0:
            return np.empty(0, np.uint8)
        # private and writable, though nobody writes: kernels are compiled anew for arrays that are read-only
        mapped = mmap.mmap(self._file, at + n_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        return np.frombuffer(mapped, np.uint8)[at:]

    def section(self, name: str) -> np.ndarray:
        """A section that was put, mapped from the file."""
        i = list(SECTIONS).index(name)
        at = _aligned(_LONGEST_HEADER) + sum(_aligned(n_bytes) for n_bytes, _ in self._rows[:i])
        return self._mapped(at, self._rows[i][0]).view(_dtype(name, self._vocab_size))

    def finish(self, *, heavy: int, sync: Sync) -> None:
        """Write the header; sync the file ("file") and its directory ("all"); give the file its name."""
        with _refused(self.path):
            rows = tuple(
                (n_bytes, _xxh64(self.section(name)) if checksum is None else checksum)
                for name, (n_bytes, checksum) in zip(SECTIONS, self._rows, strict=True)
            )
            facts = Facts(vocab_size=self._vocab_size, heavy=heavy, wide=self._wide, rows=rows)
            os.truncate(self._file, facts.file_bytes)
            _write(self._file, np.frombuffer(facts.to_bytes(), np.uint8), 0)
            if sync != "none":
                durable.sync(self._file)
            durable.rename(self._beside, self.path)
            self._done = True
            if sync == "all":
                durable.sync_directory(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        if not self._done:
            self._beside.unlink(missing_ok=True)


def _write(file: int, data: np.ndarray, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(file, view, at)
        view, at = view[n:], at + n


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}.") from None


# ---- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, *, verify: Verify) -> tuple[Facts, dict[str, np.ndarray]]:
    """Header and sections; those of a file of more than SMALL_BYTES are mapped. CheckpointError for anything wrong.

    verify: what is compared beside the header and the small sections, which always are: checksums, and numbers of the
    large sections with what they point into. "small": only in files up to SMALL_BYTES.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            small = size <= SMALL_BYTES
            if small:
                data = np.frombuffer(file.read(), np.uint8)
            else:
                data = np.frombuffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ), np.uint8)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    facts = _read_facts(path, data[:_LONGEST_HEADER].tobytes())
    if facts.file_bytes != len(data):
        raise CheckpointError(
            f"{path} is damaged: it has {len(data):,} bytes; its header says {facts.file_bytes:,}."
        )
    arrays = {}
    for name, at, n_bytes in facts.places():
        dtype = _dtype(name, facts.vocab_size)
        if n_bytes % dtype.itemsize:
            raise CheckpointError(f"{path} is damaged: {n_bytes:,} bytes are no whole {name}.")
        arrays[name] = data[at : at + n_bytes].view(dtype)
    arrays.setdefault("before", np.empty(0, token_dtype(facts.vocab_size)))
    everything = verify == "all" or (verify == "small" and small)
    if everything:
        require_checksums(path, facts, arrays)
    wrong = _wrong(arrays, facts.vocab_size) or (everything and wrong_inside(arrays, facts.vocab_size))
    if wrong:
        raise CheckpointError(f"{path} is damaged: {wrong}.")
    return facts, arrays


def _read_facts(path: Path, header: bytes) -> Facts:
    if len(header) < _START.size or header[:8] != MAGIC:
        raise CheckpointError(f"{path} is no segment (it begins with {header[:8]!r}).")
    _, version, n_sections, wanted, vocab_size, heavy, wide, zero = _START.unpack_from(header)
    if version not in _N_SECTIONS:
        raise CheckpointError(
            f"{path} is a segment of version {version}; this build reads version {VERSION} and before."
        )
    size = _START.size + _ROW.size * _N_SECTIONS[version]
    if len(header) < size or _xxh64(np.frombuffer(header[_HASHED_FROM:size], np.uint8)) != wanted:
        raise CheckpointError(f"{path} has a damaged header: its checksum is wrong.")
    if n_sections != _N_SECTIONS[version] or zero or not 1 <= vocab_size < 2**32 - 1 or not wide <= heavy:
        raise CheckpointError(
            f"{path} is damaged: its header has {n_sections} sections, vocabulary {vocab_size:,}."
        )
    return Facts(
        vocab_size=vocab_size,
        heavy=heavy,
        wide=wide,
        rows=tuple(_ROW.iter_unpack(header[_START.size : size])),
    )


def require_checksums(path: Path, facts: Facts, arrays: dict[str, np.ndarray]) -> None:
    """CheckpointError names the first section whose checksum is wrong."""
    for name, (_, wanted) in zip(SECTIONS, facts.rows, strict=False):
        if _xxh64(arrays[name]) != wanted:
            raise CheckpointError(f"{path}: the section {name} is damaged: its checksum is wrong.")


def _wrong(arrays: dict[str, np.ndarray], V: int) -> str | None:
    """What is wrong with the small sections, if anything: lengths, and numbers that point outside."""
    N, D = len(arrays["tokens"]), len(arrays["document_at"]) - 1
    H, C = len(arrays["node_low"]), len(arrays["node_token"])
    if D < 0 or N >= 2**31:
        return f"it has {N:,} tokens and {D} documents"
    wanted = {
        "order": N, "next": N, "first_at": len(arrays["first_token"]), "node_high": H, "node_distinct": H, "node_at": H + 1,
        "node_count": C, "document_line": D + 1, "document_by_id": D, "document_sha256": 32 * D,
    }  # fmt: skip
    if len(arrays["before"]):
        wanted["before"] = -(-N // STRIDE)
    for name, count in wanted.items():
        if len(arrays[name]) != count:
            return f"the section {name} has {len(arrays[name]):,} numbers, not {count:,}"
    # ascending from the first to the last of these; strictly, where each must hold something
    bounds = {
        "first_token": (0, V - 1, True), "first_at": (0, N - 1, True), "node_at": (0, C, False),
        "document_at": (0, N, True), "document_line": (0, len(arrays["documents"]), True),
    }  # fmt: skip
    for name, (least, most, strictly) in bounds.items():
        array = arrays[name]
        if not len(array):
            continue
        later, sooner = array[1:], array[:-1]
        fixed = name in ("node_at", "document_at", "document_line") and (
            array[0] != least or array[-1] != most
        )
        if array[-1] > most or fixed or not (later > sooner if strictly else later >= sooner).all():
            return f"the section {name} does not ascend to {most:,}"
    if not (arrays["node_low"] < arrays["node_high"]).all():
        return "a node is empty"
    for name, most in {"node_high": N, "node_token": V, "document_by_id": D - 1}.items():
        if len(arrays[name]) and arrays[name].max() > most:
            return f"the section {name} points outside"
    return None


def wrong_inside(arrays: dict[str, np.ndarray], V: int) -> str | None:
    """What is wrong with the sections that have a number a token, if anything."""
    N = len(arrays["tokens"])
    for name, most in {"tokens": V, "order": N - 1, "next": V, "before": V}.items():
        if len(arrays[name]) and arrays[name].max() > most:
            return f"the section {name} points outside"
    if (arrays["tokens"][arrays["document_at"][1:] - 1] != V).any() or (arrays["tokens"] == V).sum() != len(
        arrays["document_at"]
    ) - 1:
        return "documents do not end where END stands"
    before = arrays["before"]
    if len(before) and (before != tokens_before(arrays["tokens"], arrays["order"][::STRIDE], end=V)).any():
        return "the section before is not what stands before"
    return None
