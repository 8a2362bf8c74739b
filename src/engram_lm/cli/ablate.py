"""The command that trains a memory beside what it should be compared with: `engram-lm ablate ...`."""

from pathlib import Path

from engram_lm.cli.app import FileList, Flag, app, options_of
from engram_lm.training.config import TrainConfig

# what all arms share
SharedOptions = options_of(
    TrainConfig,
    (
        "field", "txt_documents", "layers", "orders", "heads", "rows_per_head", "head_width", "tokens", "epochs",
        "sequence_length", "batch_size", "holdout", "eval_tokens", "learning_rate", "device",
    ),
    orders="N-gram lengths, with commas (2,3).",
    heads="Hash heads of each order (8).",
    batch_size="Sequences a step (8).",
    eval_tokens="Most tokens of each text that are measured (16384).",
)  # fmt: skip


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
    options: SharedOptions | None = None,
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
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("draw", "options")
    }
    given |= options or {}
    if draw:
        given["draw"] = True
    from engram_lm.ablation.command import ablate_command

    return ablate_command(given)
