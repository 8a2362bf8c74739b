"""`engram-lm serve`: the page."""

from pathlib import Path

from engram_lm.cli.app import FileList, Flag, app


@app.command
def serve(
    model: str | None = None,
    *,
    index: Path | None = None,
    gate: Path | None = None,
    lam: float | None = None,
    quiz: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    key: str | None = None,
    name: FileList = (),
    open: Flag = False,
    prepare: Flag = False,
) -> int:
    """Serve a page that shows what memory does and lets one change it; without MODEL, the demo.

    Parameters
    ----------
    model
        What engram-lm train wrote, smollm2, a path or a hub name.
    index
        The index of documents that is mixed in, and that the page may change.
    gate
        The file of a fitted gate, if not the one shipped for smollm2.
    lam
        A fixed lambda instead of a gate.
    quiz
        A JSON file of questions about the documents.
    host
        Where to listen. Anything but this machine alone needs a key.
    port
        0 takes any free one.
    key
        What others must give, at least 16 characters; better in the variable ENGRAM_SERVE_KEY than on the command line.
    name
        Names under which browsers may reach the server, beside its own.
    open
        Open the page in a browser when it is ready.
    prepare
        Fetch and compile what the first start needs, and end.
    """
    from engram_lm.serve.command import serve_command

    return serve_command(
        model,
        index=index,
        gate=gate,
        lam=lam,
        quiz=quiz,
        host=host,
        port=port,
        key=key,
        names=name,
        open_page=open,
        prepare_only=prepare,
    )
