"""The handle: one element through which any torch optimizer reaches the rows of a table.

A table's gradient is (unique rows, summed gradients), kept beside the table. What autograd, clipping, accumulation,
schedules and optimizers see is `handle`, a Parameter of one element whose `.grad` is the L2 norm of that gradient:

* gradient clipping over the model counts the rows' norm, and scales `handle.grad`; the rows are scaled by the same factor
  when they are updated. Under SGD the rows are bit-equal to a dense embedding's, as long as both norms are (a dense
  norm also runs over the untouched zeros, which can move its last bit);
* `optimizer.step()` of any optimizer that holds the handle first applies the table's own rule to the rows, at that
  parameter group's learning rate, and then finds no gradient on the handle and leaves it alone;
* `zero_grad()` drops what is pending, a second `backward()` adds to it.

The handle's *value* counts the updates applied to the rows. It travels in the `state_dict`, so weights from one step and
rows from another are noticed (`check`). Gradients that an optimizer stepped past raise at the next forward.

    handle gradient -> clip -> step pre-hook -> rule.apply(rows, unique, merged, lr = group lr x rule rate, scale)
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from engram_lm.errors import RowUpdateError, StateError
from engram_lm.kernels import rows as kernels
from engram_lm.tables.rules import RowAdam, RowRule

# Every table that has a handle, so that an optimizer step can find those it passes over. Keys are handle object ids.
_OWNERS: "weakref.WeakValueDictionary[int, RowGradients]" = weakref.WeakValueDictionary()


class Norm(Tensor):
    """The handle's gradient. It remembers what it was multiplied by, because value / norm finds that only to one ulp."""

    factor: Tensor | None = None
    times = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("mul_", "__imul__") and isinstance(args[0], Norm):
            args[0].note(args[1])
        elif name == "_foreach_mul_":
            for i, gradient in enumerate(args[0]):
                if isinstance(gradient, Norm):
                    gradient.note(args[1][i] if isinstance(args[1], (list, tuple)) else args[1])
        elif "clamp" in name:
            raise RowUpdateError(
                "clip_grad_value_ clips single numbers, and what it sees of a table is the norm of its gradient. Use "
                "clip_grad_norm_, or clip the values of the other parameters alone."
            )
        return result

    def note(self, factor: Any) -> None:
        self.factor, self.times = factor, self.times + 1


def factor_of(gradient: Tensor, norm: float) -> float:
    """What the rows' gradient must be multiplied by, given what became of its norm on the handle."""
    value = float(gradient)
    if value == norm or norm == 0.0:
        return 1.0 if value == norm and norm else 0.0
    if isinstance(gradient, Norm) and gradient.times == 1:
        with torch._C.DisableTorchFunctionSubclass():
            factor = torch.as_tensor(gradient.factor, dtype=gradient.dtype)
        if float(factor * norm) == value:
            return float(factor)
    return value / norm


class RowGradients:
    """Pending gradients of one table and the handle that stands for them.

    `apply_rows(unique, merged, rule=, learning_rate=, scale=)` is the table's own `update`.
    """

    def __init__(self, table: Any, *, rule: RowRule | None = None, name: str = "table") -> None:
        self.table = weakref.proxy(table)
        self.rule = rule or RowAdam()
        self.name = name
        self.handle = nn.Parameter(torch.zeros(1))
        self._incoming: list[tuple[Tensor, Tensor]] = []
        self._pending: tuple[Tensor, Tensor] | None = None
        self._norm = 0.0
        self._passed_over: str | None = None
        self._model: weakref.ref | None = None
        self._unverified = False
        self._version = 0
        self.updates = 0
        self._bind()

    # ---- life of the handle -------------------------------------------------------------------------------------

    def _bind(self) -> None:
        _OWNERS[id(self.handle)] = self
        own = weakref.ref(self)
        # the hook holds no reference to us: a dropped table must be freed with its rows
        self.handle.register_post_accumulate_grad_hook(lambda handle: _accumulated(own, handle))

    def belong_to(self, model: nn.Module) -> None:
        """The module around the rows: an optimizer that holds none of its parameters has nothing to do with them."""
        self._model = weakref.ref(model)

    def shares_with(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer trains the model of these rows; True where that is not known."""
        model = self._model() if self._model is not None else None
        if model is None:
            return True
        own = {id(parameter) for parameter in model.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    def copy_for(self, table: Any, memo: dict) -> "RowGradients":
        """The copy that belongs to a deep copy of the table: its handle is the copied model's handle."""
        import copy

        if self._pending is not None or self._incoming:
            raise RowUpdateError(
                f"The rows of {self.name} hold gradients that were not applied; step or zero_grad before copying the model."
            )
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.table = weakref.proxy(table)
        twin._model = None  # the copied model is not whole yet
        twin.handle = copy.deepcopy(self.handle, memo)
        twin._incoming, twin._pending = [], None
        twin._bind()
        return twin

    def set_updates(self, updates: int) -> None:
        """Say how many updates the rows carry, here and in the handle's value."""
        self.updates = updates
        self._unverified = False
        with torch.no_grad():
            self.handle.fill_(updates)
        self._version = _version(self.handle)

    def weights_were_loaded(self) -> None:
        """Ask the next forward for `check_updates`, once: the handle's value came from a state_dict."""
        self._unverified = True

    def check(self, handle: Tensor, *, training: bool) -> None:
        """Refuse to read rows when gradients were lost, or when weights and rows come from different steps."""
        version = _version(self.handle)
        if self._unverified or version != self._version:
            self.check_updates()
            self._unverified, self._version = False, version
        if self._passed_over:
            raise RowUpdateError(
                f"Gradients of {self.name} were never applied: {self._passed_over} stepped without its handle. Give the "
                "optimizer model.parameters() (the handle is one of them), or freeze the rows with "
                "handle.requires_grad_(False)."
            )
        if handle is not self.handle:
            raise RowUpdateError(
                f"The handle of {self.name} is no longer the model's parameter (DataParallel, FSDP and to_empty() replace "
                "parameters). These ways of running are not supported with trainable rows yet."
            )
        if training and self._incoming:
            self._incoming.clear()
            raise RowUpdateError(
                f"Gradients of {self.name} were computed by torch.autograd.grad, which never reaches the rows. Use "
                "loss.backward()."
            )

    def check_updates(self) -> None:
        """Raise when the handle's value (from a loaded state_dict) and the rows disagree. Costs a device read."""
        value = float(self.handle.detach())
        wanted = float(torch.tensor(float(self.updates)).to(self.handle.dtype))
        if value != wanted:
            raise StateError(
                f"The weights were saved after {value:.0f} row updates, but the rows of {self.name} carry {self.updates}: "
                "loading a state_dict or averaging weights does not change rows. Load both with "
                "engram_lm.from_pretrained or MemoryTrainer."
            )

    # ---- gradients in -------------------------------------------------------------------------------------------

    def receive(self, address: Tensor, gradient: Tensor) -> None:
        """Called by backward: address int64 [...], gradient [..., width]. Kept until the handle's hook runs."""
        address_N = address.detach().reshape(-1)
        gradient_NW = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
        self._incoming.append((address_N, gradient_NW))

    def _collect(self, handle: Tensor) -> None:
        """After the handle's gradient was accumulated: merge, and make the gradient the norm."""
        grad = handle.grad
        if self._pending is not None:
            factor = factor_of(grad, self._norm)
            if factor == 0.0:
                self._pending = None  # zero_grad ran in between
            elif factor != 1.0:
                self._pending[1].mul_(factor)
        for address_N, gradient_NW in self._incoming:
            unique_U, merged_UW = merge(address_N, gradient_NW)
            if self._pending is not None:
                unique_U = torch.cat([self._pending[0], unique_U])
                merged_UW = torch.cat([self._pending[1], merged_UW])
                unique_U, merged_UW = merge(unique_U, merged_UW)
            self._pending = (unique_U, merged_UW)
        self._incoming.clear()
        if self._pending is None:
            return
        norm = torch.linalg.vector_norm(self._pending[1]).to(handle).reshape(1)
        self._norm = float(norm)
        handle.grad = norm.as_subclass(Norm)

    # ---- gradients out ------------------------------------------------------------------------------------------

    def apply(self, learning_rate: float, *, loss_scale: float = 1.0) -> None:
        """Apply what is pending at the optimizer group's rate and the factor clipping put on the handle."""
        grad = self.handle.grad
        self._passed_over = None
        if grad is None:
            self._pending = None
            return
        if self._pending is not None:
            scale = factor_of(grad, self._norm) / loss_scale
            unique_U, merged_UW = self._pending
            self._pending = None
            if scale != scale:  # NaN norm: a dense parameter would become NaN here; say it instead
                raise RowUpdateError(
                    f"The gradient of {self.name} is not finite; skip the step, or lower the learning rate."
                )
            if scale != 0.0:
                self.table.update(
                    unique_U, merged_UW, rule=self.rule, learning_rate=learning_rate, scale=scale
                )
            self.set_updates(self.updates + 1)
        self.handle.grad = None


def _version(handle: Tensor) -> int:
    """How often the handle was written to: whoever but us does (averaged weights, say) left its rows behind."""
    return 0 if handle.is_inference() else handle._version


def _accumulated(own: weakref.ref, handle: Tensor) -> None:
    gradients = own()
    if gradients is not None:
        gradients._collect(handle)


def merge(address_N: Tensor, gradient_NW: Tensor) -> tuple[Tensor, Tensor]:
    """(unique addresses ascending, summed gradients): int64 [U], float32 [U, W]. Sums run in order of appearance."""
    if address_N.device.type != "cpu":
        return merge_plain(address_N, gradient_NW)
    sorted_N, order_N = torch.sort(address_N, stable=True)
    unique_U = torch.empty_like(address_N)
    merged_UW = torch.empty(gradient_NW.shape, dtype=torch.float32)
    n = kernels.merge(
        sorted_N.numpy(),
        order_N.numpy(),
        gradient_NW.contiguous().numpy(),
        unique_U.numpy(),
        merged_UW.numpy(),
    )
    return unique_U[:n], merged_UW[:n]


def merge_plain(address_N: Tensor, gradient_NW: Tensor) -> tuple[Tensor, Tensor]:
    """The plain twin of `merge`; deterministic on every device (a segment sum over sorted rows, not atomics)."""
    sorted_N, order_N = torch.sort(address_N, stable=True)
    unique_U, count_U = torch.unique_consecutive(sorted_N, return_counts=True)
    merged_UW = torch.segment_reduce(gradient_NW[order_N].float(), "sum", lengths=count_U, axis=0)
    return unique_U, merged_UW


class Gather(torch.autograd.Function):
    """rows = table[address] or the ticket's; backward leaves (address, gradient) with the table and a zero on the handle."""

    @staticmethod
    def forward(ctx, handle: Tensor, table: Any, address: Tensor, ticket: Any) -> Tensor:
        ctx.table, ctx.address = table, address
        ctx.handle_like = (handle.dtype, handle.device)
        return table.gather(address) if ticket is None else ticket.rows()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        ctx.table.gradients.receive(ctx.address, gradient)
        dtype, device = ctx.handle_like
        return torch.zeros(1, dtype=dtype, device=device), None, None, None


def pending_rows(model: nn.Module) -> int:
    """How many rows of the model's tables hold gradients that have not been applied."""
    found = 0
    for parameter in model.parameters():
        owner = _OWNERS.get(id(parameter))
        if owner is not None and owner._pending is not None:
            found += len(owner._pending[0])
    return found


def forget_pending(model: nn.Module) -> None:
    """Drop gradients that were computed and shall not be applied."""
    for parameter in model.parameters():
        owner = _OWNERS.get(id(parameter))
        if owner is not None:
            owner._pending, owner._passed_over = None, None
            owner._incoming.clear()
            parameter.grad = None


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple | None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _apply_all(optimizer)
        return None
    if not any(True for _ in _owners_in(optimizer)):
        return None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RowUpdateError(
            "LBFGS evaluates its closure many times a step and keeps a history of gradients, which rows have not. Give the "
            "rows another optimizer, or freeze them with handle.requires_grad_(False)."
        )
    # the gradient exists only once the optimizer has called the closure
    once = _Closure(optimizer, closure)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": once}
    return (args[0], once, *args[2:]), kwargs


class _Closure:
    """A step's closure, after which the rows are updated."""

    def __init__(self, optimizer: torch.optim.Optimizer, closure: Any) -> None:
        self.optimizer, self.closure, self.called = optimizer, closure, False

    def __call__(self) -> Any:
        if self.called:
            raise RowUpdateError(
                f"{type(self.optimizer).__name__} called its closure twice in a step; rows take one update a step."
            )
        result = self.closure()
        self.called = True
        with torch.no_grad():
            _apply_all(self.optimizer)
        return result


def _owners_in(optimizer: torch.optim.Optimizer) -> Iterator[tuple[RowGradients, dict]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            owner = _OWNERS.get(id(parameter))
            if owner is not None and owner.handle is parameter:
                yield owner, group


def _apply_all(optimizer: torch.optim.Optimizer) -> None:
    # fused optimizers take the loss scale off their gradients themselves; GradScaler leaves both numbers with them
    loss_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    overflow = found_inf is not None and float(found_inf) != 0.0
    for owner, group in _owners_in(optimizer):
        if overflow:
            owner.handle.grad = None  # the optimizer skips this step; so do the rows
        rate = float(group["lr"])
        owner.apply(
            -rate if group.get("maximize") else rate,
            loss_scale=1.0 if loss_scale is None else float(loss_scale),
        )


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for owner in list(_OWNERS.values()):
        if owner._pending is not None and owner.handle.grad is not None and owner.shares_with(optimizer):
            owner._passed_over = type(optimizer).__name__


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
