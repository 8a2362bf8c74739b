"""Which rows of a split table a rank holds, and checkpoints of such parts: put back as they were, or cut anew.

part = Part(name="facts", boundaries=(0, 7, 50), rank=1)            # rows 7 to 50
tensors = shard.checkpoint() | part.to_tensors()
tensors = part.own(tensors)                                         # CheckpointError for any other part
tensors = part.cut_out([of_rank_0, of_rank_1, of_rank_2])           # the same rows from another split
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError

# State that belongs to the table as a whole and not to its rows.
_WHOLE = "state.rounding"


def even_boundaries(n_rows: int, n_ranks: int) -> list[int]:
    """Where each rank's rows begin, and n_rows: runs of equal length, the first `n_rows % n_ranks` one longer."""
    each, left = divmod(n_rows, n_ranks)
    return [rank * each + min(rank, left) for rank in range(n_ranks + 1)]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows `boundaries[rank]` to `boundaries[rank + 1]` of the table `name`.

    identity: readable facts of the table's addresses, as JSON has them, or None.
    """

    name: str
    boundaries: tuple[int, ...]
    rank: int
    identity: dict | None = None

    def __post_init__(self) -> None:
        if self.boundaries[0] != 0 or any(end <= start for start, end in pairwise(self.boundaries)):
            raise ConfigError(
                f"boundaries of {self.name} are ascending addresses from 0, with rows for every rank; got "
                f"{list(self.boundaries)}."
            )

    @property
    def n_rows(self) -> int:
        return self.boundaries[-1]

    @property
    def first(self) -> int:
        return self.boundaries[self.rank]

    @property
    def last(self) -> int:
        return self.boundaries[self.rank + 1]

    def __str__(self) -> str:
        return f"rank {self.rank} of {len(self.boundaries) - 1} (rows {self.first} to {self.last} of {self.name})"

    def to_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint carries beside rows and state."""
        return {
            "shard.boundaries": torch.tensor(self.boundaries),
            "shard.rank": torch.tensor([self.rank]),
            "shard.identity": _as_bytes(self.identity),
        }

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows and state of a checkpoint of this very part."""
        other = self._part_of(tensors)
        if other != self:
            raise CheckpointError(
                f"The checkpoint is of {other}; this is {self}. Give every rank's checkpoint to restore_from."
            )
        return _without_place(tensors)

    def cut_out(self, pieces: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows and state of this part, from checkpoints of parts of another split. Those without its rows may be missing."""
        found: list[tuple[int, dict[str, Tensor]]] = []
        split = None
        for tensors in pieces:
            other = self._part_of(tensors)
            if split not in (None, other.boundaries):
                raise CheckpointError(f"The checkpoints are of several splits of {self.name}.")
            split = other.boundaries
            first, last = max(other.first, self.first), min(other.last, self.last)
            if first >= last:
                continue
            if len(tensors["rows"]) != other.last - other.first:
                raise CheckpointError(f"A checkpoint of {other} holds {len(tensors['rows'])} rows.")
            cut = slice(first - other.first, last - other.first)
            kept = _without_place(tensors)
            found.append((first, {k: v if k == _WHOLE else v[cut] for k, v in kept.items()}))
        found.sort(key=lambda entry: entry[0])
        at = self.first
        for first, tensors in found:
            if first != at:
                break
            at += len(tensors["rows"])
        if at != self.last:
            raise CheckpointError(f"The checkpoints hold row {at} of {self.name} not once; {self} needs it.")
        parts = [tensors for _, tensors in found]
        if any(set(tensors) != set(parts[0]) for tensors in parts):
            raise CheckpointError(f"The checkpoints of {self.name} hold state of different rules.")
        steps = {str(tensors[_WHOLE].tolist()) for tensors in parts if _WHOLE in tensors}
        if len(steps) > 1:
            raise CheckpointError(f"The checkpoints of {self.name} are of different steps.")
        return {
            name: tensor if name == _WHOLE else torch.cat([tensors[name] for tensors in parts])
            for name, tensor in parts[0].items()
        }

    def _part_of(self, tensors: dict[str, Tensor]) -> "Shard":
        """The part that a checkpoint is of, which must be of the same table."""
        if not {"shard.boundaries", "shard.rank", "shard.identity", "rows"} <= set(tensors):
            raise CheckpointError(
                f"{self.name} is split over ranks; the checkpoint does not say which part it holds."
            )
        boundaries, rank = tuple(tensors["shard.boundaries"].tolist()), int(tensors["shard.rank"])
        if boundaries[-1] != self.n_rows or not 0 <= rank < len(boundaries) - 1:
            raise CheckpointError(
                f"{self.name} has {self.n_rows} rows; the checkpoint is of rank {rank} of a table of {boundaries[-1]}."
            )
        if not torch.equal(tensors["shard.identity"], _as_bytes(self.identity)):
            raise CheckpointError(f"The checkpoint belongs to a table of another identity than {self.name}.")
        return Shard(name=self.name, boundaries=boundaries, rank=rank, identity=self.identity)


def _as_bytes(facts: dict | None) -> Tensor:
    """uint8 of canonical JSON."""
    return torch.tensor(list(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8)


def _without_place(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("shard.")}
