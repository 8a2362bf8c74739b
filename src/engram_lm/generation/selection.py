"""Which documents of an index a prompt is answered from.

    selection = select(library, "How long is my leave?", chat=True)
    selection.snapshot, selection.focus, selection.notes

A question is answered from the documents it is about: of three that BM25 finds, memory names words of the best sentence
where the model is unsure (`mixing.pointing`). Other turns of a chat have those documents mixed in as the gate says; all
other text, and a question that no document is about, the whole index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engram_lm.errors import ConfigError, MissingExtraError
from engram_lm.library.choosing import is_question
from engram_lm.mixing.pointing import COVERAGE

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot
    from engram_lm.library import Library

TOP = 3


@dataclass(frozen=True)
class Selection:
    """snapshot: of the documents that are looked into. focus: sentences whose words are pointed at; () where the documents'
    wording is mixed in. notes: sentences about the choice, for the user. tenant: whose documents."""

    snapshot: Snapshot
    focus: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    tenant: str = "public"


def select(
    library: Library,
    prompt: str,
    documents: Sequence[str] = ("auto",),
    top_k: int = 0,
    *,
    chat: bool = False,
    tenant: str = "public",
    pointing: bool = True,
) -> Selection:
    """What the prompt is to be answered from.

    Args:
        documents: ["auto"], ["all"] or ids.
        top_k: how many documents a question is answered from; 0 where it was not given.
        chat: the prompt is a turn, which is about something even where it is no question.
        pointing: False where the documents' wording is to be mixed in, as a gate or a lambda says.
    Raises: ConfigError for documents that are not there, and for choices that exclude each other.
    """
    documents = list(documents)
    if not documents or (len(documents) > 1 and {"auto", "all"} & set(documents)):
        raise ConfigError("--documents is auto, all, or ids of documents.")
    if top_k < 0 or (top_k and documents != ["auto"]):
        raise ConfigError("--top-k is 1 or more, and belongs to --documents auto.")
    snapshot, notes = library.store.snapshot(tenant), ()
    if documents == ["all"] or (documents == ["auto"] and not (chat or is_question(prompt)) and not top_k):
        return Selection(snapshot, tenant=tenant)
    if documents == ["auto"]:
        try:
            found = library.chosen(prompt, top_k or TOP, tenant=tenant) if snapshot.n_documents else []
        except MissingExtraError as error:
            if top_k:
                raise
            return Selection(snapshot, notes=(f"The whole index answers. {error}",), tenant=tenant)
        if not found or found[0].coverage < COVERAGE:
            note = "no document is about this question; the whole index answers"
            return Selection(snapshot, notes=(note,), tenant=tenant)
        documents = [one.id for one in found]
        notes = (f"asked of {', '.join(documents)}",)
    chosen = snapshot.restricted(documents)
    if not (is_question(prompt) and pointing):
        return Selection(chosen, notes=notes, tenant=tenant)
    try:
        return Selection(chosen, library.focus(prompt, documents, tenant=tenant), notes, tenant)
    except MissingExtraError as error:
        return Selection(chosen, notes=(*notes, f"No words are pointed at. {error}"), tenant=tenant)
