"""What a table can be asked for, whatever tier its rows lie on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from engram_lm.tables.gradients import RowGradients
    from engram_lm.tables.rules import RowRule


class Ticket(Protocol):
    """A gather that was asked for ahead of its use."""

    def rows(self) -> Any:
        """The same tensor `gather` would return; waits when it has to. May be called once."""


class Save(Protocol):
    """A directory that is being written; a table puts its files into it.

    id: of this save, 16 hexadecimal digits. row_dtype: of rows in the files, as they are for None. row_state: whether the row
    optimizers' state is saved too, for training to go on.
    """

    id: str
    row_dtype: Any
    row_state: bool

    def tensors(self, name: str, tensors: dict[str, Any], **marks: str) -> None:
        """Write a safetensors file with these marks beside those that every file of the save has."""

    def path(self, name: str) -> Path:
        """Where the caller writes a file that is to be called `name` once the save is whole."""


@runtime_checkable
class Table(Protocol):
    """Rows at addresses, on any tier; the same rows bit for bit for the same addresses."""

    n_rows: int
    width: int
    bytes_per_row: int
    # where rows are read: addresses are best given there
    device: Any
    # the readable facts of the identity of its addresses, None where it does not say
    identity: dict | None
    # by whom its rows are trained: nobody, one process, or the processes of its group together
    trains: Literal["never", "one process", "group"]
    # Whether `prefetch` is worth calling before the rows are needed.
    fetches_ahead: bool
    # the handle through which rows train, and how often they did; a table that never trains refuses updates
    gradients: "RowGradients"

    def gather(self, address: Any, *, out: Any = None) -> Any:
        """Rows [..., width] at int64 addresses [...]. Raises AddressError before reading when one is out of range."""

    def prefetch(self, address: Any) -> Ticket:
        """Begin a gather and return its ticket."""

    def read(self, address: Any, handle: Any, ticket: Ticket | None = None) -> Any:
        """`gather`, with a gradient where rows train: what a layer calls, with the ticket it was given."""

    def update(
        self, unique: Any, gradient: Any, *, rule: "RowRule", learning_rate: float, scale: float
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) with summed gradients [U, width]."""

    def checkpoint(self) -> dict[str, Any]:
        """Rows and row-optimizer state as named tensors."""

    def restore(self, tensors: dict[str, Any]) -> None:
        """The inverse of `checkpoint`; refuses other sizes."""

    def where(self) -> dict[str, Any] | None:
        """The log that holds the rows and its position, now on disk; None where rows are in no log."""

    def save(self, save: Save, stem: str, *, identity: str) -> dict[str, Any]:
        """Put the rows into a save, named by `stem` (MEMORY-BLOCK); returns what memory.json says of them.

        identity: hash of the addresses' identity.
        """
