"""Row rules: how the summed gradient of a row changes that row, with optimizer state of a few bytes a row.

The paper trains tables with Adam at 5x the base rate and no weight decay (arXiv 2601.07372, training recipe). A full
Adam keeps 8 bytes a *number*; the first three rules keep 0 to 8 bytes a *row*, which is what lets a table larger than
the accelerator be trained: the second moment is the mean of squares over the row, and there is no first moment.

    SGD                  row -= lr g                         (for tests: bit-equal to a dense embedding)
    RowRMSprop           v <- b v + (1-b) mean(g^2);               row -= lr g / (sqrt(v) + eps)
    RowAdam              v <- b v + (1-b) mean(g^2);  n <- n + 1;  row -= lr g / (sqrt(v / (1 - b^n)) + eps)
    RowAdamMomentum      as RowAdam with m <- a m + (1-a) g;  m / (1 - a^n) in the place of g
    RowMomentumSinkhorn  Nesterov momentum, then rows and columns of the step brought to one norm (see the class)

The last two keep a first moment for every number: 4 bytes each beside the rows' own 4 (or 2).

Only rows touched in a step take part in it. State of the others is left as it is (lazy): no moment decays and no row
moves while no gradient reaches it, and n counts the steps in which this row was touched. lr is the optimizer group's
rate times `rate`. Every `apply` is a kernel on the CPU and `apply_plain` anywhere else; tests compare the two.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from engram_lm.errors import ConfigError
from engram_lm.storage.kernels import rows as kernels


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """Base of the rules. `rate` multiplies the learning rate of the optimizer group that holds the table's handle."""

    rate: float = 5.0

    name: ClassVar[str] = ""
    # Whether a row's step depends on the other rows of the step, so that rows kept apart cannot be stepped apart.
    couples_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"{type(self).__name__}.{field} is {value}; it must be greater than 0.")
        for field in ("beta1", "beta2", "decay", "momentum"):
            if not getattr(self, field, 0.5) < 1:
                raise ConfigError(
                    f"{type(self).__name__}.{field} is {getattr(self, field)}; it must be below 1."
                )

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def state_bytes_per_row(self, width: int) -> int:
        """Bytes of optimizer state beside each row of `width` numbers."""
        return 0

    def new_state(self, n_rows: int, width: int, allocate: Any) -> dict[str, torch.Tensor]:
        """State tensors [n_rows] or [n_rows, width], made by allocate(shape, dtype) as zeros."""
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

    def state_bytes_per_row(self, width: int) -> int:
        return 4

    def new_state(self, n_rows, width, allocate) -> dict[str, torch.Tensor]:
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

    def state_bytes_per_row(self, width: int) -> int:
        return 8

    def new_state(self, n_rows, width, allocate) -> dict[str, torch.Tensor]:
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


@dataclass(frozen=True, kw_only=True)
class RowAdamMomentum(RowRule):
    """Adam with a first moment for every number, and one second moment and count a row: 4 width + 8 bytes a row.

    m <- beta1 m + (1-beta1) g;  v <- beta2 v + (1-beta2) mean(g^2);  n <- n + 1
    row -= lr m / (1 - beta1^n) / (sqrt(v / (1 - beta2^n)) + eps)            (arXiv 1412.6980, v shared by the row)
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    name: ClassVar[str] = "row-adam-momentum"

    def state_bytes_per_row(self, width: int) -> int:
        return 4 * width + 8

    def new_state(self, n_rows, width, allocate) -> dict[str, torch.Tensor]:
        return {
            "first_moment": allocate((n_rows, width), torch.float32),
            "second_moment": allocate((n_rows,), torch.float32),
            "count": allocate((n_rows,), torch.int32),
        }

    def apply_fast(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        kernels.update_adam_momentum(
            rows_RW.numpy(),
            state["first_moment"].numpy(),
            state["second_moment"].numpy(),
            state["count"].numpy(),
            unique_U.numpy(),
            gradient_UW.numpy(),
            rate,
            _float32(scale),
            self.beta1,
            self.beta2,
            self.eps,
        )

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        gradient_UW = (scale * gradient_UW).double()
        state["count"][unique_U] += 1
        count_U = state["count"][unique_U].double()
        first_UW = (
            self.beta1 * state["first_moment"][unique_U].double() + (1 - self.beta1) * gradient_UW
        ).float()
        second_U = (
            self.beta2 * state["second_moment"][unique_U].double()
            + (1 - self.beta2) * gradient_UW.square().mean(1)
        ).float()
        state["first_moment"][unique_U], state["second_moment"][unique_U] = first_UW, second_U
        corrected_U = second_U.double() / (1 - self.beta2**count_U)
        step_U = (rate / ((1 - self.beta1**count_U) * (corrected_U.sqrt() + self.eps))).float()
        rows_RW[unique_U] -= step_U[:, None] * first_UW


@dataclass(frozen=True, kw_only=True)
class RowMomentumSinkhorn(RowRule):
    """DeepSeek V4.1's rule for tables: Nesterov momentum, then Sinkhorn balancing. 4 width bytes a row.

    With G [U, W] the gradients of the U rows touched in this step and M their momentum:

        M <- b M + (1-b) G;   N = b M + (1-b) G;   rows of N with a norm of at most tau times the mean norm become zero
        U = N with, K times, every row (1st, 3rd, ... time) or every column (2nd, 4th, ...) divided by its L2 norm
        row -= gamma lr sqrt(W) U

    K is odd, so that rows come last: every row that is not zero moves by gamma lr in root mean square, however large its
    gradient. Rows and columns of zeros stay zero. "Rows" and "mean" are those of this step: untouched rows have no part,
    and their momentum waits (it does not decay with the steps that pass them by).

    Args:
        gamma, balancings, tau, momentum: gamma, K, tau and b above, with V4.1's values.
        rate: 1 here and not 5, as the size of the step does not come from the gradient.
    """

    rate: float = 1.0
    gamma: float = 0.18
    balancings: int = 11
    tau: float = 1e-3
    momentum: float = 0.95
    name: ClassVar[str] = "row-momentum-sinkhorn"
    couples_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.balancings, int) or self.balancings % 2 == 0:
            raise ConfigError(
                f"RowMomentumSinkhorn.balancings is {self.balancings}; it must be odd, so that rows come last."
            )

    def state_bytes_per_row(self, width: int) -> int:
        return 4 * width

    def new_state(self, n_rows, width, allocate) -> dict[str, torch.Tensor]:
        return {"momentum": allocate((n_rows, width), torch.float32)}

    def apply_fast(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        kernels.update_sinkhorn(
            rows_RW.numpy(),
            state["momentum"].numpy(),
            unique_U.numpy(),
            gradient_UW.numpy(),
            rate * self.gamma,
            _float32(scale),
            self.momentum,
            self.tau,
            self.balancings,
        )

    def apply_plain(self, rows_RW, state, unique_U, gradient_UW, rate, scale) -> None:
        if len(unique_U) == 0:
            return
        gradient_UW = (scale * gradient_UW).double()
        b, momentum_RW = self.momentum, state["momentum"]
        momentum_RW[unique_U] = (b * momentum_RW[unique_U].double() + (1 - b) * gradient_UW).float()
        balanced_UW = (b * momentum_RW[unique_U].double() + (1 - b) * gradient_UW).float().double()
        norm_U = balanced_UW.norm(dim=1)
        balanced_UW[norm_U <= self.tau * norm_U.mean()] = 0.0
        for k in range(self.balancings):
            norm = balanced_UW.norm(dim=1 if k % 2 == 0 else 0, keepdim=True)
            balanced_UW /= norm.masked_fill(norm == 0, 1.0)
        rows_RW[unique_U] -= (rate * self.gamma * balanced_UW.shape[1] ** 0.5 * balanced_UW).float()


def _float32(value: float):
    """As a float32 scalar: numba would otherwise carry the product in float64, and torch does not."""
    return torch.tensor(value, dtype=torch.float32).numpy()[()]


RULES: dict[str, type[RowRule]] = {
    rule.name: rule for rule in (SGD, RowRMSprop, RowAdam, RowAdamMomentum, RowMomentumSinkhorn)
}


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
