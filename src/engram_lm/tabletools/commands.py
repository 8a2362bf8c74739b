"""What `engram-lm table …` and `engram-lm doctor` print: text for people, `--json` for machines. Progress goes to stderr.

Every command takes a packed `.engram` file, a directory of them, one .safetensors file, an index, or a checkpoint's
directory, and reads it in place. Exit codes beside the usual: 1 where `diff` finds a difference or `doctor` something wrong.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.progress import Progress
from engram_lm.storage import DiskStore, Layout, names_of
from engram_lm.storage.format import identity_hash
from engram_lm.storage.shipped import files_of
from engram_lm.tabletools import convert as conversion
from engram_lm.tabletools.compare import compare
from engram_lm.tabletools.convert import targets
from engram_lm.tabletools.doctor import examine
from engram_lm.tabletools.identify import expect
from engram_lm.tabletools.measure import Stats, measure, row_norms
from engram_lm.tabletools.sources import Key, open_source, sampled, size_told, whole

DIFFERENT = 1

# Rows that `doctor` reads of a table where it is not told to read all.
DOCTOR_SAMPLE = 65_536


def info_command(path: Path, *, layer: str | None, as_json: bool) -> int:
    """Headers alone."""
    source = open_source(path)
    expected = expect(source.directory, source.tables)
    told = {}
    for key, layout in source.named(layer).items():
        identity = layout.identity or (expected.identities.get(key) if isinstance(key, int) else None)
        names = names_of(layout)
        told[str(key)] = {
            "format": "packed" if source.packed else "safetensors",
            "n_rows": layout.n_rows,
            "width": layout.width,
            "codec": layout.codec,
            "scale": layout.scale if layout.codec == "fp8_e4m3" else None,
            "record_bytes": layout.record_bytes,
            "bytes": layout.n_rows * layout.record_bytes,
            "files": [str(file) for file in files_of(layout)],
            "tensor": names.codes if names else None,
            "identity": identity_hash(identity).hex() if identity else None,
            "identity_facts": identity,
            "identity_missing": None if identity else _why(source.packed, expected.why),
        }
    if as_json:
        return _print_json(told)
    for key, facts in told.items():
        print(f"layer {key}" if key.isdigit() else key)
        profile = (facts["identity_facts"] or {}).get("profile", "")
        identity = (
            f"{facts['identity'][:16]} ({profile})"
            if facts["identity"]
            else f"none: {facts['identity_missing']}"
        )
        scale = "" if facts["scale"] is None else f", scale {facts['scale']:.6g}"
        _print_pairs(
            [
                ("rows", f"{facts['n_rows']:,} of {facts['width']} numbers"),
                ("codec", f"{facts['codec']}{scale}, {facts['record_bytes']} B a row"),
                ("size", size_told(facts["bytes"])),
                ("tensor", facts["tensor"] or ""),
                ("identity", identity),
                ("files", ", ".join(_few([Path(file).name for file in facts["files"]]))),
            ]
        )
    return 0


def _why(packed: bool, why: str) -> str:
    return "the file has none" if packed else why


def verify_command(path: Path, *, layer: str | None, as_json: bool) -> int:
    """Read every byte; packed files against their checksums. The digest is of the records in row order: equal tables have
    equal digests, in whatever files they lie."""
    source, told = open_source(path), {}
    for key, layout in source.named(layer).items():
        digest, progress = hashlib.sha256(), Progress(f"verifying layer {key}")
        for row_U, record_UR in whole(layout):
            digest.update(np.ascontiguousarray(record_UR).data)
            progress(int(row_U[-1]) + 1, layout.n_rows)
        progress.end()
        told[str(key)] = {
            "n_rows": layout.n_rows,
            "checksums": "ok" if source.packed else None,
            "records_sha256": digest.hexdigest(),
        }
    if as_json:
        return _print_json(told)
    for key, facts in told.items():
        checked = (
            "every page has its checksum"
            if source.packed
            else "all rows are there; safetensors has no checksums"
        )
        print(f"layer {key}: {facts['n_rows']:,} rows read, {checked}; records {facts['records_sha256']}")
    return 0


def stats_command(path: Path, *, layer: str | None, sample: int | None, as_json: bool) -> int:
    """Norms, zero rows, NaN, scales."""
    source, told = open_source(path), {}
    for key, layout in source.named(layer).items():
        progress = Progress(f"reading layer {key}")
        total = layout.n_rows if sample is None else min(sample, layout.n_rows)
        parts = whole(layout) if sample is None else sampled(layout, sample)
        told[key] = measure(layout, parts, report=_counted(progress, total))
        progress.end()
    if as_json:
        return _print_json({str(key): stats.to_dict() for key, stats in told.items()})
    for key, stats in told.items():
        _print_stats(key, stats)
    return 0


def _print_stats(key: Key, stats: Stats) -> None:
    print(f"layer {key}: {stats.rows_read:,} of {stats.n_rows:,} rows read")
    pairs = []
    if stats.median_norm is not None:
        pairs.append(
            (
                "norms",
                f"min {stats.min_norm:.4g}, median {stats.median_norm:.4g}, mean {stats.mean_norm:.4g}, "
                f"max {stats.max_norm:.4g}",
            )
        )
    run = stats.longest_zero_run
    longest = f", longest run {run[1]:,} from row {run[0]:,}" if run else ""
    pairs += [
        ("zero rows", f"{stats.zero_rows:,}{longest}"),
        ("NaN or inf", f"{stats.broken_rows:,} rows {stats.first_broken_rows or ''}".rstrip()),
        ("largest number", f"{stats.largest:.6g}"),
    ]
    if stats.nan_scales:
        pairs.append(("NaN scales", f"{stats.nan_scales:,}"))
    _print_pairs(pairs)
    _print_histogram("norm", stats.norm_octaves, "rows")
    _print_histogram("scale", stats.scale_counts, "blocks")


def _print_histogram(what: str, counts: dict[int, int], unit: str) -> None:
    if not counts:
        return
    total, highest = sum(counts.values()), max(counts.values())
    for octave in range(min(counts), max(counts) + 1):
        count = counts.get(octave, 0)
        if count:
            bar = "█" * max(1, round(24 * count / highest))
            print(f"  {what} 2^{octave:<4} {count:>14,} {unit} {100 * count / total:6.2f} %  {bar}")


def rows_command(path: Path, addresses: str, *, layer: str | None, as_json: bool) -> int:
    """Rows at addresses, read from disk."""
    from engram_lm.addressing.command import parse_ids

    source = open_source(path)
    _, layout = source.one(layer)
    wanted = parse_ids(addresses)
    store = DiskStore(layout)
    try:
        rows_NW = store.gather(np.array(wanted, np.int64))
    finally:
        store.close()
    norms = row_norms(rows_NW).tolist()
    if as_json:
        # JSON has no NaN
        values = [[x if np.isfinite(x) else None for x in row] for row in rows_NW.tolist()]
        norms = [x if np.isfinite(x) else None for x in norms]
        told = zip(wanted, norms, values, strict=True)
        return _print_json([{"address": a, "norm": n, "row": row} for a, n, row in told])
    for address, norm, row_W in zip(wanted, norms, rows_NW, strict=True):
        numbers = " ".join(f"{x:.4g}" for x in row_W[:8])
        print(f"{address}: norm {norm:.6g}: {numbers}{' …' if layout.width > 8 else ''}")
    return 0


def diff_command(a: Path, b: Path, *, layer: str | None, sample: int | None, as_json: bool) -> int:
    """Rows that differ between two tables, or two checkpoints layer by layer."""
    ours, theirs = open_source(a), open_source(b)
    pairs = _pairs(ours.named(layer), theirs.named(layer) if len(theirs.tables) > 1 else theirs.tables, a, b)
    told = {}
    for key, (mine, other) in pairs.items():
        progress = Progress(f"comparing layer {key}")
        total = mine.n_rows if sample is None else min(sample, mine.n_rows)
        told[key] = compare(mine, other, sample=sample, report=_counted(progress, total))
        progress.end()
    different = any(found.rows_differing for found in told.values())
    if as_json:
        _print_json({str(key): found.to_dict() for key, found in told.items()})
        return DIFFERENT if different else 0
    for key, found in told.items():
        print(
            f"layer {key}: {found.rows_differing:,} of {found.rows_compared:,} rows differ, by their {found.by}"
        )
        if found.largest_row is not None:
            print(f"  largest difference {found.largest:.6g}, in row {found.largest_row:,}")
        if found.broken_on_one_side:
            print(f"  {found.broken_on_one_side:,} rows are NaN or infinite on one side")
        for row in found.first_rows:
            by = "NaN or infinity" if row["largest"] is None else f"{row['largest']:.6g}"
            print(f"  row {row['row']:,}: {by}, norms {row['norms'][0]:.6g} and {row['norms'][1]:.6g}")
    return DIFFERENT if different else 0


def _pairs(
    ours: dict[Key, Layout], theirs: dict[Key, Layout], a: Path, b: Path
) -> dict[Key, tuple[Layout, Layout]]:
    if len(ours) == len(theirs) == 1:
        (key, mine), (_, other) = next(iter(ours.items())), next(iter(theirs.items()))
        return {key: (mine, other)}
    if set(ours) != set(theirs):
        raise ConfigError(
            f"{a} has tables {', '.join(map(str, ours))}; {b} has {', '.join(map(str, theirs))}. Name one with --layer."
        )
    return {key: (ours[key], theirs[key]) for key in ours}


def convert_command(
    source: Path,
    out: Path,
    *,
    layer: str | None,
    codec: str | None,
    scale: float | None,
    name: str | None,
    shards: int | None,
    as_json: bool,
) -> int:
    """To .engram, or back to .safetensors, or a directory of .engram files."""
    opened = open_source(source)
    tables = opened.named(layer)
    if out.suffix != ".safetensors" and (name is not None or shards is not None):
        raise ConfigError("--name and --shards have no effect on packed files: they are for .safetensors.")
    expected = expect(opened.directory, opened.tables) if out.suffix != ".safetensors" else None
    told = {}
    for key, path in targets(tables, out).items():
        layout, progress = tables[key], Progress(f"converting layer {key}")
        try:
            if out.suffix == ".safetensors":
                told[str(key)] = conversion.to_safetensors(
                    layout, path, codec=codec, scale=scale, codes_name=name, shards=shards, report=progress
                )
            else:
                identity = expected.identities.get(key) if isinstance(key, int) else None
                told[str(key)] = conversion.to_packed(
                    layout, path, codec=codec, scale=scale, identity=identity, report=progress
                )
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            raise
        finally:
            progress.end()
    if as_json:
        return _print_json({key: done.to_dict() for key, done in told.items()})
    for key, done in told.items():
        resumed = f", gone on with at row {done.resumed_at:,}" if done.resumed_at else ""
        print(
            f"layer {key}: {done.path}, {done.n_rows:,} rows, {done.codec}, {size_told(done.n_bytes)}{resumed}"
        )
        if done.largest_error is not None:
            print(f"  a number x moved by at most {done.largest_error:.4g} (bound: {done.bound})")
    return 0


def doctor_command(
    checkpoint: Path,
    other: Path | None,
    *,
    sample: int | None,
    read_all: bool,
    profile: str | None,
    as_json: bool,
) -> int:
    """Findings, and 1 where something is wrong."""
    if read_all and sample is not None:
        raise ConfigError("--sample has no effect with --all.")
    n = None if read_all else sample or DOCTOR_SAMPLE
    source = open_source(checkpoint)
    progresses: list[Progress] = []

    def reporter(key: Key, what: str) -> Callable[[int], None]:
        for earlier in progresses:
            earlier.end()
        progresses.append(Progress(f"{what} layer {key}"))
        rows = source.tables[key].n_rows
        return _counted(progresses[-1], rows if n is None else min(n, rows))

    report = examine(
        source, None if other is None else open_source(other), sample=n, profile=profile, reporter=reporter
    )
    for progress in progresses:
        progress.end()
    if as_json:
        _print_json(report.to_dict())
        return DIFFERENT if report.wrong else 0
    print(f"{report.path}")
    for layer in dict.fromkeys(finding.layer for finding in report.findings):
        print("checkpoint" if layer is None else f"layer {layer}" if isinstance(layer, int) else layer)
        for finding in report.findings:
            if finding.layer == layer:
                print(f"  {finding.status:<5}  {finding.check:<12} {finding.text}")
    for key, found in report.differences.items():
        for row in found.first_rows[:5]:
            by = "NaN or infinity" if row["largest"] is None else f"{row['largest']:.6g}"
            print(
                f"  layer {key}, row {row['row']:,}: {by}, norms {row['norms'][0]:.6g} and {row['norms'][1]:.6g}"
            )
    print(f"{len(report.wrong)} wrong" if report.wrong else "nothing wrong found")
    return DIFFERENT if report.wrong else 0


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    return lambda done: progress(done, total)


def _print_json(told: Any) -> int:
    print(json.dumps(told))
    return 0


def _print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        if value:
            print(f"  {name:<14} {value}")


def _few(names: list[str]) -> list[str]:
    return names if len(names) <= 3 else [*names[:2], f"… {len(names)} files"]
