"""The handle: one element through which any torch optimizer reaches the rows of a table.

What autograd, clipping, accumulation, schedules and optimizers see of a table is `handle`, a Parameter of one element.
Its `.grad` is the L2 norm of the gradient of the rows, and carries that gradient (`tables.pending`): dropped with it, put
back with it, multiplied with it. Hence

* gradient clipping over the model counts the rows' norm, and scales the rows with everything else. Under SGD the rows are
  bit-equal to a dense embedding's, as long as both norms are (a dense norm also runs over the untouched zeros, which can
  move its last bit);
* `optimizer.step()` of any optimizer that holds the handle applies the table's own rule to the rows, at that parameter
  group's learning rate, after the optimizer's own pre-hooks. While the optimizer runs the handle has no gradient, so that
  the optimizer leaves it alone; afterwards it has it again, as every parameter has until `zero_grad`;
* a gradient that is not finite is never applied: the step raises before anything has changed.

The handle's *value* counts the updates applied to the rows, and `run` is a random number, drawn at the first update and
mixed with every later one, so that two runs with equal counts are told apart. Both travel in the `state_dict`: weights
from one step and rows from another are noticed (`check`). Gradients that no optimizer applies raise at the next forward.

    backward -> receive -> merge, norm -> handle.grad -> clip -> step pre-hook -> rule.apply(rows, unique, merged, ...)
"""

import gc
import math
import secrets
import struct
import weakref
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.errors import RowUpdateError, StateError
from engram_lm.storage.kernels import rows as kernels
from engram_lm.tables.pending import RowsGradient, gradient_of, put, standing
from engram_lm.tables.rules import RowAdam, RowRule

# Every table that has a handle, so that an optimizer step can find those it passes over. Keys are handle object ids.
_OWNERS: "weakref.WeakValueDictionary[int, RowGradients]" = weakref.WeakValueDictionary()


class RowGradients:
    """The handle of one table, and what its gradient stands for.

    The table's `update(unique, merged, rule=, learning_rate=, scale=)` applies them.
    """

    def __init__(self, table: Any, *, rule: RowRule | None = None, name: str = "table") -> None:
        self.table = weakref.proxy(table)
        self.rule = rule or RowAdam()
        self.name = name
        self.handle = nn.Parameter(torch.zeros(1))
        self._forget()
        self._model: weakref.ref | None = None
        self._in_model = False
        self._unverified = False
        self._version = 0
        self.updates, self.run = 0, 0
        # the number of the run that came with a state_dict; None where none came
        self._loaded_run: Tensor | None = None
        self._bind()

    # ---- life of the handle -------------------------------------------------------------------------------------

    def _bind(self) -> None:
        from engram_lm.tables import stepping

        stepping.watch_optimizers()
        _OWNERS[id(self.handle)] = self
        own = weakref.ref(self)
        # the hooks hold no reference to us: a dropped table must be freed with its rows
        self.handle.register_hook(lambda gradient: _on_arrival(own, gradient))
        self.handle.register_post_accumulate_grad_hook(lambda handle: _on_accumulation(own))

    def _forget(self) -> None:
        """Nothing is under way."""
        # (number of the backward pass, addresses, gradients) of backward passes that have not come to the handle yet
        self._incoming: list[tuple[int, Tensor, Tensor]] = []
        # between a backward's arrival at the handle and its accumulation there: its gradient, and the one before
        self._arrived: RowsGradient | None = None
        self._before: RowsGradient | None = None
        self._passed_over: str | None = None
        # optimizers that were seen to hold the handle
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def belong_to(self, model: nn.Module) -> None:
        """The module around the rows: an optimizer that holds none of its parameters has nothing to do with them."""
        self._model, self._in_model = weakref.ref(model), True

    def shares_with(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer trains the model of these rows; True where that is not known."""
        model = self._model() if self._model is not None else None
        if model is None:
            return True
        own = {id(parameter) for parameter in model.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])

    def copy_for(self, table: Any, memo: dict) -> "RowGradients":
        """Those of a deep copy of the table: its handle is the copied model's, without a gradient, as torch copies one."""
        import copy

        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.table = weakref.proxy(table)
        twin._model = None  # the copied model is not whole yet
        twin.handle = copy.deepcopy(self.handle, memo)
        twin._forget()
        twin._bind()
        return twin

    def set_updates(self, updates: int, *, run: int | None = None) -> None:
        """Say how many updates of which run the rows carry, here and in the handle's value. run: default as before."""
        self.updates, self.run = updates, self.run if run is None else run
        self._unverified, self._loaded_run = False, None
        with torch.no_grad():
            self.handle.fill_(updates)
        self._version = _version(self.handle)

    def weights_were_loaded(self, run: Tensor | None = None) -> None:
        """Ask the next forward for `check_updates`, once: the handle's value, and `run`, came from a state_dict."""
        self._unverified, self._loaded_run = True, run

    def check(self, handle: Tensor, *, training: bool) -> None:
        """Refuse to read rows when gradients were lost, or when weights and rows come from different steps."""
        version = _version(self.handle)
        if self._unverified or version != self._version:
            self.check_updates()
            self._unverified, self._loaded_run, self._version = False, None, version
        if self._passed_over and self._has_no_optimizer():
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
        # a recomputation of gradient checkpointing runs inside a backward, whose gradients are on their way
        if training and _backward_pass() < 0:
            self._incoming.clear()  # of a backward that failed
            if self._arrived is not None:
                self._arrived = self._before = None
                raise RowUpdateError(
                    f"Gradients of {self.name} were computed by torch.autograd.grad, which never reaches the rows. Use "
                    "loss.backward()."
                )

    def check_updates(self) -> None:
        """Raise when the weights (from a loaded state_dict, say) and the rows disagree. Costs a device read."""
        value = float(self.handle.detach())
        wanted = float(torch.tensor(float(self.updates)).to(self.handle.dtype))
        if value != wanted:
            raise StateError(
                f"The weights were saved after {value:.0f} row updates, but the rows of {self.name} carry {self.updates}: "
                "loading a state_dict or averaging weights does not change rows. Load both with "
                "engram_lm.from_pretrained or MemoryTrainer."
            )
        if not same_run(self._loaded_run, self.run):
            raise StateError(
                f"The weights and the rows of {self.name} were both saved after {self.updates} row updates, of different "
                "training runs: loading a state_dict or averaging weights does not change rows. Load both with "
                "engram_lm.from_pretrained or MemoryTrainer."
            )

    def _has_no_optimizer(self) -> bool:
        """Whether no optimizer holds the handle, so that its gradients can never be applied."""
        if not any(holds(optimizer, self.handle) for optimizer in self._optimizers):
            self._optimizers.update(o for o in _living_optimizers() if holds(o, self.handle))
        if not self._optimizers:
            return True
        self._passed_over = None
        return False

    # ---- gradients in -------------------------------------------------------------------------------------------

    def receive(self, address: Tensor, gradient: Tensor) -> None:
        """Called by backward: address int64 [...], gradient [..., width]. Kept until that backward comes to the handle."""
        address_N = address.detach().reshape(-1)
        gradient_NW = gradient.detach().reshape(-1, gradient.shape[-1]).to(torch.float32)
        self._incoming.append((_backward_pass(), address_N, gradient_NW))

    def _arrive(self, gradient: Tensor) -> Tensor | None:
        """A backward has come to the handle: what it gives the handle is the norm of what it gave the rows."""
        if float(gradient) != 0.0:
            raise RowUpdateError(
                f"The loss depends on the handle of {self.name} itself (a penalty on all parameters, say), which is a count "
                "and not the rows. Leave out the parameters whose name ends in handle."
            )
        if self._in_model:
            require_trains(self.handle)
            self.check_updates()
        self._arrived = self._before = None  # of torch.autograd.grad
        this = _backward_pass()
        incoming = [
            (address_N, gradient_NW) for task, address_N, gradient_NW in self._incoming if task == this
        ]
        self._incoming = [one for one in self._incoming if one[0] != this]
        rows = self._summed(incoming)
        if rows is None:
            return None
        before = standing(self.handle.grad, name=self.name)
        if before is not None and before.rows.is_left_behind:
            before = self.handle.grad = None
        self._before = before
        self._arrived = self._gradient(*rows)
        return self._arrived

    def _accumulate(self) -> None:
        """The handle's gradient is the one before plus the norm of this backward: make it the norm of both."""
        arrived, before, self._arrived, self._before = self._arrived, self._before, None, None
        if arrived is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            wanted = arrived.rows.value if before is None else before.rows.value + arrived.rows.value
            found, wanted = float(self.handle.grad), float(wanted)
        if found != wanted and not (math.isnan(found) and math.isnan(wanted)):
            raise RowUpdateError(
                f"A hook on the handle of {self.name} changed its gradient from {wanted:.6g} to {found:.6g}, which does not "
                "reach the rows. Register gradient hooks on the other parameters alone."
            )
        after = arrived if before is None else self._sum_of(before, arrived)
        # in place, as torch adds to a gradient: it may be a part of a larger buffer, or held elsewhere
        self.handle.grad = put(after, self.handle.grad)

    def _summed(self, incoming: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """(unique_U, merged_UW) of the reads of one backward."""
        rows: tuple[Tensor, Tensor] | None = None
        for address_N, gradient_NW in incoming:
            one = merge(address_N, gradient_NW)
            rows = one if rows is None else merge(*(torch.cat(pair) for pair in zip(rows, one, strict=True)))
        return rows

    def _sum_of(self, before: RowsGradient, arrived: RowsGradient) -> RowsGradient:
        for one in (before, arrived):
            if one.rows.merged_UW is None:  # not finite, and nothing that is added makes it so
                return one
        both = zip(before.rows.scaled(), arrived.rows.scaled(), strict=True)
        return self._gradient(*merge(*(torch.cat(pair) for pair in both)))

    def _gradient(self, unique_U: Tensor, merged_UW: Tensor) -> RowsGradient:
        return gradient_of(unique_U, merged_UW, name=self.name, handle=self.handle)

    # ---- gradients out ------------------------------------------------------------------------------------------

    @property
    def pending(self) -> RowsGradient | None:
        """The gradient that waits for an optimizer's step, None where there is none."""
        gradient = self.handle.grad
        if not isinstance(gradient, RowsGradient) or gradient.rows.applied_by is not None:
            return None
        return gradient if gradient.rows.merged_UW is not None and float(gradient) != 0.0 else None

    @property
    def _pending(self) -> tuple[Tensor, Tensor] | None:
        """(unique_U, merged_UW) of `pending`."""
        gradient = self.pending
        return None if gradient is None else gradient.rows.scaled()

    def require_finite(self) -> None:
        """RowUpdateError where a step would make rows NaN: a dense parameter would become NaN there."""
        gradient = standing(self.handle.grad, name=self.name)
        if gradient is not None and gradient.rows.merged_UW is None:
            raise RowUpdateError(
                f"The gradient of {self.name} is not finite; skip the step, or lower the learning rate."
            )

    def apply(self, learning_rate: float, *, by: torch.optim.Optimizer, loss_scale: float = 1.0) -> None:
        """Apply the handle's gradient at the rate of the optimizer's group. It stays on the handle until `zero_grad`."""
        self._passed_over = self._arrived = self._before = None
        gradient = standing(self.handle.grad, name=self.name)
        if gradient is None:
            return
        rows = gradient.rows
        factor = rows.last_factor()
        unique_U, merged_UW = rows.scaled(but_last=True)
        scale = (1.0 if factor is None else factor) / loss_scale
        self.table.update(unique_U, merged_UW, rule=self.rule, learning_rate=learning_rate, scale=scale)
        rows.applied_by = weakref.ref(by)
        # a table that trains on disk knows its own
        run = getattr(self.table, "run", None) or _next_run(
            self.run, float(gradient), learning_rate, loss_scale
        )
        self.set_updates(self.updates + 1, run=run)


def require_trains(handle: Tensor) -> None:
    """RowUpdateError under float16, and where gradients of rows would have to be summed over torch.distributed's ranks."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RowUpdateError(
            "Rows train in one process: DDP, FSDP and other torch.distributed training are not supported yet, because "
            "row gradients would not be summed over ranks. Use one rank, or freeze rows with handle.requires_grad_(False)."
        )
    if handle.dtype == torch.float16:
        raise RowUpdateError("Rows do not train under float16 weights; use float32 or bfloat16.")


def same_run(loaded: Tensor | None, run: int) -> bool:
    """Whether a run's number from a state_dict, as it was cast there, may be `run`. 0 and None are not known."""
    if loaded is None or not run or not bool(loaded.any()):
        return True
    return bool((loaded.cpu() == torch.tensor([run]).to(loaded.dtype)).all())


def _next_run(run: int, *numbers: float) -> int:
    """The number of the run after an update: random at the first, and then a hash of all updates, so that runs that part
    have different numbers and one that is resumed has that of the uninterrupted one."""
    run = run or secrets.randbits(52)
    digest = blake2b(struct.pack(f"<Q{len(numbers)}d", run, *numbers), digest_size=8).digest()
    return int.from_bytes(digest) >> 12 or 1


def _version(handle: Tensor) -> int:
    """How often the handle was written to: whoever but us does (averaged weights, say) left its rows behind."""
    return 0 if handle.is_inference() else handle._version


def _backward_pass() -> int:
    """The number of the backward pass that this thread is in; -1 outside."""
    return torch._C._current_graph_task_id()


def _on_arrival(own: weakref.ref, gradient: Tensor) -> Tensor | None:
    gradients = own()
    return None if gradients is None else gradients._arrive(gradient)


def _on_accumulation(own: weakref.ref) -> None:
    gradients = own()
    if gradients is not None:
        gradients._accumulate()


def holds(optimizer: torch.optim.Optimizer, handle: Tensor) -> bool:
    """Whether the handle is one of the optimizer's parameters."""
    groups = getattr(optimizer, "param_groups", ())
    return any(parameter is handle for group in groups for parameter in group["params"])


def _living_optimizers() -> list[torch.optim.Optimizer]:
    """Every optimizer of this process. A tenth of a second: asked for once, before gradients are called lost."""
    return [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]


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


def owners_of(model: nn.Module) -> "list[RowGradients]":
    """Those of the model's tables."""
    found = (_OWNERS.get(id(parameter)) for parameter in model.parameters())
    return [owner for owner in found if owner is not None]


def pending_rows(model: nn.Module) -> int:
    """How many rows of the model's tables hold gradients that have not been applied."""
    pending = (owner.pending for owner in owners_of(model))
    return sum(len(gradient.rows.unique_U) for gradient in pending if gradient is not None)


def forget_pending(model: nn.Module) -> None:
    """Drop gradients that were computed and shall not be applied."""
    for owner in owners_of(model):
        owner._forget()
        owner.handle.grad = None
