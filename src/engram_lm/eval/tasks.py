"""The files of benchmarks: two layouts of each, read into one, and written as tasks of lm-evaluation-harness.

JSON lines (.jsonl, plain or .gz or .xz), one item a line; the file's name begins with the benchmark's.

    benchmark        layout of a local file                        columns of the data set on the hub
    lambada          context, continuation                         text
    arc_easy         query, choices [...], gold (0 is the first)   question, choices {text, label}, answerKey
    arc_challenge    the same                                      the same
    openbookqa       the same                                      question_stem, choices {text, label}, answerKey
    piqa             the same                                      goal, sol1, sol2, label
    winogrande       context_options [...], continuation, gold     sentence with _, option1, option2, answer "1" or "2"

The prompts are the harness's own: "Question: ...\\nAnswer:" for ARC and PIQA, the bare question for OpenBookQA, the text
up to its last word for LAMBADA; for Winogrande the end of the sentence after each of its two beginnings.

    items = read_items(Path("arc_easy.jsonl.xz"), most=200, seed=0)        # [Item(...)]
    write_task("arc_easy", items, directory)                               # arc_easy.yaml and arc_easy.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.corpus.text import read_lines
from engram_lm.errors import ConfigError, DataError

BENCHMARKS = ("lambada", "arc_easy", "arc_challenge", "piqa", "winogrande", "openbookqa")
_NAMES = {"openbook_qa": "openbookqa", **{name: name for name in BENCHMARKS}}


@dataclass(frozen=True)
class Item:
    """One question: each of `ends` may follow each of `contexts`, one of the two has one entry. gold: the right pair."""

    contexts: tuple[str, ...]
    ends: tuple[str, ...]
    gold: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, what follows after a space), one a choice."""
        return [(context, end) for context in self.contexts for end in self.ends]


def benchmark_of(path: Path) -> str | None:
    """The benchmark that a file's name begins with; None for another file."""
    if ".jsonl" not in path.suffixes:
        return None
    return next((name for start, name in _NAMES.items() if path.name.startswith(start)), None)


def find_benchmarks(places: Sequence[str | Path]) -> dict[str, Path]:
    """Benchmark -> file, of files and of folders that hold some. DataError for a file of no known name, or two of one."""
    found: dict[str, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise DataError(f"{place}: no such file or folder.")
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        known = [(benchmark_of(file), file) for file in files]
        if not any(name for name, _ in known):
            raise DataError(f"{place}: wanted .jsonl files whose names begin with {', '.join(BENCHMARKS)}.")
        for name, file in known:
            if name is not None and found.setdefault(name, file) != file:
                raise DataError(f"{name} is both {found[name]} and {file}; name one of them.")
    return {name: found[name] for name in BENCHMARKS if name in found}


def read_items(path: Path, *, most: int | None = None, seed: int = 0) -> list[Item]:
    """Items of a file of either layout; `most` of them, drawn with the seed. DataError names the line that is neither."""
    name = benchmark_of(path)
    if name is None:
        raise DataError(f"{path}: wanted a .jsonl file whose name begins with {', '.join(BENCHMARKS)}.")
    if most is not None and most < 1:
        raise ConfigError(f"The number of items is 1 or more; got {most}.")
    found = []
    for text, number in read_lines(path):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
            item = _READERS[name](record)
            if not 0 <= item.gold < len(item.pairs) or not all(
                a.strip() and b.strip() for a, b in item.pairs
            ):
                raise ValueError("an empty text or an answer that is no choice")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path}:{number}: no item of {name} in either layout ({type(error).__name__}: {error}); docs/eval.md "
                "shows both."
            ) from None
        found.append(item)
    if not found:
        raise DataError(f"{path} holds no item.")
    if most is None or most >= len(found):
        return found
    return [found[i] for i in sorted(np.random.default_rng(seed).permutation(len(found))[:most])]


def write_task(name: str, items: Sequence[Item], directory: Path) -> None:
    """NAME.yaml and NAME.jsonl: a task that lm-evaluation-harness reads from `directory` alone."""
    data = directory / f"{name}.jsonl"
    with open(data, "w", encoding="utf8") as file:
        for item in items:
            record = {"contexts": item.contexts, "ends": item.ends, "gold": item.gold}
            file.write(json.dumps(record) + "\n")
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if name == "lambada":
        metrics.append({"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False})
        config |= {
            "output_type": "loglikelihood",
            "doc_to_text": "{{contexts[0]}}",
            "doc_to_target": "{{' ' + ends[0]}}",
        }
    elif name == "winogrande":
        # the text is a number: then the choices are contexts and the target follows each of them
        config |= {
            "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
            "doc_to_target": "{{ends[0]}}",
        }  # fmt: skip
    else:
        metrics.append({"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True})
        config |= {
            "output_type": "multiple_choice", "doc_to_text": "{{contexts[0]}}", "doc_to_choice": "ends",
            "doc_to_target": "gold",
        }  # fmt: skip
    # JSON is YAML
    (directory / f"{name}.yaml").write_text(
        json.dumps(config | {"metric_list": metrics}, indent=1), encoding="utf8"
    )


# ---- one line of either layout ---------------------------------------------------------------------------------------


def _lambada(record: dict[str, Any]) -> Item:
    if "text" in record:
        context, _, word = record["text"].rpartition(" ")
        return Item((context,), (word,), 0)
    return Item((record["context"].rstrip(),), (record["continuation"].strip(),), 0)


def _asked(prompt: Callable[[str], str], column: str) -> Callable[[dict[str, Any]], Item]:
    """Questions with labelled choices; prompt: makes the context of the question."""

    def read(record: dict[str, Any]) -> Item:
        if "query" in record:
            return Item((prompt(record["query"]),), tuple(record["choices"]), int(record["gold"]))
        choices = record["choices"]
        return Item(
            (prompt(record[column]),),
            tuple(choices["text"]),
            choices["label"].index(record["answerKey"].strip()),
        )

    return read


def _piqa(record: dict[str, Any]) -> Item:
    if "query" in record:
        return Item((_question(record["query"]),), tuple(record["choices"]), int(record["gold"]))
    return Item((_question(record["goal"]),), (record["sol1"], record["sol2"]), int(record["label"]))


def _winogrande(record: dict[str, Any]) -> Item:
    if "context_options" in record:
        return Item(tuple(record["context_options"]), (record["continuation"].strip(),), int(record["gold"]))
    before, after = record["sentence"].split("_")
    return Item(
        (before + record["option1"], before + record["option2"]), (after.strip(),), {"1": 0, "2": 1}[record["answer"]]
    )  # fmt: skip


def _question(text: str) -> str:
    return f"Question: {text.removeprefix('Question:').strip()}\nAnswer:"


_READERS: dict[str, Callable[[dict[str, Any]], Item]] = {
    "lambada": _lambada,
    "arc_easy": _asked(_question, "question"),
    "arc_challenge": _asked(_question, "question"),
    "openbookqa": _asked(lambda text: text, "question_stem"),
    "piqa": _piqa,
    "winogrande": _winogrande,
}
