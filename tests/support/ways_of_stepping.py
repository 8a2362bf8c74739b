"""Ways of stepping: several optimizers on one model, and closures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from dense_twin import Trainee
from training_loops import NAN, SMALL, Cell, muon_and_adamw, rest_and_rows
from ways import REFUSED, Loop, steps, way


def _in_turn(make: Callable[[Trainee], list], *, both_zero: bool, factor: float = 1.0) -> Loop:
    def run(trainee: Trainee) -> None:
        optimizers = make(trainee)
        for i in range(6):
            optimizer = optimizers[i % 2]
            loss = trainee.loss(i) * (factor if i == 2 else 1)
            for each in optimizers if both_zero else [optimizer]:
                each.zero_grad()
            loss.backward()
            norm = clip_grad_norm_(trainee.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()

    return run


def both_all(trainee: Trainee) -> list:
    return [trainee.optimizer(), trainee.optimizer(torch.optim.AdamW, **SMALL)]


_O = "several optimizers"
for _both in (True, False):
    _words = "both zeroed" if _both else "each zeroed at its own turn"
    way(_O, f"in turn, each with all parameters, {_words}")(_in_turn(both_all, both_zero=_both))
    way(_O, f"in turn, one with the rows, {_words}")(_in_turn(rest_and_rows, both_zero=_both))
    way(_O, f"in turn, one with the rows first, {_words}")(
        _in_turn(lambda t: rest_and_rows(t)[::-1], both_zero=_both)
    )
way(_O, "in turn, a NaN skipped")(_in_turn(rest_and_rows, both_zero=True, factor=NAN))


@way(_O, "on one gradient, each with its parameters")
def on_one_gradient(trainee: Trainee) -> None:
    Cell(rest_and_rows, accumulate=2, clip=0.5)(trainee)


@way(_O, "on one gradient, each with all parameters")
def both_on_one_gradient(trainee: Trainee) -> None:
    optimizers = both_all(trainee)
    for i in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        trainee.loss(i).backward()
        for optimizer in optimizers:
            optimizer.step()


@way(_O, "the rows' every third step, on what gathered since")
def every_third(trainee: Trainee) -> None:
    rest, rows = rest_and_rows(trainee)
    for i in range(6):
        rest.zero_grad()
        trainee.loss(i).backward()
        rest.step()
        if i % 3 == 2:
            rows.step()
            rows.zero_grad()


@way(_O, "the rows' dropped five times of six")
def mostly_dropped(trainee: Trainee) -> None:
    rest, rows = rest_and_rows(trainee)
    for i in range(6):
        loss = trainee.loss(i)
        rest.zero_grad()
        rows.zero_grad()
        loss.backward()
        rest.step()
    rows.step()


@way(_O, "none with the rows", REFUSED)
def none_with_the_rows(trainee: Trainee) -> None:
    steps(trainee, trainee.optimizer(parameters=trainee.rest()), 2)


@way(_O, "one for every parameter, in its backward")
def in_backward(trainee: Trainee) -> None:
    optimizers = {p: trainee.optimizer(parameters=[p]) for p in trainee.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in trainee.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for i in range(3):
        trainee.loss(i).backward()


@way(_O, "AdamW for matrices, Muon for none of the rows")
def muon(trainee: Trainee) -> None:
    Cell(muon_and_adamw, accumulate=2, clip=0.5)(trainee)


def _with_closure(call: Callable[[torch.optim.Optimizer, Callable], Any]) -> Loop:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        for i in range(3):

            def closure(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = trainee.loss(i)
                loss.backward()
                return loss

            call(optimizer, closure)

    return run


way("closures", "step(closure)")(_with_closure(lambda o, c: o.step(c)))
way("closures", "step(closure=closure)")(_with_closure(lambda o, c: o.step(closure=c)))


@way("closures", "LBFGS", REFUSED)
def lbfgs(trainee: Trainee) -> None:
    optimizer = torch.optim.LBFGS(trainee.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = trainee.loss(0)
        loss.backward()
        return loss

    optimizer.step(closure)


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimisation: the gradient is taken a little way uphill."""

    @torch.no_grad()
    def step(self, closure: Callable) -> None:
        closure = torch.enable_grad()(closure)
        closure()
        shifts = [
            (p, 0.05 * p.grad / p.grad.norm())
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        for parameter, shift in shifts:
            parameter.add_(shift)
        closure()
        for parameter, shift in shifts:
            parameter.sub_(shift)
        super().step()


@way("closures", "sharpness-aware minimisation", REFUSED)
def sharpness(trainee: Trainee) -> None:
    optimizer = Sharpness(trainee.parameters(), lr=0.05)

    def closure() -> None:
        optimizer.zero_grad()
        trainee.loss(0).backward()

    optimizer.step(closure)
