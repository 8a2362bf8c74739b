"""The gradient of a handle: one number, the L2 norm of a table's row gradients, that carries those row gradients.

What code does to the `.grad` of a parameter it does to this tensor, and the row gradients go with it:

* where the tensor goes, they go: `zero_grad` and `handle.grad = None` drop them, and a gradient that was put aside and
  put back (`kept = p.grad`, or its clone) is whole again;
* what it is multiplied or divided by, they are: by clipping, by a loss scaler, by hand. The operations are remembered,
  and made on the rows one after the other when these are needed, so that each rounds as it does in a dense gradient;
* anything else that writes to it is refused: one number cannot say what it would do to every number of the rows.

Whose turn it is to step, and what was passed over, is not known here: see `tables.gradients`.

    gradient = gradient_of(unique_U, merged_UW, name="facts")        # tensor([3.7]), with its rows
    gradient.mul_(0.5)
    unique_U, merged_UW = gradient.rows.scaled()
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.errors import RowUpdateError

# Names of torch's functions without the underscores around them. Those that are made on the rows as well:
_SCALES = {
    **dict.fromkeys(("mul", "multiply", "imul", "rmul", "foreach_mul"), "mul"),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv", "itruediv", "foreach_div"), "div"),
    **dict.fromkeys(("neg", "negative"), "neg"),
    "amp_foreach_non_finite_check_and_unscale": "mul",
}
_COPIES = ("clone", "to", "float", "double", "bfloat16", "half", "cpu", "cuda", "contiguous")
# May set the number to 0 whatever it was, as they would every number of a dense gradient.
_SETS = ("zero", "foreach_zero", "fill", "copy", "setitem", "set")
# Write to a tensor without counting its version up: `.data = x` and the loss scaler's.
_UNCOUNTED = ("set", "amp_foreach_non_finite_check_and_unscale")
_NORMS = ("norm", "foreach_norm", "linalg_norm", "linalg_vector_norm")
# Make a gradient of a gradient, number by number, that may be 0 where the rows' would not.
_CHOICES = ("where", "nan_to_num", "masked_fill")
# How a parameter is updated from its gradient by hand.
_UPDATES = (
    *("add", "iadd", "sub", "isub", "addcmul", "addcdiv", "lerp"),
    *("foreach_add", "foreach_sub", "foreach_addcmul", "foreach_addcdiv", "foreach_lerp"),
)


class Rows:
    """Row gradients and what was done to them since. One object for a gradient and its views (`.data`, `.detach()`).

    unique_U int64, ascending, and merged_UW float32; both None once dropped, or where a number is not finite.
    """

    def __init__(
        self,
        unique_U: Tensor | None,
        merged_UW: Tensor | None,
        value: Tensor,
        *,
        name: str,
        handle: "weakref.ref[nn.Parameter] | None" = None,
        is_whole: bool = True,
    ) -> None:
        self.unique_U, self.merged_UW, self.name, self.handle = unique_U, merged_UW, name, handle
        # False: other processes hold other rows of the same gradient
        self.is_whole = is_whole
        # what the number must still be; a tensor, so that nothing waits for an accelerator
        self.value = value.clone()
        self.scales: list[tuple[str, Any]] = []
        # the optimizer that has taken a step with them
        self.applied_by: weakref.ref[torch.optim.Optimizer] | None = None

    @property
    def is_left_behind(self) -> bool:
        """Whether an optimizer applied them and is gone, so that nobody is left to zero them."""
        return self.applied_by is not None and self.applied_by() is None

    def drop(self) -> None:
        self.unique_U = self.merged_UW = None
        self.scales.clear()

    def copied(self) -> "Rows":
        twin = object.__new__(Rows)
        twin.__dict__.update(self.__dict__, value=self.value.clone(), scales=list(self.scales))
        return twin

    def scaled(self, *, but_last: bool = False) -> tuple[Tensor, Tensor]:
        """(unique_U, merged_UW) after all operations; but_last: all but the multiplication that `last_factor` names."""
        last = -1 if but_last and self.last_factor() is not None else None
        merged_UW = self.merged_UW
        for operation, operand in self.scales[:last]:
            merged_UW = _made(operation, merged_UW, operand)
        return self.unique_U, merged_UW

    def last_factor(self) -> float | None:
        """What the last operation multiplied by; None where there was none, or where it divided."""
        operation, operand = self.scales[-1] if self.scales else ("div", None)
        return None if operation == "div" else -1.0 if operation == "neg" else float(operand)


def _made(operation: str, merged_UW: Tensor, operand: Any) -> Tensor:
    if operation == "neg":
        return -merged_UW
    if isinstance(operand, Tensor):
        operand = operand.reshape(()).to(merged_UW.device)
    return merged_UW * operand if operation == "mul" else merged_UW / operand


class RowsGradient(Tensor):
    """A tensor of one element with `rows`; made by `gradient_of`. Reading it reads a plain number."""

    rows: Rows

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        with torch._C.DisableTorchFunctionSubclass():
            given = _gradients((*args, *kwargs.values()))
            _refuse(name, given, args)
            before = [gradient._version for gradient in given]
            result = func(*args, **kwargs)
            for gradient, version in zip(given, before, strict=True):
                if gradient._version != version or name in _UNCOUNTED:
                    _note(gradient, name, args, kwargs)
            if name in _NORMS:
                return _norms(result, name, args, kwargs)
            return _carried(result, name, given, args, kwargs)

    def __deepcopy__(self, memo: dict) -> "RowsGradient":
        return self.clone()

    def __reduce_ex__(self, protocol: int) -> Any:
        """A file holds the number alone."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)


def gradient_of(
    unique_U: Tensor,
    merged_UW: Tensor,
    *,
    name: str,
    norm: Tensor | None = None,
    is_whole: bool = True,
    handle: nn.Parameter | None = None,
) -> RowsGradient:
    """The gradient that stands for these row gradients.

    Args:
        name: of the table, for errors.
        norm: default theirs. is_whole: False where it is also of rows that other processes hold.
        handle: whose gradient it is; gives dtype and device of the number.
    """
    norm = norm_of(merged_UW) if norm is None else norm
    value = norm.reshape(1).to(merged_UW if handle is None else handle)
    if not math.isfinite(float(norm)):
        # no multiplication makes them finite again
        unique_U = merged_UW = None
    handle = None if handle is None else weakref.ref(handle)
    rows = Rows(unique_U, merged_UW, value, name=name, handle=handle, is_whole=is_whole)
    return _with_rows(value, rows)


def norm_of(merged_UW: Tensor) -> Tensor:
    """The L2 norm as clipping takes it of a dense gradient; through float64 where squares leave the range of float32."""
    norm = torch.linalg.vector_norm(merged_UW)
    if math.isfinite(float(norm)) and float(norm) > 0.0:
        return norm
    norm = torch.linalg.vector_norm(merged_UW, dtype=torch.float64)
    return (norm.clamp(max=torch.finfo(torch.float32).max) if math.isfinite(float(norm)) else norm).float()


def standing(gradient: Tensor | None, *, name: str) -> RowsGradient | None:
    """The gradient where it stands for row gradients; None where there is none, or it is 0.

    Raises: RowUpdateError where it is another number than the rows' norm and what that was multiplied by.
    """
    if gradient is None:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        value = float(gradient)
        if value == 0.0:
            return None
        if not isinstance(gradient, RowsGradient):
            raise RowUpdateError(
                f"The gradient of the handle of {name} was replaced by a tensor of {value:.6g} that carries no row "
                "gradients; one number cannot say what every row gets. Put back the gradient itself or its clone, or None."
            )
        wanted = float(gradient.rows.value.to(gradient.dtype))
        if math.isfinite(value) and value != wanted:
            raise RowUpdateError(
                f"The gradient of the handle of {name} is {value:.6g}, and its rows' is {wanted:.6g}: something wrote to it "
                "that torch does not see (numpy, say). Multiply it or set it to None by torch's own operations."
            )
        if not math.isfinite(value):
            gradient.rows.drop()
    return gradient


def put(gradient: RowsGradient, where: Tensor) -> RowsGradient:
    """`gradient` in the memory of `where`, which is a tensor of one element, and the object where that is one with rows."""
    with torch._C.DisableTorchFunctionSubclass():
        if where.requires_grad:  # by create_graph
            return gradient
        where.copy_(gradient)
        if not isinstance(where, RowsGradient):
            return _with_rows(where, gradient.rows)
        _take(where.rows, gradient.rows, where)
    return where


# ---- parts -----------------------------------------------------------------------------------------------------------


def _with_rows(value: Tensor, rows: Rows) -> RowsGradient:
    gradient = value.as_subclass(RowsGradient)
    gradient.rows = rows
    return gradient


def _take(rows: Rows, source: Rows, gradient: Tensor) -> None:
    """Let `rows`, of `gradient`, stand for what `source` stands for."""
    own = {"name": rows.name, "handle": rows.handle, "value": gradient.clone()}
    rows.__dict__.update(source.copied().__dict__ | own)


def _gradients(given: tuple) -> list[RowsGradient]:
    found = []
    for one in given:
        if isinstance(one, RowsGradient):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += [x for x in one if isinstance(x, RowsGradient)]
    return [gradient for gradient in found if hasattr(gradient, "rows")]


def _refuse(name: str, given: list[RowsGradient], args: tuple) -> None:
    """Raise, before anything is written, for what cannot be done to every number of the rows from their norm alone."""
    if "clamp" in name or "clip" in name:
        raise RowUpdateError(
            "clip_grad_value_ clips single numbers, and what it sees of a table is the norm of its gradient. Use "
            "clip_grad_norm_, or clip the values of the other parameters alone."
        )
    chooses = name in _CHOICES or (name == "setitem" and isinstance(args[1], Tensor))
    if chooses and (name != "nan_to_num" or not all(math.isfinite(float(one)) for one in given)):
        raise RowUpdateError(
            f"{name} chooses among single numbers, and what it sees of {given[0].rows.name} is the norm of its gradient. "
            "Set the whole gradient to None, or skip the step."
        )
    targets = args[0] if args and isinstance(args[0], (list, tuple)) else args[:1]
    if name in _UPDATES and any(_is_handle(target, given) for target in targets):
        raise RowUpdateError(
            f"The handle of {given[0].rows.name} was to be updated by hand, which does not reach the rows: what updates them "
            "is the step of a torch.optim optimizer that holds the handle."
        )


def _is_handle(target: Any, given: list[RowsGradient]) -> bool:
    """Whether a tensor lies where the handle of one of these gradients does (`p.data` is another object than `p`)."""
    if not isinstance(target, Tensor) or isinstance(target, RowsGradient):
        return False
    handles = [gradient.rows.handle() for gradient in given if gradient.rows.handle is not None]
    return any(handle is not None and handle.data_ptr() == target.data_ptr() for handle in handles)


def _note(gradient: RowsGradient, name: str, args: tuple, kwargs: dict) -> None:
    """Do to the rows what `name` just did to the number, or put the number back and raise."""
    rows = gradient.rows
    if name in _SCALES:
        operand = _operand(gradient, name, args, kwargs)
        if operand is not NotImplemented:
            rows.scales.append((_SCALES[name], operand))
            rows.value = gradient.clone()
            return
    source = args[1] if name in ("copy", "set") and len(args) > 1 else None
    if isinstance(source, RowsGradient):
        _take(rows, source.rows, gradient)
        return
    value, wanted = float(gradient), float(rows.value.to(gradient.dtype))
    if value == wanted or (value != value and wanted != wanted):
        return
    if name in _SETS and value == 0.0:
        rows.drop()
        rows.value = gradient.clone()
        return
    gradient.copy_(rows.value)
    raise RowUpdateError(
        f"{name} writes to the gradient of the handle of {rows.name}, whose one number stands for those of many rows. It can "
        "be multiplied, divided, and set to zero or None."
    )


def _operand(gradient: RowsGradient, name: str, args: tuple, kwargs: dict) -> Any:
    """What the gradient was multiplied or divided by: a number or a tensor of one. NotImplemented for anything else."""
    if _SCALES[name] == "neg":
        return None
    if name.startswith("amp_"):
        operand = args[2] if len(args) > 2 else kwargs.get("inv_scale")
    else:
        operand = args[1] if len(args) > 1 else kwargs.get("other")
        if operand is gradient and args[0] is not gradient and _SCALES[name] == "mul":
            operand = args[0]
        if isinstance(operand, (list, tuple)):
            operand = operand[next(i for i, one in enumerate(args[0]) if one is gradient)]
    if isinstance(operand, Tensor):
        fits = operand.numel() == 1 and not isinstance(operand, RowsGradient)
        return operand.detach().clone() if fits else NotImplemented
    fits = isinstance(operand, (int, float)) and kwargs.get("rounding_mode") is None
    return operand if fits else NotImplemented


def _carried(result: Any, name: str, given: list[RowsGradient], args: tuple, kwargs: dict) -> Any:
    """The result, with rows where it is the gradient itself, a copy, or a multiple of it; else a plain tensor."""
    if not isinstance(result, Tensor) or any(result is gradient for gradient in given):
        return result
    if result.numel() != 1 or not result.is_floating_point():
        return result
    gradient = args[0] if isinstance(args[0], RowsGradient) else given[0]
    if result.data_ptr() == gradient.data_ptr():
        return _with_rows(result, gradient.rows)
    rows = gradient.rows.copied()
    if name in _SCALES and (args[0] is gradient or _SCALES[name] == "mul"):
        operand = _operand(gradient, name, args, kwargs)
        if operand is NotImplemented:
            return result
        rows.scales.append((_SCALES[name], operand))
    elif name not in _COPIES and name != "nan_to_num":
        return result
    rows.value = result.clone()
    return _with_rows(result, rows)


def _norms(result: Any, name: str, args: tuple, kwargs: dict) -> Any:
    """A norm of another order than 2 is not that of one number, but of the rows'."""
    order = next((kwargs[key] for key in ("ord", "p") if key in kwargs), args[1] if len(args) > 1 else 2)
    if order in (2, "fro", None):
        return result
    if name != "foreach_norm":
        return _norm_of_order(result, args[0], order)
    return [_norm_of_order(norm, one, order) for norm, one in zip(result, args[0], strict=True)]


def _norm_of_order(norm: Tensor, gradient: Tensor, order: Any) -> Tensor:
    if not isinstance(gradient, RowsGradient) or gradient.rows.merged_UW is None:
        return norm
    rows = gradient.rows
    if not rows.is_whole or not isinstance(order, (int, float)) or order <= 0:
        raise RowUpdateError(
            f"A norm of order {order!r} of the gradient of {rows.name} is not known; clip by the norm of order 2."
        )
    return torch.linalg.vector_norm(rows.scaled()[1], order).to(norm).reshape(norm.shape)
