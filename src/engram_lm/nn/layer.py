"""One Engram layer: rows and hidden states in, what is added to the residual stream out.

    e_t = concat of the looked-up rows                                            [d_mem]
    k_m, v = W e_t                      one fused projection: M keys, one shared value
    alpha_m = gate(k_m, h_m)            see nn.gate
    y_m = alpha_m v
    out_m = y_m + SiLU(conv(RMSNorm(y_m)))        where the profile has a conv, see nn.conv
    (arXiv 2601.07372, section 2; M branches are the streams of hyper-connections, 1 in an ordinary model)

It holds no rows and knows no ids: `rows` come from a table, who-came-before from a `Window`. New memory is exactly a
no-op (zero rows give zero values, the conv is zero) and still receives gradients (the projections are not zero).

    layer = EngramLayer(hidden_size=576, memory_width=1024)
    out = layer(hidden_BTD, rows_BTE, Window.begin(ids_BT, None))
    hidden_BTD = hidden_BTD + out.delta
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.nn.cache import Window
from engram_lm.nn.conv import short_conv
from engram_lm.nn.fused import FusedConv, FusedGate, fits
from engram_lm.nn.gate import GateForm, gate


class LayerOutput(NamedTuple):
    """delta: like hidden, to be added to it. gate: float [B, T, M] in (0, 1). value_norm: float [B, T]."""

    delta: Tensor
    gate: Tensor
    value_norm: Tensor | None


class EngramLayer(nn.Module):
    """Projection, gate and short conv of one memory layer.

    Args:
        hidden_size: D, width of a residual stream.
        memory_width: E, width of the concatenated rows.
        branches: M, residual streams; hidden is [B, T, D] when 1 and [B, T, M, D] (or [B, T, M*D]) otherwise.
        conv_kernel: taps of the short conv; 0 for none. conv_dilation: tokens between taps.
        eps: of every RMSNorm, the model's rms_norm_eps.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        memory_width: int,
        branches: int = 1,
        conv_kernel: int = 4,
        conv_dilation: int = 3,
        gate_form: GateForm = "signed-sqrt",
        projection_bias: bool = False,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, memory_width, branches) < 1 or conv_kernel < 0 or conv_dilation < 1:
            raise ConfigError(
                "hidden_size, memory_width, branches and conv_dilation start at 1, conv_kernel at 0."
            )
        make = {"device": device, "dtype": dtype}
        self.hidden_size, self.memory_width, self.branches = hidden_size, memory_width, branches
        self.conv_kernel, self.conv_dilation = conv_kernel, conv_dilation
        self.gate_form, self.eps = gate_form, eps
        self.projection = nn.Linear(memory_width, (branches + 1) * hidden_size, bias=projection_bias, **make)
        self.key_norm = nn.Parameter(torch.ones(branches, hidden_size, **make))
        self.query_norm = nn.Parameter(torch.ones(branches, hidden_size, **make))
        if conv_kernel:
            self.conv_norm = nn.Parameter(torch.ones(branches, hidden_size, **make))
            self.conv_weight = nn.Parameter(torch.zeros(branches * hidden_size, conv_kernel, **make))
        nn.init.normal_(self.projection.weight, std=memory_width**-0.5)
        if projection_bias:
            # a bias would make v nonzero where rows are zero: new memory would not be a no-op
            nn.init.zeros_(self.projection.bias)

    @property
    def past_length(self) -> int:
        """How many past tokens the conv reads."""
        return max(0, self.conv_kernel - 1) * self.conv_dilation

    def forward(self, hidden: Tensor, rows_BTE: Tensor, window: Window, *, key: Any = None) -> LayerOutput:
        """hidden [B, T, D] or [B, T, M, D] or [B, T, M*D]; rows [B, T, E]; `key` names this layer in the window's state."""
        batch, n_tokens = rows_BTE.shape[:2]
        hidden_BTMD = hidden.view(batch, n_tokens, self.branches, self.hidden_size)
        projected = self.projection(rows_BTE.to(self.projection.weight.dtype))
        value_BTD = projected[..., self.branches * self.hidden_size :]
        path = self._fused if fits(projected, hidden) and window.starts_BT is None else self._plain
        delta_BTMD, alpha_BTM = path(projected, hidden_BTMD, window, key)
        return LayerOutput(delta_BTMD.to(hidden.dtype).view(hidden.shape), alpha_BTM, value_BTD)

    def _plain(
        self, projected: Tensor, hidden_BTMD: Tensor, window: Window, key: Any
    ) -> tuple[Tensor, Tensor]:
        """The equations in torch: any device, any dtype, any window."""
        key_BTE, value_BTD = projected.split((self.branches * self.hidden_size, self.hidden_size), -1)
        key_BTMD = key_BTE.view(hidden_BTMD.shape)
        alpha_BTM = gate(
            key_BTMD, hidden_BTMD, self.key_norm * self.query_norm, eps=self.eps, form=self.gate_form
        )
        if window.real_BT is not None:
            alpha_BTM = alpha_BTM * window.real_BT[:, :, None]
        gated_BTMD = alpha_BTM[..., None] * value_BTD.to(alpha_BTM.dtype)[:, :, None]
        if self.conv_kernel:
            return gated_BTMD + self._conv(gated_BTMD, window, key), alpha_BTM
        return gated_BTMD, alpha_BTM

    def _fused(
        self, projected: Tensor, hidden_BTMD: Tensor, window: Window, key: Any
    ) -> tuple[Tensor, Tensor]:
        """The same through the CPU kernels."""
        batch, n_tokens, branches, width = hidden_BTMD.shape
        conv_norm = self.conv_norm if self.conv_kernel else projected.new_zeros(0, width)
        # without a past and without reordering the kernel leaves room for the conv's past itself
        alone = window.state is None and window.order_BS is None
        y, u, alpha = FusedGate.apply(
            projected.reshape(batch * n_tokens, -1),
            hidden_BTMD.reshape(batch * n_tokens, branches, width),
            self.key_norm * self.query_norm,
            conv_norm,
            window.real_BT,
            self.eps,
            self.gate_form == "signed-sqrt",
            n_tokens,
            self.past_length if alone else 0,
        )
        alpha_BTM = alpha.view(batch, n_tokens, branches)
        if not self.conv_kernel:
            return y.view(hidden_BTMD.shape), alpha_BTM
        sequence_BSC = u if alone else window.with_past(key, u, self.past_length)
        if window.take_BT is None:
            delta = FusedConv.apply(
                sequence_BSC, self.conv_weight, y.view(batch, n_tokens, -1), self.conv_dilation
            )
        else:
            conv_BSC = short_conv(sequence_BSC, self.conv_weight, dilation=self.conv_dilation)
            delta = y.view(batch, n_tokens, -1) + F.silu(window.chunk_of(conv_BSC))
        return delta.view(hidden_BTMD.shape), alpha_BTM

    def _conv(self, gated_BTMD: Tensor, window: Window, key: Any) -> Tensor:
        normed_BTMD = F.rms_norm(gated_BTMD, (self.hidden_size,), eps=self.eps) * self.conv_norm.to(
            gated_BTMD.dtype
        )
        sequence_BSC = window.with_past(key, normed_BTMD.flatten(2), self.past_length)
        segments_BS = None
        if window.starts_BT is not None:
            segments_BT = window.starts_BT.to(torch.int32).cumsum(1)
            segments_BS = F.pad(segments_BT, (self.past_length, 0), value=-1)
        out_BSC = short_conv(
            sequence_BSC,
            self.conv_weight.to(sequence_BSC.dtype),
            dilation=self.conv_dilation,
            segments_BS=segments_BS,
        )
        return F.silu(window.chunk_of(out_BSC)).view(gated_BTMD.shape)
