"""Rows in one tensor, on the CPU or an accelerator: the tier that every other tier must agree with.

New rows are zero and cost no memory until they are first written (private anonymous pages). On the CPU a gather is the
kernel of `storage.kernels.rows`; elsewhere it is `index_select`. Under torch.compile it is the custom op `engram_lm::gather`,
keyed by the table, so that a graph never holds rows.

Rows of bfloat16 train too: those a step touches become float32, take the rule's step, and are rounded back
stochastically (see `tables.kernels`), by the number of steps before, the table's seed, and the row's address.
"""

import copy
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import AddressError, CheckpointError, ConfigError, RowUpdateError
from engram_lm.storage.kernels import rows as kernels
from engram_lm.tables.gradients import Gather, RowGradients
from engram_lm.tables.protocol import Save
from engram_lm.tables.rounding import round_bf16_stochastic
from engram_lm.tables.rules import RowRule
from engram_lm.tables.saving import save_tensors

_KEYS = itertools.count(1)
_BY_KEY: "weakref.WeakValueDictionary[int, DeviceTable]" = weakref.WeakValueDictionary()


class DeviceTable:
    """`n_rows` rows of `width` numbers in one tensor.

    Args:
        n_rows, width: the shape of the table.
        dtype: float32 or bfloat16 (both trainable), or float16 (read only).
        device: where the rows lie. They stay there: moving the model does not move them.
        rule: the row rule that training uses; default RowAdam at 5 times the group's rate.
        name: how errors call it.
        seed: of the stochastic rounding of bfloat16 rows, from 0.
        first_row: address of the first row in the table that this one is a part of; rounding goes by that address.
    """

    def __init__(
        self,
        *,
        n_rows: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        rule: RowRule | None = None,
        name: str = "table",
        seed: int = 0,
        first_row: int = 0,
    ) -> None:
        if n_rows < 1 or width < 1:
            raise ConfigError(f"A table needs at least one row and one number a row; got {n_rows} x {width}.")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"Rows are float32, bfloat16 or float16; got {dtype}.")
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed is a whole number from 0 below 2^63; got {seed}.")
        self.n_rows, self.width = n_rows, width
        self.seed, self.first_row = seed, first_row
        self._steps = 0
        try:
            self._rows = _zeros((n_rows, width), dtype, torch.device(device))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"No memory for {name}: {n_rows:,} rows of {width} numbers are "
                f"{n_rows * width * dtype.itemsize / 2**30:,.0f} GiB ({error})."
            ) from None
        self._state: dict[str, Tensor] | None = None
        self.gradients = RowGradients(self, rule=rule, name=name)
        self._register()

    fetches_ahead = False
    identity = None
    trains = "one process"

    def _register(self) -> None:
        self.key = next(_KEYS)
        _BY_KEY[self.key] = self

    def __reduce__(self) -> tuple:
        raise CheckpointError(
            "A model with memory cannot be pickled (torch.save of a whole model): its rows are files of their own. Use "
            "model.save_pretrained(directory) and engram_lm.from_pretrained(directory)."
        )

    def __deepcopy__(self, memo: dict) -> "DeviceTable":
        twin = object.__new__(DeviceTable)
        memo[id(self)] = twin
        twin.n_rows, twin.width = self.n_rows, self.width
        twin.seed, twin.first_row, twin._steps = self.seed, self.first_row, self._steps
        twin._rows = self._rows.clone()
        twin._state = copy.deepcopy(self._state, memo)
        twin.gradients = self.gradients.copy_for(twin, memo)
        twin._register()
        return twin

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        return self._rows.device

    @property
    def bytes_per_row(self) -> int:
        return self.width * self._rows.element_size()

    def state_bytes(self) -> int:
        """Bytes of row-optimizer state (0 until the first update)."""
        return sum(tensor.nbytes for tensor in (self._state or {}).values())

    # ---- reading ------------------------------------------------------------------------------------------------

    def gather(self, address: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows [..., width] in the table's dtype at int64 `address` [...]; AddressError when one is out of range."""
        shape = (*address.shape, self.width)
        if self.device.type != "cpu":
            rows = self._rows.index_select(0, address.reshape(-1).to(self.device)).view(shape)
            return rows if out is None else out.copy_(rows)
        address_N = address.detach().reshape(-1).to("cpu").numpy()
        bad = kernels.first_out_of_range(address_N, self.n_rows)
        if bad >= 0:
            raise AddressError(
                f"Address {address_N[bad]} at place {bad} is outside {self.gradients.name}, which has {self.n_rows} rows."
            )
        if out is None:
            out = torch.empty(shape, dtype=self._rows.dtype)
        elif out.shape != shape or out.dtype != self._rows.dtype or not out.is_contiguous():
            raise AddressError(f"out must be a contiguous {tuple(shape)} tensor of {self._rows.dtype}.")
        kernels.gather(self._rows.data_ptr(), address_N, out.data_ptr(), self.bytes_per_row)
        return out

    def prefetch(self, address: Tensor) -> "Ready":
        """Memory is as near as this table gets: the ticket gathers when asked."""
        return Ready(self, address)

    def read(self, address: Tensor, handle: Tensor, ticket: "Ready | None" = None) -> Tensor:
        """`gather` with a gradient: what a layer calls. `handle` must be this table's handle parameter."""
        if torch.compiler.is_compiling():
            return _gather_op(handle, address, self.key, self.width, self._rows.dtype)
        if torch.is_grad_enabled() and handle.requires_grad:
            return Gather.apply(handle, self, address, ticket)
        return self.gather(address)

    # ---- writing ------------------------------------------------------------------------------------------------

    def update(
        self, unique: Tensor, gradient: Tensor, *, rule: RowRule, learning_rate: float, scale: float = 1.0
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) with gradients float32 [U, width]."""
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise RowUpdateError(
                f"Rows of {self.gradients.name} are {self.dtype}, which do not train; use float32 or bfloat16."
            )
        if self._state is None:
            self._state = self._new_state(rule, self.device)
        step = {"learning_rate": learning_rate, "scale": scale}
        if self.dtype == torch.float32:
            rule.apply(self._rows, self._state, unique, gradient, **step)
        else:
            rows_UW = self._rows[unique].float()
            state = {name: tensor[unique] for name, tensor in self._state.items()}
            place_U = torch.arange(len(unique), device=unique.device)
            rule.apply(rows_UW, state, place_U, gradient, **step)
            self._rows[unique] = round_bf16_stochastic(
                rows_UW, unique + self.first_row, seed=self.seed, step=self._steps
            )
            for name, tensor in state.items():
                self._state[name][unique] = tensor
        self._steps += 1

    def rows_view(self) -> Tensor:
        """The rows themselves, [n_rows, width]: for files, tests and instruments. Writing to it is writing the table."""
        return self._rows

    def checkpoint(self) -> dict[str, Tensor]:
        """Rows and row-optimizer state by name (views, not copies); of bfloat16 rows also the rounding's seed and step."""
        tensors = {"rows": self._rows}
        tensors |= {f"state.{name}": tensor for name, tensor in (self._state or {}).items()}
        if self.dtype == torch.bfloat16 and self._steps:
            tensors["state.rounding"] = torch.tensor([self.seed, self._steps])
        return tensors

    def where(self) -> None:
        """Its rows are in no log."""

    def save(self, save: Save, stem: str, *, identity: str) -> dict[str, Any]:
        """See `Table.save`."""
        return save_tensors(self, save, stem, identity=identity)

    def require_fits(self, tensors: dict[str, Tensor]) -> None:
        """CheckpointError where `restore` would refuse."""
        rows, state = tensors.get("rows"), _state_in(tensors)
        if rows is None or tuple(rows.shape) != (self.n_rows, self.width):
            got = "no rows" if rows is None else f"rows of shape {tuple(rows.shape)}"
            raise CheckpointError(
                f"{self.gradients.name} has {self.n_rows} rows of {self.width} numbers; the checkpoint holds {got}."
            )
        if state.pop("rounding", None) is not None and self.dtype != torch.bfloat16:
            raise CheckpointError(
                f"{self.gradients.name} holds {self.dtype}; the checkpoint's state is of bfloat16 rows."
            )
        wanted = self._new_state(self.gradients.rule, torch.device("meta"))
        if state and (set(wanted) != set(state) or any(wanted[k].shape != state[k].shape for k in wanted)):
            raise CheckpointError(
                f"{self.gradients.name} trains with {self.gradients.rule.name} (state {sorted(wanted)}); the "
                f"checkpoint holds state {sorted(state)}."
            )

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `checkpoint`. Rows of another shape are refused; state is replaced, or dropped when absent."""
        self.require_fits(tensors)
        state = _state_in(tensors)
        rounding = state.pop("rounding", None)
        self._rows.copy_(tensors["rows"])
        self._state, self._steps = None, 0
        if state:
            self._state = self._new_state(self.gradients.rule, self.device)
            for name, tensor in self._state.items():
                tensor.copy_(state[name])
        if rounding is not None:
            self.seed, self._steps = (int(number) for number in rounding)

    def _new_state(self, rule: RowRule, device: torch.device) -> dict[str, Tensor]:
        return rule.new_state(self.n_rows, self.width, lambda shape, dtype: _zeros(shape, dtype, device))


class Ready:
    """A ticket whose work is done when it is asked for."""

    def __init__(self, table: DeviceTable, address: Tensor) -> None:
        self._table, self._address = table, address

    def rows(self) -> Tensor:
        return self._table.gather(self._address)


def _state_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")
    }


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(kernels.zero_pages(n_bytes), dtype=dtype, count=torch.Size(shape).numel()).view(
        shape
    )


# ---- torch.compile: a gather is an op keyed by table, its gradient another --------------------------------------------


@torch.library.custom_op("engram_lm::gather", mutates_args=())
def _gather_op(handle: Tensor, address: Tensor, key: int, width: int, dtype: torch.dtype) -> Tensor:
    return _BY_KEY[key].gather(address)


@_gather_op.register_fake
def _(handle, address, key, width, dtype):
    return handle.new_empty((*address.shape, width), dtype=dtype)


@torch.library.custom_op("engram_lm::receive", mutates_args=())
def _receive_op(handle: Tensor, address: Tensor, gradient: Tensor, key: int) -> Tensor:
    _BY_KEY[key].gradients.receive(address, gradient)
    return torch.zeros_like(handle)


@_receive_op.register_fake
def _(handle, address, gradient, key):
    return torch.zeros_like(handle)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    handle, address, key, *_ = inputs
    ctx.key = key
    ctx.save_for_backward(handle, address)


def _gather_backward(ctx: Any, gradient: Tensor):
    handle, address = ctx.saved_tensors
    return _receive_op(handle, address, gradient, ctx.key), None, None, None, None


_gather_op.register_autograd(_gather_backward, setup_context=_setup_context)
