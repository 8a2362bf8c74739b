"""`engram-lm adapt`: what memory of a user's own documents would do for a model, in ten minutes and without training.

Half of the documents, drawn at random, stand for what is indexed, the others for what is not; text that has nothing to do
with them (`--general`) shows what that costs. Everything read is kept in OUT: the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.adapt.kept import ResultRows
from engram_lm.adapt.report import markdown, perplexities
from engram_lm.adapt.texts import LEAST, MOST_COPIED, WINDOW, Window, copied, split, window_of
from engram_lm.durable import write_atomic
from engram_lm.errors import ConfigError, DataError
from engram_lm.eval.intervals import mean_interval
from engram_lm.eval.tables import signed, table

if TYPE_CHECKING:
    from engram_lm.library import Library

SIZES = (1, 10, 100)
_GENERAL_CHARACTERS = 1500  # of a text, more than a window of 320 tokens holds in most languages


def adapt_command(
    name: str, paths: list[str], *, out: Path, questions: Path | None, general: list[str], windows: int,
    gate: Path | None, lam: float | None, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure, and write OUT/results.json and OUT/report.md."""
    if windows < 1:
        raise ConfigError(f"--windows is 1 or more; got {windows}.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --out names a directory.")
    from engram_lm.adapt.answers import read_questions
    from engram_lm.bases.naming import find_model
    from engram_lm.generation.gates import named_gate
    from engram_lm.generation.loading import load_model
    from engram_lm.library import read_texts

    find_model(name)
    named_gate(gate, lam)
    asked = [] if questions is None else read_questions(questions)
    texts = {text.id: text for text in read_texts(paths)}
    if len(texts) < 2:
        raise DataError(
            f"Two documents or more are needed, one to index and one that is not; got {len(texts)}. A long file can be cut: "
            "one JSON line for each part."
        )
    general_texts = list(itertools.islice(_general(general), windows))
    model, tokenizer = load_model(name)
    settings = _settings(name, model, texts, general_texts, windows=windows, gate=gate, lam=lam, seed=seed)
    kept = ResultRows(out / "rows", settings)
    with _library(out / "index", tokenizer, texts) as library:
        run = _Run(model, tokenizer, library, kept, gate=gate, lam=lam, windows=windows, seed=seed)
        run.read(general_texts)
        answers = run.answer(asked, out / "index", gate, lam)
    results = {
        "model": name, **{key: value for key, value in settings.items() if key != "model"}, **run.facts,
        "perplexity": perplexities(run.rows()), "questions": answers,
    }  # fmt: skip
    write_atomic(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    told = report(results)
    write_atomic(out / "report.md", told)
    print(json.dumps(results, ensure_ascii=False) if as_json else told.rstrip())


class _Run:
    """One model, one library, one directory of rows."""

    def __init__(
        self, model: Any, tokenizer: Any, library: Library, kept: ResultRows, *, gate: Path | None, lam: float | None,
        windows: int, seed: int,
    ) -> None:  # fmt: skip
        from engram_lm.adapt.arms import Arms, TimedReader
        from engram_lm.generation.gates import chosen_gate
        from engram_lm.mixing.identity import rules_of

        self.model, self.tokenizer, self.library, self.kept, self.windows = (
            model,
            tokenizer,
            library,
            kept,
            windows,
        )
        whole = library.store.snapshot()
        self.documents = {
            document.id: found[1]
            for document in library.store.documents()
            if (found := library.store.get(document.id)) is not None
        }
        self.indexed, self.unseen = split(sorted(self.documents), seed=seed)
        self.half = whole.restricted(self.indexed)
        self.sizes = {str(n): whole.restricted(self.indexed[:n]) for n in SIZES if n < len(self.indexed)}
        self.sizes[str(len(self.indexed))] = self.half
        chosen = chosen_gate(gate, lam, model=model, tokenizer=tokenizer)
        rules = rules_of(tokenizer, model, whole)
        self.arms = Arms(TimedReader(model, tokenizer), library.encoder, rules, chosen)
        self.facts: dict[str, Any] = {
            "indexed": len(self.indexed), "unseen": len(self.unseen), "indexed_tokens": self.half.n_tokens, "copied": 0,
        }  # fmt: skip

    def read(self, general: list[tuple[str, str]]) -> None:
        """Read the windows that are not kept yet, some of each kind in turn."""
        from engram_lm.adapt.passages import Passages
        from engram_lm.progress import Progress

        self.todo = self._windows(general)
        if not any(window.kind == "unseen" for window in self.todo):
            raise DataError(
                f"No document that is left out of the index has {LEAST} tokens of its own words: there is nothing to "
                "measure on."
            )
        progress = Progress("reading with the model")
        passages: dict[str, Passages] = {}
        whole = str(len(self.indexed))
        for n, window in enumerate(self.todo):
            if not self.kept.has("alone", window.key):
                if not passages:
                    passages[whole] = Passages(self.half, self.documents, self.library.encoder)
                # a page is in an index of n documents or it is not
                place = self.indexed.index(window.id) if window.kind == "indexed" else -1
                sizes = {size: found for size, found in self.sizes.items() if int(size) > place}
                rows = self.arms.score(window, sizes, passages)
                # the arm "alone" comes last: it says that all are there
                for row in sorted(rows, key=lambda row: row["arm"] == "alone"):
                    self.kept.add(row, key=window.key)
            progress(n + 1, len(self.todo))
        progress.end()

    def _windows(self, general: list[tuple[str, str]]) -> list[Window]:
        def of(names: list[str], kind: Any) -> Iterator[Window]:
            for name in names:
                window = window_of(self.documents[name], kind=kind, id=name)
                if window is not None and kind == "unseen" and copied(window.ids, self.half) > MOST_COPIED:
                    self.facts["copied"] += 1
                elif window is not None:
                    yield window

        encode = self.library.encoder.encode
        texts = (window_of(encode(text), kind="general", id=name) for name, text in general)
        lists = [
            list(itertools.islice(of(self.indexed, "indexed"), self.windows)),
            list(itertools.islice(of(self.unseen, "unseen"), self.windows)),
            [window for window in texts if window is not None],
        ]
        return [window for row in itertools.zip_longest(*lists) for window in row if window is not None]

    def rows(self) -> list[dict[str, Any]]:
        """Of the windows of this run, arm by arm."""
        from engram_lm.adapt.arms import ARMS

        keys = {window.key for window in self.todo}
        return [row for arm in ARMS for row in self.kept.rows(arm) if row["key"] in keys]

    def answer(
        self, questions: list[Any], directory: Path, gate: Path | None, lam: float | None
    ) -> list[dict[str, Any]]:
        """Answered by arm; the index holds all documents now."""
        if not questions:
            return []
        from engram_lm.adapt.answers import ARMS, Answers
        from engram_lm.progress import Progress

        answers = Answers(self.model, self.tokenizer, directory, gate=gate, lam=lam)
        progress = Progress("answering")
        keys = []
        for n, question in enumerate(questions):
            keys.append(f"{question.question} | {question.answer}")
            if not self.kept.has("asked both", keys[-1]):
                for row in answers.ask(question):
                    self.kept.add({**row, "arm": f"asked {row['arm']}"}, key=keys[-1])
            progress(n + 1, len(questions))
        progress.end()
        found = []
        for arm in ARMS:
            rows = [row for row in self.kept.rows(f"asked {arm}") if row["key"] in keys]
            share, ends = mean_interval([row["answered"] for row in rows])
            means = {
                name: float(np.mean([row[name] for row in rows])) for name in ("prompt_tokens", "seconds")
            }
            found.append({"arm": arm, "questions": len(rows), "answered": share, "interval": ends, **means})
        return found


def report(results: dict[str, Any]) -> str:
    """The report's text."""
    groups = results["perplexity"]
    whole = str(results["indexed"])
    best = {group["kind"]: group for group in groups if (group["arm"], group["index"]) == ("memory", whole)}
    texts = {
        "indexed": "documents in the index",
        "unseen": "documents left out of it",
        "general": "general text",
    }
    lines = [
        "# Memory of these documents",
        f"{results['model']}, {results['indexed']:,} documents in the index ({results['indexed_tokens']:,} tokens), "
        f"{results['unseen']:,} left out. Perplexity, model alone and with memory (λ from {results['gate']}):",
        table(
            ["text", "alone", "with memory", "", "windows"],
            [
                [texts[kind], f"{one['alone']:.2f}", f"{one['perplexity']:.2f}", signed(one["change"]), f"{one['windows']}"]
                for kind, one in best.items()
            ],
        ),
    ]  # fmt: skip
    if "general" not in best:
        lines.append(
            "What it costs text that has nothing to do with the documents was not measured: give --general FILE."
        )
    if results["copied"]:
        lines.append(
            f"{results['copied']:,} documents that were left out of the index repeat documents in it for more than "
            f"{MOST_COPIED:.0%} of their words; they were not read."
        )
    lines += ["## Every arm", markdown(groups)]
    lines.append(
        f"Perplexity of the last four fifths of windows of up to {WINDOW} tokens, one a document; in brackets 95 % of 1,000 "
        "draws of the windows. Retrieval: the passage that BM25 finds for the first fifth, before the window. "
        "With a smaller index, pages that are not in it are no indexed text."
    )
    if results["questions"]:
        rows = [
            [
                one["arm"], f"{one['answered']:.0%}", f"{one['questions']}", f"{one['prompt_tokens']:.0f}",
                f"{one['seconds']:.1f}",
            ]
            for one in results["questions"]
        ]  # fmt: skip
        lines += [
            "## Questions",
            table(["arm", "answered", "of", "prompt tokens", "CPU seconds"], rows),
            "All documents are in the index here. Memory asks of the documents that a question is about.",
        ]
    lines.append(
        f'Use it: `engram-lm generate {results["model"]} --index OUT/index "..."`; it holds all of the documents.'
    )
    return "\n\n".join(lines) + "\n"


def _general(files: list[str]) -> Iterator[tuple[str, str]]:
    """(name, text) of documents of these files; long ones are cut, so that one book gives many texts."""
    from engram_lm.corpus.text import read_documents

    if not files:
        return
    for document in read_documents(files):
        for at in range(0, max(len(document.text), 1), 20 * _GENERAL_CHARACTERS):
            name = f"{Path(document.file).name}:{document.line}:{at}"
            yield name, document.text[at : at + _GENERAL_CHARACTERS]


def _settings(
    name: str, model: Any, texts: dict[str, Any], general: list[tuple[str, str]], *, windows: int, gate: Path | None,
    lam: float | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    from engram_lm.mixing.identity import model_print

    def digest(pairs: list[tuple[str, str]]) -> str:
        lines = [json.dumps(pair) for pair in sorted(pairs)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    chosen = (
        f"the gate {gate} ({hashlib.sha256(gate.read_bytes()).hexdigest()[:12]})"
        if gate is not None
        else "the gate shipped for the model"
        if lam is None
        else f"λ {lam:g}"
    )
    return {
        "model": model_print(model), "documents": digest([(key, text.text) for key, text in texts.items()]),
        "general": digest(general), "windows": windows, "gate": chosen, "seed": seed,
    }  # fmt: skip


def _library(directory: Path, tokenizer: Any, texts: dict[str, Any]) -> Library:
    """The index of all documents; a stopped addition goes on."""
    from engram_lm.index.manifest import MANIFEST
    from engram_lm.library import Library

    if (directory / MANIFEST).exists():
        library = Library.open(directory, "write", tokenizer=tokenizer, merging="by hand")
    else:
        os.makedirs(directory.parent, exist_ok=True)
        library = Library.create(directory, tokenizer=tokenizer, merging="by hand")
    try:
        library.add(texts.values(), existing="skip")
    except BaseException:
        library.store.close()
        raise
    return library
