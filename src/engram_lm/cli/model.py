"""Commands about models with memory: train, generate, trace, demo, and the addresses of ids."""

from pathlib import Path
from typing import Literal

from engram_lm.cli.app import FileList, Flag, IdList, app, options_of
from engram_lm.training.config import TrainConfig


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


TrainOptions = options_of(TrainConfig)


@app.command
def train(
    base: str | None = None,
    *,
    out: Path,
    data: FileList | None = None,
    config: Path | None = None,
    resume: Flag = False,
    overwrite: Flag = False,
    options: TrainOptions | None = None,
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
    """
    from engram_lm.training.command import train_command

    named = {name: value for name, value in (("base", base), ("data", data)) if value is not None}
    return train_command(
        named | (options or {}), out=out, config_file=config, resume=resume, overwrite=overwrite
    )


@app.command
def generate(
    model: str,
    prompt: str,
    *,
    index: Path | None = None,
    gate: Path | None = None,
    lam: float | None = None,
    tenant: str | None = None,
    documents: list[str] | None = None,
    top_k: int | None = None,
    drafts: Flag = False,
    session: Flag = False,
    most_verbatim: int | None = None,
    strict: Flag = False,
    count: str | None = None,
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
    model
        What engram-lm train wrote, or one of its checkpoints; with --index also smollm2, a path or a hub name.
    prompt
        The text to go on with.
    index
        Mix the documents of this index into every token, as much as the gate says.
    gate
        The file of a fitted gate, if not the one shipped for smollm2.
    lam
        A fixed lambda instead of a gate: P = (1 - lam) P_model + lam P_memory.
    tenant
        Whose documents (public).
    documents
        What memory speaks from: auto (the documents that a question is about, else all), all, or ids, each with its own
        --documents.
    top_k
        How many documents of a question (3); also for a prompt that is none.
    drafts
        Read ahead what followed the longest match and check it in one forward: the same tokens, sooner where the text quotes.
    session
        Look up the prompt and what was generated as well (the last 4,096 tokens).
    most_verbatim
        After so many generated tokens in a row that are a document's own, memory is silent for one.
    strict
        Refuse a gate that was fitted on documents which are no longer in the index.
    count
        What counts once for each continuation: documents (the shipped gate's way), sources, or sources:FIELD with a field
        that documents were added with, such as author: whoever it names has one voice.
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
    from engram_lm.terminal.command import generate_command

    generate_command(
        model,
        prompt,
        index=index,
        gate=gate,
        lam=lam,
        tenant=tenant,
        documents=documents,
        top_k=top_k,
        drafts=drafts,
        session=session,
        most_verbatim=most_verbatim,
        strict=strict,
        count=count,
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
    from engram_lm.terminal.command import trace_command

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
        Directory of the memory; default the one that comes with engram-lm.
    max_new_tokens
        Tokens generated for each prompt.
    color
        auto: on a terminal, and not where NO_COLOR is set.
    """
    from engram_lm.terminal.demo import demo_command

    demo_command(memory=memory, max_new_tokens=max_new_tokens, color=color)
