"""The gate: how much of a looked-up value enters each residual branch, from how well its key agrees with the context.

    s_m = <RMSNorm(k_m), RMSNorm(h_m)> / sqrt(d)                                   for every branch m
    alpha_m = sigmoid(s_m)                                   form "plain": the paper, arXiv 2601.07372 section 2
    alpha_m = sigmoid(sign(s_m) sqrt(max(|s_m|, 1e-6)))      form "signed-sqrt": all released code

Computed in float32 or better. `gate` never materialises the normalised vectors: with w = key_weight * query_weight,
s = sum(k h w) / (rms(k) rms(h) sqrt(d)), three sums over d. `gate_plain` follows the equation.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateForm = Literal["signed-sqrt", "plain"]
GATE_FLOOR = 1e-6  # under the square root, as released; keeps its slope finite


def squash(score: Tensor, form: GateForm) -> Tensor:
    """Score to gate in (0, 1)."""
    if form == "signed-sqrt":
        score = score.sign() * score.abs().clamp_min(GATE_FLOOR).sqrt()
    return torch.sigmoid(score)


def gate(
    key_BTMD: Tensor, hidden_BTMD: Tensor, weight_MD: Tensor, *, eps: float, form: GateForm = "signed-sqrt"
) -> Tensor:
    """Gate [B, T, M]. weight is key_norm * query_norm, [M, D]; eps is the model's rms_norm_eps."""
    width = key_BTMD.shape[-1]
    dtype = torch.promote_types(torch.promote_types(key_BTMD.dtype, hidden_BTMD.dtype), torch.float32)
    key_BTMD, hidden_BTMD = key_BTMD.to(dtype), hidden_BTMD.to(dtype)
    agree_BTM = (key_BTMD * weight_MD.to(dtype) * hidden_BTMD).sum(-1)
    key_BTM = torch.rsqrt(key_BTMD.square().mean(-1) + eps)
    hidden_BTM = torch.rsqrt(hidden_BTMD.square().mean(-1) + eps)
    return squash(agree_BTM * key_BTM * hidden_BTM / math.sqrt(width), form)


def gate_plain(
    key_BTMD: Tensor,
    hidden_BTMD: Tensor,
    key_norm_MD: Tensor,
    query_norm_MD: Tensor,
    *,
    eps: float,
    form: GateForm = "signed-sqrt",
) -> Tensor:
    """The plain twin, term by term as in the equation."""
    width = (key_BTMD.shape[-1],)
    key_BTMD = F.rms_norm(key_BTMD, width, eps=eps) * key_norm_MD
    query_BTMD = F.rms_norm(hidden_BTMD, width, eps=eps) * query_norm_MD
    return squash((key_BTMD * query_BTMD).sum(-1) / math.sqrt(width[0]), form)
