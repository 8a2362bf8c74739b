"""Safetensors files by header and ranges: where each tensor's bytes lie, checked before any is read. Not a tensor library.

A file is 8 bytes of header length, a JSON header, then tensors one after the other without gaps. A checkpoint is one
such file, or several with `model.safetensors.index.json`. Nothing here reads or copies the tensors themselves.

    tensors = checkpoint_tensors(directory, wanted=lambda name: name.endswith(".weight"))
    tensors["layers.1.engram.embed.weight"]         # Tensor(dtype="F8_E4M3", shape=(…), path=…, offset=…, n_bytes=…)

Headers come from strangers: lengths, offsets, shapes and file names are refused where they cannot be.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from engram_lm.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"

# The format's own limit.
_MOST_HEADER = 100_000_000
_MOST_INDEX = 2**28
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class Tensor(NamedTuple):
    """Bytes `offset` to `offset + n_bytes` of `path`."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int


def file_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of one file. CheckpointError says what is wrong with its header."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            n_header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= n_header <= min(_MOST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is no safetensors file: it has {size:,} bytes and says that its header takes {n_header:,}."
                )
            text = file.read(n_header)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    header = _json_object(text, f"The header of {path}")
    header.pop("__metadata__", None)
    return _checked(path, header, data_at=8 + n_header, size=size)


def _checked(path: Path, header: dict[str, Any], *, data_at: int, size: int) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
            raise CheckpointError(f"{path}: the header's entry for {name!r} is not a tensor's.")
        first, last = span
        if not first <= last <= size - data_at:
            raise CheckpointError(
                f"{path}: {name!r} lies at bytes {first:,} to {last:,}, and the file has {size - data_at:,} of data: "
                "cut short, or a hostile header."
            )
        count = 1
        for length in shape:
            count *= length
        if dtype in _BYTES and count * _BYTES[dtype] != last - first:
            raise CheckpointError(
                f"{path}: {name!r} is {dtype} {list(shape)} and takes {count * _BYTES[dtype]:,} bytes; its range holds "
                f"{last - first:,}."
            )
        tensors[name] = Tensor(dtype, tuple(shape), path, data_at + first, last - first)
    end = data_at
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "has a gap before it"
            raise CheckpointError(f"{path}: {name!r} {what}; tensors follow one another.")
        end += tensor.n_bytes
    if end != size:
        raise CheckpointError(f"{path} has {size - end:,} bytes behind its last tensor.")
    return tensors


def checkpoint_tensors(
    path: str | os.PathLike, *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors whose names are `wanted`, of a file, an index, or a directory with either.

    Only the headers of files that hold one are read.
    """
    path = Path(path)
    if path.is_dir():
        index = path / INDEX
        if not index.exists():
            files = sorted(path.glob("*" + SUFFIX))
            if not files:
                raise CheckpointError(f"{path} holds no {INDEX} and no {SUFFIX} file.")
            return _merged(files, wanted)
        path = index
    if path.suffix != ".json":
        return {name: tensor for name, tensor in file_tensors(path).items() if wanted(name)}
    return _of_index(path, wanted)


def _merged(files: Iterable[Path], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in file_tensors(file).items():
            if name in tensors and wanted(name):
                raise CheckpointError(
                    f"{name!r} is in {tensors[name].path.name} and in {file.name}: which one is meant?"
                )
            if wanted(name):
                tensors[name] = tensor
    return tensors


def _of_index(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        if path.stat().st_size > _MOST_INDEX:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; an index has at most {_MOST_INDEX:,}."
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    places = _json_object(text, str(path)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path} has no weight_map of names to files.")
    places = {name: file for name, file in places.items() if wanted(name)}
    for name, file in places.items():
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or not file.endswith(SUFFIX):
            raise CheckpointError(f"{path} puts {name!r} into {file!r}; wanted a {SUFFIX} file beside it.")
    found = {file: file_tensors(path.parent / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in found[file]:
            raise CheckpointError(f"{path} puts {name!r} into {file}, which does not hold it.")
    return {name: found[file][name] for name, file in places.items()}


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Length and header of a file that holds `tensors` (name: dtype, shape) in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        n_bytes = _BYTES[dtype]
        for length in shape:
            n_bytes *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(number) is int and 0 <= number < 2**63 for number in value)
    )


def _json_object(text: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a name twice")
        return keys

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object.")
    return value
