"""Commands that measure a model: `engram-lm eval ...`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from engram_lm.cli.app import FileList, Flag, app

# --memory on off shuffled
States = Annotated[
    list[Literal["on", "off", "noise", "shuffled"]], Parameter(consume_multiple=True, negative="")
]

evaluation = App(
    name="eval",
    help="What a model knows and what its memory adds: engram-lm eval my-memory --text held-out.txt --out report",
)
app.command(evaluation)


@evaluation.default
def measure(
    model: str,
    /,
    *,
    out: Path,
    text: FileList | None = None,
    training: FileList | None = None,
    facts: FileList | None = None,
    pararel: Path | None = None,
    benchmarks: FileList | None = None,
    gates: Flag = False,
    spans: FileList | None = None,
    canaries: Path | None = None,
    memory: States | None = None,
    tokens: int = 20_000,
    most: int = 200,
    pararel_facts: int = 5,
    candidates: int = 15,
    references: int = 255,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    device: str | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> None:
    """Measure a model, with its memory on and off. Only what is named is measured; layouts are in docs/eval.md.

    Each measure is kept when it is done: the same command goes on after a stop. Ctrl-C keeps what is finished.

    Parameters
    ----------
    model
        smollm2, a path, a hub name, or what engram-lm train wrote; with memory or without.
    out
        A directory for one JSON file a measure, and report.md.
    text
        Perplexity of these texts (.txt, .jsonl and their .gz, .xz).
    training
        The text that was trained on: results are split by how often it holds an n-gram.
    facts
        Facts to complete: JSON lines with relation, prompt, answer and paraphrases.
    pararel
        ParaRel's archive or folder: is the answer the same in other words?
    benchmarks
        Files or folders of LAMBADA, ARC, PIQA, Winogrande and OpenBookQA; needs the extra eval.
    gates
        Gates over the texts of --text, by frequency and by what they save.
    spans
        Gates inside and outside of entities: files of FewRel or Re-DocRED.
    canaries
        What engram-lm eval canaries wrote: how exposed the secrets are.
    memory
        States to measure: on, off, noise (rows of the same norms), shuffled (rows of other addresses); default on and off.
    tokens
        Tokens of each file of --text.
    most
        Facts, items of each benchmark, and texts of each file of --spans, drawn at random.
    pararel_facts
        Subjects of each relation of --pararel.
    candidates
        Other answers that a right one is compared with.
    references
        Other secrets that a canary is compared with; they bound its exposure.
    window
        Tokens that the model reads at a time.
    stride
        Where the next window begins; default half a window.
    batch_size
        Of the benchmarks.
    seed
        Of what is drawn, of noise and of shuffled rows.
    device
        cpu, cuda or cuda:1; default where the model loads.
    overwrite
        Remove results of these measures that are of other settings or of another model, then go on as without it.
    json
        Print JSON instead of the report.
    """
    from engram_lm.eval.command import EvalOptions, eval_command

    options = EvalOptions(
        text=tuple(text or ()), training=tuple(training or ()), facts=tuple(facts or ()), pararel=pararel,
        benchmarks=tuple(benchmarks or ()), gates=gates, spans=tuple(spans or ()), canaries=canaries,
        memory=tuple(memory) if memory else None, tokens=tokens, most=most, pararel_facts=pararel_facts,
        candidates=candidates, references=references, window=window, stride=stride, batch_size=batch_size,
        seed=seed, device=device,
    )  # fmt: skip
    eval_command(model, out=out, options=options, overwrite=overwrite, as_json=json)


@evaluation.command
def canaries(
    out: Path,
    /,
    *,
    each: int = 8,
    controls: int | None = None,
    repeats: str = "1,2,4,8,16,32,64",
    digits: int = 6,
    seed: int = 0,
    documents: Path | None = None,
) -> None:
    """Make canaries: invented secrets to put into training text, whose exposure engram-lm eval --canaries measures.

    Parameters
    ----------
    out
        A .jsonl file of names, secrets and repeats: for measuring, not for training.
    each
        Canaries of each number of repeats.
    controls
        Canaries that are never trained; default as many.
    repeats
        How often, with commas between them.
    digits
        Of a secret.
    seed
        Of names, digits and order.
    documents
        A .jsonl file of documents to train on, each canary as often as it says.
    """
    from engram_lm.errors import ConfigError
    from engram_lm.eval.command import canaries_command

    try:
        counts = [int(count) for count in repeats.split(",")]
    except ValueError:
        raise ConfigError(f"--repeats are whole numbers with commas between them; got {repeats!r}.") from None
    canaries_command(
        out, each=each, controls=controls, repeats=counts, digits=digits, seed=seed, documents=documents
    )
