"""What `engram-lm serve` shows without a model's name: the package's trained memory on SmolLM2, and an index of an invented
company's handbook, made anew at every start in a temporary directory and removed at the end.

    demo = Demo.find()
    demo.make_index(directory, encoder=loaded.encoder)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_lm import demo


@dataclass(frozen=True)
class Demo:
    """memory: what `save_memory` wrote. documents: texts, with quiz.json and examples.json beside them."""

    memory: Path
    documents: Path

    @classmethod
    def find(cls) -> "Demo":
        """The demo that comes with the package."""
        return cls(demo.memory(), demo.documents())

    @property
    def quiz(self) -> Path:
        return self.documents / "quiz.json"

    @property
    def examples(self) -> Path:
        return self.documents / "examples.json"

    def make_index(self, directory: Path, *, encoder: Any) -> tuple[int, int]:
        """Index the documents, each with its first line as its title; (documents, tokens)."""
        from engram_lm.index.store import Index
        from engram_lm.library import Library, Text

        paths = sorted(self.documents.glob("*.md"))
        texts = [path.read_text(encoding="utf8") for path in paths]
        store = Index.create(
            directory, vocab_size=encoder.vocab_size, tokenizer=encoder.first_print, merging="by hand"
        )
        with Library(store, encoder) as library:
            encoder.save(directory)
            added = library.add(
                Text(id=path.name, text=text, source="handbook", extra={"title": title_of(text)})
                for path, text in zip(paths, texts, strict=True)
            )
        return added.documents, added.tokens


def title_of(text: str) -> str:
    """The first line, without what marks it as a heading."""
    return text.lstrip().partition("\n")[0].lstrip("# ").strip()
