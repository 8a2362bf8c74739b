"""The `engram-lm` command: one thin function a command, each importing what it needs when it is called.

Nothing here computes. `engram-lm --help` answers without importing torch, numba or numpy; tests hold it to that.

Exit codes: 0 done; 1 where `doctor` finds something wrong or `table diff` a difference; 2 refused, with one line on stderr
that starts with `engram-lm:`; 130 interrupted; 141 when the reader of a pipe has gone. Anything else is a bug of ours and
keeps its traceback.

    engram-lm addresses --profile deepseek-v4.1 --layer 1 --canonical --ids 0,5,17,-1,42 --json
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from engram_lm import __version__
from engram_lm.errors import EngramError

REFUSED, INTERRUPTED, READER_GONE = 2, 130, 141

app = App(
    name="engram-lm",
    help="Memory for language models that is looked up, not computed.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
# engram-lm table <command>: what is asked of a table of rows.
table = App(
    name="table",
    help="Tables of rows: look into them, compare, convert, and how much of one a cache must hold.",
)
app.command(table)

# A list of ids may begin with -1.
IdList = Annotated[str, Parameter(allow_leading_hyphen=True)]
# Off unless given: there is no --no-json.
Flag = Annotated[bool, Parameter(negative="")]
# --data a.txt b.txt
FileList = Annotated[list[str], Parameter(consume_multiple=True, negative="")]


@app.command
def addresses(
    *,
    profile: str,
    layer: int,
    ids: IdList,
    canonical: Flag = False,
    json: Flag = False,
    layers: IdList | None = None,
    rows_per_head: int | None = None,
    vocab_size: int | None = None,
    fill_id: int | None = None,
    eos_ids: IdList | None = None,
) -> None:
    """Print the table rows that token ids read, head by head, counted within each head.

    Parameters
    ----------
    profile
        Address scheme: paper, deepseek-v4.1, qwen-ple or longcat.
    layer
        Block that reads the memory, from 0.
    ids
        Token ids with commas between them, such as 0,5,17,-1,42.
    canonical
        The ids are canonical ones; -1 is a dead token.
    json
        Print JSON, one list of rows a token, instead of a table.
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
    """
    from engram_lm.addressing.command import addresses_command, parse_ids

    printed = addresses_command(
        profile=profile,
        layer=layer,
        ids=ids,
        canonical=canonical,
        json=json,
        layers=None if layers is None else parse_ids(layers),
        rows_per_head=rows_per_head,
        vocab_size=vocab_size,
        fill_id=fill_id,
        eos_ids=() if eos_ids is None else parse_ids(eos_ids),
    )
    print(printed)


@app.command
def train(
    base: str | None = None,
    *,
    out: Path,
    data: FileList | None = None,
    config: Path | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    field: str | None = None,
    txt_documents: Literal["file", "line", "paragraph"] | None = None,
    mode: Literal["memory", "lora", "all"] | None = None,
    lora_rank: int | None = None,
    layers: str | None = None,
    profile: str | None = None,
    orders: str | None = None,
    heads: int | None = None,
    rows_per_head: int | None = None,
    head_width: int | None = None,
    conv_kernel: int | None = None,
    hash_seed: int | None = None,
    rule: str | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    packing: Literal["concat", "documents"] | None = None,
    holdout: float | None = None,
    eval_tokens: int | None = None,
    learning_rate: float | None = None,
    warmup: float | None = None,
    schedule: Literal["cosine", "linear", "constant"] | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    log_every: int | None = None,
    keep_checkpoints: int | None = None,
    seed: int | None = None,
    minutes: float | None = None,
    device: Literal["auto", "cpu"] | None = None,
) -> int:
    """Train memory on a model: engram-lm train smollm2 --data corpus.jsonl --out runs/first

    The same command goes on where an earlier one was cut off. Ctrl-C stops with a checkpoint.

    Parameters
    ----------
    base
        smollm2, scratch:tiny, scratch:small, scratch:base, a directory, or a hub name.
    out
        Directory of the run: options, metrics, picture, checkpoints, and at the end the memory.
    data
        Files or globs of .txt and .jsonl, plain or with .gz or .xz after it.
    config
        JSON file of these options, such as an earlier run's train.json; what is given here comes first.
    resume
        Go on with the run in --out; its own options are used.
    overwrite
        Replace the run that --out holds.
    field
        Field of a JSONL line that holds the text (text).
    txt_documents
        What a document of a .txt file is (paragraph).
    mode
        What trains: memory alone, memory and a LoRA adapter, or all (memory; all for scratch bases).
    lora_rank
        Rank of the adapter (8).
    layers
        Blocks before which memory enters, from 0, with commas (1 and the middle one).
    profile
        Address scheme (paper).
    orders
        N-gram lengths, with commas (the profile's, 2,3).
    heads
        Hash heads of each order (the profile's, 8).
    rows_per_head
        Rows of each head (20011).
    head_width
        Numbers a row (32).
    conv_kernel
        Taps of the short conv, 0 for none (the profile's, 4).
    hash_seed
        Seed of the hash multipliers (the profile's).
    rule
        How rows train: row-adam, row-adam-momentum, row-momentum-sinkhorn, row-rmsprop or sgd (row-adam).
    tokens
        How many tokens to train on (all of the training side).
    epochs
        Passes over them (1).
    sequence_length
        Tokens a sequence (256).
    batch_size
        Sequences a forward (8).
    accumulation
        Forwards a step (1).
    packing
        Sequences cut from one stream, or with documents kept apart (concat).
    holdout
        Share of the documents that is never trained on and measured (0.02).
    eval_tokens
        Most held-out tokens measured at a time (16384).
    learning_rate
        Highest rate; rows train at 5 times it (0.001).
    warmup
        Share of the steps over which the rate rises (0.05).
    schedule
        How the rate falls after that (cosine).
    weight_decay
        On matrices, never on rows (0).
    clip
        Largest gradient norm, 0 for none (1).
    eval_every
        Steps between measurements (a tenth of the run).
    save_every
        Steps between checkpoints (a tenth of the run).
    log_every
        Steps a line of metrics.jsonl (10, fewer in a short run).
    keep_checkpoints
        How many checkpoints stay (2).
    seed
        Of initial values and the order of the text (0).
    minutes
        Stop after this long with a checkpoint; the same command goes on.
    device
        auto takes an accelerator where there is one (auto).
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from engram_lm.runs.command import train_command

    return train_command(given)


@app.command
def generate(
    directory: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int | None = None,
    chat: Flag = False,
    memory: Literal["on", "off"] = "on",
    tier: Literal["device", "host", "disk", "cached"] = "device",
    cache_mb: int | None = None,
    heat: Literal["share", "gate"] | None = None,
    block: int | None = None,
    branch: int | None = None,
    full: float | None = None,
    color: Literal["auto", "always", "never"] = "auto",
) -> None:
    """Go on with a text; its background reddens where memory adds most.

    Parameters
    ----------
    directory
        What engram-lm train wrote, or one of its checkpoints.
    prompt
        The text to go on with.
    max_new_tokens
        Most tokens that are generated.
    temperature
        0 takes the likeliest token; above that, tokens are drawn.
    seed
        Of the draws.
    chat
        Put the prompt into the chat template and print the answer alone.
    memory
        off runs the model without its memory.
    tier
        Where the rows are read: the model's device, host memory, the files on disk, or cached: disk with hot rows kept.
    cache_mb
        MB of memory for the hot rows of each table, for --tier cached.
    heat
        What the red means: share, |added| / |hidden state| (the default), or gate, which is 0.5 for empty rows.
    block
        Look at the memory before this block alone, not at the strongest.
    branch
        Look at this residual branch alone.
    full
        The share that is full red; default what the training run measured, else the prompt's strongest.
    color
        auto: on a terminal, and not where NO_COLOR is set.
    """
    from engram_lm.show.command import generate_command

    generate_command(
        directory,
        prompt,
        heat=heat,
        block=block,
        branch=branch,
        full=full,
        memory=memory,
        tier=tier,
        cache_bytes=None if cache_mb is None else cache_mb << 20,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        color=color,
    )


@app.command
def trace(
    directory: Path,
    text: str,
    *,
    block: int | None = None,
    branch: int | None = None,
    limit: int = 40,
    json: Flag = False,
) -> None:
    """Print what memory reads at every token of a text: n-grams, gates, shares, norms, addresses.

    Parameters
    ----------
    directory
        What engram-lm train wrote, or one of its checkpoints.
    text
        The text to trace.
    block
        The memory before this block alone.
    branch
        This residual branch alone.
    limit
        Most tokens that are shown, 0 for all.
    json
        Print JSON with all addresses instead of tables.
    """
    from engram_lm.show.command import trace_command

    trace_command(directory, text, block=block, branch=branch, limit=limit, as_json=json)


@app.command
def demo(
    *,
    memory: Path | None = None,
    max_new_tokens: int = 32,
    color: Literal["auto", "always", "never"] = "auto",
) -> None:
    """Show a language model with a trained memory: where the memory speaks, and the same text without it.

    Parameters
    ----------
    memory
        Directory of the memory; default the one in the clone, demo/memory.
    max_new_tokens
        Tokens generated for each prompt.
    color
        auto: on a terminal, and not where NO_COLOR is set.
    """
    from engram_lm.show.demo import demo_command

    demo_command(memory=memory, max_new_tokens=max_new_tokens, color=color)


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
        tokenizer.json, its directory or a hub name; for text, and for profiles that hash canonical ids.
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
    from engram_lm.operate.report import simulate_command

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
    from engram_lm.operate.table_commands import info_command

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
    from engram_lm.operate.table_commands import verify_command

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
    from engram_lm.operate.table_commands import stats_command

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
    from engram_lm.operate.table_commands import rows_command

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
    from engram_lm.operate.table_commands import diff_command

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
    from engram_lm.operate.table_commands import convert_command

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
    from engram_lm.operate.table_commands import doctor_command

    return doctor_command(checkpoint, other, sample=sample, read_all=all, profile=profile, as_json=json)


@app.command
def version() -> None:
    """Print the versions of engram-lm, Python and the libraries whose arithmetic it uses."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    print(f"engram-lm {__version__}")
    print(f"python {platform.python_version()}")
    for name in ("numpy", "numba", "tokenizers", "torch", "transformers", "triton", "vllm"):
        try:
            print(f"{name} {version_of(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")


def run(tokens: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    try:
        result = app(
            tokens, exit_on_error=False, print_error=False, help_on_error=False, result_action="return_value"
        )
        sys.stdout.flush()
    except (EngramError, CycloptsError) as refusal:
        print(f"engram-lm: {' '.join(str(refusal).split())}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("engram-lm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `engram-lm` command."""
    sys.exit(run())


if __name__ == "__main__":
    main()
