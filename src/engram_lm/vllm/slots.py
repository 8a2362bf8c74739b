"""The rows of a step in vLLM's second interface: which tokens stand before each, read from the device in one copy.

A row is a request's next token or, under speculative decoding, the token after some of its drafts: the drafts before it
are in the step's inputs alone. Rows of a prompt that is not read to its end yet give no token and are left out.

    rows_of(req_states, ctx, {slot: part}, max_order=64)

R: rows; K: max_order
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_lm.vllm.live import Part, Row


def rows_of(states: Any, ctx: Any, slots: dict[int, Part], *, max_order: int) -> list[Row]:
    """states: LogitsProcRequestState; ctx: LogitsContext; slots: of requests that have memory."""
    import torch

    slot_R = ctx.expanded_idx_mapping.long()
    total_R = states.total_len.gpu[slot_R].long()
    prompt_R = states.prompt_len.gpu[slot_R].long()
    # the last K tokens that are decided; places before the first are read at 0 and cut off below
    place_RK = total_R[:, None] - max_order + torch.arange(max_order, device=slot_R.device)
    token_RK = states.all_token_ids.gpu[slot_R[:, None], place_RK.clamp(min=0)].long()
    facts = (
        slot_R,
        total_R,
        prompt_R,
        ctx.expanded_local_pos.long(),
        ctx.pos.long() + 1,
        ctx.input_ids.long(),
    )
    host = torch.cat([torch.stack(facts, dim=1), token_RK], dim=1).cpu().numpy()
    rows = []
    for at, (slot, total, prompt, draft, length, _) in enumerate(host[:, :6].tolist()):
        if slot not in slots or length < total:
            continue
        decided = host[at, 6 + max(max_order - total, 0) :]
        drafts = host[at - draft + 1 : at + 1, 5]
        rows.append(
            Row(
                at=at,
                last=np.concatenate([decided, drafts]),
                generated=total + draft - prompt,
                part=slots[slot],
            )
        )
    return rows
