"""Is this checkpoint's memory what it should be? Identity, row counts, moduli, scales, holes, norms, and what a second
release changed. Nothing is repaired.

Findings are "ok", "note" (worth a look: the tables can be used) or "wrong" (they cannot, or not for this model).

    report = examine(open_source("model/"), sample=65_536)
    report.wrong                                    # the findings that say so
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.addressing import AddressScheme
from engram_lm.errors import ConfigError
from engram_lm.storage import Layout, names_of
from engram_lm.storage.safetensors import Tensor, checkpoint_tensors
from engram_lm.storage.shipped import files_of
from engram_lm.tabletools.compare import Difference, compare
from engram_lm.tabletools.identify import Expected, expect, read_config
from engram_lm.tabletools.measure import Stats, measure
from engram_lm.tabletools.sources import Key, Source, chosen, sampled, size_told, whole

# What transformers saves beside a Qwen table: they must be what addresses are made with.
_CONSTANTS = {
    "layer_multipliers": "multipliers",
    "ngram_heads_vocab_sizes": "moduli",
    "ngram_heads_offsets": "offsets",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """status: ok, note or wrong. layer: None for the checkpoint as a whole."""

    layer: Key | None
    check: str
    status: str
    text: str


@dataclass(kw_only=True)
class Report:
    """Everything that was found; `stats` and `differences` by layer."""

    path: Path
    expected: Expected
    findings: list[Finding] = field(default_factory=list)
    stats: dict[Key, Stats] = field(default_factory=dict)
    differences: dict[Key, Difference] = field(default_factory=dict)

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "wrong"]

    def add(self, layer: Key | None, check: str, status: str, text: str) -> None:
        self.findings.append(Finding(layer=layer, check=check, status=status, text=text))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "profile": self.expected.profile,
            "profile_from": self.expected.source,
            "identities": {str(k): v for k, v in self.expected.identities.items()},
            "findings": [vars(finding) for finding in self.findings],
            "stats": {str(k): v.to_dict() for k, v in self.stats.items()},
            "differences": {str(k): v.to_dict() for k, v in self.differences.items()},
            "wrong": len(self.wrong),
        }


Reporter = Callable[[Key, str], Callable[[int], None]]


def _silent(layer: Key, what: str) -> Callable[[int], None]:
    return lambda rows: None


def examine(
    source: Source,
    other: Source | None = None,
    *,
    sample: int | None,
    profile: str | None = None,
    reporter: Reporter = _silent,
) -> Report:
    """Examine the tables of `source`, and how `other` differs. `sample`: rows read of each table; None: all."""
    expected = expect(source.directory, source.tables, profile=profile)
    report = Report(path=source.path, expected=expected)
    _identity(report, source)
    for key, layout in source.tables.items():
        scheme = expected.schemes.get(key) if isinstance(key, int) else None
        _files(report, key, layout)
        if scheme is not None:
            _rows(report, key, layout, scheme)
            _constants(report, source, key, layout, scheme)
            _padding(report, key, layout, scheme)
        parts = whole(layout) if sample is None else sampled(layout, sample)
        stats = report.stats[key] = measure(layout, parts, report=reporter(key, "reading"))
        _numbers(report, key, layout, stats)
    if other is not None:
        _releases(report, source, other, sample, reporter)
    return report


def _identity(report: Report, source: Source) -> None:
    expected = report.expected
    if expected.profile is None:
        report.add(
            None, "profile", "note", f"unknown: {expected.why}. Row counts and moduli are not checked."
        )
    else:
        report.add(None, "profile", "ok", f"{expected.profile}, by {expected.source}")
    if expected.why and expected.profile is not None:
        report.add(None, "identity", "note", f"none: {expected.why}")
    for layer, facts in expected.identities.items():
        kept = source.tables[layer].identity if layer in source.tables else None
        hashed = _hash(facts)
        if kept is not None and not expected.is_identity(kept, facts):
            keys = ", ".join(sorted(k for k in facts if facts[k] != kept.get(k)))
            report.add(
                layer,
                "identity",
                "wrong",
                f"the file has {_hash(kept)}, config and tokenizer {hashed}: {keys}",
            )
        else:
            report.add(layer, "identity", "ok", hashed)
    for layer in expected.schemes:
        if layer not in source.tables:
            report.add(layer, "rows", "wrong", "the model reads memory here, and there is no table")
    for key, layout in source.tables.items():
        if expected.schemes and key not in expected.schemes:
            layers = ", ".join(map(str, expected.schemes))
            report.add(key, "rows", "wrong", f"a table, and the model reads memory in layers {layers} alone")
        elif layout.identity is not None and key not in expected.identities:
            report.add(key, "identity", "ok", f"{_hash(layout.identity)}, by the file itself")
            _own_rows(report, key, layout)
    declared = _declared(source)
    for layer, n_rows in declared.items():
        if layer in source.tables and source.tables[layer].n_rows != n_rows:
            got = source.tables[layer].n_rows
            report.add(layer, "config", "wrong", f"config.json says {n_rows:,} rows; the table has {got:,}")


def _own_rows(report: Report, key: Key, layout: Layout) -> None:
    """A packed file's rows against the moduli in its own identity."""
    moduli = layout.identity.get("moduli")
    if not (isinstance(moduli, list) and moduli and all(type(modulus) is int for modulus in moduli)):
        report.add(key, "rows", "note", "the identity lists no moduli: row counts are not checked")
        return
    sums = f"{len(moduli)} moduli, {moduli[0]:,} to {moduli[-1]:,}, sum to {sum(moduli):,}"
    if sum(moduli) <= layout.n_rows:
        report.add(key, "rows", "ok", f"{sums}; {layout.n_rows - sum(moduli)} rows of padding")
    else:
        report.add(
            key, "rows", "wrong", f"{sums}; the table has {layout.n_rows:,}: some addresses are outside"
        )


def _declared(source: Source) -> dict[int, int]:
    """Row counts that config.json lists by layer."""
    config = read_config(source.directory)
    layers, counts = config.get("engram_layer_ids"), config.get("engram_num_embeddings")
    if not (isinstance(layers, list) and isinstance(counts, list) and len(layers) == len(counts)):
        return {}
    return dict(zip(layers, counts, strict=True))


def _hash(facts: dict[str, Any]) -> str:
    from engram_lm.storage.format import identity_hash

    return identity_hash(facts).hex()[:16]


def _files(report: Report, key: Key, layout: Layout) -> None:
    n_bytes = layout.n_rows * layout.record_bytes
    text = (
        f"{layout.n_rows:,} rows of {layout.width} numbers, {layout.codec}, {layout.record_bytes} B a row, "
        f"{size_told(n_bytes)} in {len(files_of(layout))} file(s)"
    )
    report.add(key, "table", "ok", text)
    for segment in layout.segments:
        hole = _unwritten(segment.path, segment.offset, segment.end)
        if hole is not None:
            text = f"{segment.path.name} was never written at bytes {hole[0]:,} to {hole[1]:,}: a download cut short?"
            report.add(key, "holes", "note", text)
            return


def _unwritten(path: Path, start: int, end: int) -> tuple[int, int] | None:
    """The first range between `start` and `end` that the file system holds no data for."""
    with open(path, "rb") as file:
        try:
            hole = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            if hole >= end:
                return None
            try:
                return hole, min(end, os.lseek(file.fileno(), hole, os.SEEK_DATA))
            except OSError:  # no data from here to the end
                return hole, end
        except (OSError, AttributeError):  # file systems that do not say
            return None


def _rows(report: Report, key: int, layout: Layout, scheme: AddressScheme) -> None:
    wanted = scheme.padded_rows
    first, last = int(scheme.moduli[0]), int(scheme.moduli[-1])
    sums = f"{len(scheme.moduli)} moduli, {first:,} to {last:,}, sum to {scheme.rows:,}"
    if wanted != scheme.rows:
        sums += f", padded to {wanted:,}"
    if layout.n_rows == wanted:
        report.add(key, "rows", "ok", sums)
    else:
        others = [n for n, s in report.expected.schemes.items() if s.padded_rows == layout.n_rows]
        swapped = f" That is layer {others[0]}'s: are the layers swapped?" if others else ""
        report.add(key, "rows", "wrong", f"{sums}; the table has {layout.n_rows:,}.{swapped}")
    width = scheme.profile.head_width
    if layout.width != width:
        report.add(
            key,
            "width",
            "wrong",
            f"{layout.width} numbers a row; wanted {width}, by {report.expected.source}",
        )


def _constants(report: Report, source: Source, key: int, layout: Layout, scheme: AddressScheme) -> None:
    """Multipliers, moduli and offsets that a checkpoint keeps beside its rows."""
    names = names_of(layout)
    if source.packed or names is None or not names.codes.endswith("ngram_embedding.weight"):
        return
    base = names.codes.removesuffix("ngram_embedding.weight")
    wanted = {base + name: attribute for name, attribute in _CONSTANTS.items()}
    found = checkpoint_tensors(source.path, wanted=wanted.__contains__)
    for name, tensor in found.items():
        kept, here = _integers(tensor), getattr(scheme, wanted[name]).tolist()
        if kept != here:
            report.add(
                key, wanted[name], "wrong", f"the checkpoint has {kept[:4]}…, config.json gives {here[:4]}…"
            )
    if found and not any(f.layer == key and f.check in wanted.values() for f in report.findings):
        kinds = ", ".join(wanted[name] for name in found)
        report.add(key, "constants", "ok", f"{kinds} in the checkpoint are those of config.json")


def _integers(tensor: Tensor) -> list[int]:
    if tensor.dtype != "I64" or tensor.n_bytes > 2**16:
        return []
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.n_bytes), "<i8").tolist()


def _padding(report: Report, key: int, layout: Layout, scheme: AddressScheme) -> None:
    if layout.n_rows != scheme.padded_rows or scheme.rows == scheme.padded_rows:
        return
    padding = np.arange(scheme.rows, scheme.padded_rows)
    stats = measure(layout, chosen(layout, padding))
    filled = len(padding) - stats.zero_rows
    text = f"{len(padding)} rows behind the last address"
    if filled:
        report.add(key, "padding", "note", f"{text}, {filled} of them not zero: no address reaches them")
    else:
        report.add(key, "padding", "ok", f"{text}, all zero")


def _numbers(report: Report, key: Key, layout: Layout, stats: Stats) -> None:
    share = (
        f"of {stats.rows_read:,} rows read" if stats.rows_read < stats.n_rows else f"of {stats.n_rows:,} rows"
    )
    if layout.codec == "fp8_e4m3":
        report.add(key, "scales", "ok", f"one scale, {layout.scale:.6g}")
    elif stats.nan_scales:
        report.add(key, "scales", "wrong", f"{stats.nan_scales:,} are NaN")
    elif stats.scale_counts:
        low, high = min(stats.scale_counts), max(stats.scale_counts)
        report.add(key, "scales", "ok", f"2^{low} to 2^{high}, no NaN")
    if stats.broken_rows:
        rows = ", ".join(map(str, stats.first_broken_rows))
        report.add(
            key, "numbers", "wrong", f"{stats.broken_rows:,} {share} hold NaN or infinity, the first: {rows}"
        )
    if stats.zero_rows == stats.rows_read:
        report.add(key, "holes", "wrong", f"all {share} are zero")
    elif stats.zero_rows:
        run = stats.longest_zero_run
        longest = f"; the longest run is {run[1]:,} rows from {run[0]:,}" if run else ""
        report.add(key, "holes", "note", f"{stats.zero_rows:,} {share} are zero{longest}")
    else:
        report.add(key, "holes", "ok", f"none {share} is zero")
    if stats.median_norm is not None:
        text = f"{stats.min_norm:.4g} to {stats.max_norm:.4g}, median {stats.median_norm:.4g}"
        far = stats.max_norm > 1e4 * stats.median_norm
        report.add(key, "norms", "note" if far else "ok", f"{text} ({share})")


def _releases(report: Report, source: Source, other: Source, sample: int | None, reporter: Reporter) -> None:
    facts = expect(other.directory, other.tables)
    for layer in report.expected.identities.keys() & facts.identities.keys():
        a, b = report.expected.identities[layer], facts.identities[layer]
        keys = ", ".join(sorted(k for k in a if a[k] != b.get(k)))
        if keys:
            report.add(
                layer, "releases", "note", f"identities differ in {keys}: the same row means something else"
            )
    for key in list(source.tables) + [key for key in other.tables if key not in source.tables]:
        if key not in source.tables or key not in other.tables:
            where = source.path if key in source.tables else other.path
            report.add(key, "releases", "note", f"only in {where}")
            continue
        try:
            found = compare(
                source.tables[key], other.tables[key], sample=sample, report=reporter(key, "comparing")
            )
        except ConfigError as error:
            report.add(key, "releases", "note", str(error))
            continue
        report.differences[key] = found
        same = "the same rows" if not found.rows_differing else f"{found.rows_differing:,} rows differ"
        text = f"{same} of {found.rows_compared:,} compared"
        if found.rows_differing and found.largest_row is not None:
            text += f", by at most {found.largest:.4g} (row {found.largest_row:,})"
        report.add(key, "releases", "note" if found.rows_differing else "ok", text)
