"""What happens to rows when an optimizer steps: it applies them, or it passes them over.

No optimizer knows of tables. Torch calls the hooks here around the step of every optimizer in the process. For one that
holds handles, the rows are updated after its own pre-hooks, which may clip, and before its own arithmetic, from which
the handles' gradients are hidden; before its own post-hooks, which may call `zero_grad`, they are back. With a closure the
rows are updated as soon as it has been called, for the gradients exist only then.

    watch_optimizers()        # `tables.gradients` does, when the first handle is made
    optimizer.step()
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from engram_lm.errors import RowUpdateError
from engram_lm.tables.gradients import _OWNERS, RowGradients, holds

_WATCHING: list[Any] = []
_STEPS: "weakref.WeakKeyDictionary[torch.optim.Optimizer, Step]" = weakref.WeakKeyDictionary()


def watch_optimizers() -> None:
    """Call the hooks of this module at every optimizer's step from now on."""
    if not _WATCHING:
        _WATCHING.append(register_optimizer_step_pre_hook(_before_step))
        _WATCHING.append(register_optimizer_step_post_hook(_after_step))


class Step:
    """One optimizer's step, for the rows whose handles it holds."""

    def __init__(self) -> None:
        self.hooks: list[Any] = []
        self.hidden: list[tuple[RowGradients, Tensor]] = []

    def put_in_place(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `before` the last of the optimizer's own pre-hooks and `after` the first of its post-hooks."""
        for hook in self.hooks:
            hook.remove()
        after = optimizer.register_step_post_hook(self.after)
        self.hooks = [optimizer.register_step_pre_hook(self.before), after]
        # torch has no way to register a hook in front of those that are there
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple | None:
        self.hidden.clear()  # of a step that raised
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.apply(optimizer)
            return None
        if isinstance(optimizer, torch.optim.LBFGS):
            raise RowUpdateError(
                "LBFGS evaluates its closure many times a step and keeps a history of gradients, which rows have not. Give "
                "the rows another optimizer, or freeze them with handle.requires_grad_(False)."
            )
        once = _Closure(self, optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": once}
        return (args[0], once, *args[2:]), kwargs

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the rows of every handle, or none: what cannot be applied raises first. Then hide the gradients."""
        # fused optimizers take the loss scale off their gradients themselves; GradScaler leaves both numbers with them
        loss_scale = getattr(optimizer, "grad_scale", None)
        loss_scale = 1.0 if loss_scale is None else float(loss_scale)
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and float(found_inf) != 0.0
        owners = list(_owners_in(optimizer))
        if not skipped:
            rates = [_rate(owner, optimizer, group) for owner, group in owners]
            for owner, _ in owners:
                owner.require_finite()
            for (owner, _), rate in zip(owners, rates, strict=True):
                owner.apply(rate, by=optimizer, loss_scale=loss_scale)
        for owner, _ in owners:
            owner._optimizers.add(optimizer)
            if owner.handle.grad is not None:
                self.hidden.append((owner, owner.handle.grad))
                owner.handle.grad = None

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for owner, gradient in self.hidden:
            if owner.handle.grad is None:
                owner.handle.grad = gradient
        self.hidden.clear()


class _Closure:
    """A step's closure, after which the rows are updated."""

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, closure: Any) -> None:
        self.step, self.optimizer, self.closure, self.called = step, optimizer, closure, False

    def __call__(self) -> Any:
        if self.called:
            raise RowUpdateError(
                f"{type(self.optimizer).__name__} called its closure twice in a step; rows take one update a step."
            )
        result = self.closure()
        self.called = True
        with torch.no_grad():
            self.step.apply(self.optimizer)
        return result


def _owners_in(optimizer: torch.optim.Optimizer) -> Iterator[tuple[RowGradients, dict]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = _OWNERS.get(id(parameter))
            if owner is not None and owner.handle is parameter:
                yield owner, group


def _rate(owner: RowGradients, optimizer: torch.optim.Optimizer, group: dict) -> float:
    rate = group.get("lr")
    if rate is None:
        raise RowUpdateError(
            f"{type(optimizer).__name__} has no learning rate in the group of the handle of {owner.name}, and the rows go by "
            "it. Give lr=, or give the handle another optimizer."
        )
    return -float(rate) if group.get("maximize") else float(rate)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if any(True for _ in _owners_in(optimizer)):
        _STEPS.setdefault(optimizer, Step()).put_in_place(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Note whose gradients this step passed over. Another optimizer may still apply them; the next forward asks."""
    for owner in list(_OWNERS.values()):
        if not holds(optimizer, owner.handle) and owner.pending is not None and owner.shares_with(optimizer):
            owner._passed_over = type(optimizer).__name__
