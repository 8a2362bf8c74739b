"""Small pieces of work that between them call the kernels of every usual command, with the arguments that it calls them with.

What this is not: a test. Nothing is looked at but that it runs.

    PARTS["indexes"](Path("an/empty/directory"))            # compiles what indexes need, or loads it
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = 300  # tokens that a document repeats, so that matches are long
_SMALL, _LARGE = 1000, 70_000  # vocabularies whose ids take two bytes, and four


# ---- indexes ------------------------------------------------------------------------------------------------------------


def _documents(n: int, tokens: int) -> list[tuple[str, np.ndarray, str]]:
    """Documents of one wording, so that intervals of equal contexts are wide, each with an end of its own."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 9, tokens)
    ends = rng.integers(0, _SMALL, (n, _WORDS))
    return [(f"{i}", np.concatenate([common, ends[i]]), f"{i}.txt") for i in range(n)]


def _filled(directory: Path, vocab_size: int) -> Any:
    from engram_lm.index.store import Index

    store = Index.create(directory, vocab_size=vocab_size, tokenizer="none", merging="by hand")
    documents = _documents(12, 1500)
    store.add(documents[:8])
    store.add(documents[8:])
    return store


def build(directory: Path, vocab_size: int) -> None:
    """An index that grows, shrinks, is merged, purged and verified."""
    with _filled(directory, vocab_size) as store:
        store.update(add=[("12", np.arange(40), "12.txt")], delete=["1"])
        store.purge(["4"])
        store.merge()
        store.verify()


def search(directory: Path) -> None:
    """Matches, probabilities and scores over several segments, some of whose documents are deleted."""
    with _filled(directory, _SMALL) as store:
        store.delete(["2"])
        snapshot = store.snapshot()
        context = _documents(1, 1500)[0][1][:40]
        match = snapshot.match(context)
        snapshot.continuations(match, match.depth)
        snapshot.documents_of(match, match.depth)
        snapshot.longest(context)
        for counting in ({}, {"count": "sources"}, {"count": "documents", "cap": 1}):
            snapshot.prepare(**counting)
            snapshot.distribution(context, **counting)
        segment = snapshot.views[0].segment
        segment.continuations(segment.match(context), 0)


def score(directory: Path) -> None:
    """Scores of a prompt."""
    with _filled(directory, _SMALL) as store:
        ids = _documents(1, 200)[0][1]
        for counting in ({}, {"count": "sources"}):
            store.snapshot().score(ids, **counting)


def mix() -> None:
    """Mixtures of a model's logits and what memory says."""
    from engram_lm.mixing import onepass
    from engram_lm.mixing.mix import mix as mixture

    logits_TV = np.zeros((2, 64), np.float32)
    mixture(logits_TV[0], np.full(32, 1 / 32, np.float32), lam=0.5, out=np.zeros(64, np.float32))
    onepass.survey_rows(logits_TV, np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros((2, 6)))


# ---- tables -------------------------------------------------------------------------------------------------------------


def read(directory: Path) -> None:
    """Rows of every codec from memory, from disk and read ahead; caches of rows; addresses."""
    from engram_lm.storage import CODECS

    for codec in CODECS:
        _read(directory / codec, codec)
    _read_logged(directory)
    _scheme().addresses(np.arange(40)[None])


def _written(path: Path, codec: str, width: int = 64) -> Any:
    from engram_lm.storage import TableWriter, open_packed, verify

    with TableWriter(path, n_rows=400, width=width, codec=codec) as writer:
        writer.add_rows(np.zeros((400, width), np.float32))
        writer.finish()
    verify(path)
    return open_packed(path)


def _read(path: Path, codec: str) -> None:
    from engram_lm.storage import CachedStore, DiskStore, HostStore

    layout, address, out = _written(path, codec), np.arange(40), np.zeros((40, 64), np.float32)
    for store in (
        HostStore.load(layout),
        DiskStore(layout),
        DiskStore(layout, direct=False),
        CachedStore(DiskStore(layout), budget_bytes=100_000),
    ):
        for dtype in ("fp32", "bf16"):
            store.gather(address, dtype=dtype)
            begun = store.begin(address.ctypes.data, address.size)
            if begun is not None:
                begun.finish(out.ctypes.data, dtype)
        store.close()


def _read_logged(directory: Path) -> None:
    from engram_lm.storage import DiskStore, LoggedStore

    store = LoggedStore(DiskStore(_written(directory / "base", "fp32")), directory / "log")
    rows = np.arange(20)
    store.append(rows, np.zeros((20, 256), np.uint8), np.zeros((20, 0), np.uint8), update=1)
    store.read_records(np.arange(40), np.zeros((40, 256), np.uint8))
    store.sync()
    store.close()


def _scheme() -> Any:
    from engram_lm.addressing import PROFILES, resolve

    (scheme,) = resolve(PROFILES["paper"], vocab_size=50_000, layers=(1,), fill_id=0)
    return scheme


def simulate() -> None:
    """Caches of rows, simulated."""
    from engram_lm.cachesim.requests import Requests
    from engram_lm.cachesim.simulate import POLICIES
    from engram_lm.cachesim.simulate import simulate as play

    tokens_Q = np.full(4, 50)
    requests = Requests(
        name="none", ids_T=np.arange(200) % 60, tokens_Q=tokens_Q, prompt_Q=np.zeros_like(tokens_Q)
    )
    for warm_up in (0.0, 0.3):
        play(requests, _scheme(), bytes_per_row=64, budgets=[10_000], policies=POLICIES, warm_up=warm_up)


# ---- training; needs torch ------------------------------------------------------------------------------------------------


def train(directory: Path) -> None:
    """A step of every row rule, of rows in memory and on disk; the gate and the short conv, forward and backward."""
    import torch

    from engram_lm.tables import DeviceTable, LoggedTable, rule_from_json

    for name in ("row-adam", "row-adam-momentum", "row-rmsprop", "row-momentum-sinkhorn", "sgd"):
        _step(DeviceTable(n_rows=400, width=64, rule=rule_from_json(name)))
    _step(DeviceTable(n_rows=400, width=64, dtype=torch.bfloat16, rule=rule_from_json("row-adam")))
    base, log = directory / "trained", directory / "trained.log"
    _written(base, "bf16")
    table = LoggedTable.open(base, log, rule=rule_from_json("row-adam"), dtype=torch.bfloat16)
    _step(table)
    _layer()


def _step(table: Any) -> None:
    import torch

    optimizer = torch.optim.SGD([table.gradients.handle], lr=0.1)
    address = torch.arange(12).view(3, 4)
    for _ in range(2):
        table.read(address, table.gradients.handle, table.prefetch(address)).float().sum().backward()
        optimizer.step()


def _layer() -> None:
    import torch

    from engram_lm.nn import EngramLayer, Window

    for conv_kernel in (4, 0):
        layer = EngramLayer(hidden_size=16, memory_width=16, conv_kernel=conv_kernel)
        hidden = torch.zeros(2, 5, 16, requires_grad=True)
        window = Window.begin(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool))
        layer(hidden, torch.zeros(2, 5, 16), window)[0].sum().backward()


# ---- parts ----------------------------------------------------------------------------------------------------------------


def indexes(directory: Path) -> None:
    """All that an index and a mixture need."""
    build(directory / "small", _SMALL)
    search(directory / "search")
    score(directory / "score")
    build(directory / "large", _LARGE)
    mix()


def tables(directory: Path) -> None:
    """All that tables need, and training where torch is installed."""
    directory.mkdir()
    read(directory)
    simulate()
    if find_spec("torch") is not None:
        train(directory)


# About equally long, as they run side by side.
PARTS: dict[str, Callable[[Path], None]] = {"indexes": indexes, "tables": tables}
