"""Commands about tables of rows: `engram-lm table ...` and doctor."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from engram_lm.cli.app import Flag, IdList, app

table = App(
    name="table",
    help="Tables of rows: look into them, compare, convert, and how much of one a cache must hold.",
)
app.command(table)


@table.command
def simulate(
    *,
    tokens: Path,
    profile: str,
    budget: str | None = None,
    concurrency: str = "1",
    prefill: int | None = None,
    warm_up: float = 0.0,
    policy: str = "lru,lfu,tinylfu",
    entry: Literal["row", "ngram"] = "row",
    codec: str | None = None,
    tokenizer: str | None = None,
    canonical: Flag = False,
    dtype: Literal["uint16", "int32", "uint32", "int64"] | None = None,
    separator: int | None = None,
    field: str | None = None,
    txt_documents: Literal["file", "line", "paragraph"] | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
    layer: int | None = None,
    layers: IdList | None = None,
    rows_per_head: int | None = None,
    vocab_size: int | None = None,
    fill_id: int | None = None,
    eos_ids: IdList | None = None,
    json: Flag = False,
    plot: Path | None = None,
) -> None:
    """Print how often caches of table rows would hit while a server reads a token stream. Needs no weights.

    Parameters
    ----------
    tokens
        Requests: ids in .npy, .bin or .jsonl ({"ids": [...]} a line), or text in .jsonl or .txt, plain, .gz or .xz.
    profile
        Address scheme: paper, deepseek-v4.1, qwen-ple or longcat.
    budget
        Sizes of one layer's cache, with commas: 64MB, 1GiB, 0.1% of its table (1 MB and up, by fours).
    concurrency
        Requests read at a time, round robin, with commas, as in 1,8,64.
    prefill
        Tokens of each request that come first, in one step (one, unless the file has prompt_tokens).
    warm_up
        Share of the tokens that fill the caches and is not counted.
    policy
        lfu, tinylfu, pinned, with commas; lru and static are always there.
    entry
        What a cache holds: single rows, or all rows of an n-gram together.
    codec
        How rows are stored, which says their bytes (the released model's).
    tokenizer
        tokenizer.json, its directory, smollm2 or a hub name; for text, and for profiles that hash canonical ids.
    canonical
        The ids are canonical ones.
    dtype
        Of a .bin file.
    separator
        Id behind which a .npy or .bin stream is cut into requests.
    field
        Field of a JSONL line that holds the text (text).
    txt_documents
        What a request of a .txt file is (file).
    limit
        Read whole requests until they hold this many tokens.
    shuffle
        Seed of another order of the requests.
    layer
        One block that reads memory, from 0 (each of them).
    layers
        All blocks that read the memory, if not the released model's: moduli depend on them.
    rows_per_head
        Rows wanted of each head, if not the profile's.
    vocab_size
        Number of ids that are hashed, if not the released model's.
    fill_id
        Id that stands before the start, if not the released model's.
    eos_ids
        Ids that end a text, for profiles that stop there.
    json
        Print JSON with the whole curves.
    plot
        PNG file for the curves.
    """
    from engram_lm.addressing.command import parse_ids
    from engram_lm.cachesim.report import simulate_command

    printed = simulate_command(
        tokens=tokens,
        profile=profile,
        budget=budget,
        concurrency=concurrency,
        prefill=prefill,
        warm_up=warm_up,
        policy=policy,
        entry=entry,
        codec=codec,
        tokenizer=tokenizer,
        canonical=canonical,
        dtype=dtype,
        separator=separator,
        field=field,
        txt_documents=txt_documents,
        limit=limit,
        shuffle=shuffle,
        layer=layer,
        layers=None if layers is None else parse_ids(layers),
        rows_per_head=rows_per_head,
        vocab_size=vocab_size,
        fill_id=fill_id,
        eos_ids=() if eos_ids is None else parse_ids(eos_ids),
        json=json,
        plot=plot,
    )
    print(printed)


@table.command
def info(path: Path, *, layer: str | None = None, json: Flag = False) -> int:
    """Print what a table file or a checkpoint holds: rows, codec, tensors, identity. Reads headers alone.

    Parameters
    ----------
    path
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    layer
        The table of this block, from 0 (all of them).
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import info_command

    return info_command(path, layer=layer, as_json=json)


@table.command
def verify(path: Path, *, layer: str | None = None, json: Flag = False) -> int:
    """Read every row, check the checksums of packed files, and print a digest that equal tables share.

    Parameters
    ----------
    path
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    layer
        The table of this block, from 0 (all of them).
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import verify_command

    return verify_command(path, layer=layer, as_json=json)


@table.command
def stats(path: Path, *, layer: str | None = None, sample: int | None = None, json: Flag = False) -> int:
    """Print norms of rows, zero rows, rows with NaN, and scales.

    Parameters
    ----------
    path
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    layer
        The table of this block, from 0 (all of them).
    sample
        Read this many rows, drawn at random (all rows).
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import stats_command

    return stats_command(path, layer=layer, sample=sample, as_json=json)


@table.command
def rows(path: Path, addresses: IdList, *, layer: str | None = None, json: Flag = False) -> int:
    """Print rows at addresses, read from disk.

    Parameters
    ----------
    path
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    addresses
        Rows with commas between them, such as 0,5,17.
    layer
        The table of this block, from 0, where there are several.
    json
        Print JSON with all numbers.
    """
    from engram_lm.tabletools.commands import rows_command

    return rows_command(path, addresses, layer=layer, as_json=json)


@table.command
def diff(a: Path, b: Path, *, layer: str | None = None, sample: int | None = None, json: Flag = False) -> int:
    """Print which rows of two tables differ, and by how much; exit code 1 where any do.

    Parameters
    ----------
    a
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    b
        Another, of the same rows and width; format and codec may differ.
    layer
        The table of this block, from 0 (all of them).
    sample
        Compare this many rows, drawn at random (all rows).
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import diff_command

    return diff_command(a, b, layer=layer, sample=sample, as_json=json)


@table.command
def convert(
    source: Path,
    out: Path,
    *,
    layer: str | None = None,
    codec: Literal["fp32", "bf16", "fp8_e4m3_e8m0", "fp8_e4m3"] | None = None,
    scale: float | None = None,
    name: str | None = None,
    shards: int | None = None,
    json: Flag = False,
) -> int:
    """Write a table to a packed file, or back to safetensors with its shipped names. Goes on where a killed one was.

    Parameters
    ----------
    source
        A .engram file or a directory of them, a .safetensors file, an index, or a checkpoint's directory.
    out
        A .engram file, a .safetensors file, or a directory for a .engram file of each layer.
    layer
        The table of this block, from 0 (all of them).
    codec
        Encode rows anew (as they are). The error and its bound are printed.
    scale
        Of fp8_e4m3: the scale of the whole table (the least that holds its largest number).
    name
        Of safetensors: the tensor, as in layers.1.engram.embed.weight (what the table came with).
    shards
        Of safetensors: in how many tensors ngram_embedding.shard_0.weight and on (as it came).
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import convert_command

    return convert_command(
        source, out, layer=layer, codec=codec, scale=scale, name=name, shards=shards, as_json=json
    )


@app.command
def doctor(
    checkpoint: Path,
    other: Path | None = None,
    *,
    sample: int | None = None,
    all: Flag = False,
    profile: str | None = None,
    json: Flag = False,
) -> int:
    """Check a checkpoint's memory: identity, row counts, moduli, scales, holes, norms; and what another release changed.

    Parameters
    ----------
    checkpoint
        A checkpoint's directory, index or .safetensors file, or packed files.
    other
        Another release of it, to compare row by row.
    sample
        Rows read of each table, drawn at random (65536).
    all
        Read all rows.
    profile
        Check against this released model, deepseek-v4.1 or qwen-ple, not against config.json.
    json
        Print JSON.
    """
    from engram_lm.tabletools.commands import doctor_command

    return doctor_command(checkpoint, other, sample=sample, read_all=all, profile=profile, as_json=json)
