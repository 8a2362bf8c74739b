"""The documents that are indexed and the text that is not, windows of both, and a model that reads each text once.

    domains = {name: Domain.of(data, name, encoder) for name in DOMAINS}
    windows_of(domains["handbook"], n=24), general_windows(data, encoder, n=24)
    read = CachedReader(model, cache)                 # an `adapt.arms.Reader` that keeps what it read

Each domain is split into two halves of whole documents. A smaller index is the beginning of the half.
"""

import json
import lzma
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gate_texts import BOOKS, documents

from engram_lm.adapt.texts import MOST_COPIED, WINDOW, Window, copied, split, window_of
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.library.encoding import TextEncoder

DOMAINS = {
    "handbook": "domain/handbook18f.jsonl.xz",
    "articles": "domain/enwiki2018-new.jsonl.xz",
    "factbook": "domain/factbook.jsonl.xz",
}
GENERAL = {"wikitext2-test": "corpora/wikitext2-test.txt.xz", "textbooks": "corpora/openstax-ccby.jsonl.xz"}
SIZES = (1, 10, 100)


@dataclass(frozen=True, eq=False)
class Domain:
    """documents: ids by name. indexed, unseen: names, in the order in which an index grows."""

    name: str
    documents: dict[str, np.ndarray]
    indexed: list[str]
    unseen: list[str]
    vocab_size: int

    @classmethod
    def of(cls, data: Path, name: str, encoder: TextEncoder) -> "Domain":
        found = documents(data / DOMAINS[name])
        ids = encoder.encode_all(text for _, text in found)
        held = {key: one for (key, _), one in zip(found, ids, strict=True)}
        return cls(name, held, *split(held, seed=0), encoder.vocab_size)

    @cached_property
    def snapshots(self) -> dict[str, Snapshot]:
        """By how many documents: 1, 10, 100, all."""
        sizes = {str(n): n for n in SIZES if n < len(self.indexed)} | {"all": len(self.indexed)}
        return {size: self.snapshot(self.indexed[:n]) for size, n in sizes.items()}

    def snapshot(self, names: list[str]) -> Snapshot:
        segment = Segment.build(
            [self.documents[name] for name in names], vocab_size=self.vocab_size,
            documents=[Document(id=name) for name in names],
        )  # fmt: skip
        return Snapshot([LiveSegment(segment)], vocab_size=self.vocab_size)


@dataclass(frozen=True)
class Windows:
    """repeated: documents left out of the unseen because the index holds their wording; copied_share: of the others."""

    indexed: list[Window]
    unseen: list[Window]
    repeated: int
    copied_share: float


def windows_of(domain: Domain, n: int) -> Windows:
    """n of each half: the first documents that have a whole window."""
    whole, repeated, shares = domain.snapshots["all"], 0, []

    def of(names: Iterable[str], kind) -> Iterator[Window]:
        for name in names:
            if len(domain.documents[name]) >= WINDOW:
                yield window_of(domain.documents[name], kind=kind, id=name, domain=domain.name)

    indexed = [window for window, _ in zip(of(domain.indexed, "indexed"), range(n), strict=False)]
    unseen: list[Window] = []
    for window in of(domain.unseen, "unseen"):
        if len(unseen) == n:
            break
        share = copied(window.ids, whole)
        repeated += share > MOST_COPIED
        if share <= MOST_COPIED:
            unseen.append(window)
            shares.append(share)
    return Windows(indexed, unseen, repeated, float(np.mean(shares)))


def general_windows(data: Path, encoder: TextEncoder, n: int) -> list[Window]:
    """n of an encyclopaedia and n of textbooks; of books that the gate was fitted on none."""
    found = []
    with lzma.open(data / GENERAL["wikitext2-test"], "rt", encoding="utf8") as file:
        pages = file.read()
    every = len(pages) // n
    texts = [("wikitext2-test", str(at), pages[at : at + 2500]) for at in range(0, every * n, every)]
    books: list[tuple[str, str, str]] = []
    with lzma.open(data / GENERAL["textbooks"], "rt", encoding="utf8") as file:
        for number, line in enumerate(file):
            record = json.loads(line)
            if record["book"] not in BOOKS and number % 31 == 0 and len(record["text"]) >= 4000:
                books.append(("textbooks", record["id"], record["text"][500:4000]))
    for domain, name, text in [*texts, *books[:n]]:
        ids = encoder.encode(text)
        if len(ids) >= WINDOW:
            found.append(window_of(ids, kind="general", id=name, domain=domain))
    return found


class CachedReader:
    """A model with `model` and `lm_head` (Llama and its kin); last hidden states are kept, logits made of them anew.

    One text a forward, so that seconds are those of one text; `prepare` reads many short ones together.
    """

    def __init__(self, model, cache: Path) -> None:
        self.model, self.cache = model, cache
        cache.mkdir(parents=True, exist_ok=True)

    def __call__(self, ids: np.ndarray, last: int) -> tuple[np.ndarray, float]:
        path = self.path(ids, last)
        if path.exists():
            kept = np.load(path)
            hidden_TD, seconds = torch.from_numpy(kept["hidden"]), float(kept["seconds"])
            with torch.inference_mode():
                return self.model.lm_head(hidden_TD).float().numpy(), seconds
        begun = time.process_time()
        with torch.inference_mode():
            hidden_TD = self.model.model(torch.as_tensor(ids)[None], use_cache=False).last_hidden_state[0]
            logits_TV = self.model.lm_head(hidden_TD[-last - 1 : -1]).float().numpy()
        seconds = time.process_time() - begun
        self.keep(path, hidden_TD[-last - 1 : -1].numpy(), seconds)
        return logits_TV, seconds

    def prepare(self, texts: list[tuple[np.ndarray, int]], *, batch: int = 12) -> None:
        """Read (ids, last) that are not known yet, texts of about one length together."""
        wanted = {self.path(ids, last): (ids, last) for ids, last in texts}
        missing = sorted((len(ids), path) for path, (ids, _) in wanted.items() if not path.exists())
        for at in range(0, len(missing), batch):
            paths = [path for _, path in missing[at : at + batch]]
            rows = [wanted[path][0] for path in paths]
            ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            for b, ids in enumerate(rows):  # causal: what stands behind a text does not change it
                ids_BT[b, : len(ids)] = torch.as_tensor(ids)
            begun = time.process_time()
            with torch.inference_mode():
                hidden_BTD = self.model.model(ids_BT, use_cache=False).last_hidden_state.numpy()
            seconds = (time.process_time() - begun) / len(rows)
            for b, path in enumerate(paths):
                ids, last = wanted[path]
                self.keep(path, hidden_BTD[b, len(ids) - last - 1 : len(ids) - 1], seconds)

    def path(self, ids: np.ndarray, last: int) -> Path:
        ids = np.ascontiguousarray(ids, np.int64).tobytes()
        return self.cache / f"{zlib.crc32(ids):08x}{zlib.adler32(ids):08x}-{last}.npz"

    def keep(self, path: Path, hidden_TD: np.ndarray, seconds: float) -> None:
        beside = path.with_suffix(".new.npz")
        np.savez(beside, hidden=hidden_TD, seconds=seconds)
        beside.replace(path)
