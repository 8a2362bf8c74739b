"""LongCat's input-side fusion: the mean of the token embedding and every projected row. No gate, no state.

    x_t = (E[token_t] + sum_c P_c row_c) / (1 + C)          C sub-tables, each with its own projection P_c

There is no zero state here that leaves a model unchanged: the mean halves the embedding even when all rows are zero. That
is how the profile is defined, and why `attach` does not offer it for a model that was trained without it.
"""

import torch
from torch import Tensor, nn


class EmbeddingMean(nn.Module):
    """Token embedding and rows to the model's input.

    Args:
        hidden_size: D. row_width: W, of one sub-table. columns: C = (orders) x (parts).
    """

    def __init__(
        self, *, hidden_size: int, row_width: int, columns: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.hidden_size, self.row_width, self.columns = hidden_size, row_width, columns
        # one fused matrix: the sum of C projections is one projection of the concatenated rows
        self.projection = nn.Linear(columns * row_width, hidden_size, bias=False, dtype=dtype)

    def forward(self, embedding_BTD: Tensor, rows_BTCW: Tensor) -> Tensor:
        """embedding [B, T, D], rows [B, T, C, W] or [B, T, C*W]; returns [B, T, D]."""
        rows_BTE = rows_BTCW.reshape(*embedding_BTD.shape[:2], self.columns * self.row_width)
        total_BTD = embedding_BTD + self.projection(rows_BTE.to(self.projection.weight.dtype))
        return total_BTD / (1 + self.columns)
