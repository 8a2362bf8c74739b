"""What `engram-lm addresses` prints: the rows that a few token ids have, as JSON or as a table.

    engram-lm addresses --profile deepseek-v4.1 --layer 1 --canonical --ids 0,5,17,99,1234,-1,42,43 --json

Rows are those within each head, before offsets: the form in which published vectors are written.
"""

import json as json_module
from collections.abc import Sequence

from engram_lm.addressing.resolve import resolve
from engram_lm.addressing.shipped import SHIPPED, profile_named
from engram_lm.errors import ConfigError, TokenIdError


def addresses_command(
    *,
    profile: str,
    layer: int,
    ids: str | Sequence[int],
    canonical: bool = False,
    json: bool = False,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
    fill_id: int | None = None,
    layers: Sequence[int] | None = None,
    rows_per_head: int | None = None,
) -> str:
    """The text that the command prints. There is no tokenizer here: ids are taken as they are.

    vocab_size, fill_id and layers default to the released model's; `layer` is one of `layers`.
    """
    chosen, shipped = profile_named(profile), SHIPPED[profile]
    if canonical and chosen.id_space == "raw":
        raise ConfigError(f"Profile {profile!r} hashes raw ids, so --canonical has no effect. Leave it out.")
    if not canonical and chosen.id_space == "canonical":
        raise ConfigError(
            f"Profile {profile!r} hashes canonical ids and there is no tokenizer here to make them. "
            "Pass canonical ids and say so with --canonical."
        )
    layers = tuple(shipped.layers if layers is None else layers)
    if layer not in layers:
        raise ConfigError(
            f"layer {layer} has no memory in profile {profile!r}: layers {', '.join(map(str, layers))} do. "
            "Moduli depend on all memory layers, so name them with --layers where they differ."
        )
    schemes = resolve(
        chosen,
        vocab_size=shipped.vocab_size if vocab_size is None else vocab_size,
        layers=layers,
        fill_id=shipped.pad_id if fill_id is None else fill_id,
        eos_ids=tuple(eos_ids) or shipped.eos_ids,
        rows_per_head=rows_per_head,
    )
    scheme = schemes[layers.index(layer)]
    numbers = parse_ids(ids)
    rows_TC = (scheme.addresses(numbers) - scheme.offsets).tolist()
    if json:
        return json_module.dumps(rows_TC, separators=(",", ":"))
    return _table(numbers, rows_TC, scheme.profile.orders, scheme.profile.heads)


def parse_ids(ids: str | Sequence[int]) -> list[int]:
    """'0,5,-1' or a sequence of integers, as a list."""
    parts = ids.replace(",", " ").split() if isinstance(ids, str) else list(ids)
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise TokenIdError(
            f"ids are {ids!r}; wanted integers with commas between, as in 0,5,17. ({error})"
        ) from error


def _table(ids: list[int], rows_TC: list[list[int]], orders: Sequence[int], heads: int) -> str:
    names = ["id", *(f"{order}-gram/{head}" for order in orders for head in range(heads))]
    lines = [names, *([str(token), *map(str, rows)] for token, rows in zip(ids, rows_TC, strict=True))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
