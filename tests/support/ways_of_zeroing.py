"""Ways of zeroing gradients, of skipping steps, and of doing both by a loss scaler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from dense_twin import Trainee
from engram_lm.errors import RowUpdateError
from training_loops import CLIPS, INF, NAN, SKIPS, Cell, one, rest_and_rows
from ways import REFUSED, Loop, by_hand, set_to, way


def _zero_each(change: Callable[[nn.Parameter], Any]) -> Callable[[Trainee, Any], None]:
    def zero(trainee: Trainee, optimizer: Any) -> None:
        with torch.no_grad():
            for parameter in trainee.parameters():
                if parameter.grad is not None:
                    change(parameter)

    return zero


ZEROING: dict[str, Callable[[Trainee, Any], None]] = {
    "optimizer.zero_grad()": lambda t, o: o.zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda t, o: o.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda t, o: t.model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda t, o: t.model.zero_grad(set_to_none=False),
    "p.grad = None": _zero_each(set_to(lambda g: None)),
    "p.grad = zeros": _zero_each(set_to(torch.zeros_like)),
    "p.grad.zero_()": _zero_each(lambda p: p.grad.zero_()),
    "p.grad.data.zero_()": _zero_each(lambda p: p.grad.data.zero_()),
    "p.grad.detach().fill_(0)": _zero_each(lambda p: p.grad.detach().fill_(0)),
    "p.grad[...] = 0": _zero_each(lambda p: p.grad.__setitem__(..., 0)),
    "p.grad.copy_(zeros)": _zero_each(lambda p: p.grad.copy_(torch.zeros_like(p))),
    "torch._foreach_zero_": lambda t, o: torch._foreach_zero_(
        [p.grad for p in t.parameters() if p.grad is not None]
    ),
}


def _zeroed(zero: Callable, factor: float) -> Loop:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        for i in range(3):
            (trainee.loss(2 * i) * factor).backward()
            zero(trainee, optimizer)
            if i == 1:
                optimizer.step()  # with nothing
            trainee.loss(2 * i + 1).backward()
            optimizer.step()
            zero(trainee, optimizer)

    return run


for _name, _zero in ZEROING.items():
    way("zeroing", f"{_name}")(_zeroed(_zero, 1.0))
    way("zeroing", f"{_name} of a NaN")(_zeroed(_zero, NAN))
way("zeroing", "multiplied by 0")(_zeroed(_zero_each(lambda p: p.grad.mul_(0)), 1.0))


@way("zeroing", "never, the gradient grows")
def never_zeroed(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(4):
        trainee.loss(i).backward()
        optimizer.step()


@way("zeroing", "in a post-hook of the optimizer")
def zeroed_in_a_hook(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad())
    for i in range(3):
        trainee.loss(i).backward()
        optimizer.step()


@way("zeroing", "two steps on one gradient")
def stepped_twice(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(2):
        optimizer.zero_grad()
        trainee.loss(i).backward()
        optimizer.step()
        optimizer.step()


def _in_one_buffer(trainee: Trainee) -> Tensor:
    """Gradients laid out one after the other; returns all of them as one tensor."""
    buffer = torch.zeros(sum(parameter.numel() for parameter in trainee.parameters()))
    at = 0
    for parameter in trainee.parameters():
        parameter.grad = buffer[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return buffer


@way("zeroing", "gradients in one buffer, which is zeroed")
def one_buffer(trainee: Trainee) -> None:
    optimizer, buffer = trainee.optimizer(), _in_one_buffer(trainee)
    for i in range(3):
        (trainee.loss(2 * i) * (NAN if i == 1 else 1)).backward()
        buffer.zero_()
        trainee.loss(2 * i + 1).backward()
        optimizer.step()
        buffer.zero_()


@way("zeroing", "gradients in one buffer, which is scaled", REFUSED)
def one_buffer_scaled(trainee: Trainee) -> None:
    optimizer, buffer = trainee.optimizer(), _in_one_buffer(trainee)
    trainee.loss(0).backward()
    buffer.mul_(0.5)
    optimizer.step()


@way("zeroing", "between forward and backward")
def zeroed_after_forward(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        loss = trainee.loss(i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


for _bad, _word in ((NAN, "NaN"), (INF, "inf")):
    for _micro, _place in ((0, "first"), (1, "second"), (2, "last")):
        way("skipped steps", f"{_word} in the {_place} of 3 backward passes")(
            Cell(one(torch.optim.SGD), accumulate=3, clip=0.5, bad=((1, _micro, _bad),))
        )
way("skipped steps", "two one after the other")(
    Cell(one(torch.optim.SGD), accumulate=2, clip=0.5, bad=((1, 0, NAN), (2, 1, INF)))
)
way("skipped steps", "the first and the last")(
    Cell(one(torch.optim.SGD), clip=0.5, bad=((0, 0, NAN), (3, 0, NAN)))
)
way("skipped steps", "for a NaN outside the rows")(
    Cell(one(torch.optim.SGD), clip=0.5, bad=((1, -1, NAN),), rest_alone=True)
)


@way("skipped steps", "not skipped: a step on NaN", REFUSED)
def not_skipped(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    (trainee.loss(0) * NAN).backward()
    optimizer.step()


@way("skipped steps", "not skipped: a step on a gradient clipped by a NaN norm", REFUSED)
def not_skipped_clipped(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    trainee.loss(0).backward()
    trainee.rest()[0].grad.fill_(NAN)
    clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()


@way("skipped steps", "a step that was refused for a NaN, then others")
def refused_then_on(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        (trainee.loss(i) * (NAN if i == 1 else 1)).backward()
        if i != 1:
            optimizer.step()
        elif not trainee.is_dense:  # whose rows would be NaN
            with pytest.raises(RowUpdateError, match="not finite"):
                optimizer.step()
        optimizer.zero_grad()


@way("skipped steps", "gradients with NaN dropped, parameter by parameter")
def dropped_by_parameter(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        trainee.loss(i).backward()
        if i == 1:
            (trainee.rows() + trainee.rest())[0].grad.mul_(NAN)
        for parameter in trainee.parameters():
            if not torch.isfinite(parameter.grad).all():
                parameter.grad = None
        optimizer.step()


by_hand(
    "numbers with NaN zeroed (nan_to_num_)",
    lambda p: (p.grad.mul_(NAN), p.grad.nan_to_num_()),
    REFUSED,
    group="skipped steps",
)
by_hand(
    "numbers with NaN zeroed (a mask)",
    lambda p: (p.grad.mul_(NAN), p.grad.__setitem__(p.grad.isnan(), 0)),
    REFUSED,
    group="skipped steps",
)
by_hand(
    "numbers with NaN zeroed (torch.where)",
    set_to(lambda g: torch.where(g.isnan(), 0, g * NAN)),
    REFUSED,
    group="skipped steps",
)


@way("skipped steps", "a backward that fails, and the next batch")
def failed_backward(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(4):
        optimizer.zero_grad()
        hidden = trainee.model.get_input_embeddings().weight
        hook = hidden.register_hook(_raise) if i == 1 else None
        try:
            trainee.loss(i).backward()
        except MemoryError:
            hook.remove()
            continue
        optimizer.step()


def _raise(gradient: Tensor) -> None:
    raise MemoryError


@way("skipped steps", "a failed backward, then the same batch again")
def failed_and_again(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    loss = trainee.loss(0)
    hook = trainee.model.get_input_embeddings().weight.register_hook(_raise)
    try:
        loss.backward(retain_graph=True)
    except MemoryError:
        hook.remove()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


for _skip, _bad in SKIPS.items():
    for _clip in ("none", "active"):
        for _n in (1, 2):
            way("GradScaler", f"{_n} backward a step, clipping {_clip}, skipped {_skip}")(
                Cell(one(torch.optim.SGD), accumulate=_n, clip=CLIPS[_clip], scaled=True, bad=_bad)
            )
way("GradScaler", "inf in the last of 3 backward passes")(
    Cell(one(torch.optim.SGD), accumulate=3, clip=0.5, scaled=True, bad=((1, 2, INF),))
)
way("GradScaler", "a fused optimizer, skipped once")(
    Cell(one(torch.optim.SGD, fused=True), accumulate=2, scaled=True, bad=((1, 1, INF),))
)
way("GradScaler", "inf outside the rows")(
    Cell(one(torch.optim.SGD), scaled=True, bad=((1, -1, INF),), rest_alone=True)
)
way("GradScaler", "two optimizers, of which one skips")(
    Cell(rest_and_rows, scaled=True, bad=((1, -1, INF),), rest_alone=True)
)


@way("GradScaler", "a scale that grows and falls")
def growing(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=4.0, growth_factor=3.0, backoff_factor=0.1, growth_interval=1
    )
    for i in range(6):
        optimizer.zero_grad()
        scaler.scale(trainee.loss(i) * (INF if i in (2, 3) else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        trainee.told.append(scaler.get_scale())


@way("GradScaler", "a scale beyond what squares in float32 hold")
def enormous(trainee: Trainee) -> None:
    optimizer, scaler = trainee.optimizer(), torch.amp.GradScaler("cpu", init_scale=2.0**90)
    for i in range(3):
        optimizer.zero_grad()
        scaler.scale(trainee.loss(i)).backward()
        scaler.step(optimizer)
        scaler.update()
        trainee.told.append(scaler.get_scale())
