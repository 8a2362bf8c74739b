"""Row rules: how the summed gradient of a row changes that row, with optimizer state of a few bytes a row.

The paper trains tables with Adam at 5x the base rate and no weight decay (arXiv 2601.07372, training recipe). A full
Adam keeps 8 bytes a *number*; the rules here keep 4 or 8 bytes a *row*, which is what lets a table larger than the
accelerator be trained: the second moment is the mean of squares over the row, and there is no first moment (beta1 = 0).

    RowAdam     v <- b v + (1-b) mean(g^2);  n <- n + 1;  row -= lr g / (sqrt(v / (1 - b^n)) + eps)
    RowRMSprop  v <- b v + (1-b) mean(g^2);               row -= lr g / (sqrt(v) + eps)
    SGD         row -= lr g                               (for tests: bit-equal to a dense embedding)

n counts the steps in which this row was touched. lr is the optimizer group's rate times `rate`.
Every `apply` is a kernel on the CPU and `apply_plain` anywhere else; tests compare the two.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from engram_lm.errors import ConfigError
from engram_lm.kernels import rows as kernels


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """Base of the rules. `rate` multiplies the learning rate of the optimizer group that holds the table's handle."""

    rate: float = 5.0

    name: ClassVar[str] = ""
    bytes_per_row: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"{type(self).__name__}.{field} is {value}; it must be greater than 0.")
        for field in ("beta2", "decay"):
            if not getattr(self, field, 0.5) < 1:
                raise ConfigError(
                    f"{type(self).__name__}.{field} is {getattr(self, field)}; it must be below 1."
                )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def new_state(self, n_rows: int, allocate: Any) -> dict[str, torch.Tensor]:
        """State tensors of length n_rows, made by allocate(shape, dtype) as zeros."""
        return {}

    def apply(self, rows_RW, state, unique_U, gradient_UW, *, learning_rate: float, scale: float) -> None:
        """Change rows in place. rows float32 [R, W]; unique int64 [U] ascending; gradient float32 [U, W]."""
        if rows_RW.device.type == "cpu":
            self.apply_fast(rows_RW, state, unique_U, gradient_UW, self.rate * learning_rate, scale)
        else:
            self.apply_plain(rows_RW, state, unique_U, gradient_UW, self.rate * learning_rate, scale)

    def apply_fast(self, rows_RW, state, unique_U, gradient_UW, rate: float, scale: float) -> None:
        raise NotImplementedError

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate: float, scale: float) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SGD(RowRule):
    """row -= lr * g; no state."""

    rate: float = 1.0
    name: ClassVar[str] = "sgd"

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        # torch's own multiply-add, so that the last bit is the one torch.optim.SGD gives a dense embedding
        rows_RW[unique_U] = rows_RW[unique_U].add_(scale * gradient_UW, alpha=-rate)

    apply_fast = apply_plain


@dataclass(frozen=True, kw_only=True)
class RowRMSprop(RowRule):
    """RMSprop with one second moment a row: 4 bytes a row."""

    decay: float = 0.99
    eps: float = 1e-8
    name: ClassVar[str] = "row-rmsprop"
    bytes_per_row: ClassVar[int] = 4

    def new_state(self, n_rows, allocate) -> dict[str, torch.Tensor]:
        return {"second_moment": allocate((n_rows,), torch.float32)}

    def apply_fast(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        kernels.update_rmsprop(
            rows_RW.numpy(),
            state["second_moment"].numpy(),
            unique_U.numpy(),
            gradient_UW.numpy(),
            rate,
            _float32(scale),
            self.decay,
            self.eps,
        )

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        gradient_UW = scale * gradient_UW
        square_U = gradient_UW.double().square().mean(1)
        second_U = (
            self.decay * state["second_moment"][unique_U].double() + (1 - self.decay) * square_U
        ).float()
        state["second_moment"][unique_U] = second_U
        step_U = (rate / (second_U.double().sqrt() + self.eps)).float()
        rows_RW[unique_U] -= step_U[:, None] * gradient_UW


@dataclass(frozen=True, kw_only=True)
class RowAdam(RowRule):
    """Adam with beta1 = 0 and one second moment and count a row: 8 bytes a row."""

    beta2: float = 0.999
    eps: float = 1e-8
    name: ClassVar[str] = "row-adam"
    bytes_per_row: ClassVar[int] = 8

    def new_state(self, n_rows, allocate) -> dict[str, torch.Tensor]:
        return {
            "second_moment": allocate((n_rows,), torch.float32),
            "count": allocate((n_rows,), torch.int32),
        }

    def apply_fast(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        kernels.update_adam(
            rows_RW.numpy(),
            state["second_moment"].numpy(),
            state["count"].numpy(),
            unique_U.numpy(),
            gradient_UW.numpy(),
            rate,
            _float32(scale),
            self.beta2,
            self.eps,
        )

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        gradient_UW = scale * gradient_UW
        square_U = gradient_UW.double().square().mean(1)
        state["count"][unique_U] += 1
        second_U = (
            self.beta2 * state["second_moment"][unique_U].double() + (1 - self.beta2) * square_U
        ).float()
        state["second_moment"][unique_U] = second_U
        corrected_U = second_U.double() / (1 - self.beta2 ** state["count"][unique_U].double())
        step_U = (rate / (corrected_U.sqrt() + self.eps)).float()
        rows_RW[unique_U] -= step_U[:, None] * gradient_UW


def _float32(value: float):
    """As a float32 scalar: numba would otherwise carry the product in float64, and torch does not."""
    return torch.tensor(value, dtype=torch.float32).numpy()[()]


RULES: dict[str, type[RowRule]] = {rule.name: rule for rule in (SGD, RowRMSprop, RowAdam)}


def rule_from_json(data: dict[str, Any] | str) -> RowRule:
    """A rule from its name or its `to_json`. Unknown names and keys raise ConfigError."""
    data = {"name": data} if isinstance(data, str) else dict(data)
    name = data.pop("name", None)
    if name not in RULES:
        raise ConfigError(f"Unknown row rule {name!r}; this build has {', '.join(sorted(RULES))}.")
    try:
        return RULES[name](**data)
    except TypeError as error:
        raise ConfigError(f"Row rule {name!r}: {error}.") from None
