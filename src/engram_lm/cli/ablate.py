"""The command that trains a memory beside what it should be compared with: `engram-lm ablate ...`."""

from pathlib import Path
from typing import Literal

from engram_lm.cli.app import FileList, Flag, app


@app.command
def ablate(
    base: str | None = None,
    *,
    out: Path,
    data: FileList | None = None,
    arms: str | None = None,
    seeds: str | None = None,
    texts: FileList | None = None,
    train_from: int | None = None,
    rates: str | None = None,
    minutes: float | None = None,
    draw: Flag = False,
    config: Path | None = None,
    field: str | None = None,
    txt_documents: Literal["file", "line", "paragraph"] | None = None,
    layers: str | None = None,
    orders: str | None = None,
    heads: int | None = None,
    rows_per_head: int | None = None,
    head_width: int | None = None,
    tokens: int | None = None,
    epochs: int | None = None,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    holdout: float | None = None,
    eval_tokens: int | None = None,
    learning_rate: float | None = None,
    device: Literal["auto", "cpu"] | None = None,
) -> int:
    """Train a memory, its controls, and what one would train instead, on the same text in the same order.

    The same command goes on where an earlier one was cut off. The end is a table and a picture of all arms.

    Parameters
    ----------
    base
        smollm2, a directory or a hub name (a frozen base), or scratch:tiny, scratch:small, scratch:base.
    out
        Directory of the ablation: a run and a result file an arm, the table and the picture.
    data
        Files or globs of .txt and .jsonl, plain or with .gz or .xz after it.
    arms
        Which arms, in this order, with commas (all): memory, one-row, shuffled, frozen-random, unigram, none; of scratch
        bases wide-ffn and fast-embedding; of others continued, bias and lora.
    seeds
        Each arm once for each, with commas (0).
    texts
        Further texts that every arm is measured on: FILE or NAME=FILE.
    train_from
        Blocks before this one stay frozen in the arms lora and continued (none).
    rates
        Learning rates of single arms, as lora=5e-4,continued=1e-4 (continued: a tenth of the others').
    minutes
        Stop after this long; the same command goes on.
    draw
        Only draw the table and the picture again, from the results in --out.
    config
        JSON file of the options of engram-lm train that all arms share; what is given here comes first.
    field
        Field of a JSONL line that holds the text (text).
    txt_documents
        What a document of a .txt file is (paragraph).
    layers
        Blocks before which memory enters, from 0, with commas (1 and the middle one).
    orders
        N-gram lengths, with commas (2,3).
    heads
        Hash heads of each order (8).
    rows_per_head
        Rows of each head (20011).
    head_width
        Numbers a row (32).
    tokens
        How many tokens to train on (all of the training side).
    epochs
        Passes over them (1).
    sequence_length
        Tokens a sequence (256).
    batch_size
        Sequences a step (8).
    holdout
        Share of the documents that is never trained on and measured (0.02).
    eval_tokens
        Most tokens of each text that are measured (16384).
    learning_rate
        Highest rate; rows train at 5 times it (0.001).
    device
        auto takes an accelerator where there is one (auto).
    """
    given = {name: value for name, value in locals().items() if value is not None and value is not False}
    from engram_lm.ablation.command import ablate_command

    return ablate_command(given)
