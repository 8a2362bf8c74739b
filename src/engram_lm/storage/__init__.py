"""The bytes of tables: the packed file, checkpoints that others shipped, codecs, and the tiers that rows are read from.

    layout = open_packed("table.engram")             # where the bytes of a row lie; open_shipped for released checkpoints
    with DiskStore(layout) as store:                 # or HostStore, CachedStore
        rows = store.gather(address)                 # NumPy alone; `engram_lm.tables` puts torch around it

`format` and `writer` are docs/format.md in code, `rowlog` trains a file where it lies. Names load what they need when first
used.
"""

from engram_lm.lazy import exports

_WHERE = {
    "CODECS": "codecs",
    "CachedStore": "cached",
    "DiskStore": "disk",
    "Extent": "layout",
    "Header": "format",
    "HostStore": "store",
    "Layout": "layout",
    "LoggedStore": "rowlog",
    "RowStore": "store",
    "TableWriter": "writer",
    "names_of": "shipped",
    "open_packed": "format",
    "open_shipped": "shipped",
    "read_header": "format",
    "verify": "format",
}

__all__ = list(_WHERE)

__getattr__, __dir__ = exports(__name__, _WHERE)
