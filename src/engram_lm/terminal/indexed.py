"""Generation with an index of documents: which documents, which gate, and the line that says what the index did.

A question is answered from the documents it is about: of three that BM25 finds, memory names words of the best sentence
where the model is unsure (`mixing.pointing`). Other turns of a chat have those documents mixed in as the gate says; all
other text, and a question that no document is about, the whole index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engram_lm.errors import ConfigError, MissingExtraError
from engram_lm.extras import missing

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library import Library
    from engram_lm.mixing.gate import Lambda
    from engram_lm.mixing.pointing import PointingProcessor
    from engram_lm.mixing.processor import MemoryProcessor
    from engram_lm.mixing.trace import MemoryStep
    from engram_lm.terminal.speaking import Token


TOP = 3
_SLOW_TOKENS = 2_000_000  # some ten seconds


class Indexed:
    """An index beside a model, for one generation.

    documents: ["auto"], ["all"] or ids. top_k: how many documents of a question; 0 where it was not given. library: of the
    directory, where it is open already. drafts, session, most_verbatim: of `mixing.speculate` and `memory_processor`; they
    need documents mixed in, and a question that is answered by pointing refuses them. strict: refuse a gate that was fitted
    on documents which are gone, instead of saying so. count: of `Snapshot.distribution`, instead of the gate's.
    """

    def __init__(
        self,
        directory: Path,
        *,
        model: Any,
        tokenizer: Any,
        gate: Path | None,
        lam: float | None,
        tenant: str,
        prompt: str = "",
        chat: bool = False,
        documents: Sequence[str] = ("auto",),
        top_k: int = 0,
        library: Library | None = None,
        drafts: bool = False,
        session: int | Literal["off"] = "off",
        most_verbatim: int | None = None,
        strict: bool = False,
        count: str | None = None,
    ) -> None:
        from engram_lm.library import Library
        from engram_lm.mixing.gate_provenance import told

        self.model, self.tokenizer = model, tokenizer
        self.library = Library.open(directory, tokenizer=tokenizer) if library is None else library
        self.snapshot: Snapshot = self.library.store.snapshot(tenant)
        self.focus: tuple[Any, ...] = ()
        self.notes: list[str] = []
        self._choose(prompt, chat, list(documents), top_k, tenant, mixing=gate is not None or lam is not None)
        self.drafts, self.session, self.most_verbatim = drafts, session, most_verbatim
        self.gate: Lambda | None = None
        if self.focus and (drafts or session != "off" or most_verbatim is not None or count is not None):
            raise ConfigError(
                "This question is answered by naming words of a sentence, where --drafts, --session, --most-verbatim and "
                "--count have no effect: mix the documents in with --gate or --lam, or ask the whole index with --documents "
                "all."
            )
        if not self.focus:
            self.gate = chosen_gate(gate, lam, self.snapshot, model=model, tokenizer=tokenizer)
            if count is not None:
                self.gate = counting(self.gate, count)
                self._require_field(count)
            if gone := told(self.gate, self.library.store.snapshot(tenant)):
                if strict:
                    raise ConfigError(gone)
                self.notes.append(gone)
        self.ids: list[int] = []
        self.steps: list[MemoryStep] = []

    def _require_field(self, count: str) -> None:
        """ConfigError where no document has the field by which sources are to be told apart."""
        field = count.partition(":")[2]
        if field and self.snapshot.views and not any(view.sources(count)[0] for view in self.snapshot.views):
            raise ConfigError(
                f"No document here has the field {field!r} of --count {count}: nothing would be capped."
            )

    def _choose(
        self, prompt: str, chat: bool, documents: list[str], top_k: int, tenant: str, *, mixing: bool
    ) -> None:
        """Restrict memory to what was named, or to what the prompt is about. mixing: a gate or lambda was asked for, so the
        documents' wording is mixed in and no words are pointed at."""
        from engram_lm.library.choosing import is_question
        from engram_lm.mixing.pointing import COVERAGE

        if not documents or (len(documents) > 1 and {"auto", "all"} & set(documents)):
            raise ConfigError("--documents is auto, all, or ids of documents.")
        if top_k < 0 or (top_k and documents != ["auto"]):
            raise ConfigError("--top-k is 1 or more, and belongs to --documents auto.")
        asking = chat or is_question(prompt)
        if documents == ["all"] or (documents == ["auto"] and not asking and not top_k):
            return
        if documents != ["auto"]:
            self.snapshot = self.snapshot.restricted(documents)
            if is_question(prompt) and not mixing:
                self.focus = self._focus(prompt, documents, tenant)
            return
        try:
            found = (
                self.library.chosen(prompt, top_k or TOP, tenant=tenant) if self.snapshot.n_documents else []
            )
        except MissingExtraError as error:
            if top_k:
                raise
            self.notes.append(f"The whole index answers. {error}")
            return
        if not found or found[0].coverage < COVERAGE:
            self.notes.append("no document is about this question; the whole index answers")
            return
        ids = [one.id for one in found]
        self.notes.append(f"asked of {', '.join(ids)}")
        self.snapshot = self.snapshot.restricted(ids)
        if is_question(prompt) and not mixing:
            self.focus = self._focus(prompt, ids, tenant)

    def _focus(self, prompt: str, ids: list[str], tenant: str) -> tuple[Any, ...]:
        try:
            return self.library.focus(prompt, ids, tenant=tenant)
        except MissingExtraError as error:
            self.notes.append(f"No words are pointed at. {error}")
            return ()

    def processor(self, ids: list[int]) -> MemoryProcessor | PointingProcessor:
        """A new one for a prompt."""
        import torch

        from engram_lm.mixing import memory_processor

        if self.gate is None:
            from engram_lm.mixing.identity import rules_of
            from engram_lm.mixing.pointing import PointingProcessor

            rules = rules_of(self.tokenizer, self.model, self.snapshot)
            return PointingProcessor(self.focus, prompt_length=len(ids), rules=rules)
        return memory_processor(
            self.snapshot, self.gate, torch.tensor([ids]), tokenizer=self.tokenizer, model=self.model,
            session=self.session, most_verbatim=self.most_verbatim,
        )  # fmt: skip

    def speak(self, ids: list[int], *, memory: str = "on", **options: Any) -> Iterator[Token]:
        """`speaking.speak` with this index. memory: whether the model's own tables take part."""
        from engram_lm.terminal.speaking import HeatView, speak

        if not self.drafts or self.gate is None:
            view = HeatView(quantity="index")
            return speak(
                self.model,
                self.tokenizer,
                ids,
                view=view,
                memory=memory,
                processor=self.processor(ids),
                **options,
            )
        return self._drafted(ids, memory, **options)

    def _drafted(self, ids: list[int], memory: str, **options: Any) -> Iterator[Token]:
        from engram_lm.mixing import speculating
        from engram_lm.terminal.speaking import Token, end_ids, memory_switch

        for token in ids:
            yield Token(token, 0.0, True)
        ends, result = end_ids(self.model, self.tokenizer), None
        said = speculating(
            self.model, ids, self.snapshot, self.gate, tokenizer=self.tokenizer, session=self.session,
            most_verbatim=self.most_verbatim, **options,
        )  # fmt: skip
        with memory_switch(self.model, memory):
            while result is None:
                try:
                    token, step = next(said)
                except StopIteration as over:
                    result = over.value
                else:
                    if token in ends:
                        continue
                    yield Token(token, (step.responsibility or 0.0) if step else 0.0, False, step)
        self.notes.append(
            f"{len(result.tokens)} tokens in {result.forwards} forwards; {result.accepted} of {result.drafted} drafted "
            "tokens kept"
        )

    def watched(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """The same tokens; what the index did is kept for `told`."""
        for token in tokens:
            self.ids.append(token.id)
            if token.step is not None:
                self.steps.append(token.step)
            yield token

    def told(self) -> list[str]:
        """What happened: one line, and the documents behind the token that the index gave most of."""
        from engram_lm.mixing.trace import summary

        lines = [*self.notes, summary(list(self.steps))]
        spoken = [step for step in self.steps if step.depth and (step.responsibility or 0) > 0]
        if spoken:
            best = max(spoken, key=lambda step: (round(step.responsibility or 0, 2), step.depth))
            match = self.snapshot.match(np.array(self.ids[: best.position], np.int64))
            for document, count in self.snapshot.documents_of(match, match.depth, limit=3):
                times = f"{count:,} times" if count != 1 else "once"
                facts = "".join(
                    f", {name}: {value}"
                    for name, value in document.extra.items()
                    if name in ("title", "licence", "license", "attribution")
                )
                lines.append(_plain(f"  {document.id} ({times}{facts})"))
        return lines


def _plain(line: str) -> str:
    """Without signs that a terminal obeys: documents come from anywhere."""
    return "".join(sign if sign.isprintable() else "�" for sign in line)


def chosen_gate(
    path: Path | None, lam: float | None, snapshot: Snapshot, *, model: Any, tokenizer: Any
) -> Lambda:
    """The gate of a file, a fixed lambda, or the one shipped for this model."""
    from engram_lm.mixing.identity import require_identity

    gate = named_gate(path, lam)
    if lam is not None:
        return gate
    try:
        require_identity(gate, tokenizer=tokenizer, model=model)
    except ConfigError:
        raise
    except ValueError as error:
        if path is not None:
            raise
        raise ConfigError(
            f"No gate is shipped for this model ({error}) Give --lam 0.3, say, or fit one: engram-lm gate fit."
        ) from None
    return gate


def named_gate(path: Path | None, lam: float | None) -> Lambda:
    """The gate that a command names, or the shipped one; whether it fits the model is `chosen_gate`'s to say."""
    from engram_lm.mixing.gate import FixedLambda, Gate, default_gate

    if path is not None and lam is not None:
        raise ConfigError("--gate and --lam exclude each other: a gate says what lambda is.")
    if lam is not None:
        return FixedLambda(lam)
    return default_gate() if path is None else Gate.load(path)


def require_parts(
    name: str, index: Path | None, *, gate: Path | None = None, lam: float | None = None
) -> None:
    """What a command with a model, and perhaps an index, needs: looked for before any of it is loaded."""
    from engram_lm.bases.naming import find_model
    from engram_lm.index.manifest import require_index

    find_model(name)
    if index is not None:
        require_index(index)
        named_gate(gate, lam)


def counting(gate: Lambda, count: str) -> Lambda:
    """The gate with another way of counting P_memory: the same numbers where no source says a thing in two documents."""
    kind, colon, field = count.partition(":")
    if count != "documents" and (kind != "sources" or (colon and not field)):
        raise ConfigError(
            f"--count is documents, sources, or sources: and a field of the documents; got {count!r}."
        )
    return replace(gate, reading=replace(gate.reading, count=count))  # type: ignore[type-var]


def load_any(name: str) -> tuple[Any, Any]:
    """(model, tokenizer): a memory directory, a run, smollm2, a path or a hub name."""
    try:
        from engram_lm.attachment.loading import load_any
    except ImportError as error:
        raise missing(f"A model needs torch and transformers ({error})", "hf") from error
    return load_any(name)
