"""Logits read once: largest, log-sum-exp, entropy, and the mixture written in place. numba; the plain twin is in `mix`.

The exponential and the logarithm are Cephes' expf and logf (Moshier 1992; errors below 2e-7 relative) written without
branches, so that LLVM turns whole loops into vector instructions: 25 µs for the sums of 49,152 logits, 85 µs for the
mixture, where libm takes 170 and more. Exponents end at -87: what is below 1e-38 counts as 1e-38.

V: the model's logits; M: tokens the memory speaks of (M <= V); T: positions
"""

import numpy as np

from engram_lm.kernels.compiled import kernel

f32, i32 = np.float32, np.int32
_SUMS = {"contract", "reassoc", "nsz", "arcp"}  # infinities and NaN keep their meaning
_FLOOR = f32(-87.0)
_BLOCK = 1024


@kernel(inline="always")
def _exp(x):
    x = max(x, _FLOOR)
    n = np.floor(x * f32(1.44269504088896341) + f32(0.5))
    r = x - n * f32(0.693359375)
    r = r - n * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return (p * (r * r) + r + f32(1.0)) * np.int32((i32(n) + i32(127)) << i32(23)).view(np.float32)


@kernel(inline="always")
def _log(x):
    bits = np.float32(x).view(np.int32)
    mantissa = np.int32((bits & i32(0x007FFFFF)) | i32(0x3F000000)).view(np.float32)
    small = mantissa < f32(0.707106781186547524)
    e = f32((bits >> i32(23)) - i32(126)) - (f32(1) if small else f32(0))
    z = (mantissa + mantissa if small else mantissa) - f32(1)
    z2 = z * z
    p = f32(7.0376836292e-2)
    p = p * z - f32(1.1514610310e-1)
    p = p * z + f32(1.1676998740e-1)
    p = p * z - f32(1.2420140846e-1)
    p = p * z + f32(1.4249322787e-1)
    p = p * z - f32(1.6668057665e-1)
    p = p * z + f32(2.0000714765e-1)
    p = p * z - f32(2.4999993993e-1)
    p = p * z + f32(3.3333331174e-1)
    y = z * z2 * p
    y = y + e * f32(-2.12194440e-4)
    y = y - f32(0.5) * z2
    return z + y + e * f32(0.693359375)


@kernel(inline="always")
def _ordered(x):
    """A whole number that is larger where x is (NaN above all): vectors of whole numbers have a maximum, floats do not."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> i32(31)) & i32(0x7FFFFFFF)))


@kernel
def largest(x_V):
    """(place, value) of the first largest number; a NaN is larger than all."""
    best, at = np.int32(-2147483648), 0
    for start in range(0, x_V.shape[0], _BLOCK):
        block = x_V[start : start + _BLOCK]
        most = np.int32(-2147483648)
        for i in range(block.shape[0]):
            most = np.int32(max(most, _ordered(block[i])))
        if most > best:
            best, at = most, start
    for i in range(at, x_V.shape[0]):
        if _ordered(x_V[i]) == best:
            return i, x_V[i]
    return 0, x_V[0]


@kernel(fastmath=_SUMS)
def _sums(x_V, most):
    total, weighted = f32(0), f32(0)
    for i in range(x_V.shape[0]):
        d = max(x_V[i] - most, _FLOOR)
        e = _exp(d)
        total += e
        weighted += e * d
    return total, weighted


@kernel
def survey(x_V):
    """(place of the largest, its value, log-sum-exp, entropy in nats) of float32 logits; NaN or +inf: NaN."""
    at, most = largest(x_V)
    total, weighted = _sums(x_V, most)
    log_total = np.log(np.float64(total))
    return at, most, np.float64(most) + log_total, log_total - np.float64(weighted) / np.float64(total)


@kernel(fastmath=_SUMS)
def allowed_mass(x_V, q_M):
    """How much of the memory's mass is on tokens whose logits are not -inf."""
    kept = f32(0)
    for i in range(q_M.shape[0]):
        kept += q_M[i] if x_V[i] > f32(-np.inf) else f32(0)
    return kept


@kernel(fastmath=_SUMS)
def _mix(x_V, q_M, keep, give, lse, shift, out_V):
    for i in range(q_M.shape[0]):
        x, q = x_V[i], q_M[i]
        mixed = lse + _log(max(keep * _exp(min(x - lse, f32(0))) + give * q, f32(1.2e-38)))
        out_V[i] = mixed if (q > f32(0)) & (x > f32(-np.inf)) else x + shift
    for i in range(q_M.shape[0], x_V.shape[0]):
        out_V[i] = x_V[i] + shift


@kernel
def mix_linear(x_V, q_M, lam, kept, lse, out_V):
    """out = lse + log((1 - lam) P_model + lam q / kept): logits of the mixture, with the model's log-sum-exp.

    Where q is 0 a logit only falls by log(1 - lam); where it is -inf it stays. out_V may be x_V.
    """
    _mix(x_V, q_M, f32(1.0 - lam), f32(lam / kept), f32(lse), f32(np.log1p(-lam)), out_V)


@kernel
def survey_rows(x_TV, target_T, other_T, out_T6):
    """Each row of a prompt's logits, read once.

    out: log P(target), log P(other), entropy, log P(largest), place of the largest, log-sum-exp; targets and others below
    0 or at V and above give -inf.
    """
    V = x_TV.shape[1]
    for t in range(x_TV.shape[0]):
        at, most, lse, entropy = survey(x_TV[t])
        target, other = target_T[t], other_T[t]
        out_T6[t, 0] = np.float64(x_TV[t, target]) - lse if 0 <= target < V else -np.inf
        out_T6[t, 1] = np.float64(x_TV[t, other]) - lse if 0 <= other < V else -np.inf
        out_T6[t, 2] = entropy
        out_T6[t, 3] = np.float64(most) - lse
        out_T6[t, 4] = at
        out_T6[t, 5] = lse
