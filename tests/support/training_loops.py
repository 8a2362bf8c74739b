"""The loop that most training has, with its options; the optimizers; and the grid of both that the judge walks.

judge(Cell(OPTIMIZERS["AdamW"], accumulate=2, clip=0.5, scaled=True, bad=SKIPS["NaN at first"]))
judge(grid()[0].run)
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from dense_twin import Trainee


@dataclasses.dataclass(frozen=True)
class Cell:
    """One loop of the grid. optimizers(trainee) makes one or several; clip: None or the largest norm."""

    optimizers: Callable[[Trainee], list[torch.optim.Optimizer]]
    accumulate: int = 1
    clip: float | None = None
    scaled: bool = False
    # (step, backward): what the loss is multiplied by
    bad: tuple[tuple[int, int, float], ...] = ()
    rest_alone: bool = False

    def __call__(self, trainee: Trainee, steps: int = 4) -> None:
        optimizers = self.optimizers(trainee)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2, enabled=self.scaled)
        for step in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            for micro in range(self.accumulate):
                loss = trainee.loss(step * self.accumulate + micro) / self.accumulate
                scaler.scale(loss * self._factor(step, micro)).backward()
            if self.rest_alone and self._factor(step, -1) != 1:
                trainee.rest()[0].grad.mul_(self._factor(step, -1))
            norm = torch.tensor(0.0)
            if self.scaled and self.clip is not None:
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
            if self.clip is not None:
                norm = clip_grad_norm_(trainee.parameters(), self.clip)
            elif not self.scaled:
                norm = nn.utils.get_total_norm([p.grad for p in trainee.parameters() if p.grad is not None])
            trainee.told += [float(norm), scaler.get_scale()]
            if self.scaled or bool(torch.isfinite(norm)):
                for optimizer in optimizers:
                    scaler.step(optimizer)
            if self.scaled:
                scaler.update()

    def _factor(self, step: int, micro: int) -> float:
        return math.prod(bad for at, when, bad in self.bad if (at, when) == (step, micro))


def one(kind: Callable, **options: Any) -> Callable[[Trainee], list]:
    return lambda trainee: [trainee.optimizer(kind, **options)]


def muon_and_adamw(trainee: Trainee) -> list:
    """Muon takes matrices alone; vectors and rows go with AdamW."""
    matrices = [parameter for parameter in trainee.rest() if parameter.dim() == 2]
    taken = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in trainee.parameters() if id(parameter) not in taken]
    return [
        trainee.optimizer(torch.optim.Muon, matrices, lr=0.01),
        trainee.optimizer(torch.optim.AdamW, others, lr=0.01, eps=1e-3),
    ]


def rest_and_rows(trainee: Trainee) -> list:
    return [
        trainee.optimizer(torch.optim.AdamW, trainee.rest(), lr=0.01, eps=1e-3),
        trainee.optimizer(torch.optim.SGD, trainee.rows()),
    ]


# eps keeps numbers whose gradient is rounding alone from moving as far as the others.
SMALL = {"lr": 0.01, "eps": 1e-3}
OPTIMIZERS: dict[str, Callable[[Trainee], list]] = {
    "SGD": one(torch.optim.SGD),
    "SGD, momentum and weight decay": one(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, fused": one(torch.optim.SGD, fused=True),
    "SGD, foreach": one(torch.optim.SGD, foreach=True),
    "Adam": one(torch.optim.Adam, **SMALL),
    "AdamW": one(torch.optim.AdamW, weight_decay=0.1, **SMALL),
    "AdamW, fused": one(torch.optim.AdamW, fused=True, **SMALL),
    "AdamW, amsgrad, foreach": one(torch.optim.AdamW, amsgrad=True, foreach=True, **SMALL),
    "NAdam": one(torch.optim.NAdam, **SMALL),
    "RAdam": one(torch.optim.RAdam, **SMALL),
    "Adamax": one(torch.optim.Adamax, **SMALL),
    "RMSprop": one(torch.optim.RMSprop, momentum=0.5, **SMALL),
    "Adagrad": one(torch.optim.Adagrad, **SMALL),
    "Adadelta": one(torch.optim.Adadelta, lr=1.0, eps=1e-3),
    "Adafactor": one(torch.optim.Adafactor, lr=0.01),
    "ASGD": one(torch.optim.ASGD),
    "Muon and AdamW": muon_and_adamw,
    "AdamW for the model, SGD for the rows": rest_and_rows,
}
RULES = ("sgd", "row-rmsprop", "row-adam", "row-adam-momentum", "row-momentum-sinkhorn")
NAN, INF = float("nan"), float("inf")
SKIPS: dict[str, tuple[tuple[int, int, float], ...]] = {
    "none": (),
    "NaN at first": ((0, 0, NAN),),
    "inf in the middle, twice": ((1, 0, INF), (2, 0, INF)),
}
CLIPS = {"none": None, "active": 0.5, "inactive": 1e6}


# ---- the grid --------------------------------------------------------------------------------------------------------

# With these every combination is run; with the others a dozen.
WHOLE = (
    "SGD",
    "SGD, momentum and weight decay",
    "AdamW",
    "AdamW for the model, SGD for the rows",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One loop of the grid by its options' names."""

    optimizer: str
    rule: str
    accumulate: int
    clip: str
    scaled: bool
    skip: str

    def run(self, trainee: Trainee) -> None:
        Cell(
            OPTIMIZERS[self.optimizer], accumulate=self.accumulate, clip=CLIPS[self.clip], scaled=self.scaled,
            bad=SKIPS[self.skip],
        )(trainee)  # fmt: skip


def grid() -> list[Point]:
    options = [list(OPTIMIZERS), RULES, (1, 2, 3), CLIPS, (False, True), SKIPS]
    return [point for chosen in itertools.product(*options) if _is_run(point := Point(*chosen))]


def _is_run(point: Point) -> bool:
    if point.rule != "sgd":
        return point.optimizer in ("SGD", "AdamW") and point.accumulate == 2 and point.clip == "active"
    return point.optimizer in WHOLE or (point.accumulate == 2 and point.clip != "inactive")
