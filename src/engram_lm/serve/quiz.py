"""Questions about the documents, and whether an answer holds what it has to: a JSON file and a comparison of words.

    [{"id": "dog", "kind": "paraphrased", "prompt": "...?", "document": "people.md", "answer": ["Orlando"]}, ...]

verbatim: the prompt is the beginning of a sentence of the document, to be gone on with. paraphrased: a question in other
words, asked in the chat template. An answer is right if it contains one of the wordings in `answer`; letter case and
punctuation do not matter: "The dog is called ORLANDO!" is right. Whole words only, but for scripts without blanks.

    quiz = Quiz.read("quiz.json")
    quiz.question("dog").is_answered_by("Orlando, I think")
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import DataError
from engram_lm.serve.http_errors import Refusal, shown

# tokens that an answer may take
MOST_TOKENS = {"verbatim": 12, "paraphrased": 32}


@dataclass(frozen=True, kw_only=True)
class Question:
    """answers: wordings of which one has to occur; the first is shown."""

    id: str
    kind: Literal["verbatim", "paraphrased"]
    prompt: str
    document: str
    answers: tuple[str, ...]

    @property
    def chat(self) -> bool:
        return self.kind == "paraphrased"

    @property
    def max_tokens(self) -> int:
        return MOST_TOKENS[self.kind]

    def is_answered_by(self, text: str) -> bool:
        """Whether a text contains an answer."""
        return any(contains(text, answer) for answer in self.answers)

    def facts(self) -> dict[str, Any]:
        """For GET /api/quiz: without the answer."""
        return {
            "id": self.id, "kind": self.kind, "prompt": self.prompt, "document": self.document, "chat": self.chat,
        }  # fmt: skip


class Quiz:
    """Questions by id, in the order of the file."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions = {question.id: question for question in questions}
        if len(self.questions) < len(questions):
            raise DataError("A quiz holds a question id twice.")

    @classmethod
    def read(cls, path: str | Path) -> "Quiz":
        """Read a quiz file. DataError where it is none."""
        try:
            rows = json.loads(Path(path).read_text(encoding="utf8"))
            return cls([_question(row) for row in rows])
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no quiz ({error}); docs/serve.md shows one.") from None

    def question(self, name: str) -> Question:
        """Refusal 404 for an unknown id."""
        if name not in self.questions:
            raise Refusal(404, f"There is no question {shown(name)} in the quiz.")
        return self.questions[name]


def contains(text: str, answer: str) -> bool:
    """Whether the words of `answer` stand in `text`, side by side."""
    said, wanted = _words(text), _words(answer)
    if not wanted:
        return False
    if re.search(r"[぀-ヿ㐀-鿿가-힯]", wanted):
        return wanted.replace(" ", "") in said.replace(" ", "")
    return f" {wanted} " in f" {said} "


def _words(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,140 is 1140
    return " ".join(re.sub(r"[^\w:]+|(?<!\d):|:(?!\d)", " ", text).split())


def _question(row: dict[str, Any]) -> Question:
    if row["kind"] not in MOST_TOKENS:
        raise ValueError(f"kind is verbatim or paraphrased; got {row['kind']!r}")
    answers = tuple(str(answer) for answer in row["answer"])
    if isinstance(row["answer"], str) or not answers or not all(_words(answer) for answer in answers):
        raise ValueError(f"answer of {row['id']!r} is a list of wordings")
    return Question(
        id=str(row["id"]),
        kind=row["kind"],
        prompt=str(row["prompt"]),
        document=str(row["document"]),
        answers=answers,
    )
