"""Questions answered by every arm: the model alone, memory as `engram-lm generate --index` uses it, passages in the prompt.

    questions = read_questions(Path("questions.jsonl"))       # {"question": ..., "answer": ...} a line
    answers = Answers(model, tokenizer, directory, gate=None, lam=None)
    answers.ask(questions[0])                                 # a row for each arm

A question is answered where the greedy answer of up to 24 tokens holds the answer word for word, whatever its case.
Memory asks of the documents that the question is about (`generation.select`). Retrieved are the three best passages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engram_lm.corpus.text import json_lines, read_lines
from engram_lm.errors import DataError

MOST, TOP = 24, 3
TEXT = "Use the following text to answer the question.\n\n{text}\n\nQuestion: {question}"
ARMS = ("alone", "memory", "retrieval", "both")


@dataclass(frozen=True)
class Question:
    question: str
    answer: str
    id: str

    def is_answered_by(self, text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", text, re.IGNORECASE) is not None


def read_questions(path: Path) -> list[Question]:
    """Lines of JSON with question and answer. DataError names the line that has none."""
    found = []
    if not path.exists():
        raise DataError(f"{path}: no such file; --questions names JSON lines with question and answer.")
    for record, number in json_lines(read_lines(path), path, "question"):
        answer = record.get("answer")
        if not isinstance(answer, str) or not answer.strip() or not record["question"].strip():
            raise DataError(f"{path}:{number}: a question and an answer are wanted, both with words.")
        found.append(Question(record["question"], answer.strip(), f"{number}"))
    if not found:
        raise DataError(f"{path} holds no question.")
    return found


class Answers:
    """One model beside one index."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        directory: Path,
        *,
        gate: Path | None = None,
        lam: float | None = None,
    ) -> None:
        from engram_lm.generation.engines import TransformersEngine
        from engram_lm.generation.gates import chosen_gate
        from engram_lm.library import Library

        self.engine, self.parts = (
            TransformersEngine(model, tokenizer),
            {"model": model, "tokenizer": tokenizer},
        )
        self.library = Library.open(directory, tokenizer=tokenizer)
        self.named = gate is not None or lam is not None
        # found when it is first needed: questions that are pointed at need none
        self.gate = cache(lambda: chosen_gate(gate, lam, **self.parts))
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def ask(
        self, question: Question, *, passage: str | None = None, arms: Sequence[str] = ARMS
    ) -> list[dict[str, Any]]:
        """passage: a text for the arm "oracle", which reads it in the prompt."""
        # here, as it brings torch: questions are read and checked without
        from engram_lm.generation.decoder import Request, stream
        from engram_lm.generation.prompts import prompt_ids

        rows, tokenizer = [], self.engine.tokenizer
        for arm in arms:
            begun = time.process_time()
            text = passage if arm == "oracle" else None
            if arm in ("retrieval", "both"):
                text = self._retrieved(question.question)
            turn = TEXT.format(text=text, question=question.question) if text else question.question
            ids = prompt_ids(tokenizer, turn, chat=self.chat, encoder=self.library.encoder)
            processor = self._processor(question.question, ids) if arm in ("memory", "both") else None
            tokens = stream(self.engine, Request(ids=ids, max_new_tokens=MOST, watch=False), processor)
            answer = tokenizer.decode([token.id for token in tokens][len(ids) :], skip_special_tokens=True)
            rows.append({
                "arm": arm, "question": question.question, "answered": question.is_answered_by(answer), "text": answer,
                "prompt_tokens": len(ids), "seconds": round(time.process_time() - begun, 3),
            })  # fmt: skip
        return rows

    def _processor(self, question: str, ids: list[int]) -> Any:
        from engram_lm.generation.processors import processor_for
        from engram_lm.generation.selection import select

        selection = select(self.library, question, chat=self.chat, pointing=not self.named)
        return processor_for(selection, None if selection.focus else self.gate(), ids, **self.parts)

    def _retrieved(self, question: str) -> str:
        chooser = self.library.chooser()
        found = []
        for at, _, _ in chooser.ranked(question):
            passage = chooser.passages[at]
            document = self.library.store.get(passage.id)
            if document is not None:
                found.append(self.library.encoder.decode(document[1][passage.begin : passage.end]).strip())
            if len(found) == TOP:
                break
        return "\n".join(found)
