"""Commands about gates: `engram-lm gate ...`."""

from pathlib import Path

from cyclopts import App

from engram_lm.cli.app import FileList, Flag, app

gate = App(
    name="gate", help="Gates: how far an index of documents is believed at every token, fitted for a model."
)
app.command(gate)


@gate.command
def fit(
    model: str,
    *,
    index: Path,
    general: FileList,
    out: Path,
    texts: int = 24,
    bound: float = 0.005,
    tenant: str = "public",
    seed: int = 0,
    plot: Path | None = None,
) -> None:
    """Fit a gate. Every document is looked up without itself, in indexes of 1, 10, 100 and all documents.

    Parameters
    ----------
    model
        smollm2, a path, a hub name, or what engram-lm train wrote.
    index
        The index of documents.
    general
        Text that has nothing to do with them (.txt, .jsonl and their .xz): the gate may not harm it.
    out
        The file to write.
    texts
        Documents, and general texts, that the model reads; 512 tokens of each.
    bound
        How much more perplexing held-out general text may be, 0.005 for half a per cent.
    tenant
        Whose documents.
    seed
        Of the choice of texts.
    plot
        Draw lambda against the lambda that would have been best, into this file.
    """
    from engram_lm.terminal.gates import fit_command

    fit_command(
        model,
        index=index,
        general=general,
        out=out,
        texts=texts,
        bound=bound,
        tenant=tenant,
        seed=seed,
        plot=plot,
    )


@gate.command
def report(
    path: Path,
    *,
    index: Path | None = None,
    tenant: str | None = None,
    strict: Flag = False,
    json: Flag = False,
    plot: Path | None = None,
) -> None:
    """Print what a gate was fitted on and what it was measured to do.

    Parameters
    ----------
    path
        A gate's file.
    index
        The index it was fitted on: say how many of its documents are gone since.
    tenant
        Whose documents (public).
    strict
        Fail where some are gone.
    json
        Print JSON.
    plot
        Draw the calibration into this file.
    """
    from engram_lm.terminal.gates import report_command

    report_command(path, as_json=json, plot=plot, index=index, tenant=tenant, strict=strict)
