"""Questions answered by every arm: the model alone, memory as `engram-lm generate --index` uses it, passages in the prompt.

    questions = read_questions(Path("questions.jsonl"))       # {"question": ..., "answer": ...} a line
    answers = Answers(model, tokenizer, directory, gate=None, lam=None)
    answers.ask(questions[0])                                 # a row for each arm

A question is answered where the greedy answer of up to 24 tokens holds the answer word for word, whatever its case.
Memory asks of the documents that the question is about (`terminal.indexed`). Retrieved are the three best passages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lm.corpus.text import json_lines, read_lines
from engram_lm.errors import DataError
from engram_lm.terminal.indexed import Indexed

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
        self.model, self.tokenizer, self.directory = model, tokenizer, directory
        self.gate, self.lam = gate, lam
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self._shared: Indexed | None = None

    def ask(
        self, question: Question, *, passage: str | None = None, arms: Sequence[str] = ARMS
    ) -> list[dict[str, Any]]:
        """passage: a text for the arm "oracle", which reads it in the prompt."""
        # here, as it brings torch: questions are read and checked without
        from engram_lm.terminal.speaking import prompt_ids, speak

        rows = []
        for arm in arms:
            begun = time.process_time()
            indexed = self._indexed(question.question)
            text = passage if arm == "oracle" else None
            if arm in ("retrieval", "both"):
                text = self._retrieved(indexed, question.question)
            turn = TEXT.format(text=text, question=question.question) if text else question.question
            ids = prompt_ids(self.tokenizer, turn, chat=self.chat)
            processor = indexed.processor(ids) if arm in ("memory", "both") else None
            spoken = speak(self.model, self.tokenizer, ids, max_new_tokens=MOST, processor=processor)
            said = [token.id for token in spoken][len(ids) :]
            answer = self.tokenizer.decode(said, skip_special_tokens=True)
            rows.append({
                "arm": arm, "question": question.question, "answered": question.is_answered_by(answer), "text": answer,
                "prompt_tokens": len(ids), "seconds": round(time.process_time() - begun, 3),
            })  # fmt: skip
        return rows

    def _indexed(self, question: str) -> Indexed:
        # the library of the first is kept: its chooser has read the documents
        indexed = Indexed(
            self.directory, model=self.model, tokenizer=self.tokenizer, gate=self.gate, lam=self.lam, tenant="public",
            prompt=question, chat=self.chat, library=None if self._shared is None else self._shared.library,
        )  # fmt: skip
        self._shared = self._shared or indexed
        return indexed

    def _retrieved(self, indexed: Indexed, question: str) -> str:
        chooser = indexed.library.chooser()
        found = []
        for at, _, _ in chooser.ranked(question):
            passage = chooser.passages[at]
            document = indexed.library.store.get(passage.id)
            if document is not None:
                found.append(indexed.library.encoder.decode(document[1][passage.begin : passage.end]).strip())
            if len(found) == TOP:
                break
        return "\n".join(found)
