"""The short conv: a causal depthwise convolution over past gated values, dilated by the highest N-gram order.

    z_t = sum_j weight[:, K-1-j] * u_{t - j*dilation},   j = 0 .. K-1        (arXiv 2601.07372, section 2; demo code)

Zero-initialised, so that SiLU(z) = 0 and new memory changes nothing. Computed as K shifted multiply-adds in [B, T, C]:
no transpose to channels-first, and the past is simply longer input. `short_conv_plain` is torch's conv1d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    inputs_BSC: Tensor, weight_CK: Tensor, *, dilation: int, segments_BS: Tensor | None = None
) -> Tensor:
    """Conv over time without padding: [B, S, C] -> [B, S - (K-1)*dilation, C].

    weight float [C, K], the last tap belongs to the current token. segments int [B, S]: a tap of another segment
    (document) contributes nothing.
    """
    kernel = weight_CK.shape[1]
    n_out = inputs_BSC.shape[1] - (kernel - 1) * dilation
    out_BTC = None
    for k in range(kernel):
        shifted_BTC = inputs_BSC[:, k * dilation : k * dilation + n_out]
        if segments_BS is not None and k < kernel - 1:
            same_BT = segments_BS[:, k * dilation : k * dilation + n_out] == segments_BS[:, -n_out:]
            shifted_BTC = shifted_BTC * same_BT[:, :, None]
        tap_BTC = shifted_BTC * weight_CK[:, k] if out_BTC is None else None
        out_BTC = tap_BTC if out_BTC is None else torch.addcmul(out_BTC, shifted_BTC, weight_CK[:, k])
    return out_BTC


def short_conv_plain(inputs_BSC: Tensor, weight_CK: Tensor, *, dilation: int) -> Tensor:
    """The plain twin: torch's grouped conv1d."""
    channels = inputs_BSC.shape[2]
    out_BCT = F.conv1d(inputs_BSC.transpose(1, 2), weight_CK[:, None], groups=channels, dilation=dilation)
    return out_BCT.transpose(1, 2)
