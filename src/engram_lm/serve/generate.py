"""Generation for the page: alone, with the index in every token, or with passages of it in the prompt.

    for event in ...: generate(loaded, mixed, asked, emit=job.emit)       # POST /api/generate

The arm says what the index does: nothing, `memory` what `engram-lm generate --index` does (a question is answered from the
documents it is about, by pointing), or `retrieval`: the best passages by BM25 stand in the prompt. Whether the tables are on
is a question of its own. A token is told once the model has read it, so that the tables' heat at it is known.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engram_lm.serve.http_errors import Refusal, shown

if TYPE_CHECKING:
    from engram_lm.generation.selection import Selection
    from engram_lm.mixing.gate import Lambda
    from engram_lm.serve.schema import GenerateRequest
    from engram_lm.serve.served_mixture import ServedMixture
    from engram_lm.serve.served_model import ServedModel

PASSAGES = 3
# the best of three wordings on six facts (experiments/questions)
QUESTION = "Use the following text to answer the question.\n\n{text}\n\nQuestion: {prompt}"
CONTINUATION = "{text}\n\n{prompt}"
MOST_LAMBDA = 0.999


def require_possible(loaded: ServedModel, mixed: ServedMixture | None, asked: GenerateRequest) -> None:
    """Refusal of what this server cannot do, for a request that has not waited yet."""
    if asked.max_tokens > loaded.limits.new_tokens:
        raise Refusal(422, f"max_tokens is at most {loaded.limits.new_tokens} here; got {asked.max_tokens}.")
    if asked.arm != "alone" and mixed is None:
        raise Refusal(422, "This server has no index; start it with --index DIR.")


def generate(
    loaded: ServedModel,
    mixed: ServedMixture | None,
    asked: GenerateRequest,
    *,
    emit: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Emit start, token and done events (`messages`); returns the last. emit raises where nobody listens any more."""
    from engram_lm.generation.decoder import Request, stream
    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.generation.pieces import PieceDecoder
    from engram_lm.generation.processors import processor_for
    from engram_lm.generation.report import summary

    begun = time.perf_counter()
    require_possible(loaded, mixed, asked)
    prompt, retrieved = asked.prompt, []
    if asked.arm == "retrieval":
        prompt, retrieved = _with_passages(mixed, asked)
    ids = loaded.chat_ids(prompt) if asked.chat else loaded.text_ids(prompt, "prompt")
    loaded.require_room(len(ids), asked.max_tokens)
    selection = processor = None
    notes: list[str] = []
    if asked.arm == "memory":
        selection, gate, notes = _selected(mixed, asked)
        processor = processor_for(selection, gate, ids, model=loaded.model, tokenizer=loaded.tokenizer)
    emit({"type": "start", "prompt_tokens": len(ids), "retrieved": list(dict.fromkeys(retrieved))})
    request = Request(
        ids=ids, max_new_tokens=asked.max_tokens, temperature=asked.temperature,
        seed=secrets.randbits(31) if asked.seed is None else asked.seed, memory="on" if asked.tables else "off",
    )  # fmt: skip
    with_tables = asked.tables and loaded.has_tables
    decoder, count, first_ms, given = PieceDecoder(loaded.tokenizer), 0, None, []
    for token in stream(TransformersEngine(loaded.model, loaded.tokenizer), request, processor):
        given.append(token)
        if token.is_prompt:
            continue
        count += 1
        if first_ms is None:
            first_ms = (time.perf_counter() - begun) * 1000
        step = token.step
        emit(
            {
                "type": "token",
                "id": token.id,
                "text": decoder.add(token.id),
                "r": 0.0 if step is None else step.responsibility or 0.0,
                "tables": min(1.0, token.share / loaded.full_share) if with_tables else None,
                "lambda": None if step is None else step.lam,
                "depth": 0 if step is None else step.depth,
                "count": 0 if step is None else step.count,
                "documents": 0 if step is None else step.documents,
            }
        )
    told = [] if selection is None else [line.strip() for line in summary(given, selection, notes)]
    if retrieved:
        told.append(f"{len(retrieved)} passages of {', '.join(dict.fromkeys(retrieved))} stand in the prompt")
    done = {
        "type": "done",
        "ms": (time.perf_counter() - begun) * 1000,
        "tokens": count,
        "prompt_tokens": len(ids),
        "first_token_ms": first_ms,
        "text": decoder.end(),
        "told": told,
    }
    emit(done)
    return done


def _selected(mixed: ServedMixture, asked: GenerateRequest) -> tuple[Selection, Lambda | None, list[str]]:
    """(which documents answer, what mixes them in, sentences about that)."""
    from engram_lm.generation.selection import select
    from engram_lm.mixing.gate import FixedLambda

    library = mixed.shelf.library
    for name in asked.documents or []:
        if name not in ("all", "auto") and library.store.get(name) is None:
            raise Refusal(404, f"There is no document {shown(name)} in the index; perhaps it was deleted.")
    named = asked.lam is not None or mixed.lam is not None or mixed.gate_path is not None
    selection = select(
        library, asked.prompt, asked.documents or ["auto"], chat=asked.chat, pointing=not named
    )
    if selection.focus:
        return selection, None, []
    if asked.lam is not None:
        return selection, FixedLambda(min(asked.lam, MOST_LAMBDA)), []
    gone = mixed.audit.note(library.store.snapshot())
    return selection, mixed.gate, [gone] if gone else []


def _with_passages(mixed: ServedMixture, asked: GenerateRequest) -> tuple[str, list[str]]:
    """The prompt with the passages that are about it, and their documents."""
    found = mixed.shelf.passages(asked.prompt, PASSAGES)
    if not found:
        return asked.prompt, []
    form = QUESTION if asked.chat else CONTINUATION
    text = "\n".join(passage for _, passage in found)
    return form.format(text=text, prompt=asked.prompt), [name for name, _ in found]
