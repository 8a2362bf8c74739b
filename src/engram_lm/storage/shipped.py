"""Shipped checkpoints as tables, in place: the names under which released models keep their rows, as layouts.

    tables = open_shipped(directory)                # {1: Layout, 14: Layout}, by block from 0
    store = DiskStore(tables[1])                    # or HostStore.load(tables[1])

| family | codes | scales | codec |
|---|---|---|---|
| DeepSeek-V4.1 | `layers.N.engram.embed.weight` F8_E4M3 | `.scale` F8_E8M0 [rows, width / 32] | fp8_e4m3_e8m0 |
| Qwen4-Exp | `….ngram_embedding.weight` or `.shard_K.weight`, BF16 or F32 | none | bf16, fp32 |
| Qwen4-Exp, FP8 | the same, F8_E4M3 | `….ngram_embedding.weight_scale`, one number | fp8_e4m3 |

Codes are [rows, width]; shards are numbered from 0 and follow one another.
A number is its code times its scale, as transformers' FP8Embedding has it (`weight_scale`: BF16 [1] in the released
files). Under an fp8 quantiser's other name, `weight_scale_inv`, one number means the same. Anything else under these
prefixes is refused by name: another layout would be read as wrong rows.

Layouts have no identity here: tables know nothing of profiles (`engram_lm.tabletools.identify` derives it).
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engram_lm.errors import CheckpointError
from engram_lm.storage.codecs import BLOCK, bf16_values
from engram_lm.storage.layout import Extent, Layout
from engram_lm.storage.safetensors import Tensor, checkpoint_tensors

_V41 = re.compile(r"(?P<prefix>(?:.*\.)?layers\.[0-9]{1,6}\.engram\.embed)\.(?P<part>.+)")
_QWEN = re.compile(r"(?P<prefix>(?:.*\.)?ngram_embedding)\.(?P<part>.+)")
_SHARD = re.compile(r"shard_([0-9]{1,9})\.weight")
_LAYER = re.compile(r"(?:.*\.)?layers\.([0-9]{1,6})\.")
_SCALES = ("weight_scale", "weight_scale_inv")
_CODECS = {"BF16": "bf16", "F32": "fp32", "F8_E4M3": "fp8_e4m3"}
_SCALE_DTYPES = {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a table's tensors are called, kept in `Layout.note` and in packed files so that there is a way back.

    codes, scale: full names; scale None where there is none. scale_dtype, scale_shape: of one number for the table.
    shards: in how many tensors the codes lay; 1: in one.
    """

    codes: str
    scale: str | None = None
    scale_dtype: str = "F8_E8M0"
    scale_shape: tuple[int, ...] = ()
    shards: int = 1

    def note(self) -> str:
        """As `Layout.note`."""
        return json.dumps({"safetensors": asdict(self)}, sort_keys=True)


def names_of(layout: Layout) -> Names | None:
    """The names in a layout's note; None where there are none."""
    try:
        fields = json.loads(layout.note)["safetensors"]
        names = Names(**{**fields, "scale_shape": tuple(fields["scale_shape"])})
    except (ValueError, KeyError, TypeError):
        return None
    texts = [names.codes, names.scale_dtype, "" if names.scale is None else names.scale]
    whole = type(names.shards) is int and 1 <= names.shards <= 2**20
    return names if whole and all(isinstance(text, str) for text in texts) else None


def is_table_name(name: str) -> bool:
    """Whether a tensor of this name holds rows or scales of a table."""
    return not name.startswith("mtp.") and bool(_V41.fullmatch(name) or _QWEN.fullmatch(name))


def open_shipped(path: str | os.PathLike) -> dict[int | str, Layout]:
    """The tables of a checkpoint: a directory, an index or one file. No row is read.

    Keys are blocks from 0, as in `layers.N.`; where a name has none, or two tables the same, the name before `.weight`.
    CheckpointError says which tensor is missing, or of another kind than its family ships.
    """
    tensors = checkpoint_tensors(path, wanted=is_table_name)
    groups: dict[str, dict[str, Tensor]] = {}
    makers = {}
    for name, tensor in tensors.items():
        for pattern, make in ((_V41, _v41), (_QWEN, _qwen)):
            if found := pattern.fullmatch(name):
                groups.setdefault(found["prefix"], {})[found["part"]] = tensor
                makers[found["prefix"]] = make
    if not groups:
        raise CheckpointError(
            f"{path} holds no table: no tensor is called layers.N.engram.embed.… or ….ngram_embedding.…"
        )
    layouts = {prefix: makers[prefix](prefix, parts) for prefix, parts in groups.items()}
    layers = {prefix: _layer(prefix) for prefix in layouts}
    known = [layer for layer in layers.values() if layer is not None]
    keys = {p: layer if layer is not None and known.count(layer) == 1 else p for p, layer in layers.items()}
    ordered = sorted(keys, key=lambda prefix: (isinstance(keys[prefix], str), keys[prefix]))
    return {keys[prefix]: layouts[prefix] for prefix in ordered}


def _layer(prefix: str) -> int | None:
    found = _LAYER.match(prefix + ".")
    return int(found[1]) if found else None


def _v41(prefix: str, parts: dict[str, Tensor]) -> Layout:
    _only(prefix, parts, {"weight", "scale"})
    codes, scale = _part(prefix, parts, "weight"), _part(prefix, parts, "scale")
    n_rows, width = _matrix(f"{prefix}.weight", codes, "F8_E4M3")
    if width % BLOCK:
        raise CheckpointError(
            f"{prefix}.weight is {width} wide; wanted a multiple of {BLOCK}, which share a scale."
        )
    if scale.dtype != "F8_E8M0" or scale.shape != (n_rows, width // BLOCK):
        raise CheckpointError(
            f"{prefix}.scale is {scale.dtype} {list(scale.shape)}; {n_rows:,} rows of {width} codes have F8_E8M0 "
            f"[{n_rows}, {width // BLOCK}]."
        )
    names = Names(codes=f"{prefix}.weight", scale=f"{prefix}.scale")
    return Layout(
        name=names.codes,
        n_rows=n_rows,
        width=width,
        codec="fp8_e4m3_e8m0",
        segments=(_segment(codes, 0, at=0), _segment(scale, 0, at=width)),
        note=names.note(),
    )


def _qwen(prefix: str, parts: dict[str, Tensor]) -> Layout:
    shards = {int(found[1]): name for name in parts if (found := _SHARD.fullmatch(name))}
    n_shards = sum(bool(_SHARD.fullmatch(name)) for name in parts)
    if shards and ("weight" in parts or n_shards != len(shards)):
        raise CheckpointError(
            f"{prefix} has its rows twice: as weight and as shards, or a shard under two numbers."
        )
    _only(prefix, parts, {"weight", *_SCALES, *shards.values()})
    if shards and sorted(shards) != list(range(len(shards))):
        missing = next(k for k in range(len(shards)) if k not in shards)
        raise CheckpointError(
            f"{prefix}.shard_{missing}.weight is missing; there are shards to {max(shards)}."
        )
    pieces = [shards[k] for k in sorted(shards)] or ["weight"]
    segments, n_rows, first = [], 0, _part(prefix, parts, pieces[0])
    for piece in pieces:
        tensor = _part(prefix, parts, piece)
        if tensor.dtype not in _CODECS:
            raise CheckpointError(
                f"{prefix}.{piece} is {tensor.dtype}; this build reads {', '.join(_CODECS)}."
            )
        rows, width = _matrix(f"{prefix}.{piece}", tensor, first.dtype)
        if width != first.shape[1]:
            raise CheckpointError(f"{prefix}.{piece} is {width} wide; {pieces[0]} is {first.shape[1]}.")
        segments.append(_segment(tensor, n_rows, at=0))
        n_rows += rows
    scale, names = _scale(prefix, parts, first.dtype, len(shards) or 1)
    return Layout(
        name=names.codes,
        n_rows=n_rows,
        width=first.shape[1],
        codec=_CODECS[first.dtype],
        segments=_joined(segments),
        scale=scale,
        note=names.note(),
    )


def _scale(prefix: str, parts: dict[str, Tensor], dtype: str, shards: int) -> tuple[float, Names]:
    found = [name for name in _SCALES if name in parts]
    if dtype != "F8_E4M3":
        if found:
            raise CheckpointError(f"{prefix}.{found[0]} is without effect: the rows are {dtype}.")
        return 1.0, Names(codes=f"{prefix}.weight", shards=shards)
    if len(found) != 1:
        raise CheckpointError(
            f"{prefix} is F8_E4M3 and has {len(found)} of {', '.join(_SCALES)}; wanted one."
        )
    tensor, name = parts[found[0]], f"{prefix}.{found[0]}"
    if tensor.dtype not in _SCALE_DTYPES or tensor.shape not in ((), (1,)):
        raise CheckpointError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted one number for the table, {', '.join(_SCALE_DTYPES)}."
        )
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        raw = np.frombuffer(file.read(tensor.n_bytes), _SCALE_DTYPES[tensor.dtype])
    value = float(bf16_values(raw)[0] if tensor.dtype == "BF16" else raw[0])
    if not (value > 0 and math.isfinite(value)):
        raise CheckpointError(f"{name} is {value}; wanted a number above 0.")
    names = Names(
        codes=f"{prefix}.weight",
        scale=name,
        scale_dtype=tensor.dtype,
        scale_shape=tensor.shape,
        shards=shards,
    )
    return value, names


def _only(prefix: str, parts: dict[str, Tensor], known: set[str]) -> None:
    unknown = sorted(set(parts) - known)
    if unknown:
        raise CheckpointError(
            f"{prefix}.{unknown[0]} is no tensor of a layout that this build knows: its rows would be read wrong."
        )


def _part(prefix: str, parts: dict[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise CheckpointError(f"{prefix}.{name} is missing; there is {', '.join(sorted(parts))}.")
    return parts[name]


def _matrix(name: str, tensor: Tensor, dtype: str) -> tuple[int, int]:
    if tensor.dtype != dtype or len(tensor.shape) != 2 or 0 in tensor.shape:
        raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted {dtype} [rows, width].")
    return tensor.shape[0], tensor.shape[1]


def _segment(tensor: Tensor, first_row: int, *, at: int) -> Extent:
    n_rows, stride = tensor.shape[0], tensor.n_bytes // tensor.shape[0]
    return Extent(
        path=tensor.path,
        offset=tensor.offset,
        first_row=first_row,
        n_rows=n_rows,
        stride=stride,
        group=n_rows,
        group_stride=tensor.n_bytes,
        at=at,
        n_bytes=stride,
    )


def _joined(segments: list[Extent]) -> tuple[Extent, ...]:
    """Runs that follow one another in one file as one run: fewer, larger reads."""
    joined: list[Extent] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last is not None and last.path == segment.path and last.end == segment.offset:
            n_rows = last.n_rows + segment.n_rows
            fields = {**vars(last), "n_rows": n_rows, "group": n_rows, "group_stride": n_rows * last.stride}
            joined[-1] = Extent(**fields)
        else:
            joined.append(segment)
    return tuple(joined)


def shard_rows(n_rows: int, shards: int) -> list[int]:
    """Rows of each shard, as transformers saves them (torch.chunk: equal ones, the last may be smaller)."""
    step = -(-n_rows // shards)
    return [min(step, n_rows - start) for start in range(0, n_rows, step)]


def shard_name(names: Names, k: int) -> str:
    """The k-th shard's tensor."""
    return names.codes.removesuffix("weight") + f"shard_{k}.weight"


def files_of(layout: Layout) -> list[Path]:
    """The files that hold a table's rows, each once."""
    return list(dict.fromkeys(segment.path for segment in layout.segments))
