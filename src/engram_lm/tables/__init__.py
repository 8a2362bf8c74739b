"""Tables of learned rows: what a table can be asked for, the tiers that hold one, and the file that keeps one.

A table is `n_rows` records of `width` numbers, read at int64 addresses. Rows are never Parameters, buffers or
`state_dict` entries: `.to()`, `.half()`, DDP broadcasts and `save_pretrained` do not touch them. Training reaches them
through a one-element handle (see `tables.gradients`).

    table = DeviceTable(n_rows=4096, width=64)
    rows = table.gather(address)                # [..., 64] for address int64 [...]
    ticket = table.prefetch(address)            # decides when the work is done, never what the answer is
    rows = ticket.rows()

Bytes in files are read and written by `engram_lm.storage`, which needs no torch. Names load what they need when first used.
"""

from engram_lm.lazy import exports

_WHERE = {
    "DeviceTable": "device",
    "RowGradients": "gradients",
    "forget_pending": "gradients",
    "pending_rows": "gradients",
    "ShardedTable": "sharded",
    "RowAdam": "rules",
    "RowAdamMomentum": "rules",
    "RowMomentumSinkhorn": "rules",
    "RowRMSprop": "rules",
    "RowRule": "rules",
    "SGD": "rules",
    "rule_from_json": "rules",
    "Table": "protocol",
    "Ticket": "protocol",
    "ReadOnlyTable": "read_only",
    "LoggedTable": "logged",
}

__all__ = list(_WHERE)

__getattr__, __dir__ = exports(__name__, _WHERE)
