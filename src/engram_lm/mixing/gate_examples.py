"""Examples for a gate, from an index and a model: every rule that `fit` asks of who makes them. Torch.

    fit, bound = collect(model, snapshot, general_texts, rules=rules_of(tokenizer, model, snapshot))
    gate = calibrate(fit_gate(fit, tokenizer=..., model=...), bound)

The model reads each chosen text once, one window of it; the windows are then looked up in indexes of 1, 10, 100 and all
documents, each without the document itself. General texts, token ids of text that has nothing to do with the index,
are looked up in the same indexes; every second one is kept for the bound. 24 documents and 24 general texts of 512
tokens are 25,000 tokens for the model and 100,000 examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import DataError
from engram_lm.mixing import onepass
from engram_lm.mixing.fit import Examples, examples_of
from engram_lm.mixing.gate import LookupConfig
from engram_lm.mixing.lookups import read_text, tail
from engram_lm.mixing.mix import TokenRules

if TYPE_CHECKING:
    from engram_lm.index.snapshot import Snapshot

WINDOW, LEAST = 512, 32
SIZES = (1, 10, 100, None)


def collect(
    model: Any,
    snapshot: Snapshot,
    general: Sequence[np.ndarray],
    *,
    rules: TokenRules,
    reading: LookupConfig | None = None,
    sizes: Sequence[int | None] = SIZES,
    texts: int = 24,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, all_texts: None,
) -> tuple[Examples, Examples]:
    """(examples to fit on, general examples for the bound). texts: documents of the index that are read, at most.

    sizes: documents of the indexes, None for all. DataError with fewer than two documents or two general texts.
    """
    reading = reading or LookupConfig(count="documents")
    random = np.random.default_rng(seed)
    documents = list(_documents(snapshot))
    general = [ids for ids in general if len(ids) >= LEAST]
    if len(documents) < 2 or len(general) < 2:
        raise DataError(
            f"A gate needs at least 2 documents in the index and 2 general texts of {LEAST} tokens; got "
            f"{len(documents)} and {len(general)}."
        )
    order = [documents[i] for i in random.permutation(len(documents))]
    memories: dict[str, tuple[Snapshot, set[str]]] = {}
    for size in sizes:
        if size is None or size >= len(order):
            memories["all"] = snapshot, {name for name, _ in order}
        else:
            names = [name for name, _ in order[:size]]
            memories[str(size)] = snapshot.restricted(names), set(names)
    chosen = [document for document in order if len(document[1]) >= LEAST][:texts]
    if not chosen:
        raise DataError(f"No document of the index has {LEAST} tokens: there is nothing to fit on.")
    fit, bound = [], []
    total = len(chosen) + len(general)
    for n, (name, ids) in enumerate(chosen):
        window = _window(ids, random)
        logits_TV = _logits(model, window)
        for size, (memory, names) in memories.items():
            own = memory.without(name) if name in names else memory
            if own.n_documents:
                fit.append(_examples(window, logits_TV, own, rules, reading, f"documents, {size}", "domain"))
        progress(n + 1, total)
    for n, ids in enumerate(general):
        window = _window(np.asarray(ids, np.int64), random)
        logits_TV = _logits(model, window)
        for memory, _ in memories.values():
            where = (fit, bound)[n % 2]
            where.append(_examples(window, logits_TV, memory, rules, reading, "general text", "general"))
        progress(len(chosen) + n + 1, total)
    return Examples.join(fit), Examples.join(bound)


def _documents(snapshot: Snapshot) -> Iterator[tuple[str, np.ndarray]]:
    for view in snapshot.views:
        for number in range(view.segment.n_documents):
            if number not in view.dead_documents:
                tokens = view.segment.document_tokens(number)
                yield view.segment.document(number).id, tokens.astype(np.int64)


def _window(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    start = int(random.integers(0, max(len(ids) - WINDOW, 0) + 1))
    return ids[start : start + WINDOW]


def _logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        device = next(model.parameters()).device
        logits_TV = model(torch.as_tensor(ids, device=device)[None], use_cache=False).logits[0, :-1]
    return np.ascontiguousarray(logits_TV.float().cpu().numpy())


def _examples(
    ids: np.ndarray,
    logits_TV: np.ndarray,
    memory: Snapshot,
    rules: TokenRules,
    reading: LookupConfig,
    group: str,
    kind: Any,
) -> Examples:
    rows = tail(read_text(memory, ids, rules, reading))
    survey_T6 = np.empty((len(logits_TV), 6))
    onepass.survey_rows(logits_TV, ids[1:], rows.top, survey_T6)
    return examples_of(rows, survey_T6, tokens=memory.n_tokens, group=group, kind=kind)
