"""Loops that people train with, each written for any model: what `dense_twin.judge` runs on a model and its twin.

    verdict = judge(WAYS["skipped steps: two one after the other"].run)

A way takes a Trainee and trains its model for a few steps. `wanted` is its verdict, as docs/training.md has it. They are
written in files by kind, `ways_of_*.py`; `training_ways` has them all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dense_twin import Trainee

Loop = Callable[[Trainee], Any]


@dataclasses.dataclass(frozen=True)
class Way:
    name: str
    run: Loop
    wanted: str
    group: str


WAYS: dict[str, Way] = {}
REFUSED = "refused: RowUpdateError"


def way(group: str, name: str, wanted: str = "exact") -> Callable[[Loop], Loop]:
    def register(run: Loop) -> Loop:
        assert f"{group}: {name}" not in WAYS
        WAYS[f"{group}: {name}"] = Way(name, run, wanted, group)
        return run

    return register


def steps(
    trainee: Trainee, optimizer: torch.optim.Optimizer, n: int = 1, first: int = 0, **options: Any
) -> None:
    for i in range(n):
        optimizer.zero_grad()
        trainee.loss(first + i, **options).backward()
        optimizer.step()


def by_hand(
    name: str,
    change: Callable[[nn.Parameter], Any],
    wanted: str = "exact",
    *,
    group: str = "gradients by hand",
) -> None:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        for i in range(3):
            optimizer.zero_grad()
            trainee.loss(2 * i).backward()
            with torch.no_grad():
                for parameter in trainee.parameters():
                    change(parameter)
            trainee.loss(2 * i + 1).backward()
            optimizer.step()

    way(group, name, wanted)(run)


def set_to(value: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Parameter], None]:
    def change(parameter: nn.Parameter) -> None:
        parameter.grad = value(parameter.grad)

    return change
