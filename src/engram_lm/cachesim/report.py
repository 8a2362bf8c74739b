"""What `engram-lm table simulate` prints: hit rates against cache sizes, as a table, as JSON, as a picture.

    engram-lm table simulate --tokens log.jsonl --profile qwen-ple --eos-ids 248046 --concurrency 1,8,64 --budget 1GB

Ids are what the profile hashes, or become so: a tokenizer makes ids of text, and canonical ids of its own ids.
"""

import json as json_module
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engram_lm.addressing import SHIPPED, AddressScheme, Profile, profile_named, resolve
from engram_lm.bases.tokenizer import load_tokenizer
from engram_lm.cachesim.requests import Requests, read_requests, require_stream
from engram_lm.cachesim.simulate import POLICIES, Cache, Simulation, simulate
from engram_lm.corpus.text import TxtDocuments
from engram_lm.errors import ConfigError, DataError, TokenIdError
from engram_lm.storage.codecs import codec_named
from engram_lm.vocab import TokenMap

# How the released models store their rows.
CODECS_SHIPPED = {"deepseek-v4.1": "fp8_e4m3_e8m0"}
OTHER_CODEC = "bf16"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# Sizes that are shown where none are asked for: from here by fours until everything fits.
_FIRST_BUDGET, _BUDGET_STEP = 10**6, 4


def simulate_command(
    *,
    tokens: Path,
    profile: str,
    budget: str | None = None,
    concurrency: str = "1",
    prefill: int | None = None,
    warm_up: float = 0.0,
    policy: str = "lru,lfu,tinylfu",
    entry: str = "row",
    codec: str | None = None,
    tokenizer: str | None = None,
    canonical: bool = False,
    dtype: str | None = None,
    separator: int | None = None,
    field: str | None = None,
    txt_documents: TxtDocuments | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    rows_per_head: int | None = None,
    vocab_size: int | None = None,
    fill_id: int | None = None,
    eos_ids: Sequence[int] = (),
    json: bool = False,
    plot: Path | None = None,
) -> str:
    """The text that the command prints; the picture is written to `plot`."""
    chosen = profile_named(profile)
    policies = _policies(policy, warm_up)
    slots = _numbers(concurrency)
    record = codec_named(codec or CODECS_SHIPPED.get(profile, OTHER_CODEC))
    bytes_per_row = record.record_bytes(chosen.head_width)
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot is {plot}; wanted a file that ends in .png.")
    require_stream(tokens)
    made = None if tokenizer is None else load_tokenizer(tokenizer)
    requests = read_requests(
        tokens,
        tokenizer=made,
        dtype=dtype,
        separator=separator,
        field=field,
        txt_documents=txt_documents,
        prefill=prefill,
        limit=limit,
    )
    requests, hashed = as_hashed(requests, chosen, tokenizer=made, canonical=canonical, vocab_size=vocab_size)
    if shuffle is not None:
        requests = requests.shuffled(shuffle)
    schemes = _schemes(chosen, hashed, layer, layers, rows_per_head, fill_id, eos_ids)
    _check_ids(requests, schemes[0])
    found = [
        simulate(
            requests,
            scheme,
            bytes_per_row=bytes_per_row,
            slots=number,
            budgets=_budgets(budget, requests, scheme, bytes_per_row),
            policies=policies,
            entry=entry,
            warm_up=warm_up,
        )
        for scheme in schemes
        for number in slots
    ]
    if plot is not None:
        from engram_lm.cachesim.plot import draw_curves

        draw_curves(found, plot, title=f"{requests.name}, {profile}: hit rate of a cache for one layer")
    facts = {
        "tokens_file": requests.name,
        "tokens": len(requests.ids_T),
        "requests": len(requests),
        "empty_requests": requests.empty,
        "profile": profile,
        "vocab_size": schemes[0].vocab_size,
        "rows_per_head": schemes[0].profile.rows_per_head,
        "codec": record.name,
        "bytes_per_row": bytes_per_row,
        "table_rows": [scheme.padded_rows for scheme in schemes],
        "entry": entry,
        "warm_up": warm_up,
        "prefill": prefill,
        "shuffle": shuffle,
    }
    if json:
        told = {**facts, "simulations": [as_dict(each) for each in found]}
        return json_module.dumps(told, separators=(",", ":"))
    return _text(facts, found, policies)


def as_hashed(
    requests: Requests,
    profile: Profile,
    *,
    tokenizer: Any = None,
    canonical: bool = False,
    vocab_size: int | None = None,
) -> tuple[Requests, int]:
    """Requests with the ids that the profile hashes, and how many such ids there are."""
    shipped = SHIPPED[profile.name]
    if profile.id_space == "raw" and canonical:
        raise ConfigError(
            f"Profile {profile.name!r} hashes raw ids, so --canonical has no effect. Leave it out."
        )
    if canonical and tokenizer is not None:
        raise ConfigError("--canonical says that the ids need no tokenizer. Leave one of the two out.")
    if profile.id_space == "raw" or canonical:
        return requests, shipped.vocab_size if vocab_size is None else vocab_size
    if tokenizer is None:
        raise ConfigError(
            f"Profile {profile.name!r} hashes canonical ids: name the --tokenizer whose ids these are, or pass "
            "canonical ids and say so with --canonical."
        )
    if vocab_size is not None:
        raise ConfigError("--vocab-size has no effect where a tokenizer's own map is hashed. Leave it out.")
    token_map = TokenMap.from_tokenizer(tokenizer)
    return replace(requests, ids_T=token_map.canonical_of(requests.ids_T)), token_map.size


def as_dict(found: Simulation) -> dict[str, Any]:
    """Plain data for JSON, without what was not run."""
    caches = {}
    for name, cache in found.caches.items():
        values = asdict(cache)
        values["limit"] = cache.limit
        values["curve"] = [_without_none(point) for point in values["curve"]]
        values["at"] = [{"budget": budget, **_without_none(point)} for budget, point in values["at"].items()]
        caches[name] = values
    return {**asdict(found), "merged": found.merged, "caches": caches}


def parse_bytes(text: str, *, table_bytes: int) -> int:
    """'64MB', '1.5GiB', '2000' or '0.1%' of the table, as bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else "?"
    if match and unit == "%":
        return int(float(match[1]) / 100 * table_bytes)
    if match and unit in _UNITS:
        return int(float(match[1]) * _UNITS[unit])
    raise ConfigError(f"--budget holds {text!r}; wanted sizes such as 64MB, 1GiB or 0.1% (of a table).")


def readable_bytes(n_bytes: int) -> str:
    """Three digits and a decimal unit."""
    for unit in ("TB", "GB", "MB", "KB"):
        if n_bytes >= _UNITS[unit]:
            return f"{n_bytes / _UNITS[unit]:.3g} {unit}"
    return f"{n_bytes} B"


def _budgets(budget: str | None, requests: Requests, scheme: AddressScheme, bytes_per_row: int) -> list[int]:
    table_bytes = scheme.padded_rows * bytes_per_row
    if budget is not None:
        return sorted({parse_bytes(part, table_bytes=table_bytes) for part in budget.split(",")})
    # Nothing is gained beyond a row for every lookup, nor beyond the table.
    largest = min(table_bytes, len(requests.ids_T) * scheme.columns * bytes_per_row)
    sizes = [_FIRST_BUDGET]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] * _BUDGET_STEP)
    return sizes


def _policies(policy: str, warm_up: float) -> tuple[str, ...]:
    asked = [part.strip() for part in policy.split(",")]
    unknown = [name for name in asked if name not in POLICIES]
    if unknown:
        raise ConfigError(f"There is no policy {unknown[0]!r}; there are {', '.join(POLICIES)}.")
    if "pinned" in asked and not warm_up:
        raise ConfigError("policy pinned holds what a warm-up read most, and there is none. Give --warm-up.")
    # Follow from the reads alone.
    free = ("lru", "static", "pinned") if warm_up else ("lru", "static")
    return tuple(name for name in POLICIES if name in (*asked, *free))


def _numbers(concurrency: str) -> list[int]:
    try:
        numbers = [int(part) for part in concurrency.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(
            f"--concurrency is {concurrency!r}; wanted numbers of requests from 1, as in 1,8,64."
        )
    return numbers


def _schemes(
    profile: Profile,
    vocab_size: int,
    layer: int | None,
    layers: Sequence[int] | None,
    rows_per_head: int | None,
    fill_id: int | None,
    eos_ids: Sequence[int],
) -> list[AddressScheme]:
    """Of every layer, or of the one that was asked for."""
    shipped = SHIPPED[profile.name]
    all_layers = tuple(shipped.layers if layers is None else layers)
    if layer is not None and layer not in all_layers:
        raise ConfigError(
            f"layer {layer} has no memory in profile {profile.name!r}: layers {', '.join(map(str, all_layers))} do."
        )
    schemes = resolve(
        profile,
        vocab_size=vocab_size,
        layers=all_layers,
        fill_id=shipped.pad_id if fill_id is None else fill_id,
        eos_ids=tuple(eos_ids) or shipped.eos_ids,
        rows_per_head=rows_per_head,
    )
    return [scheme for scheme in schemes if layer in (None, scheme.layer)]


def _check_ids(requests: Requests, scheme: AddressScheme) -> None:
    """Before minutes of work, and with the place in words of the file."""
    ids_T = requests.ids_T
    bad_T = (ids_T < -1) | (ids_T >= scheme.vocab_size)
    if bad_T.any():
        at = int(bad_T.argmax())
        request = int((requests.tokens_Q.cumsum() <= at).sum())
        raise TokenIdError(
            f"{requests.name}: id {int(ids_T[at])} in request {request} is outside the vocabulary of "
            f"{scheme.vocab_size} ids that profile {scheme.profile.name!r} hashes. Give --vocab-size, or the tokenizer."
        )
    if not (ids_T >= 0).any():
        raise DataError(f"{requests.name} holds dead tokens (-1) only")


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _text(facts: dict[str, Any], found: Sequence[Simulation], policies: Sequence[str]) -> str:
    empty = f" ({facts['empty_requests']} empty ones left out)" if facts["empty_requests"] else ""
    lines = [
        f"{facts['tokens_file']}: {facts['tokens']:,} tokens in {facts['requests']:,} requests{empty}",
        f"{facts['profile']}: {facts['table_rows'][0]:,} rows of {facts['bytes_per_row']} bytes ({facts['codec']}), "
        f"{readable_bytes(found[0].table_bytes)} a layer; {facts['vocab_size']:,} ids",
    ]
    if facts["warm_up"]:
        lines.append(f"the first {facts['warm_up']:.0%} of the tokens fill the caches and are not counted")
    for each in found:
        lines += ["", *_simulation(each, facts["entry"], policies)]
    return "\n".join(lines)


def _simulation(found: Simulation, entry: str, policies: Sequence[str]) -> list[str]:
    shared = found.caches["all"]
    orders = [name for name in found.caches if name != "all"]
    what = "rows" if entry == "row" else "n-grams"
    lines = []
    if found.left_out:
        lines.append(
            f"{found.left_out:,} tokens at the end are left out, where fewer than {found.slots} requests remain"
        )
    lines += [
        f"layer {found.layer}, {found.slots} at a time: {found.counted_steps:,} steps; {found.lookups:,} lookups "
        f"of {what}, {shared.reads:,} reads ({found.merged:.1%} of lookups merged within their step)",
        "one cache for all orders, hits in % of reads",
    ]
    rows = [["cache", "of table", *policies, *(f"{name} (lru)" for name in orders), "steps without miss"]]
    for budget, point in shared.at.items():
        values = [getattr(point, name) for name in policies]
        by_order = [(point.lru_by_order or {})[name] for name in orders]
        cells = [_percent(value) for value in [*values, *by_order, point.whole_steps]]
        rows.append([readable_bytes(budget), f"{budget / found.table_bytes:.4%}", *cells])
    lines += _aligned(rows)
    lines.append("LRU cache needed for a hit rate; each order alone in its own cache")
    targets = list(shared.needed)
    rows = [["", *(f"{target:.0%}" for target in targets), "limit", "holds everything"]]
    for name, cache in found.caches.items():
        needed = [_needed(cache, target) for target in targets]
        rows.append(
            [name, *needed, _percent(cache.limit), readable_bytes(cache.entries * cache.bytes_per_entry)]
        )
    return [*lines, *_aligned(rows)]


def _needed(cache: Cache, target: float) -> str:
    n_bytes = cache.needed[target]
    return "-" if n_bytes is None else readable_bytes(n_bytes)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
