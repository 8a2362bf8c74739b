"""Questions in the user's own words: memory without prompt tokens beside retrieved text in the prompt (README.md).

$ python experiments/questions/ask.py --out runs/questions                       # a quarter of an hour of one idle core
$ python experiments/questions/ask.py --out runs/questions --quick               # two minutes: ten facts, fewer arms
$ python experiments/questions/ask.py --out runs/questions --text corpus.jsonl.xz     # and the harm to general text
$ python experiments/questions/tables.py runs/questions                          # tables, and results.json

Answers are kept a line each in OUT/<arm>.jsonl; what is there is not computed again. Greedy, one thread, deterministic.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import torch
from decoding import Answer, Start, argmax, decode, prefill
from documents import DATA, Fact, Page, handbook, passages, read_facts
from ideas import Pointer, Quote

from engram_lm.bases.base import load_base
from engram_lm.index.segment import Document, Segment
from engram_lm.index.snapshot import LiveSegment, Snapshot
from engram_lm.library.choosing import Chooser
from engram_lm.library.encoding import TextEncoder
from engram_lm.mixing import FixedLambda, default_gate, memory_processor
from engram_lm.mixing.identity import rules_of
from engram_lm.mixing.pointing import COVERAGE, Pointing

SIZES, TOP = (1, 8, 100), (1, 3, 5)
MOST = 24
PROMPT = "Use the following text to answer the question.\n\n{text}\n\nQuestion: {question}"
LAMBDAS = (0.5, 0.9)
POINTING = Pointing()


@dataclass
class Shelf:
    """The handbook in documents of one size, as memory and as passages for prompts."""

    size: int
    pages: dict[str, Page]
    snapshot: Snapshot
    chooser: Chooser
    parts: dict[str, Page]
    parts_chooser: Chooser


class Asker:
    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.model, self.tokenizer, _ = load_base("smollm2", report=lambda line: None)
        self.encoder, self.gate = TextEncoder.of(self.tokenizer), default_gate()
        self.ends = {self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id}
        self.facts = read_facts()
        self.shelves = {size: self.shelf(size) for size in SIZES}
        self.rules = rules_of(self.tokenizer, self.model, self.shelves[1].snapshot)

    def shelf(self, size: int) -> Shelf:
        pages = handbook(self.facts, sentences=size)
        parts = passages(pages)
        snapshot, part_snapshot = self.memory(pages), self.memory(parts)
        return Shelf(
            size, pages, snapshot, Chooser(snapshot, self.encoder), parts,
            Chooser(part_snapshot, self.encoder),
        )  # fmt: skip

    def memory(self, pages: dict[str, Page]) -> Snapshot:
        segment = Segment.build(
            self.encoder.encode_all(page.text for page in pages.values()), vocab_size=self.encoder.vocab_size,
            documents=[Document(id=name) for name in pages],
        )  # fmt: skip
        return Snapshot([LiveSegment(segment)], vocab_size=self.encoder.vocab_size)

    # ---- prompts ------------------------------------------------------------------------------------------------------

    def chat(self, turn: str) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def starts_with(self, question: str, texts: list[str], tops: tuple[int, ...]) -> dict[int, Start]:
        """The prompt with the first k texts, for every k; what they share is read once."""
        whole = self.chat(PROMPT.format(text="\x00", question=question))
        text = self.tokenizer.decode(whole)
        head, tail = text.split("\x00")
        encode = lambda part: self.tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
        at, found = prefill(self.model, encode(head)), {}
        for n, passage in enumerate(texts, 1):
            at = prefill(self.model, encode(passage if n == 1 else f"\n{passage}"), after=at)
            if n in tops or n == len(texts):
                for k in tops:
                    if k == n or (n == len(texts) and k > n):
                        found[k] = prefill(self.model, encode(tail), after=at)
        return found

    # ---- ways to answer -----------------------------------------------------------------------------------------------

    def processed(
        self, prompt: list[int], snapshot: Snapshot, gate
    ) -> Callable[[list[int], np.ndarray], int]:
        ids = torch.tensor([prompt])
        processor = memory_processor(snapshot, gate, ids, rules=self.rules, record="nothing")

        def way(said: list[int], logits_V: np.ndarray) -> int:
            return int(
                processor(torch.tensor([prompt + said]), torch.from_numpy(logits_V.copy())[None])[0].argmax()
            )

        return way

    def ways(self, prompt: list[int], question: str, shelf: Shelf, kind: str) -> dict[str, tuple]:
        """arm -> (way, seconds to prepare)."""
        ways: dict[str, tuple] = {}
        gates = {"gate": self.gate, "believing gate": replace(self.gate, shift=self.gate.shift - 3.0)}
        gates |= {f"λ {lam}": FixedLambda(lam) for lam in LAMBDAS}
        for name in ("gate", "λ 0.5", "λ 0.9") if kind != "both" else ():
            ways[f"whole, {name}"] = self.processed(prompt, shelf.snapshot, gates[name]), 0.0
        for k in TOP if kind == "question" else (3,):
            begun = time.perf_counter()
            chosen = shelf.chooser.chosen(question, k)
            ids = [one.id for one in chosen]
            restricted = shelf.snapshot.restricted(ids) if ids else shelf.snapshot
            spent = time.perf_counter() - begun
            names = {1: ("gate", "believing gate", "λ 0.5", "λ 0.9"), 3: ("gate", "λ 0.5")}.get(k, ("λ 0.5",))
            for name in names if kind == "question" else ("gate",):
                ways[f"top {k}, {name}"] = self.processed(prompt, restricted, gates[name]), spent
            begun = time.perf_counter()
            focus = shelf.chooser.focus(question, ids)
            spent += time.perf_counter() - begun
            known = focus if chosen and chosen[0].coverage >= COVERAGE else ()
            ways[f"top {k}, pointing"] = Pointer(known, POINTING), spent
            if k != 3 or kind != "question":
                continue
            ways["top 3, pointing always"] = Pointer(focus, POINTING), spent
            if shelf.size != 8:
                continue
            best = known[0] if known else None
            ways["top 3, quote"] = Quote(best, 0), spent
            ways["top 3, quote from word"] = Quote(best, best.starts[0] if best and best.starts else 0), spent
            three = shelf.chooser.focus(question, ids, most=3) if known else ()
            ways["top 3, pointing at 3 sentences"] = Pointer(three, POINTING), spent
            for lam in (0.2, 0.5):
                ways[f"top 3, pointing λ {lam}"] = Pointer(known, replace(POINTING, lam=lam)), spent
            for alpha in (0.0, 0.5):
                ways[f"top 3, pointing alpha {alpha}"] = Pointer(known, replace(POINTING, alpha=alpha)), spent
        return ways

    # ---- one question -------------------------------------------------------------------------------------------------

    def ask(self, fact: Fact) -> None:
        prompt = self.chat(fact.question)
        ways, about = {"alone": argmax}, {"alone": 0.0}
        for shelf in self.shelves.values():
            for name, (way, spent) in self.ways(prompt, fact.question, shelf, "question").items():
                ways[f"{shelf.size}: {name}"], about[f"{shelf.size}: {name}"] = way, spent
        self.run_alone(fact, prompt, ways, about)

    def continue_cloze(self, fact: Fact) -> None:
        ids = self.tokenizer(fact.cloze, add_special_tokens=False).input_ids
        ways, about = {"cloze alone": argmax}, {"cloze alone": 0.0}
        for shelf in self.shelves.values():
            for name, (way, spent) in self.ways(ids, fact.cloze, shelf, "cloze").items():
                ways[f"cloze {shelf.size}: {name}"], about[f"cloze {shelf.size}: {name}"] = way, spent
        self.run_alone(fact, ids, ways, about, most=12)

    def ask_with_text(self, fact: Fact) -> None:
        """Retrieved text in the prompt, the best first; the oracle's passage; and memory beside the text."""
        texts = {"oracle sentence": ([fact.sentence], (1,))}
        for shelf in self.shelves.values():
            ranked = shelf.parts_chooser.chosen(fact.question, max(TOP))
            texts[f"{shelf.size}: prompt"] = [shelf.parts[one.id].text for one in ranked], TOP
            if shelf.size == 8:
                oracle = next(page for page in shelf.parts.values() if fact.number in page.facts)
                texts["oracle passage"] = [oracle.text], (1,)
        ways, about, starts = {}, {}, []
        for name, (found, tops) in texts.items():
            both = (
                [f"{name.split(':')[0]}: both, top 3, {arm}" for arm in ("gate", "pointing")]
                if 3 in tops
                else []
            )
            if all(self.known(arm, fact) for arm in [*both, *(f"{name} {k}" for k in tops)]):
                continue
            if all(self.known(f"{name} {k}", fact) for k in tops):
                tops = (3,)
            begun = self.starts_with(fact.question, found, tops) if found else {}
            for k in tops:
                start = begun.get(k) or prefill(self.model, self.chat(fact.question))
                same = next((n for n, other in enumerate(starts) if other.ids == start.ids), len(starts))
                if same == len(starts):
                    starts.append(start)
                ways[f"{name} {k}"], about[f"{name} {k}"] = (same, argmax), 0.0
                if k == 3:
                    shelf = self.shelves[int(name.split(":")[0])]
                    more = self.ways(start.ids, fact.question, shelf, "both")
                    for arm, (way, spent) in more.items():
                        arm = f"{shelf.size}: both, {arm}"
                        ways[arm], about[arm] = (same, way), spent
        self.run(fact, starts, ways, about)

    def run(self, fact: Fact, starts: list[Start], ways: dict, about: dict, most: int = MOST) -> None:
        """ways: arm -> (number of its start, way)."""
        left = {name: way for name, way in ways.items() if not self.known(name, fact)}
        if left:
            answers = decode(self.model, starts, left, most=most, ends=self.ends)
            for name, answer in answers.items():
                start = starts[ways[name][0]]
                self.keep(name, fact, answer, start.ids, start.seconds, about[name])

    def run_alone(self, fact: Fact, prompt: list[int], ways: dict, about: dict, most: int = MOST) -> None:
        """Ways that have a prompt without documents."""
        if not all(self.known(name, fact) for name in ways):
            self.run(
                fact,
                [prefill(self.model, prompt)],
                {name: (0, way) for name, way in ways.items()},
                about,
                most,
            )

    # ---- what is kept -------------------------------------------------------------------------------------------------

    def path(self, arm: str) -> Path:
        return self.out / f"{arm.replace(': ', '_').replace(', ', '_').replace(' ', '-')}.jsonl"

    def known(self, arm: str, fact: Fact) -> bool:
        if arm not in _KNOWN:
            path = self.path(arm)
            lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
            _KNOWN[arm] = {json.loads(line)["fact"] for line in lines}
        return fact.number in _KNOWN[arm]

    def keep(
        self, arm: str, fact: Fact, answer: Answer, prompt: list[int], read: float, spent: float
    ) -> None:
        text = self.tokenizer.decode(answer.ids)
        line = {
            "arm": arm, "fact": fact.number, "part": fact.part, "answered": fact.is_answered_by(text), "text": text,
            "prompt_tokens": len(prompt), "new_tokens": len(answer.ids), "prompt_seconds": round(read, 4),
            "choosing_seconds": round(spent, 5), "memory_seconds": round(answer.seconds, 5),
        }  # fmt: skip
        with open(self.path(arm), "a", encoding="utf8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        _KNOWN[arm].add(fact.number)


_KNOWN: dict[str, set[int]] = {}


def general_questions(asker: Asker) -> None:
    """Questions about the world at large: does memory of the handbook take the model's answers away?"""
    lines = (DATA / "general.txt").read_text(encoding="utf8").splitlines()[1:]
    shared = lines.index("---")
    for n, line in enumerate(lines):
        if line == "---":
            continue
        question, answer = line.split(" | ")
        kind = "general" if n < shared else "general, shared words"
        fact = Fact(n * 3 + (1 if n % 2 else 0), "", question, "", answer)
        prompt = asker.chat(question)
        ways, about = {f"{kind}: alone": argmax}, {f"{kind}: alone": 0.0}
        for shelf in [asker.shelves[8]]:
            for name, (way, spent) in asker.ways(prompt, question, shelf, "question").items():
                if name.startswith(("top 3, pointing", "top 3, gate", "top 3, λ", "top 3, quote", "whole")):
                    ways[f"{kind}: {name}"], about[f"{kind}: {name}"] = way, spent
            texts = [shelf.parts[one.id].text for one in shelf.parts_chooser.chosen(question, 3)]
        asker.run_alone(fact, prompt, ways, about)
        arm = f"{kind}: prompt 3"
        if not texts:
            asker.run_alone(fact, prompt, {arm: argmax}, {arm: 0.0})
        elif not asker.known(arm, fact):
            asker.run(fact, [asker.starts_with(question, texts, (3,))[3]], {arm: (0, argmax)}, {arm: 0.0})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--text", type=Path, help="JSON lines (.xz) with general text, for the harm")
    parser.add_argument("--only", choices=["questions", "cloze", "prompt", "general"], nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    asker = Asker(options.out, options.quick)
    facts = sorted(asker.facts, key=lambda fact: fact.part != "test")[: 10 if options.quick else None]
    todo = options.only or (
        ["questions", "prompt"] if options.quick else ["questions", "general", "cloze", "prompt"]
    )
    begun = time.perf_counter()
    steps = {"questions": asker.ask, "cloze": asker.continue_cloze, "prompt": asker.ask_with_text}
    for name in todo:
        if name == "general":
            general_questions(asker)
            continue
        for n, fact in enumerate(facts, 1):
            steps[name](fact)
            if sys.stderr.isatty() or n % 10 == 0:
                print(
                    f"{name}: {n} of {len(facts)} facts, {time.perf_counter() - begun:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    if options.text is not None:
        from harm import measure

        measure(asker, options.text, options.out / "harm.json")


if __name__ == "__main__":
    main()
