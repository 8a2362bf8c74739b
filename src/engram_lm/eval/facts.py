"""Facts completed: in the words of the document and in others, beside what the most common answer would get.

    facts = read_facts(["probes.jsonl.xz"], most=150, seed=0)
    measured = facts_measured(subject, facts, states=("on", "off"))
    measured.value("said in full", of="verbatim", memory="on").value

A line of the file: {"relation": "capital", "prompt": "The capital of Algeria is", "answer": "Algiers",
"paraphrases": ["Algeria has its capital in"]}, with or without "subject" and "id". `prompt` stands for the wording that was
trained on; no paraphrases are allowed.

    said in full            greedy decoding says every token of the answer (one forward: the arg max at each of them)
    first among answers     the answer is more probable than each of up to `candidates` other answers of its relation,
                            by log P of the whole answer, not divided by its length; a tie counts as lost
    reciprocal rank         mean of 1 / its rank among them
    most common answer      share right when every question of a relation gets the relation's most common answer in the file
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.corpus.text import find_files, json_lines, read_lines
from engram_lm.errors import ConfigError, DataError
from engram_lm.eval.intervals import mean_interval, share_interval
from engram_lm.eval.result import Result, Value

if TYPE_CHECKING:
    from engram_lm.eval.evaluated_model import EvaluatedModel
    from engram_lm.progress import Progress

CANDIDATES = 15
CONSTANT = "most common answer"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact and the ways to ask for it. id: the document it is from, or any name."""

    id: str
    relation: str
    prompt: str
    answer: str
    paraphrases: tuple[str, ...] = ()


def read_facts(files: Sequence[str | Path], *, most: int | None = None, seed: int = 0) -> list[Fact]:
    """Facts of JSON lines (.jsonl, plain or .gz or .xz), all or `some`. DataError names a bad line."""
    found = []
    for path in find_files(list(files)):
        for record, number in json_lines(read_lines(path), path, "prompt"):
            texts: dict[str, Any] = {name: record.get(name) for name in ("relation", "prompt", "answer")}
            for name, text in texts.items():
                if not isinstance(text, str) or not text.strip():
                    raise DataError(
                        f"{path}:{number}: a fact has relation, prompt and answer; {name} is {text!r}."
                    )
            others = record.get("paraphrases", [])
            if not isinstance(others, list) or not all(isinstance(x, str) and x.strip() for x in others):
                raise DataError(f"{path}:{number}: paraphrases is a list of prompts; got {others!r}.")
            name = str(record.get("id", record.get("subject", number)))
            found.append(Fact(id=name, paraphrases=tuple(others), **texts))
    if not found:
        raise DataError(f"{', '.join(map(str, files))}: no fact.")
    return found if most is None else some(found, most, seed=seed)


def some(facts: Sequence[Fact], most: int, *, seed: int) -> list[Fact]:
    """`most` of the facts, drawn with the seed, in their order; all where there are no more."""
    if most < 1:
        raise ConfigError(f"The number of facts is 1 or more; got {most}.")
    chosen = np.random.default_rng(seed).permutation(len(facts))[:most]
    return [facts[i] for i in sorted(chosen)]


def answers_of(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """relation -> its answers, each as often as it is one."""
    answers: dict[str, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).append(fact.answer)
    return answers


def others_of(answers: Sequence[str], answer: str, *, most: int, key: Sequence[Any]) -> list[str]:
    """Up to `most` of the distinct other answers, drawn by the key, so that every model and state gets the same ones."""
    others = sorted(set(answers) - {answer})
    if len(others) <= most:
        return others
    digest = hashlib.sha256(json.dumps([*key, answer]).encode()).digest()
    order = np.random.default_rng(list(digest)).permutation(len(others))
    return [others[i] for i in sorted(order[:most])]


def ranked(subject: EvaluatedModel, prompt: str, answers: Sequence[str]) -> tuple[np.ndarray, list[bool]]:
    """float64 [N]: log P of each answer after the prompt, in the present state; and whether greedy decoding says it."""
    pairs = [subject.pair(prompt, answer) for answer in answers]
    log_p, greedy = np.empty(len(answers)), [False] * len(answers)
    # most answers leave the prompt's ids as they are; one that merges with its end has a prompt of its own
    groups: dict[bytes, list[int]] = {}
    for i, (before, _) in enumerate(pairs):
        groups.setdefault(before.tobytes(), []).append(i)
    for places in groups.values():
        said = subject.continuations(pairs[places[0]][0], [pairs[i][1].tolist() for i in places])
        for i, one in zip(places, said, strict=True):
            log_p[i], greedy[i] = one
    if len(groups) > 1:  # log P of the whole text after the ids that all share
        shared = min(len(before) for before, _ in pairs)
        for i, (before, _) in enumerate(pairs):
            if len(before) > shared:
                log_p[i] += subject.log_probs(before, since=shared).sum()
    return log_p, greedy


def settings(
    facts: Sequence[Fact], *, states: Sequence[str], candidates: int, seed: int,
    answers: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `facts_measured` depends on beside the model."""
    text = json.dumps([[asdict(fact) for fact in facts], answers])
    return {
        "facts": len(facts), "facts_sha256": hashlib.sha256(text.encode()).hexdigest()[:16], "states": list(states),
        "candidates": candidates, "seed": seed,
    }  # fmt: skip


def facts_measured(
    subject: EvaluatedModel, facts: Sequence[Fact], *, states: Sequence[str], candidates: int = CANDIDATES, seed: int = 0,
    answers: Mapping[str, Sequence[str]] | None = None, progress: Progress | None = None,
) -> Result:  # fmt: skip
    """All facts in every state. answers: of each relation, for candidates and the most common one; default those asked."""
    subject.require_states(states)
    if candidates < 1:
        raise ConfigError(f"candidates is 1 or more other answers; got {candidates}.")
    begun = time.perf_counter()
    pool = answers or answers_of(facts)
    common = {relation: Counter(found).most_common(1)[0][0] for relation, found in pool.items()}
    others = [others_of(pool[f.relation], f.answer, most=candidates, key=[seed, f.relation]) for f in facts]
    asked: dict[str, dict[str, list[_Asked]]] = {}
    for s, state in enumerate(states):
        asked[state] = {"verbatim": [], "paraphrased": []}
        with subject.state(state):
            for n, fact in enumerate(facts):
                for kind, prompts in (("verbatim", [fact.prompt]), ("paraphrased", fact.paraphrases)):
                    found = [_ask(subject, prompt, fact.answer, others[n]) for prompt in prompts]
                    if found:
                        asked[state][kind].append(_Asked.mean(fact, found))
                if progress:
                    progress(s * len(facts) + n + 1, len(states) * len(facts))
    values = []
    for kind in ("verbatim", "paraphrased"):
        rows = asked[states[0]][kind]
        if not rows:
            continue
        for name in ("said in full", "first among answers", "reciprocal rank"):
            for state in states:
                of_what = mean_interval if name == "reciprocal rank" else share_interval
                mean, ends = of_what([row.numbers[name] for row in asked[state][kind]])
                values.append(Value(name, kind, state, mean, len(rows), "facts", ends))
            if name != "reciprocal rank":
                mean, ends = share_interval(
                    [float(row.fact.answer == common[row.fact.relation]) for row in rows]
                )
                values.append(Value(name, kind, CONSTANT, mean, len(rows), "facts", ends))
    choices_N = np.array([1 + len(found) for found in others])
    return Result(
        "facts", tuple(values), settings(facts, states=states, candidates=candidates, seed=seed, answers=answers),
        notes=(
            "Said in full: greedy decoding says every token of the answer. First among answers: more probable than each of "
            f"up to {candidates} other answers of the relation ({choices_N.mean():.1f} answers on average, chance "
            f"{100 * (1 / choices_N).mean():.1f} %). A fact asked in several other words counts once, with the mean. "
            "Verbatim prompts are the document's own words.",
        ),
        seconds=round(time.perf_counter() - begun, 2), facts={"relations": _by_relation(asked)},
    )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A fact asked in one kind of words: means over its prompts."""

    fact: Fact
    numbers: dict[str, float]

    @classmethod
    def mean(cls, fact: Fact, found: list[dict[str, float]]) -> _Asked:
        return cls(fact, {name: float(np.mean([one[name] for one in found])) for name in found[0]})


def _ask(subject: EvaluatedModel, prompt: str, answer: str, others: Sequence[str]) -> dict[str, float]:
    log_p, greedy = ranked(subject, prompt, [answer, *others])
    rank = 1 + int((log_p[1:] >= log_p[0]).sum())
    return {
        "said in full": float(greedy[0]),
        "first among answers": float(rank == 1),
        "reciprocal rank": 1 / rank,
    }


def _by_relation(asked: dict[str, dict[str, list[_Asked]]]) -> dict[str, Any]:
    """relation -> kind -> {"facts": n, state: share said in full}."""
    found: dict[str, Any] = {}
    for state, kinds in asked.items():
        for kind, rows in kinds.items():
            for relation in sorted({row.fact.relation for row in rows}):
                said = [row.numbers["said in full"] for row in rows if row.fact.relation == relation]
                place = found.setdefault(relation, {}).setdefault(kind, {"facts": len(said)})
                place[state] = round(float(np.mean(said)), 4)
    return found
