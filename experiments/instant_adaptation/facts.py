"""Closed-book facts: in the document's words, in other words, contradicted, corrected, and deleted (part of run.py).

The index holds the articles of 2018 and, for each country of the factbook, a document of its facts as plain sentences. A
fact is a prompt ("The capital of Algeria is") whose continuation a document holds word for word, and one paraphrase of it.

    true          all documents as they are
    contradicted  the documents of the asked facts say something else: the answer of another fact of the same relation
    corrected     the same store after those documents were replaced by the true ones
    halved        the true store after half of its documents were deleted

A prompt is continued with the answer where every token of the answer is the arm's first choice after those before it, which
is greedy decoding. What an arm would answer first, and how likely that is, is kept for the rates of confident wrong answers.

    alone, memory (whole index, gate), memory 0.3 (whole index, fixed), memory top 3 (the documents that BM25 finds, gate),
    retrieval (the best passage in the prompt), both, oracle (the passage that holds the fact)
"""

import json
import lzma
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gate_texts import documents

from engram_lm.adapt.answers import Answers, Question
from engram_lm.adapt.kept import ResultRows
from engram_lm.eval.intervals import mean_interval
from engram_lm.library import Library, Text
from engram_lm.library.choosing import Chooser
from engram_lm.mixing import FixedLambda, memory_processor
from engram_lm.mixing.lookups import read_next

ARMS = ("alone", "memory", "memory 0.3", "memory top 3", "retrieval", "both", "oracle")
WORDINGS = ("verbatim", "paraphrased")
RELATIONS = ("capital", "government_type", "highest_point")
QUESTIONS = {
    "capital": "What is the capital of {}?",
    "government_type": "What type of government does {} have?",
    "highest_point": "What is the highest point of {}?",
    "nationality": "What is the nationality of {}?",
    "birth_year": "In which year was {} born?",
    "founded_year": "In which year was {} founded?",
    "film_year": "In which year did the film {} come out?",
}


@dataclass(frozen=True)
class Fact:
    """other: what the contradicting document says. part: "tuning" facts are what thresholds are chosen on."""

    source: str
    document: str
    subject: str
    relation: str
    prompt: str
    paraphrase: str
    answer: str
    other: str
    part: str

    @property
    def key(self) -> str:
        return f"{self.document} {self.relation}"

    def asked(self, wording: str) -> str:
        return self.prompt if wording == "verbatim" else self.paraphrase

    def contradicted(self, text: str) -> str:
        """A document that says `other` wherever it said the answer."""
        return re.sub(rf"(?<!\w){re.escape(self.answer)}(?!\w)", lambda _: self.other, text)


def texts_of(data: Path) -> dict[str, str]:
    """Documents of the index: articles, and a country's facts as sentences."""
    texts = {f"articles/{name}": text for name, text in documents(data / "domain/enwiki2018-new.jsonl.xz")}
    sentences: dict[str, list[str]] = {}
    for line in (data / "domain/factbook_probes.jsonl").read_text(encoding="utf8").splitlines():
        probe = json.loads(line)
        sentences.setdefault(probe["id"], []).append(f"{probe['prompt']} {probe['answer']}.")
    return texts | {name: " ".join(found) for name, found in sentences.items()}


def read_facts(data: Path, texts: dict[str, str], n: int) -> list[Fact]:
    """n facts of each source, of different documents; every third is for tuning."""
    with lzma.open(data / "domain/enwiki2018-new_probes.jsonl.xz", "rt", encoding="utf8") as file:
        articles = [json.loads(line) for line in file]
    book = [
        json.loads(line)
        for line in (data / "domain/factbook_probes.jsonl").read_text(encoding="utf8").split("\n")
        if line
    ]
    sources = {
        "articles": [{**probe, "id": f"articles/{probe['id']}"} for probe in articles],
        "factbook": [probe for probe in book if probe["relation"] in RELATIONS],
    }
    facts: list[Fact] = []
    for source, probes in sources.items():
        draw = random.Random(0)
        probes = [
            probe
            for probe in probes
            if probe["paraphrases"] and f"{probe['prompt']} {probe['answer']}" in texts.get(probe["id"], "")
        ]
        draw.shuffle(probes)
        seen: set[str] = set()
        for probe in probes:
            if probe["id"] in seen or len(seen) == n:
                continue
            others = sorted(
                {one["answer"] for one in probes if one["relation"] == probe["relation"]} - {probe["answer"]}
            )
            if not others:
                continue
            seen.add(probe["id"])
            facts.append(Fact(
                source, probe["id"], probe["subject"], probe["relation"], probe["prompt"], probe["paraphrases"][0],
                probe["answer"], draw.choice(others), "tuning" if len(seen) % 3 == 0 else "test",
            ))  # fmt: skip
    return facts


class Shelf:
    """What a store holds at one moment, with its passages."""

    def __init__(self, library: Library, encoder: Any, like: "Shelf | None" = None) -> None:
        self.snapshot = library.store.snapshot()
        self.encoder = encoder
        self.documents = {
            document.id: found[1].astype(np.int64)
            for document in library.store.documents()
            if (found := library.store.get(document.id)) is not None
        }
        self.chooser = Chooser(self.snapshot, encoder, words=None if like is None else like.chooser.words)

    def best(self, query: str) -> np.ndarray:
        for at, _, _ in self.chooser.ranked(query):
            return self._tokens(at)
        return np.empty(0, np.int64)

    def top(self, query: str, k: int = 3) -> Any:
        ids = [one.id for one in self.chooser.chosen(query, k)]
        return self.snapshot.restricted(ids) if ids else self.snapshot

    def oracle(self, fact: Fact, answer: str) -> np.ndarray:
        """The passage of the fact's document that says it."""
        found = [at for at, passage in enumerate(self.chooser.passages) if passage.id == fact.document]
        texts = [self.encoder.decode(self._tokens(at)) for at in found]
        for wanted in (f"{fact.prompt} {answer}", answer):
            for at, text in zip(found, texts, strict=True):
                if wanted in text:
                    return self._tokens(at)
        return self._tokens(found[0])

    def _tokens(self, at: int) -> np.ndarray:
        passage = self.chooser.passages[at]
        return self.documents[passage.id][passage.begin : passage.end]


def make_shelves(
    setting: Any, texts: dict[str, str], facts: list[Fact]
) -> tuple[dict[str, Shelf], dict[str, Any]]:
    """Every state, through the stores' own add, replace and delete; and what is measured on the way."""
    root = setting.out / "facts"
    shutil.rmtree(root, ignore_errors=True)
    wrong = dict(texts)
    for fact in facts:
        wrong[fact.document] = fact.contradicted(wrong[fact.document])
    shelves, told = {}, {}
    begun = time.process_time()
    with Library.create(root / "true", tokenizer=setting.tokenizer, merging="by hand") as library:
        library.add(Text(id=name, text=text) for name, text in texts.items())
        told["build, CPU seconds"] = round(time.process_time() - begun, 2)
        told["documents"], told["tokens"] = library.store.stats().documents, library.store.stats().tokens
        told["index bytes"] = library.store.stats().bytes
        begun = time.process_time()
        shelves["true"] = Shelf(library, setting.encoder)
        told["BM25, CPU seconds"] = round(time.process_time() - begun, 2)
        held = sorted({fact.document for fact in facts})
        random.Random(1).shuffle(held)
        rest = sorted(texts.keys() - set(held))
        random.Random(1).shuffle(rest)
        gone = [*held[: len(held) // 2], *rest[: len(rest) // 2]]
        library.delete(gone)
        shelves["halved"] = Shelf(library, setting.encoder, shelves["true"])
    with Library.create(root / "corrected", tokenizer=setting.tokenizer, merging="by hand") as library:
        library.add(Text(id=name, text=text) for name, text in wrong.items())
        shelves["contradicted"] = Shelf(library, setting.encoder, shelves["true"])
        begun = time.perf_counter()
        library.add((Text(id=name, text=texts[name]) for name in held), existing="replace")
        told["correction of all facts, seconds"] = round(time.perf_counter() - begun, 4)
        shelves["corrected"] = Shelf(library, setting.encoder, shelves["true"])
    told["corrected, same bits as never contradicted"] = same_bits(setting, shelves, facts)
    return shelves, told | {"deleted": gone}


def same_bits(setting: Any, shelves: dict[str, Shelf], facts: list[Fact]) -> dict[str, int]:
    """Of how many prompts P_memory over the whole vocabulary is that of a store which never held the old documents."""
    equal = changed = 0
    for fact in facts:
        ids, found = setting.encoder.encode(fact.prompt), {}
        for state in ("true", "contradicted", "corrected"):
            out = np.empty(setting.encoder.vocab_size + 1, np.float32)
            found[state] = read_next(
                shelves[state].snapshot, ids, setting.rules, setting.gate.reading, out=out
            )[0]
        equal += bool(np.array_equal(found["true"], found["corrected"]))
        changed += not np.array_equal(found["true"], found["contradicted"])
    return {"prompts": len(facts), "equal": equal, "that the old document had changed": changed}


# ---- what the model reads ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Asked:
    """One reading: a prompt, with a passage before it or not, and an answer that is looked for."""

    fact: Fact
    state: str
    wording: str
    said: str
    arm: str
    before: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.before, self.prompt, self.answer])


def asked(setting: Any, shelves: dict[str, Shelf], facts: list[Fact]) -> Iterator[Asked]:
    """Every reading by an arm that needs one of its own: alone, retrieval, oracle."""
    encode, between = setting.encoder.encode, setting.encoder.encode("\n\n")
    for fact in facts:
        for state, shelf in shelves.items():
            answers = {"true": fact.answer} | ({"other": fact.other} if state == "contradicted" else {})
            for wording in WORDINGS if state in ("true", "contradicted") else WORDINGS[:1]:
                prompt = encode(fact.asked(wording))
                passages = {"alone": np.empty(0, np.int64), "retrieval": shelf.best(fact.asked(wording))}
                if state in ("true", "contradicted"):
                    passages["oracle"] = shelf.oracle(fact, list(answers.values())[-1])
                for said, answer in answers.items():
                    for arm, passage in passages.items():
                        before = np.concatenate([passage, between]) if len(passage) else passage
                        yield Asked(fact, state, wording, said, arm, before, prompt, encode(f" {answer}"))


def measure_facts(setting: Any, *, n: int) -> dict[str, Any]:
    texts = texts_of(setting.data)
    facts = read_facts(setting.data, texts, n)
    shelves, told = make_shelves(setting, texts, facts)
    readings = list(asked(setting, shelves, facts))
    setting.read.prepare([(one.ids, len(one.answer)) for one in readings])
    rows = [row for one in readings for row in answered(setting, shelves[one.state], one)]
    gone = set(told.pop("deleted"))
    for row in rows:
        row["deleted"] = row["state"] == "halved" and row["document"] in gone
    path = setting.out / "facts" / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    return {
        "about the documents": told,
        "facts": Counter(fact.source for fact in facts),
        "groups": grouped(rows),
        "abstaining": abstaining(rows),
    }


def answered(setting: Any, shelf: Shelf, one: Asked) -> Iterator[dict[str, Any]]:
    """The row of a reading, and of the arms that mix memory into it."""
    logits_TV, seconds = setting.read(one.ids, len(one.answer))
    gate, fixed = setting.gate, FixedLambda(0.3, reading=setting.gate.reading)
    arms: dict[str, Any] = {one.arm: None}
    if one.arm == "alone":
        arms |= {
            "memory": (shelf.snapshot, gate),
            "memory 0.3": (shelf.snapshot, fixed),
            "memory top 3": (shelf.top(one.fact.asked(one.wording)), gate),
        }
    if one.arm == "retrieval":
        arms["both"] = (shelf.snapshot, gate)
    for arm, mixing in arms.items():
        begun = time.process_time()
        right, first = first_choices(setting, one, logits_TV, mixing)
        spent = time.process_time() - begun if mixing else 0.0
        yield {
            "source": one.fact.source, "document": one.fact.document, "relation": one.fact.relation, "part": one.fact.part,
            "state": one.state, "wording": one.wording, "said": one.said, "arm": arm, "right": right, **first,
            "prompt_tokens": len(one.before) + len(one.prompt), "model_seconds": round(seconds, 4),
            "memory_seconds": round(spent / len(one.answer), 5),
        }  # fmt: skip


def first_choices(
    setting: Any, one: Asked, logits_TV: np.ndarray, mixing: Any
) -> tuple[bool, dict[str, float]]:
    """Whether every token of the answer is the first choice; and of the first token how likely that choice is, lambda,
    and the part of it that memory gave."""
    prompt = np.concatenate([one.before, one.prompt])
    processor = None
    if mixing is not None:
        snapshot, gate = mixing
        processor = memory_processor(snapshot, gate, torch.as_tensor(prompt)[None], rules=setting.rules)
    right, first = True, {}
    for t, token in enumerate(one.answer):
        logits_V = torch.from_numpy(logits_TV[t].copy())[None]
        if processor is not None:
            logits_V = processor(torch.as_tensor(np.concatenate([prompt, one.answer[:t]]))[None], logits_V)
        top = int(logits_V.argmax())
        if t == 0:
            step = None if processor is None else processor.step_of(top)
            p = float(torch.softmax(logits_V[0].double(), -1)[top])
            first = {
                "p_first": p, "lambda": step.lam if step else 0.0,
                "responsibility": (step.responsibility or 0.0) if step else 0.0,
            }  # fmt: skip
        right = right and top == int(token)
    return right, first


# ---- sums -------------------------------------------------------------------------------------------------------------


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares by source, state, wording, looked-for answer and arm."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        for source in (row["source"], "all"):
            key = (source, row["state"], row["wording"], row["said"], row["arm"])
            found.setdefault(key, []).append(row)
    groups = []
    for (source, state, wording, said, arm), of in found.items():
        share, ends = mean_interval([row["right"] for row in of])
        means = {
            name: round(float(np.mean([row[name] for row in of])), 5)
            for name in (
                "p_first",
                "lambda",
                "responsibility",
                "prompt_tokens",
                "model_seconds",
                "memory_seconds",
            )
        }
        groups.append({
            "source": source, "state": state, "wording": wording, "said": said, "arm": arm, "facts": len(of),
            "share": share, "interval": ends, **means,
        })  # fmt: skip
    return groups


def abstaining(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Correct, confidently wrong and silent, with half of the documents deleted.

    An arm abstains where its first choice is less likely than a threshold; "memory, its own words" where memory gave less
    than a threshold of it. The threshold is the one with most correct less wrong answers on the tuning facts.
    """
    halved = [row for row in rows if row["state"] == "halved" and row["said"] == "true"]
    ways = {arm: (arm, "p_first") for arm in ARMS} | {"memory, its own words": ("memory", "responsibility")}
    found = []
    for way, (arm, measure) in ways.items():
        of = [row for row in halved if row["arm"] == arm]
        tuning = [row for row in of if row["part"] == "tuning"]
        if not tuning:
            continue
        limits = [0.0, *sorted({row[measure] for row in tuning}), 2.0]

        def gain(limit: float) -> int:
            return sum((1 if row["right"] else -1) for row in tuning if row[measure] >= limit)  # noqa: B023

        limit = max(limits, key=gain)
        for deleted in (False, True):
            here = [row for row in of if row["part"] == "test" and row["deleted"] == deleted]
            said = [row[measure] >= limit for row in here]
            right = [row["right"] for row in here]
            found.append({
                "arm": way, "document": "deleted" if deleted else "kept", "facts": len(here), "threshold": limit,
                "correct": float(np.mean([s and r for s, r in zip(said, right, strict=True)])),
                "confident wrong": float(np.mean([s and not r for s, r in zip(said, right, strict=True)])),
                "abstained": float(np.mean([not s for s in said])),
                "wrong without abstaining": float(np.mean([not r for r in right])),
            })  # fmt: skip
    return found


# ---- questions in a chat ----------------------------------------------------------------------------------------------


def ask_questions(setting: Any, kept: ResultRows, *, n: int) -> dict[str, Any]:
    """Real questions in the chat template, decoded; memory as `engram-lm generate --index` uses it."""
    texts = texts_of(setting.data)
    facts = [fact for fact in read_facts(setting.data, texts, 40) if fact.relation in QUESTIONS]
    each = [
        [fact for fact in facts if fact.source == source][: n // 2] for source in ("articles", "factbook")
    ]
    facts = [fact for pair in zip(*each, strict=False) for fact in pair]
    directory = setting.out / "facts" / "corrected"
    with Library.open(directory, tokenizer=setting.tokenizer) as library:
        shelf = Shelf(library, setting.encoder)
    answers = Answers(setting.model, setting.tokenizer, directory)
    arms = ("alone", "memory", "retrieval", "both", "oracle")
    for fact in facts:
        if kept.has("oracle", fact.key):
            continue
        question = Question(QUESTIONS[fact.relation].format(fact.subject), fact.answer, fact.key)
        passage = setting.encoder.decode(shelf.oracle(fact, fact.answer)).strip()
        for row in answers.ask(question, passage=passage, arms=arms):
            kept.add({**row, "source": fact.source}, key=fact.key)
    groups = []
    for arm in arms:
        for source in ("articles", "factbook", "all"):
            of = [row for row in kept.rows(arm) if source in (row["source"], "all")]
            if of:
                share, ends = mean_interval([row["answered"] for row in of])
                means = {
                    name: round(float(np.mean([row[name] for row in of])), 3)
                    for name in ("prompt_tokens", "seconds")
                }
                groups.append(
                    {
                        "arm": arm,
                        "source": source,
                        "questions": len(of),
                        "share": share,
                        "interval": ends,
                        **means,
                    }
                )
    return {"groups": groups}
