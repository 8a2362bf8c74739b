"""The next token of a prompt: what the model alone says, what memory says, and the mixture; and whole candidates.

    next_tokens(loaded, mixed, asked, check=lambda: None)       # POST /api/next

P = (1 - lambda) P_model + lambda P_memory, from the two distributions as they are, so that lambda may be any number from 0
to 1. "The model" has its tables where the request says so. A candidate is several tokens; each is given those before it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.serve.http_errors import Refusal
from engram_lm.serve.limits import MOST_CHARACTERS_A_TOKEN

if TYPE_CHECKING:
    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.serve.schema import NextRequest
    from engram_lm.serve.served_mixture import LookUp, ServedMixture
    from engram_lm.serve.served_model import ServedModel

_MOST_CANDIDATE_TOKENS = 32


def next_tokens(
    loaded: ServedModel, mixed: ServedMixture | None, asked: NextRequest, *, check: Callable[[], None]
) -> dict[str, Any]:
    """The answer to POST /api/next. mixed: of the index, None without one or where it is not wanted."""
    import torch

    from engram_lm.generation.engines import TransformersEngine
    from engram_lm.mixing.mix import blend

    begun, engine = time.perf_counter(), TransformersEngine(loaded.model)
    ids = loaded.text_ids(asked.prompt, "prompt")
    candidates = [(text, _candidate_ids(loaded, asked.prompt, text)) for text in asked.candidates]
    check()
    snapshot = None if mixed is None or not asked.index else mixed.shelf.snapshot()
    if snapshot is not None and not snapshot.n_tokens:
        snapshot = None

    def look_up(context: list[int], logits_V: np.ndarray) -> LookUp | None:
        return None if snapshot is None else mixed.look_up(snapshot, context, logits_V)

    with torch.inference_mode(), loaded.tables(asked.tables):
        forward = engine.read(torch.tensor([ids]))
        logits_V = _row(forward.logits_NKV[0, -1])
        found = look_up(ids, logits_V)
        told = []
        for text, tokens in candidates:
            rows = [logits_V]
            if len(tokens) > 1:
                check()
                rows += _more_rows(engine, forward.cache, tokens[:-1])
            told.append({"text": text, "tokens": _parts(loaded, look_up, ids, tokens, rows)})
    p_model_V = _softmax(logits_V)
    lam, match, sources = 0.0, None, []
    p_mix_V, p_memory_V = p_model_V, None
    if found is not None and found.p_V.any():
        lam = found.lam if asked.lam is None else asked.lam
        p_memory_V = found.p_V
        p_mix_V = blend(p_model_V, p_memory_V, lam)
        match, sources = _match(mixed, asked.prompt, found)
    k = asked.k
    return {
        "ms": (time.perf_counter() - begun) * 1000,
        "lambda": lam,
        "match": match,
        "model": _top(loaded, p_model_V, k),
        "memory": [] if p_memory_V is None else _top(loaded, p_memory_V, k),
        "mix": _top(loaded, p_mix_V, k),
        "candidates": told,
        "sources": sources,
    }


def _match(mixed: ServedMixture, prompt: str, found: LookUp) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from engram_lm.serve.served_index import hit_facts

    depth = int(found.memory.depth[0])
    match = {
        "depth": depth,
        "count": int(found.memory.count[0]),
        "distinct": int(found.memory.distinct[0]),
        "documents": int(found.memory.documents[0]),
        "text": "",
    }
    if not depth:
        return match, []
    told = mixed.shelf.library.explain(prompt, limit=3)
    return {**match, "text": told.matched}, [hit_facts(hit) for hit in told.hits]


def _candidate_ids(loaded: ServedModel, prompt: str, text: str) -> list[int]:
    """Ids of a candidate as the prompt goes on with it: words are set apart by a blank, Chinese signs are not."""
    if not text.strip():
        raise Refusal(422, "A candidate is empty; write some words or leave it out.")
    if len(text) > _MOST_CANDIDATE_TOKENS * MOST_CHARACTERS_A_TOKEN:
        raise Refusal(
            413,
            f"A candidate has {len(text):,} characters; at most {_MOST_CANDIDATE_TOKENS} tokens are compared here.",
        )
    apart = not (prompt[-1].isspace() or text[0].isspace() or _is_wide(prompt[-1]) or _is_wide(text[0]))
    ids = loaded.encoder.encode(f" {text}" if apart else text).tolist()
    if len(ids) > _MOST_CANDIDATE_TOKENS:
        raise Refusal(
            413, f"A candidate has {len(ids)} tokens; at most {_MOST_CANDIDATE_TOKENS} are compared here."
        )
    return ids


def _is_wide(sign: str) -> bool:
    """Chinese, Japanese and Korean signs and their punctuation, which are written without blanks."""
    return "⺀" <= sign <= "鿿" or "가" <= sign <= "힯" or "＀" <= sign <= "￯" or sign >= "\U00020000"


def _more_rows(engine: TransformersEngine, cache: Any, tokens: list[int]) -> list[np.ndarray]:
    """Logits behind each of these tokens after the prompt in the cache, which is left as it was."""
    import torch

    croppable = getattr(cache, "is_croppable", False)
    forward = engine.read(
        torch.tensor([tokens]), cache=cache if croppable else copy.deepcopy(cache), last=len(tokens)
    )
    if croppable:
        cache.crop(-len(tokens))
    return [_row(row) for row in forward.logits_NKV[0]]


def _parts(
    loaded: ServedModel, look_up: Callable, ids: list[int], tokens: list[int], rows: list[np.ndarray]
) -> list[dict[str, Any]]:
    parts = []
    for n, (token, row_V) in enumerate(zip(tokens, rows, strict=True)):
        found = look_up(ids + tokens[:n], row_V)
        parts.append(
            {
                "id": token,
                "text": loaded.decode([token]),
                "p_model": float(_softmax(row_V)[token]),
                "p_memory": 0.0 if found is None else float(found.p_V[token]),
                "lambda": 0.0 if found is None else found.lam,
            }
        )
    return parts


def _top(loaded: ServedModel, p_V: np.ndarray, k: int) -> list[dict[str, Any]]:
    best = np.argpartition(-p_V, min(k, len(p_V) - 1))[:k]
    best = best[np.lexsort((best, -p_V[best]))]
    return [
        {"id": int(token), "text": loaded.decode([int(token)]), "p": float(p_V[token])}
        for token in best
        if p_V[token] > 0
    ]


def _row(logits: Any) -> np.ndarray:
    return np.ascontiguousarray(logits.numpy())


def _softmax(logits_V: np.ndarray) -> np.ndarray:
    p_V = np.exp(logits_V.astype(np.float64) - float(logits_V.max()))
    return p_V / p_V.sum()
