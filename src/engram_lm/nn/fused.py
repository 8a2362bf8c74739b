"""The gate and the short conv on the CPU in float32, through the kernels of `nn.kernels`, with hand-written gradients.

Used by `EngramLayer` where it applies: CPU, float32, not under torch.compile (whose own fusion takes over there).
Everywhere else the plain torch path runs; tests compare the two, values and gradients.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.nn import kernels

# Below this many numbers a thread's start costs more than it saves.
_WORTH_A_THREAD = 1 << 18
_pool: tuple[int, int, ThreadPoolExecutor] | None = None
_ALL = np.zeros(0, dtype=np.bool_)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels apply: float32 on the CPU, and not tracing a graph."""
    if torch.compiler.is_compiling():
        return False
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)


def spread(task: Callable[[int, int], None], n: int, *, numbers: int) -> None:
    """task(begin, end) over [0, n) in torch's number of threads; `numbers` is the size of the whole work."""
    n_threads = min(torch.get_num_threads(), n, max(1, numbers // _WORTH_A_THREAD))
    if n_threads < 2:
        task(0, n)
        return
    global _pool  # noqa: PLW0603 - one pool a process, made when first needed
    if _pool is None or _pool[:2] != (os.getpid(), n_threads):
        # threads do not survive a fork
        _pool = (os.getpid(), n_threads, ThreadPoolExecutor(n_threads, thread_name_prefix="engram"))
    cuts = [n * i // n_threads for i in range(n_threads + 1)]
    for future in [_pool[2].submit(task, a, b) for a, b in itertools.pairwise(cuts)]:
        future.result()


class FusedGate(torch.autograd.Function):
    """(projected [B*T, (M+1) D], hidden [B*T, M, D], norms) -> (y [B*T, M, D], u [B, lead + T, M*D], alpha [B*T, M]).

    u (empty without a conv) has `lead` zeros before each sequence, so that the conv needs no padded copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        hidden: Tensor,
        weight: Tensor,
        conv_norm: Tensor,
        real: Any,
        eps: float,
        signed: bool,
        n_tokens: int,
        lead: int,
    ):
        projected, hidden, weight = projected.contiguous(), hidden.contiguous(), weight.contiguous()
        conv_norm = conv_norm.contiguous()
        n, (branches, width) = projected.shape[0], weight.shape
        alpha, stats = torch.empty(n, branches), torch.empty(n, branches, 4)
        y = torch.empty(n, branches, width)
        u = torch.empty(0, 0, 0)
        if conv_norm.numel():
            u = torch.empty(n // max(1, n_tokens), lead + n_tokens, branches * width)
            u[:, :lead] = 0
        arrays = [_array(x) for x in (projected, hidden, weight, conv_norm)]
        outputs = [_array(x) for x in (alpha, stats, y)] + [_array(u.view(-1, branches, width))]
        mask = _ALL if real is None else real.reshape(-1).numpy()
        eps = np.float32(eps)
        spread(
            lambda a, b: kernels.gate_forward(*arrays, mask, eps, signed, n_tokens, lead, *outputs, a, b),
            n,
            numbers=projected.numel(),
        )
        ctx.save_for_backward(projected, hidden, weight, conv_norm, alpha, stats)
        ctx.form = (signed, n_tokens, lead)
        ctx.mark_non_differentiable(alpha)
        return y, u, alpha

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_u: Tensor, grad_alpha: Any):
        projected, hidden, weight, conv_norm, alpha, stats = ctx.saved_tensors
        n = projected.shape[0]
        grad_projected, grad_hidden = torch.empty_like(projected), torch.empty_like(hidden)
        reads = [_array(x) for x in (projected, hidden, weight, conv_norm, alpha, stats)]
        reads += [_array(grad_y.contiguous()), _array(grad_u.contiguous().view(-1, *weight.shape))]
        writes = [_array(grad_projected), _array(grad_hidden)]
        partial: dict[int, tuple[Tensor, Tensor]] = {}

        def task(begin: int, end: int) -> None:
            sums = partial[begin] = (torch.zeros_like(weight), torch.zeros_like(conv_norm))
            kernels.gate_backward(*reads, *ctx.form, *writes, *(_array(x) for x in sums), begin, end)

        spread(task, n, numbers=projected.numel())
        # added in order of the tokens, so that the result does not depend on which thread was first
        grad_weight = sum(partial[begin][0] for begin in sorted(partial))
        grad_norm = sum(partial[begin][1] for begin in sorted(partial))
        return grad_projected, grad_hidden, grad_weight, grad_norm, None, None, None, None, None


class FusedConv(torch.autograd.Function):
    """(u [B, T + (K-1) dilation, C], weight [C, K], y [B, T, C]) -> y + silu(conv(u))."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, y: Tensor, dilation: int) -> Tensor:
        inputs, y = inputs.contiguous(), y.contiguous()
        taps = weight.t().contiguous()
        out = torch.empty_like(y)
        arrays = _array(inputs), _array(taps), dilation, _array(y), _array(out)
        spread(lambda a, b: kernels.conv_forward(*arrays, a, b), y.shape[0] * y.shape[1], numbers=y.numel())
        ctx.save_for_backward(inputs, taps)
        ctx.dilation = dilation
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):
        inputs, taps = ctx.saved_tensors
        grad = grad.contiguous()
        batch, _, channels = inputs.shape
        grad_inputs, grad_taps = torch.zeros_like(inputs), torch.zeros(batch, *taps.shape)
        arrays = _array(inputs), _array(taps), ctx.dilation, _array(grad), _array(grad_inputs)

        def task(begin: int, end: int) -> None:
            scratch = np.empty(channels, dtype=np.float32)
            for b in range(begin, end):
                kernels.conv_backward(*arrays, _array(grad_taps[b]), scratch, b)

        spread(task, batch, numbers=grad.numel())
        return grad_inputs, grad_taps.sum(0).t(), grad, None


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
