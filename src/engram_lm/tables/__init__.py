"""Tables of learned rows: what a table can be asked for, and the tiers that hold one.

A table is `rows` records of `width` numbers, read at int64 addresses. Rows are never Parameters, buffers or
`state_dict` entries: `.to()`, `.half()`, DDP broadcasts and `save_pretrained` do not touch them. Training reaches them
through a one-element handle (see `tables.gradients`).

    table = DeviceTable(rows=4096, width=64)
    rows = table.gather(address)                # [..., 64] for address int64 [...]
    ticket = table.prefetch(address)            # decides when the work is done, never what the answer is
    rows = ticket.rows()
"""

from typing import Any, Protocol, runtime_checkable

from engram_lm.tables.device import DeviceTable
from engram_lm.tables.gradients import RowGradients, forget_pending, pending_rows
from engram_lm.tables.rules import SGD, RowAdam, RowRMSprop, RowRule, rule_from_json


class Ticket(Protocol):
    """A gather that was asked for ahead of its use."""

    def rows(self) -> Any:
        """The same tensor `gather` would return; waits when it has to. May be called once."""


@runtime_checkable
class Table(Protocol):
    """Rows at addresses, on any tier; the same rows bit for bit for the same addresses."""

    n_rows: int
    width: int

    def gather(self, address: Any, *, out: Any = None) -> Any:
        """Rows [..., width] at int64 addresses [...]. Raises AddressError before reading when one is out of range."""

    def prefetch(self, address: Any) -> Ticket:
        """Begin a gather and return its ticket."""


@runtime_checkable
class TrainableTable(Table, Protocol):
    """A table whose rows are trained where they lie."""

    gradients: RowGradients

    def update(
        self, unique: Any, gradient: Any, *, rule: RowRule, learning_rate: float, scale: float
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) with summed gradients [U, width]."""

    def checkpoint(self) -> dict[str, Any]:
        """Rows and row-optimizer state as named tensors."""

    def restore(self, tensors: dict[str, Any]) -> None:
        """The inverse of `checkpoint`; refuses other sizes."""


__all__ = [
    "SGD",
    "DeviceTable",
    "RowAdam",
    "RowGradients",
    "RowRMSprop",
    "RowRule",
    "Table",
    "Ticket",
    "TrainableTable",
    "forget_pending",
    "pending_rows",
    "rule_from_json",
]
