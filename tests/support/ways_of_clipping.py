"""Ways of accumulating and clipping gradients, and of changing them by hand."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from dense_twin import Trainee
from training_loops import (
    CLIPS,
    INF,
    NAN,
    Cell,
    one,
)
from ways import REFUSED, Loop, by_hand, set_to, steps, way

for _n in (1, 2, 3):
    for _clip in CLIPS:
        way("accumulation and clipping", f"{_n} backward a step, clipping {_clip}")(
            Cell(one(torch.optim.SGD), accumulate=_n, clip=CLIPS[_clip])
        )


def _clipped(group: str, name: str, clip: Callable[[Trainee], Any], wanted: str = "exact") -> None:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        for i in range(3):
            optimizer.zero_grad()
            for j in range(2):
                trainee.loss(2 * i + j).backward()
            seen = clip(trainee)
            if isinstance(seen, Tensor):
                trainee.told.append(float(seen))
            optimizer.step()

    way(group, name, wanted)(run)


def _clip_each(trainee: Trainee) -> None:
    for parameter in trainee.parameters():
        clip_grad_norm_([parameter], 0.05)


def _clip_by_hand(trainee: Trainee) -> Tensor:
    gradients = [parameter.grad for parameter in trainee.parameters() if parameter.grad is not None]
    total = sum(gradient.pow(2).sum() for gradient in gradients).sqrt()
    for gradient in gradients:
        gradient.mul_(0.5 / total)
    return total


_A = "accumulation and clipping"
_clipped(_A, "norm of order 1", lambda t: clip_grad_norm_(t.parameters(), 20.0, norm_type=1))
_clipped(_A, "norm of order 3", lambda t: clip_grad_norm_(t.parameters(), 0.2, norm_type=3))
_clipped(_A, "largest number (order inf)", lambda t: clip_grad_norm_(t.parameters(), 0.05, norm_type=INF))
_clipped(
    _A, "largest number, foreach=False", lambda t: clip_grad_norm_(t.parameters(), 0.05, INF, foreach=False)
)
_clipped(_A, "norm of order -1", lambda t: clip_grad_norm_(t.parameters(), 0.05, norm_type=-1), REFUSED)
_clipped(_A, "foreach=False", lambda t: clip_grad_norm_(t.parameters(), 0.5, foreach=False))
_clipped(_A, "every parameter by itself", _clip_each)
_clipped(_A, "all but the rows", lambda t: clip_grad_norm_(t.rest(), 0.5))
_clipped(_A, "the rows alone", lambda t: clip_grad_norm_(t.rows(), 0.5))
_clipped(_A, "by hand, over squares", _clip_by_hand)
_clipped(_A, "twice", lambda t: (clip_grad_norm_(t.parameters(), 0.7), clip_grad_norm_(t.parameters(), 0.3)))
_clipped(_A, "clip_grad_value_", lambda t: clip_grad_value_(t.parameters(), 1e-3), REFUSED)
_clipped(
    _A,
    "clip_grad_value_, foreach=False",
    lambda t: clip_grad_value_(t.parameters(), 1e-3, foreach=False),
    REFUSED,
)
_clipped(
    _A, "p.grad.data.clamp_", lambda t: [p.grad.data.clamp_(-1e-3, 1e-3) for p in t.parameters()], REFUSED
)
_clipped(_A, "clip_grad_value_ of all but the rows", lambda t: clip_grad_value_(t.rest(), 1e-3))


@way(_A, "between two backward passes")
def clipped_between(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        trainee.loss(2 * i).backward()
        clip_grad_norm_(trainee.parameters(), 0.3)
        trainee.loss(2 * i + 1).backward()
        optimizer.step()


@way(_A, "a norm that is not finite raises (error_if_nonfinite)", "both raise RuntimeError")
def clipped_error(trainee: Trainee) -> None:
    (trainee.loss(0) * NAN).backward()
    clip_grad_norm_(trainee.parameters(), 0.5, error_if_nonfinite=True)


@way(_A, "in a pre-hook of the optimizer")
def clipped_in_a_hook(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    optimizer.register_step_pre_hook(
        lambda *_: trainee.told.append(float(clip_grad_norm_(trainee.parameters(), 0.3)))
    )
    steps(trainee, optimizer, 3)


@way(_A, "a schedule, and groups with rates of their own")
def scheduled(trainee: Trainee) -> None:
    groups = [{"params": trainee.rest(), "lr": 0.1}, {"params": trainee.rows(), "lr": 0.4}]
    optimizer = trainee.optimizer(parameters=groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for i in range(4):
        steps(trainee, optimizer, first=i)
        schedule.step()


@way(_A, "ascent (maximize)")
def ascended(trainee: Trainee) -> None:
    steps(trainee, trainee.optimizer(maximize=True), 3)


def _keep_and_return(keep: Callable[[Tensor], Any]) -> Loop:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        for i in range(3):
            optimizer.zero_grad()
            trainee.loss(3 * i).backward()
            kept = [keep(parameter.grad) for parameter in trainee.parameters()]
            optimizer.zero_grad()
            trainee.loss(3 * i + 1).backward()
            clip_grad_norm_(trainee.parameters(), 0.1)
            for parameter, gradient in zip(trainee.parameters(), kept, strict=True):
                parameter.grad = gradient
            trainee.loss(3 * i + 2).backward()
            optimizer.step()

    return run


by_hand("multiplied in place", lambda p: p.grad.mul_(0.3))
by_hand("multiplied by a tensor", lambda p: p.grad.mul_(torch.tensor(0.3)))
by_hand("p.grad *= 0.3", lambda p: p.grad.__imul__(0.3))
by_hand("divided in place", lambda p: p.grad.div_(3))
by_hand("p.grad.data divided", lambda p: p.grad.data.div_(3))
by_hand("p.grad.detach() multiplied, then divided", lambda p: p.grad.detach().mul_(0.3).div_(0.7))
by_hand("reversed", lambda p: p.grad.neg_())
by_hand("by its own norm", lambda p: p.grad.div_(p.grad.norm() + 1e-6))
by_hand("p.grad = p.grad / 3", set_to(lambda g: g / 3))
by_hand("p.grad = 0.3 * p.grad", set_to(lambda g: 0.3 * g))
by_hand("p.grad = p.grad.clone()", set_to(lambda g: g.clone()))
by_hand("p.grad = copy.deepcopy(p.grad)", set_to(copy.deepcopy))
by_hand("noise added", lambda p: p.grad.add_(0.01), REFUSED)
by_hand("p.grad = p.grad + 0.01", set_to(lambda g: g + 0.01), REFUSED)
by_hand("another tensor put in its place", set_to(torch.ones_like), REFUSED)
by_hand("its signs alone", lambda p: p.grad.sign_(), REFUSED)
by_hand("written to through NumPy", lambda p: p.grad.numpy().__imul__(0.5), REFUSED)
by_hand("nan_to_num_ where all is finite", lambda p: p.grad.nan_to_num_())
by_hand("small numbers zeroed (torch.where)", set_to(lambda g: torch.where(g.abs() < 1, g, 0)), REFUSED)
way("gradients by hand", "put aside and put back")(_keep_and_return(lambda g: g))
way("gradients by hand", "a clone put aside and put back")(_keep_and_return(lambda g: g.clone()))


@way("gradients by hand", "copied back in place")
def copied_back(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    trainee.loss(0).backward()
    kept = [parameter.grad.clone() for parameter in trainee.parameters()]
    trainee.loss(1).backward()
    for parameter, gradient in zip(trainee.parameters(), kept, strict=True):
        parameter.grad.copy_(gradient)
    optimizer.step()


@way("gradients by hand", "the sum of two, by hand", REFUSED)
def summed(trainee: Trainee) -> None:
    optimizer, kept = trainee.optimizer(), []
    for i in range(2):
        optimizer.zero_grad()
        trainee.loss(i).backward()
        kept.append([parameter.grad.clone() for parameter in trainee.parameters()])
    for parameter, first, second in zip(trainee.parameters(), *kept, strict=True):
        parameter.grad = first + second
    optimizer.step()


@way("gradients by hand", "a scaled step by hand (p.data.add_)", REFUSED)
def stepped_by_hand(trainee: Trainee) -> None:
    for i in range(2):
        trainee.loss(i).backward()
        for parameter in trainee.parameters():
            parameter.data.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None


@way("gradients by hand", "a step by hand (p -= lr * p.grad)", REFUSED)
def stepped_in_place(trainee: Trainee) -> None:
    for i in range(2):
        trainee.loss(i).backward()
        with torch.no_grad():
            for parameter in trainee.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


@way("gradients by hand", "a step by hand into new data", REFUSED)
def stepped_into_data(trainee: Trainee) -> None:
    for i in range(2):
        trainee.loss(i).backward()
        for parameter in trainee.parameters():
            parameter.data = parameter.data - 0.1 * parameter.grad.data
            parameter.grad = None


@way("gradients by hand", "the handles set by hand", "refused: StateError")
def handles_written(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(2):
        steps(trainee, optimizer, first=i)
        for parameter in trainee.parameters():
            parameter.data = parameter.data * 0.99
