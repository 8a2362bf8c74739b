"""What `engram-lm index ...` prints: text for people, `--json` for machines. Progress goes to stderr."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram_lm.bases.tokenizer import load_tokenizer
from engram_lm.index.manifest import require_new
from engram_lm.index.store import Index
from engram_lm.library.library import Existing, Explanation, Hit, Library
from engram_lm.library.texts import STDIN, find, read_texts

LOCK_SECONDS = 10.0  # another writer is waited for


def create_command(directory: Path, *, model: str, as_json: bool) -> None:
    require_new(directory)
    tokenizer = load_tokenizer(model)
    with Library.create(directory, tokenizer=tokenizer, merging="by hand") as library:
        facts = {"vocab_size": library.store.vocab_size, "tokenizer": library.store.tokenizer}
    _say(facts, f"{directory}: an empty index of {facts['vocab_size']:,} token ids", as_json)


def add_command(
    directory: Path, paths: list[str], *, id: str | None, field: str, tenant: str, existing: Existing,
    extra: dict[str, str], as_json: bool,
) -> None:  # fmt: skip
    total = sum(found.path.stat().st_size for found in find(path for path in paths if path != STDIN))
    with Library.open(directory, "write", wait_seconds=LOCK_SECONDS) as library:
        started = time.perf_counter()
        added = library.add(
            read_texts(paths, field=field, id=id, extra=extra), tenant=tenant, existing=existing,
            report=_counting(f"adding ({total / 1e6:,.0f} MB of files)"),
        )  # fmt: skip
        took = time.perf_counter() - started
        facts = {**asdict(added), "seconds": took, "generation": library.store.generation}
    beside = [
        f"{n:,} {word}"
        for n, word in ((added.replaced, "replaced"), (added.skipped, "left as they were"))
        if n
    ]
    _say(
        facts,
        f"indexed {added.tokens:,} tokens of {_plural(added.documents, 'document')} in {_duration(took)}"
        + (f" ({', '.join(beside)})" if beside else ""),
        as_json,
    )


def sync_command(directory: Path, folder: Path, *, field: str, tenant: str, as_json: bool) -> None:
    with Library.open(directory, "write", wait_seconds=LOCK_SECONDS) as library:
        synced = library.sync(folder, tenant=tenant, field=field)
        facts = {**asdict(synced), "generation": library.store.generation}
    _say(
        facts,
        f"{synced.added:,} added, {synced.changed:,} changed, {synced.removed:,} removed, {synced.unchanged:,} as they were",
        as_json,
    )


def delete_command(directory: Path, ids: list[str], *, tenant: str, as_json: bool) -> None:
    with Index.open(directory, "write", wait_seconds=LOCK_SECONDS) as store:
        started = time.perf_counter()
        store.delete(ids, tenant=tenant)
        took = time.perf_counter() - started
        facts = {"deleted": len(ids), "seconds": took, "generation": store.generation}
    _say(facts, f"{_plural(len(ids), 'document')} out of every count, in {_duration(took)}", as_json)


def purge_command(directory: Path, ids: list[str], *, tenant: str | None, as_json: bool) -> None:
    with Index.open(directory, "write", merging="by hand", wait_seconds=LOCK_SECONDS) as store:
        report = store.purge(ids, tenant=tenant)
    _say(_plain(report), "nothing of deleted documents is left: every file was read again", as_json)


def merge_command(directory: Path, *, tenant: str | None, as_json: bool) -> None:
    with Index.open(directory, "write", merging="by hand", wait_seconds=LOCK_SECONDS) as store:
        before = store.stats()
        store.merge(tenant)
        after = store.stats()
    _say(
        {"segments_before": before.segments, "segments": after.segments, "bytes": after.bytes},
        f"{_plural(before.segments, 'segment')} merged into {after.segments:,}",
        as_json,
    )


def verify_command(directory: Path, *, as_json: bool) -> None:
    from engram_lm.progress import Progress

    progress = Progress("reading")
    with Index.open(directory) as store:
        report = store.verify(progress)
    progress.end()
    _say(_plain(report), "every byte is as it was written", as_json)


def stats_command(directory: Path, *, compressed: bool = False, as_json: bool) -> None:
    """compressed: also what the second channel of docs/mixing.md would hold in memory."""
    with Index.open(directory) as store:
        stats = store.stats()
        extra = _compressed_bytes(store) if compressed else None
    if as_json:
        beside = {"bytes_per_token": stats.bytes_per_token, "dead_share": stats.dead_share}
        print(json.dumps({**asdict(stats), **beside, "compressed_bytes": extra}))
        return
    segments = sum(tenant.bytes for tenant in stats.tenants.values())
    each = f" ({segments / stats.tokens:.1f} bytes a token)" if stats.tokens else ""
    print(
        f"{_plural(stats.documents, 'document')}, {stats.tokens:,} tokens, {segments / 1e6:,.2f} MB{each}, "
        f"{_plural(stats.segments, 'segment')}, generation {stats.generation}"
    )
    if stats.dead_documents:
        print(
            f"{_plural(stats.dead_documents, 'deleted document')} still in files, {100 * stats.dead_share:.1f} % of tokens"
        )
    if extra is not None:
        print(f"the channel of compressed contexts, in memory: {extra / 1e6:,.2f} MB")
    for name, tenant in stats.tenants.items():
        print(f"  {name}: {_plural(tenant.documents, 'document')}, {tenant.tokens:,} tokens")
    if stats.merge_error:
        print(f"the last merge failed: {stats.merge_error}")


def _compressed_bytes(store: Index) -> int:
    from engram_lm.index.compressed import bytes_of
    from engram_lm.library.encoding import TextEncoder
    from engram_lm.vocab import TokenMap

    tokens = TokenMap.from_tokenizer(TextEncoder.of(store.directory).backend, raw_size=store.vocab_size)
    return sum(bytes_of(store.snapshot(tenant), tokens) for tenant in store.tenants)


def search_command(directory: Path, text: str, *, tenant: str, limit: int, as_json: bool) -> None:
    with Library.open(directory) as library:
        started = time.perf_counter()
        total, hits = library.search(text, tenant=tenant, limit=limit)
        took = time.perf_counter() - started
    if as_json:
        print(
            json.dumps(
                {"count": total, "documents": [_hit(hit) for hit in hits], "seconds": took},
                ensure_ascii=False,
            )
        )
        return
    where = (
        f" in {_plural(len(hits), 'document')}"
        if len(hits) < limit
        else f"; the {limit} documents that hold most"
    )
    print(f"found {_plural(total, 'time')}{where if hits else ''}, in {_duration(took)}")
    _print_hits(hits)


def explain_command(directory: Path, text: str, *, tenant: str, limit: int, as_json: bool) -> None:
    with Library.open(directory) as library:
        started = time.perf_counter()
        told = library.explain(text, tenant=tenant, limit=limit)
        took = time.perf_counter() - started
    if as_json:
        facts = {**asdict(told), "hits": [_hit(hit) for hit in told.hits], "seconds": took}
        print(json.dumps(facts, ensure_ascii=False))
        return
    _print_explanation(told, took)


def verbatim_command(
    directory: Path, file: str, *, tenant: str, shortest: int, limit: int, as_json: bool
) -> None:
    from engram_lm.library.verbatim import verbatim_runs

    (text,) = read_texts([file], id="text")
    with Library.open(directory) as library:
        ids = library.encoder.encode(text.text)
        runs = verbatim_runs(library.store.snapshot(tenant), ids, shortest=shortest, limit=limit)
        told = [
            {
                "start": run.start,
                "tokens": run.length,
                "text": library.encoder.decode(ids[run.start : run.start + run.length]),
                "documents": [{"id": document.id, "count": count} for document, count in run.documents],
            }
            for run in runs
        ]
    if as_json:
        print(json.dumps({"tokens": len(ids), "runs": told}, ensure_ascii=False))
        return
    print(
        f"{_plural(len(ids), 'token')}; "
        + (
            f"the longest run of a document has {told[0]['tokens']:,}"
            if told
            else f"no run of {shortest} or more is a document's"
        )
    )
    for run in told:
        print(
            f"{run['tokens']:6,} tokens at {run['start']:,}, {', '.join(one['id'] for one in run['documents'])}"
        )
        print("    " + " ".join(run["text"].split())[:200])


def _print_explanation(told: Explanation, took: float) -> None:
    if not told.counts or not told.counts[0]:
        print("the index is empty")
        return
    if not told.depth:
        print("no document ends a wording like this one; single tokens alone speak:")
    else:
        print(
            f"longest match: {_plural(told.depth, 'token')}, {_plural(told.counts[-1], 'time')}, "
            f"{_duration(took)}: {told.matched!r}"
        )
    for one in told.continuations:
        print(f"  {one.p:6.3f}  {one.count:8,}x  {repr(one.text) if one.text else 'end of document'}")
    _print_hits(told.hits)


def _print_hits(hits: Any) -> None:
    for hit in hits:
        facts = [
            f"{key}: {value}"
            for key, value in hit.document.extra.items()
            if key not in ("file_sha256", "folder")
        ]
        print(
            f"{hit.document.id}  ({_plural(hit.count, 'time')})" + (f"  {'; '.join(facts)}" if facts else "")
        )
        for before, found, after in hit.passages[:1]:
            print("    " + " ".join(f"...{before}[{found}]{after}...".split()))


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "document": asdict(hit.document),
        "count": hit.count,
        "passages": [list(parts) for parts in hit.passages],
    }


def _counting(what: str) -> Callable[[int, int], None]:
    """A line on stderr a commit, from the second on: what is committed stays when it is stopped."""
    commits = 0

    def report(documents: int, tokens: int) -> None:
        nonlocal commits
        commits += 1
        if commits > 1:
            print(f"{what}: {_plural(documents, 'document')}, {tokens:,} tokens committed", file=sys.stderr)

    return report


def _plain(record: Any) -> dict[str, Any]:
    return asdict(record)


def _say(facts: dict[str, Any], sentence: str, as_json: bool) -> None:
    print(json.dumps(facts) if as_json else sentence)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
