"""The mixture in torch, for logits that stay where they are: the twin of `mix.mix` for many rows on any device."""

import torch


def mix_rows(
    x_RV: torch.Tensor, lse_R1: torch.Tensor, q_RM: torch.Tensor, lam_R1: torch.Tensor
) -> torch.Tensor:
    """`mix` in torch for rows on any device, float32, each lam above 0. A row in which memory has no allowed token stays."""
    x_RM = x_RV[:, : q_RM.shape[1]]
    allowed_RM = x_RM > -torch.inf
    kept_R1 = torch.where(allowed_RM, q_RM, 0.0).sum(-1, keepdim=True)
    p_RM = (1 - lam_R1) * (x_RM - lse_R1).exp() + lam_R1 / kept_R1 * q_RM
    out_RV = x_RV + torch.log1p(-lam_R1)
    out_RV[:, : q_RM.shape[1]] = torch.where(
        (q_RM > 0) & allowed_RM, lse_R1 + p_RM.clamp(min=1.2e-38).log(), out_RV[:, : q_RM.shape[1]]
    )
    return torch.where(kept_R1 > 0, out_RV, x_RV)
