"""What the processes that share a table say to each other, over torch.distributed and CPU tensors.

    ranks = Ranks(group, name="facts")
    n_received = ranks.meet(Doing.READ, problem=error_or_none, n_sent=[3, 0, 5])    # raises on all ranks, or on none
    rows, work = ranks.swap(rows_to_send, n_sent, n_received)

A collective call waits for every rank, so a rank that raises alone leaves the others waiting. Hence the meeting: one
all-gather of a few numbers before anything moves, after which all ranks go on or all ranks raise.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from engram_lm.errors import (
    AddressError,
    CheckpointError,
    ConfigError,
    EngramError,
    RowUpdateError,
    StateError,
)


class Doing(IntEnum):
    """What a rank is about to do."""

    READ = 0
    BACKWARD = 1
    RESTORE = 2


_WORDS = {Doing.READ: "reads", Doing.BACKWARD: "runs backward", Doing.RESTORE: "restores"}
# What the others raise where one rank cannot.
_ERRORS: dict[Doing, type[EngramError]] = {
    Doing.READ: AddressError,
    Doing.BACKWARD: RowUpdateError,
    Doing.RESTORE: CheckpointError,
}


class Ranks:
    """The processes of one group. `rank` is this one's number, `n` how many there are.

    Args:
        group: a process group with a backend for the CPU (gloo); None for the world.
        name: how errors call what they share.
    """

    def __init__(self, group: Any, *, name: str) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                f"{name} is to be split over ranks, and there is no process group: call "
                "torch.distributed.init_process_group first, or use DeviceTable."
            )
        backends = dist.get_backend_config(group)
        if "cpu:" not in backends:
            raise ConfigError(
                f"{name} lies in host memory, and the process group has no backend for the CPU (it has {backends}). Give "
                'group=torch.distributed.new_group(backend="gloo").'
            )
        self.group, self.name = group, name
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)

    def meet(
        self, doing: Doing, *, to_go: int = 0, problem: EngramError | None = None, n_sent: Sequence[int] = ()
    ) -> list[int]:
        """Tell every rank what this one does, whether it can, and how much it sends each. Returns what each sends here.

        problem: raised here, and named on the others. StateError where ranks differ in `doing` or `to_go` (reads of a
        backward that are still to be exchanged).
        """
        counts = list(n_sent) or [0] * self.n
        said = self._gathered(torch.tensor([doing, to_go, problem is not None, *counts]))
        if problem is not None:
            raise problem
        first, *_ = said = [tensor.tolist() for tensor in said]
        for rank, theirs in enumerate(said):
            if theirs[2]:
                raise _ERRORS[Doing(theirs[0])](
                    f"Rank {rank} could not go on with {self.name} (its own error says why); nothing moved on any rank."
                )
        for rank, theirs in enumerate(said):
            if theirs[:2] != first[:2]:
                raise StateError(
                    f"Ranks differ in what they do with {self.name}: rank 0 {_words(first)}, rank {rank} {_words(theirs)}. "
                    "Every rank makes the same calls, with no addresses where it wants nothing."
                )
        return [theirs[3 + self.rank] for theirs in said]

    def agree(self, given: str, *, problem: EngramError | None = None) -> None:
        """Raise ConfigError on every rank unless all were given the same and none has a problem."""
        everyone: list[Any] = [None] * self.n
        dist.all_gather_object(everyone, (str(problem or ""), given), group=self.group)
        if problem is not None:
            raise problem
        for rank, (trouble, theirs) in enumerate(everyone):
            if trouble:
                raise ConfigError(f"Rank {rank} cannot hold its part of {self.name}: {trouble}")
            if theirs != everyone[0][1]:
                raise ConfigError(
                    f"Rank {rank} was given another {self.name} than rank 0: {theirs} and not {everyone[0][1]}."
                )

    def swap(
        self, tensor: Tensor, n_sent: list[int], n_received: list[int], *, wait: bool = True
    ) -> tuple[Tensor, Any]:
        """Send each rank its run of the first dimension. Returns what came, in rank order, and the work to wait for."""
        sent = tensor.contiguous()
        received = torch.empty((sum(n_received), *sent.shape[1:]), dtype=sent.dtype)
        work = dist.all_to_all_single(received, sent, n_received, n_sent, group=self.group, async_op=not wait)
        return received, work

    def sum_in_order(self, value: Tensor) -> Tensor:
        """The sum over ranks, added in rank order: the same bits on each, which an all-reduce does not promise."""
        total = torch.zeros_like(value)
        for part in self._gathered(value):
            total += part
        return total

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.n)]
        dist.all_gather(everyone, tensor, group=self.group)
        return everyone


def _words(said: list[int]) -> str:
    doing, to_go = Doing(said[0]), said[1]
    return f"{_WORDS[doing]} over {to_go} reads" if doing is Doing.BACKWARD else _WORDS[doing]
