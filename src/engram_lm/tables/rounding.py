"""Stochastic rounding to bfloat16 as torch code, for rows on an accelerator: `tables.kernels` bit for bit.

torch has no 64-bit unsigned arithmetic, so the words are int64: products wrap the same way, and a shift to the right
drops the copies of the sign.
"""

import torch
from torch import Tensor

from engram_lm.tables import kernels


def round_bf16_stochastic(values_UW: Tensor, row_U: Tensor, *, seed: int, step: int) -> Tensor:
    """bfloat16 [U, W] from float32 [U, W]; row_U int64 [U], seed and step from 0 name the random numbers."""
    if values_UW.device.type != "cpu":
        return round_bf16_stochastic_plain(values_UW, row_U, seed=seed, step=step)
    bits_UW = kernels.round_bf16_stochastic(values_UW.contiguous().numpy(), row_U.numpy(), seed, step)
    return torch.from_numpy(bits_UW).view(torch.bfloat16)


def round_bf16_stochastic_plain(values_UW: Tensor, row_U: Tensor, *, seed: int, step: int) -> Tensor:
    """The same on any device."""
    column_W = torch.arange(values_UW.shape[1], device=values_UW.device)
    seed_1, step_1 = torch.tensor([[seed], [step]], device=values_UW.device)
    of_step = _output(seed_1, step_1)
    of_row_U = _output(of_step, row_U)
    word_UW = _output(of_row_U[:, None], column_W // 4)
    up_UW = (word_UW >> 16 * (column_W % 4)) & 0xFFFF
    bits_UW = values_UW.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    rounded_UW = (bits_UW + up_UW) >> 16
    kept_UW = bits_UW >> 16 | 0x40 * values_UW.isnan()
    out_UW = torch.where(values_UW.isfinite(), rounded_UW, kept_UW)
    return (out_UW - ((out_UW & 0x8000) << 1)).to(torch.int16).view(torch.bfloat16)


def _output(start: Tensor, i: Tensor) -> Tensor:
    """The i-th output, from 0, of SplitMix64 started at `start`."""
    z = start + _signed(0x9E3779B97F4A7C15) * (i + 1)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64)
