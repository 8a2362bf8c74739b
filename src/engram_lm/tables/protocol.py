"""What a table can be asked for, whatever tier its rows lie on."""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from engram_lm.tables.gradients import RowGradients
    from engram_lm.tables.rules import RowRule


class Ticket(Protocol):
    """A gather that was asked for ahead of its use."""

    def rows(self) -> Any:
        """The same tensor `gather` would return; waits when it has to. May be called once."""


@runtime_checkable
class Table(Protocol):
    """Rows at addresses, on any tier; the same rows bit for bit for the same addresses."""

    n_rows: int
    width: int
    # Whether `prefetch` is worth calling before the rows are needed.
    fetches_ahead: bool

    def gather(self, address: Any, *, out: Any = None) -> Any:
        """Rows [..., width] at int64 addresses [...]. Raises AddressError before reading when one is out of range."""

    def prefetch(self, address: Any) -> Ticket:
        """Begin a gather and return its ticket."""

    def read(self, address: Any, handle: Any, ticket: Ticket | None = None) -> Any:
        """`gather`, with a gradient where rows train: what a layer calls, with the ticket it was given."""


@runtime_checkable
class TrainableTable(Table, Protocol):
    """A table whose rows are trained where they lie."""

    gradients: "RowGradients"

    def update(
        self, unique: Any, gradient: Any, *, rule: "RowRule", learning_rate: float, scale: float
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) with summed gradients [U, width]."""

    def checkpoint(self) -> dict[str, Any]:
        """Rows and row-optimizer state as named tensors."""

    def restore(self, tensors: dict[str, Any]) -> None:
        """The inverse of `checkpoint`; refuses other sizes."""
