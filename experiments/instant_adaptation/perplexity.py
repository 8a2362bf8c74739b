"""Perplexity of indexed, unseen and general text against the size of the index, by every arm (part of run.py)."""

import itertools
import sys
import time
from typing import Any

from domains import Domain, Windows, general_windows, windows_of

from engram_lm.adapt.arms import ARMS, Arms
from engram_lm.adapt.kept import ResultRows
from engram_lm.adapt.passages import Passages
from engram_lm.adapt.report import perplexities
from engram_lm.adapt.texts import Window

RETRIEVED_FOR_GENERAL = "handbook"


class Perplexity:
    """Windows of every domain and of general text in turn, so that the first `most` are some of each."""

    def __init__(self, setting: Any, windows: int, most: int | None = None) -> None:
        self.most = most
        self.setting, self.domains = setting, setting.domains
        self.arms = Arms(setting.read, setting.encoder, setting.rules, setting.gate)
        self.windows: dict[str, Windows] = {
            name: windows_of(one, windows) for name, one in self.domains.items()
        }
        self.general = general_windows(setting.data, setting.encoder, windows)
        self.passages: dict[str, Passages] = {}

    def todo(self) -> list[Window]:
        lists = [one for found in self.windows.values() for one in (found.indexed, found.unseen)]
        for domain in dict.fromkeys(window.domain for window in self.general):
            lists.append([window for window in self.general if window.domain == domain])
        todo = [window for row in itertools.zip_longest(*lists) for window in row if window is not None]
        return todo[: self.most]

    def run(self, kept: ResultRows) -> None:
        todo, begun = self.todo(), time.perf_counter()
        for n, window in enumerate(todo, 1):
            if kept.has("alone", window.key):
                continue
            names = [window.domain] if window.domain in self.domains else list(self.domains)
            indexes, passages = {}, {}
            for name in names:
                domain = self.domains[name]
                place = domain.indexed.index(window.id) if window.kind == "indexed" else -1
                for size, snapshot in domain.snapshots.items():
                    if snapshot.n_documents > place:
                        indexes[f"{name} {size}"] = snapshot
                if window.kind != "general" or name == RETRIEVED_FOR_GENERAL:
                    passages[f"{name} all"] = self.passages_of(domain)
            rows = self.arms.score(window, indexes, passages)
            # the arm "alone" comes last: it says that all are there
            for row in sorted(rows, key=lambda row: row["arm"] == "alone"):
                kept.add(row, key=window.key)
            if n % 10 == 0:
                print(
                    f"perplexity: {n} of {len(todo)} texts, {time.perf_counter() - begun:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def passages_of(self, domain: Domain) -> Passages:
        if domain.name not in self.passages:
            begun = time.process_time()
            self.passages[domain.name] = Passages(
                domain.snapshots["all"], domain.documents, self.setting.encoder
            )
            self.setting.facts[f"BM25 of {domain.name}, CPU seconds"] = round(time.process_time() - begun, 2)
        return self.passages[domain.name]

    def results(self, kept: ResultRows) -> dict[str, Any]:
        keys = {window.key for window in self.todo()}
        rows = [row for arm in ARMS for row in kept.rows(arm) if row["key"] in keys]
        # every row of a window that was finished, no other
        done = {row["key"] for row in rows if row["arm"] == "alone"}
        return {
            "groups": perplexities(row for row in rows if row["key"] in done),
            "left out as copies": {name: one.repeated for name, one in self.windows.items()},
            "share of unseen words in copied runs": {
                name: one.copied_share for name, one in self.windows.items()
            },
            "indexes": {
                f"{name} {size}": {"documents": found.n_documents, "tokens": found.n_tokens}
                for name, domain in self.domains.items()
                for size, found in domain.snapshots.items()
            },
        }
