"""The command that measures what memory of a user's own documents would do: `engram-lm adapt ...`."""

from pathlib import Path

from engram_lm.cli.app import FileList, Flag, app


@app.command
def adapt(
    model: str,
    documents: list[str],
    /,
    *,
    out: Path,
    questions: Path | None = None,
    general: FileList | None = None,
    windows: int = 24,
    gate: Path | None = None,
    lam: float | None = None,
    seed: int = 0,
    json: Flag = False,
) -> None:
    """Measure what memory of your documents does for a model: alone, memory, retrieval in the prompt. Trains nothing.

    Half of the documents are indexed; perplexity is that of windows of both halves. The same command goes on after a stop.

    Parameters
    ----------
    model
        smollm2, a path, a hub name, or what engram-lm train wrote.
    documents
        .txt, .md, .rst, .jsonl (.gz, .xz) and folders of them; .pdf, .docx, .html and .pptx with the extra documents.
    out
        A directory for report.md, results.json, the rows they come from, and the index.
    questions
        JSON lines with question and answer, asked of all documents.
    general
        Text that has nothing to do with them (.txt, .jsonl and their .xz): what memory costs it.
    windows
        Texts of 320 tokens that the model reads of each kind; of a small model a second or two each.
    gate
        The file of a fitted gate, if not the one shipped for smollm2.
    lam
        A fixed lambda instead of a gate.
    seed
        Of the halves.
    json
        Print JSON instead of the report.
    """
    from engram_lm.adapt.command import adapt_command

    adapt_command(
        model, documents, out=out, questions=questions, general=general or [], windows=windows, gate=gate, lam=lam,
        seed=seed, as_json=json,
    )  # fmt: skip
