"""Ways of copying a model, of saving it, and of running a backward."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dense_twin import Trainee, make_dense, slots, with_memory
from engram_lm.attachment import load_memory, save_memory
from training_loops import (
    NAN,
    Cell,
    one,
)
from ways import REFUSED, Loop, steps, way


def _copied(before: Callable[[Trainee, Any], Any]) -> Loop:
    def run(trainee: Trainee) -> None:
        optimizer = trainee.optimizer()
        steps(trainee, optimizer, 1)
        trainee.loss(1).backward()
        before(trainee, optimizer)
        model = copy.deepcopy(trainee.model)
        if trainee.is_dense:
            for slot in slots(model):  # deepcopy has made two Parameters of the one
                slot.rows = slot.table.weight
        twin = trainee.copy(model)
        assert all(parameter.grad is None for parameter in twin.parameters())
        steps(twin, twin.optimizer(), 2, first=2)
        optimizer.step()
        steps(trainee, optimizer, 1, first=4)
        trainee.told += [float(slot.table.rows_view().double().sum()) for slot in slots(model)]

    return run


_C = "copies and checkpoints"
way(_C, "deepcopy after zero_grad")(_copied(lambda t, o: o.zero_grad()))
way(_C, "deepcopy after zero_grad(set_to_none=False)")(
    _copied(lambda t, o: t.model.zero_grad(set_to_none=True))
)
way(_C, "deepcopy with a gradient, which the copy has not")(_copied(lambda t, o: None))
way(_C, "deepcopy after a step that did not zero")(_copied(lambda t, o: o.step()))


@way(_C, "deepcopy after a NaN that was zeroed")
def copied_after_nan(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    (trainee.loss(0) * NAN).backward()
    optimizer.zero_grad()
    twin = trainee.copy(copy.deepcopy(trainee.model))
    if trainee.is_dense:
        for slot in slots(twin.model):
            slot.rows = slot.table.weight
    steps(twin, twin.optimizer(), 2)
    steps(trainee, optimizer, 2)
    trainee.told += [float(slot.table.rows_view().double().sum()) for slot in slots(twin.model)]


@way(_C, "saved in the middle of an accumulation, loaded, gone on")
def resumed(trainee: Trainee) -> None:
    first = trainee.optimizer(momentum=0.0)
    steps(trainee, first, 2)
    trainee.loss(2).backward()  # lost, as torch's checkpoints hold no gradients
    model = with_memory()
    if trainee.is_dense:
        make_dense(model).load_state_dict(trainee.model.state_dict())
    else:
        with tempfile.TemporaryDirectory() as directory:
            save_memory(trainee.model, directory, row_state=True)
            load_memory(model, Path(directory), row_state=True)
        rest = {k: v for k, v in trainee.model.state_dict().items() if ".engram." not in k}
        model.load_state_dict(rest, strict=False)
    trainee.model = model
    second = trainee.optimizer(momentum=0.0)
    second.load_state_dict(first.state_dict())
    steps(trainee, second, 3, first=3)


@way(_C, "averaged weights, run without their rows", "refused: StateError")
def averaged(trainee: Trainee) -> None:
    mean = torch.optim.swa_utils.AveragedModel(trainee.model)
    steps(trainee, trainee.optimizer(), 2)
    mean.update_parameters(trainee.model)
    mean.update_parameters(trainee.model)
    trainee.copy(mean.module).loss(0)


@way("backward", "two forwards, one backward")
def two_forwards(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        (trainee.loss(2 * i) + 2 * trainee.loss(2 * i + 1)).backward()
        optimizer.step()


@way("backward", "twice through one graph")
def twice(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        loss = trainee.loss(i)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        optimizer.step()


@way("backward", "with inputs= all parameters")
def with_inputs(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        trainee.loss(i).backward(inputs=trainee.parameters())
        optimizer.step()


@way("backward", "with inputs= all but the rows")
def with_other_inputs(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        trainee.loss(i).backward(inputs=trainee.rest())
        optimizer.step()


@way("backward", "gradients measured by torch.autograd.grad before it")
def measured(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        loss = trainee.loss(i)
        torch.autograd.grad(loss, trainee.parameters(), retain_graph=True)
        loss.backward()
        optimizer.step()


@way("backward", "torch.autograd.grad put into p.grad")
def put_into_grad(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        gradients = torch.autograd.grad(trainee.loss(i), trainee.parameters())
        for parameter, gradient in zip(trainee.parameters(), gradients, strict=True):
            parameter.grad = gradient
        clip_grad_norm_(trainee.parameters(), 0.5)
        optimizer.step()


@way("backward", "torch.autograd.grad alone", REFUSED)
def grad_alone(trainee: Trainee) -> None:
    for i in range(2):
        gradients = torch.autograd.grad(trainee.loss(i), trainee.parameters())
        with torch.no_grad():
            for parameter, gradient in zip(trainee.rest(), gradients, strict=False):
                parameter.sub_(0.0 * gradient.sum())


@way("backward", "create_graph=True, accumulated")
def with_graph(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on cycles of parameters and their gradients
        for i in range(2):
            optimizer.zero_grad()
            for j in range(2):
                trainee.loss(2 * i + j).backward(create_graph=True)
            optimizer.step()
        optimizer.zero_grad()


@way("backward", "gradient checkpointing")
def checkpointed(trainee: Trainee) -> None:
    trainee.model.activation_checkpointing_enable({"use_reentrant": False})
    Cell(one(torch.optim.SGD), accumulate=2, clip=0.5, bad=((1, 0, NAN),))(trainee)


@way("backward", "in eval mode")
def in_eval(trainee: Trainee) -> None:
    trainee.model.eval()
    Cell(one(torch.optim.SGD), accumulate=2, clip=0.5, bad=((1, 0, NAN),))(trainee)


@way("backward", "memory off in every second forward")
def memory_off(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(4):
        optimizer.zero_grad()
        trainee.loss(2 * i).backward()
        trainee.loss(2 * i + 1, memory="off").backward()
        optimizer.step()


@way("backward", "an evaluation between backward and step")
def evaluated(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(3):
        optimizer.zero_grad()
        trainee.loss(i).backward()
        with torch.no_grad():
            trainee.told.append(float(trainee.loss(9)))
        optimizer.step()


@way("backward", "rows frozen and let go again")
def frozen_for_a_while(trainee: Trainee) -> None:
    everything = trainee.parameters()
    optimizer = trainee.optimizer()
    for i in range(4):
        for rows in trainee.rows():
            rows.requires_grad_(i not in (1, 2))
        optimizer.zero_grad()
        trainee.loss(i).backward()
        optimizer.step()
    assert len(everything) == len(trainee.parameters())


@way("backward", "rows frozen between backward and step")
def frozen_before_the_step(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    trainee.loss(0).backward()
    for rows in trainee.rows():
        rows.requires_grad_(False)
    optimizer.step()
    for rows in trainee.rows():
        rows.requires_grad_(True)


@way("backward", "a penalty on all parameters", REFUSED)
def penalised(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(2):
        optimizer.zero_grad()
        (trainee.loss(i) + 1e-3 * sum(p.square().sum() for p in trainee.parameters())).backward()
        optimizer.step()


@way("backward", "a penalty on all but the rows")
def penalised_rest(trainee: Trainee) -> None:
    optimizer = trainee.optimizer()
    for i in range(2):
        optimizer.zero_grad()
        (trainee.loss(i) + 1e-3 * sum(p.square().sum() for p in trainee.rest())).backward()
        optimizer.step()


def _halve(gradient: Tensor) -> None:
    gradient.mul_(0.5)


def _hooked(hook: Callable[[Tensor], Any]) -> Loop:
    def run(trainee: Trainee) -> None:
        for parameter in trainee.parameters():
            parameter.register_hook(hook)
        steps(trainee, trainee.optimizer(), 3)

    return run


way("backward", "hooks on all parameters that look")(_hooked(lambda g: None))
way("backward", "hooks on all parameters that multiply in place")(_hooked(_halve))
way("backward", "hooks on all parameters that return a multiple", REFUSED)(_hooked(lambda g: g * 0.5))
way("backward", "hooks on all parameters that clip", REFUSED)(_hooked(lambda g: g.clamp(-1e-3, 1e-3)))
