"""A table larger than memory that trains on disk: a packed file, and a log of the rows that changed.

    table = LoggedTable.open("layer1.engram", "layer1.rows", rule=RowAdam())
    use_table(model, 1, table)
    ...                                # any optimizer, through the handle, as for rows in memory
    table.checkpoint()                 # {"log_position": ...}: an fsync, no copy of the rows
    table.restore(checkpoint)          # cuts the log there

An update reads the touched rows and their state, applies the row rule to that small array, and appends it to the log:
the numbers are those of `DeviceTable`, bit for bit. Rows of codec bf16 are rounded stochastically, as there.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError
from engram_lm.storage.codecs import bf16_values
from engram_lm.storage.disk import DiskStore
from engram_lm.storage.format import open_packed
from engram_lm.storage.rowlog import LoggedStore
from engram_lm.tables.gradients import Gather, RowGradients
from engram_lm.tables.protocol import Save
from engram_lm.tables.read_only import ReadOnlyTable, StoredTicket
from engram_lm.tables.rounding import round_bf16_stochastic
from engram_lm.tables.rules import RowAdam, RowRule
from engram_lm.tables.saving import packed_name


class LoggedTable(ReadOnlyTable):
    """Rows of a LoggedStore, trainable.

    Args:
        store: its `rule` and `state_bytes` must be this rule's.
        rule: the row rule; default RowAdam.
        seed: of stochastic rounding, for codec bf16.
        dtype, threads, shadow: as StoredTable.
    """

    trains = "one process"

    def __init__(
        self, store: LoggedStore, *, rule: RowRule | None = None, seed: int = 0, dtype: torch.dtype = torch.float32,
        threads: int = 2, shadow: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(store, dtype=dtype, threads=threads, shadow=shadow)
        self.gradients = RowGradients(self, rule=rule or RowAdam(), name=store.name)
        self.seed = seed
        self._shapes = {
            name: (tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in self.gradients.rule.new_state(1, self.width, _small).items()
        }
        self.gradients.set_updates(store.last_update, run=self.run)

    @classmethod
    def open(
        cls,
        base: str | os.PathLike,
        log: str | os.PathLike,
        *,
        state: str | os.PathLike | None = None,
        rule: RowRule | None = None,
        depth: int = 64,
        **options: Any,
    ) -> "LoggedTable":
        """The packed file `base` with the log `log`, which is made where it is missing.

        state: the state file that `store.fold` wrote with the base, for training to go on as if it had not been folded.
        """
        rule = rule or RowAdam()
        layout = open_packed(base)
        store = LoggedStore(
            DiskStore(layout, depth=depth),
            log,
            state_bytes=rule.state_bytes_per_row(layout.width),
            rule=rule.to_json(),
            states=None if state is None else DiskStore(open_packed(state), depth=depth),
        )
        return cls(store, rule=rule, **options)

    def __deepcopy__(self, memo: dict) -> "LoggedTable":
        raise CheckpointError(
            f"{self.store.name} trains on disk, and two models cannot write one log. Checkpoint, and open it again."
        )

    @property
    def run(self) -> int:
        """The number of the training run: here a hash of what the log holds, as it is known when the log is opened again."""
        return (int(self.store.chain, 16) >> 12 or 1) if self.store.last_update else 0

    def state_bytes(self) -> int:
        """Bytes of row-optimizer state in the log, for the rows that it holds."""
        return self.store.rows_logged * self.store.state_bytes

    def read(self, address: Tensor, handle: Tensor, ticket: StoredTicket | None = None) -> Tensor:
        if torch.is_grad_enabled() and handle.requires_grad and not torch.compiler.is_compiling():
            return Gather.apply(handle, self, address, ticket)
        return super().read(address, handle, ticket)

    def update(
        self, unique: Tensor, gradient: Tensor, *, rule: RowRule, learning_rate: float, scale: float = 1.0
    ) -> None:
        """Apply `rule` to rows `unique` (int64 [U], ascending) with gradients float32 [U, width]; append them to the log."""
        row_U = np.ascontiguousarray(unique.cpu().numpy(), np.int64)
        record_UR, state_US = self.store.read_entries(row_U)
        bf16 = self.store.codec.name == "bf16"
        rows_UW = torch.from_numpy(bf16_values(record_UR.view("<u2")) if bf16 else record_UR.view("<f4"))
        state = self._unpack(state_US)
        rule.apply(
            rows_UW, state, torch.arange(len(row_U)), gradient.cpu(), learning_rate=learning_rate, scale=scale
        )
        if bf16:
            bits_UW = round_bf16_stochastic(
                rows_UW, unique.cpu(), seed=self.seed, step=self.store.last_update
            )
            record_UR = bits_UW.view(torch.uint16).numpy().view(np.uint8)
        else:
            record_UR = rows_UW.numpy().view(np.uint8)
        self.store.append(row_U, record_UR, self._pack(state), update=self.store.last_update + 1)

    def checkpoint(self) -> dict[str, Tensor]:
        """{"log_position": int64 [2]}: where the log ends, now on disk, and how many updates it holds."""
        return {"log_position": torch.tensor([self.store.sync(), self.gradients.updates])}

    def where(self) -> dict[str, Any]:
        """What a checkpoint writes down: the base, the log, the position that is now on disk, and a hash of all before it."""
        base = self.store.base.layout.segments[0].path
        return {
            "base": str(base.resolve()),
            "log": str(self.store.path.resolve()),
            "position": self.store.sync(),
            "chain": self.store.chain,
        }

    def save(self, save: Save, stem: str, *, identity: str) -> dict[str, Any]:
        """See `Table.save`. With row state the log's position is written down; else base and log become a packed file."""
        if save.row_state:
            return {"row_state": False, "log": self.where()}
        self.store.fold(save.path(packed_name(stem)), note=save.id)
        return {"row_state": False, "chain": self.store.chain}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Cut the log at the checkpoint's position. CheckpointError where the log does not hold it."""
        if "log_position" not in tensors:
            raise CheckpointError(
                f"{self.store.name} trains on disk; the checkpoint names no position of its log."
            )
        position, updates = tensors["log_position"].tolist()
        self.store.roll_back(position)
        self.gradients.set_updates(updates, run=self.run)

    def _unpack(self, state_US: np.ndarray) -> dict[str, Tensor]:
        state, at = {}, 0
        for name, (shape, dtype) in self._shapes.items():
            n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            part = torch.from_numpy(np.ascontiguousarray(state_US[:, at : at + n_bytes]))
            state[name] = part.view(dtype).reshape(len(state_US), *shape)
            at += n_bytes
        return state

    def _pack(self, state: dict[str, Tensor]) -> np.ndarray | None:
        if not state:
            return None
        parts = [tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8) for tensor in state.values()]
        return torch.cat(parts, 1).numpy()


def _small(shape: tuple, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)
