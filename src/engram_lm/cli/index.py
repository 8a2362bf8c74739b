"""Commands about indexes of documents: `engram-lm index ...`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from engram_lm.cli.app import FileList, Flag, app

index = App(
    name="index",
    help="Indexes of documents: exact N-gram memory that knows a document's wording as soon as it is added.",
)
app.command(index)

# A folder or file may be named "-": standard input.
Paths = Annotated[list[str], Parameter(allow_leading_hyphen=True)]


@index.command
def create(directory: Path, *, model: str, json: Flag = False) -> None:
    """Make an empty index for the texts of a model's tokenizer.

    Parameters
    ----------
    directory
        Made where it is missing.
    model
        smollm2, a hub name, or a path: a model's directory or a tokenizer.json.
    json
        Print JSON.
    """
    from engram_lm.library.commands import create_command

    create_command(directory, model=model, as_json=json)


@index.command
def add(
    directory: Path,
    paths: Paths,
    /,
    *,
    id: str | None = None,
    field: str = "text",
    tenant: str = "public",
    existing: Literal["error", "skip", "replace"] = "error",
    licence: str | None = None,
    attribution: str | None = None,
    json: Flag = False,
) -> None:
    """Add files, folders, JSON lines or standard input. Known when it returns; nothing is trained.

    Parameters
    ----------
    directory
        An index made by engram-lm index create.
    paths
        .txt, .md, .rst, .jsonl (.gz, .xz), folders of them, or - for standard input; .pdf, .docx, .html and .pptx with the
        extra documents.
    id
        The document's id, for one file; else its path, or the field id of a JSON line.
    field
        Where a JSON line has its text.
    tenant
        Whose documents these are; tenants never mix.
    existing
        What to do where an id is there already: error, skip (a stopped addition goes on) or replace.
    licence
        Kept with every document of this addition, and shown by explain.
    attribution
        Likewise.
    json
        Print JSON.
    """
    from engram_lm.library.commands import add_command

    extra = {name: value for name, value in (("licence", licence), ("attribution", attribution)) if value}
    add_command(
        directory, paths, id=id, field=field, tenant=tenant, existing=existing, extra=extra, as_json=json
    )


@index.command
def update(
    directory: Path,
    paths: Paths,
    /,
    *,
    id: str | None = None,
    field: str = "text",
    tenant: str = "public",
    json: Flag = False,
) -> None:
    """Add files; documents of the same ids are replaced, and a reader sees the old or the new one, never both or neither.

    Parameters
    ----------
    directory
        An index.
    paths
        As for add.
    id
        The document's id, for one file.
    field
        Where a JSON line has its text.
    tenant
        Whose documents these are.
    json
        Print JSON.
    """
    from engram_lm.library.commands import add_command

    add_command(
        directory, paths, id=id, field=field, tenant=tenant, existing="replace", extra={}, as_json=json
    )


@index.command
def sync(
    directory: Path, folder: Path, *, field: str = "text", tenant: str = "public", json: Flag = False
) -> None:
    """Make the index agree with a folder: new files added, changed ones replaced, removed ones deleted, all at once.

    Parameters
    ----------
    directory
        An index.
    folder
        Only documents that came from it are touched.
    field
        Where a JSON line has its text.
    tenant
        Whose documents these are.
    json
        Print JSON.
    """
    from engram_lm.library.commands import sync_command

    sync_command(directory, folder, field=field, tenant=tenant, as_json=json)


@index.command
def delete(directory: Path, ids: FileList, /, *, tenant: str = "public", json: Flag = False) -> None:
    """Take documents out of every count and probability. Their bytes stay in files until a merge, or purge.

    Parameters
    ----------
    directory
        An index.
    ids
        Of documents.
    tenant
        Whose documents these are.
    json
        Print JSON.
    """
    from engram_lm.library.commands import delete_command

    delete_command(directory, ids, tenant=tenant, as_json=json)


@index.command
def purge(
    directory: Path, ids: FileList | None = None, /, *, tenant: str | None = None, json: Flag = False
) -> None:
    """Rewrite every file that holds something of a deleted document, and prove by reading all that nothing is left.

    Parameters
    ----------
    directory
        An index.
    ids
        Documents to delete first.
    tenant
        Of these documents; without, all tenants' deleted documents.
    json
        Print JSON.
    """
    from engram_lm.library.commands import purge_command

    purge_command(directory, ids or [], tenant=tenant, as_json=json)


@index.command
def merge(directory: Path, *, tenant: str | None = None, json: Flag = False) -> None:
    """Merge segments into one a tenant: queries are fastest then.

    Parameters
    ----------
    directory
        An index.
    tenant
        This one's alone.
    json
        Print JSON.
    """
    from engram_lm.library.commands import merge_command

    merge_command(directory, tenant=tenant, as_json=json)


@index.command
def verify(directory: Path, *, json: Flag = False) -> None:
    """Read every byte and check it.

    Parameters
    ----------
    directory
        An index.
    json
        Print JSON.
    """
    from engram_lm.library.commands import verify_command

    verify_command(directory, as_json=json)


@index.command
def stats(directory: Path, *, compressed: Flag = False, json: Flag = False) -> None:
    """Print documents, tokens, bytes, segments, and what deleted documents still take.

    Parameters
    ----------
    directory
        An index.
    compressed
        Also make the channel of compressed contexts, and print what it takes in memory (docs/mixing.md).
    json
        Print JSON.
    """
    from engram_lm.library.commands import stats_command

    stats_command(directory, compressed=compressed, as_json=json)


@index.command
def search(
    directory: Path, text: str, *, tenant: str = "public", limit: int = 10, json: Flag = False
) -> None:
    """Print which documents hold a wording, how often, and a passage of each. Whole words: it compares tokens.

    Parameters
    ----------
    directory
        An index.
    text
        The wording.
    tenant
        Whose documents are searched.
    limit
        Most documents that are shown.
    json
        Print JSON.
    """
    from engram_lm.library.commands import search_command

    search_command(directory, text, tenant=tenant, limit=limit, as_json=json)


@index.command
def explain(
    directory: Path, text: str, *, tenant: str = "public", limit: int = 5, json: Flag = False
) -> None:
    """Print what memory alone says comes after a text, and which documents it has that from.

    Parameters
    ----------
    directory
        An index.
    text
        What stands before.
    tenant
        Whose documents are asked.
    limit
        Most continuations, and most documents, that are shown.
    json
        Print JSON.
    """
    from engram_lm.library.commands import explain_command

    explain_command(directory, text, tenant=tenant, limit=limit, as_json=json)


@index.command
def verbatim(
    directory: Path,
    file: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    tenant: str = "public",
    shortest: int = 16,
    limit: int = 10,
    json: Flag = False,
) -> None:
    """Print the longest passages of a text that stand in the documents word for word, and where.

    Parameters
    ----------
    directory
        An index.
    file
        A text, or - for standard input: what a model said, for example.
    tenant
        Whose documents are compared.
    shortest
        Tokens of the shortest passage that is shown.
    limit
        Most passages that are shown.
    json
        Print JSON.
    """
    from engram_lm.library.commands import verbatim_command

    verbatim_command(directory, file, tenant=tenant, shortest=shortest, limit=limit, as_json=json)


@index.command
def key() -> None:
    """Print a new key for signing tenant tokens. Whoever has it can speak for every tenant: keep it in a file."""
    from engram_lm.tenancy import new_key

    print(new_key())


@index.command
def token(tenant: str, *, key_file: Path, hours: float = 24.0) -> None:
    """Print a token that lets an application read one tenant's documents through a server that has the same key.

    Parameters
    ----------
    tenant
        Whose documents.
    key_file
        A file with the key alone, made by engram-lm index key.
    hours
        How long the token is good for.
    """
    from engram_lm.errors import ConfigError
    from engram_lm.tenancy import sign

    try:
        secret = key_file.read_text(encoding="utf8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key_file} cannot be read: {error}.") from None
    print(sign(tenant, secret, seconds=3600 * hours))
