"""A text token by token: what the tables read and let in, what the index knew, and what each took off the loss.

One forward of two rows, the tables off in the first; or, where the losses without tables may come later, of one row, which
takes half as long. Of token t: `tables` is what the model read at t (n-grams that end there) and let into the residual
stream, which helps to predict t + 1; `index` and the losses are about t itself, given what came before it.

    trace_text(loaded, mixed, "Alexander the Great", check=lambda: None)       # POST /api/trace
    losses_of(loaded, "Alexander the Great", tables=False)                     # POST /api/losses
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from engram_lm.serve.served_mixture import ServedMixture
    from engram_lm.serve.served_model import ServedModel
    from engram_lm.traces import LayerTrace

SEEN_ORDERS = (1, 2, 3)


def trace_text(
    loaded: ServedModel,
    mixed: ServedMixture | None,
    text: str,
    *,
    check: Callable[[], None],
    without: bool = True,
) -> dict[str, Any]:
    """The answer to POST /api/trace. mixed: of the index, None without one; check: raises where nobody waits any more;
    without: whether the losses without tables are wanted too, a second forward where there are tables."""
    import torch

    begun = time.perf_counter()
    ids = loaded.text_ids(text)
    ids_T = np.array(ids, np.int64)
    ids_1T = torch.tensor([ids], device=loaded.device)
    check()
    if loaded.has_tables and without:
        off_TV, logits_TV, records = _both(loaded, ids_1T)
        off = _losses(ids_T, off_TV)
        del off_TV
    else:
        logits_TV, records = _once(loaded, ids_1T)
        off = None if loaded.has_tables else _losses(ids_T, logits_TV)
    with_tables = _losses(ids_T, logits_TV) if loaded.has_tables else None
    check()
    known = None if mixed is None else mixed.of_text(ids_T, logits_TV)
    orders = sorted({*SEEN_ORDERS, *(order for record in records for order in record.orders)})
    seen = [None] * len(ids) if mixed is None else mixed.seen(ids_T, orders)
    pieces, parts = _pieces(loaded, ids), _parts(loaded, records)
    tokens = []
    for t, token in enumerate(ids):
        loss_off = None if off is None else _number(off[t])
        loss_tables = None if with_tables is None else _number(with_tables[t])
        entry = None if known is None else known[t]
        loss = loss_off if with_tables is None else loss_tables
        if entry is not None:
            loss = _number(-entry.pop("log_p"))
        tokens.append(
            {
                "id": token,
                "text": pieces[t],
                "loss_off": loss_off,
                "loss_tables": loss_tables,
                "loss": loss,
                "tables": [part[t] for part in parts] if records else None,
                "index": entry,
                "seen": [
                    {"order": order, "count": None if seen[t] is None else seen[t][order]} for order in orders
                ],
            }
        )
    return {"ms": (time.perf_counter() - begun) * 1000, "tokens": tokens}


def losses_of(loaded: ServedModel, text: str, *, tables: bool) -> dict[str, Any]:
    """The answer to POST /api/losses: of each token, by the model with its tables or without, the index left out."""
    import torch

    from engram_lm.attachment import memory_off

    begun = time.perf_counter()
    ids = loaded.text_ids(text)
    off = contextlib.nullcontext() if tables or not loaded.has_tables else memory_off(loaded.model)
    with off:
        logits_TV, _ = _once(loaded, torch.tensor([ids], device=loaded.device))
    losses = [_number(loss) for loss in _losses(np.array(ids, np.int64), logits_TV)]
    return {"ms": (time.perf_counter() - begun) * 1000, "losses": losses}


def _once(loaded: ServedModel, ids_1T: Any) -> tuple[np.ndarray, list[LayerTrace]]:
    """Logits [T, V] of the model as it is, and what its tables did."""
    import torch

    from engram_lm.attachment import trace

    watching = trace(loaded.model) if loaded.has_tables else contextlib.nullcontext([])
    with torch.inference_mode(), watching as records:
        logits_1TV = loaded.model(ids_1T, use_cache=False).logits
    return _logits(logits_1TV[0]), records


def _both(loaded: ServedModel, ids_1T: Any) -> tuple[np.ndarray, np.ndarray, list[LayerTrace]]:
    """Logits [T, V] without tables and with them, and what the tables did.

    Both are rows of one forward, which costs less than two: what a slot adds is taken away in the first row, where the
    hidden states are then the base model's own.
    """
    import torch

    from engram_lm.attachment import memories, trace

    hooks = [
        slot.register_forward_hook(_silence_first_row)
        for memory in memories(loaded.model).values()
        for slot in memory.slots
    ]
    try:
        with torch.inference_mode(), trace(loaded.model) as records:
            logits_2TV = loaded.model(ids_1T.expand(2, -1), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return _logits(logits_2TV[0]), _logits(logits_2TV[1]), records


def _silence_first_row(slot: Any, given: tuple, output: Any) -> Any:
    delta = output.delta.clone()
    delta[0] = 0
    return output._replace(delta=delta)


def _logits(logits_TV: Any) -> np.ndarray:
    return np.ascontiguousarray(logits_TV.float().cpu().numpy())


def _losses(ids_T: np.ndarray, logits_TV: np.ndarray) -> np.ndarray:
    """Nats of each token given those before it, NaN for the first: float64 [T]."""
    from engram_lm.mixing.scoring import log_p_of

    return np.concatenate([[np.nan], -log_p_of(logits_TV[: len(ids_T) - 1], ids_T[1:])])


def _pieces(loaded: ServedModel, ids: list[int]) -> list[str]:
    """What each token adds to the text; "" for a part of a character, which comes with its last token."""
    from engram_lm.generation.pieces import PieceDecoder

    decoder = PieceDecoder(loaded.tokenizer)
    pieces = [decoder.add(token) for token in ids]
    pieces[-1] += decoder.end()
    return pieces


def _parts(loaded: ServedModel, records: list[LayerTrace]) -> list[list[dict[str, Any]]]:
    """For every memory layer one entry a token, of the last row."""
    from functools import cache

    decode = cache(lambda ids: loaded.decode(list(ids)))
    found = []
    for record in records:
        ids, heads = record.token_ids[-1].tolist(), record.heads
        norm_TO = np.linalg.norm(record.row_norm[-1].reshape(len(ids), len(record.orders), heads), axis=-1)
        address_TOH = record.address[-1].reshape(len(ids), len(record.orders), heads)
        layer = []
        for t in range(len(ids)):
            ngrams = []
            for o, order in enumerate(record.orders):
                n = int(record.ngrams[-1, t, o])
                ngrams.append(
                    {
                        "order": order,
                        "text": decode(tuple(ids[t + 1 - n : t + 1])),
                        "addresses": address_TOH[t, o].tolist(),
                        "norm": _number(norm_TO[t, o]),
                    }
                )
            layer.append(
                {
                    "memory": record.memory,
                    "layer": record.block,
                    "gates": [_number(gate) for gate in record.gate[-1, t]],
                    "added": _number(record.share[-1, t].max()),
                    "ngrams": ngrams,
                }
            )
        found.append(layer)
    return found


def _number(value: Any) -> float | None:
    """For JSON: six digits, None for what is no number."""
    value = float(value)
    return float(f"{value:.6g}") if np.isfinite(value) else None
