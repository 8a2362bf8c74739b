"""Gate and short conv on the CPU, forward and backward, each one pass over a token's vectors while they are in cache.

Plain twins: `nn.gate.gate` and `nn.conv.short_conv` with torch's autograd. In torch these are some thirty passes over
[tokens, width]; here a token is read once. Kernels work on a range of tokens, so that threads can share a batch, and
release the GIL. Everything is float32; sums over the width may be reassociated (`fastmath`), which is what lets them
use vector instructions.

    a = sum(k w h), r_k = rsqrt(mean k^2 + eps), r_h likewise, s = a r_k r_h / sqrt(D), alpha = sigmoid(squash(s))
    y = alpha v,  r = rsqrt(alpha^2 mean v^2 + eps),  u = y r w_c                        (RMSNorm before the conv)
    out = y + silu(sum_j w_j u_{t - j dilation})
"""

import math

import numpy as np

from engram_lm.kernels.compiled import kernel

FAST = {"reassoc", "contract", "arcp", "nsz"}  # not "nnan": NaN must stay NaN
GATE_FLOOR = np.float32(1e-6)
_LOG2E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.4426950408889634),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _HALF = np.float32(1.0), np.float32(0.5)


@kernel(inline="always")
def _sigmoid(x):
    """1 / (1 + e^-x) in float32, branch-free so that a loop over it is vectorised (Cephes' expf polynomial, < 2 ulp)."""
    t = min(max(-x, np.float32(-87.0)), np.float32(87.0))
    n = np.floor(t * _LOG2E + _HALF)
    f = t - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
    e = p * f * f + f + _ONE
    scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    # NaN must not be hidden by the clamp: x - x is 0, or NaN
    return _ONE / (_ONE + e * scale) + (x - x)


@kernel(fastmath=FAST, error_model="numpy")
def gate_forward(
    kv_NE,
    h_NMD,
    w_MD,
    wc_MD,
    real_N,
    eps,
    signed,
    n_tokens,
    lead,
    alpha_NM,
    stats_NM4,
    y_NMD,
    u_NMD,
    begin,
    end,
):
    """alpha, y and u of tokens [begin, end). wc of size 0: no conv, u is not written. real of size 0: all are tokens.

    kv holds M keys, then the value. Before each sequence of n_tokens, u has `lead` places for the conv's past. stats
    keeps (a, r_k, r_h, r) for the backward pass.
    """
    M, D = w_MD.shape
    root = np.float32(1.0 / math.sqrt(D))
    per = np.float32(1.0 / D)
    has_conv = wc_MD.size > 0
    for n in range(begin, end):
        v = kv_NE[n, M * D :]
        vv = np.float32(0.0)
        for d in range(D):
            vv += v[d] * v[d]
        vv *= per
        for m in range(M):
            k = kv_NE[n, m * D : (m + 1) * D]
            h = h_NMD[n, m]
            w = w_MD[m]
            a = np.float32(0.0)
            kk = np.float32(0.0)
            hh = np.float32(0.0)
            for d in range(D):
                a += k[d] * h[d] * w[d]
                kk += k[d] * k[d]
                hh += h[d] * h[d]
            rk = _ONE / np.float32(math.sqrt(kk * per + eps))
            rh = _ONE / np.float32(math.sqrt(hh * per + eps))
            s = a * rk * rh * root
            if signed:
                size = np.float32(math.sqrt(max(abs(s), GATE_FLOOR)))
                s = size if s > 0 else (-size if s < 0 else s)
            alpha = _sigmoid(s)
            if real_N.size > 0 and not real_N[n]:
                alpha = np.float32(0.0)
            alpha_NM[n, m] = alpha
            r = _ONE / np.float32(math.sqrt(alpha * alpha * vv + eps))
            stats_NM4[n, m, 0] = a
            stats_NM4[n, m, 1] = rk
            stats_NM4[n, m, 2] = rh
            stats_NM4[n, m, 3] = r
            y = y_NMD[n, m]
            if has_conv:
                u = u_NMD[n + lead * (n // n_tokens + 1), m]
                wc = wc_MD[m]
                for d in range(D):
                    y[d] = alpha * v[d]
                    u[d] = y[d] * r * wc[d]
            else:
                for d in range(D):
                    y[d] = alpha * v[d]


@kernel(fastmath=FAST, error_model="numpy")
def gate_backward(
    kv_NE,
    h_NMD,
    w_MD,
    wc_MD,
    alpha_NM,
    stats_NM4,
    gy_NMD,
    gu_NMD,
    signed,
    n_tokens,
    lead,
    gkv_NE,
    gh_NMD,
    gw_MD,
    gwc_MD,
    begin,
    end,
):
    """Gradients of tokens [begin, end); gw and gwc are added to."""
    M, D = w_MD.shape
    root = np.float32(1.0 / math.sqrt(D))
    per = np.float32(1.0 / D)
    has_conv = wc_MD.size > 0
    for n in range(begin, end):
        v = kv_NE[n, M * D :]
        gv = gkv_NE[n, M * D :]
        for d in range(D):
            gv[d] = np.float32(0.0)
        for m in range(M):
            alpha = alpha_NM[n, m]
            a, rk, rh, r = stats_NM4[n, m, 0], stats_NM4[n, m, 1], stats_NM4[n, m, 2], stats_NM4[n, m, 3]
            gy = gy_NMD[n, m]
            galpha = np.float32(0.0)
            if has_conv:
                # u = x r w_c with x = y: g_y += r (g_x - x_hat mean(g_x x_hat)), x_hat = y r, g_x = g_u w_c
                gu = gu_NMD[n + lead * (n // n_tokens + 1), m]
                wc = wc_MD[m]
                gwc = gwc_MD[m]
                scale = alpha * r
                inner = np.float32(0.0)
                for d in range(D):
                    inner += gu[d] * wc[d] * v[d]
                inner = inner * scale * per
                for d in range(D):
                    hat = v[d] * scale
                    gwc[d] += gu[d] * hat
                    total = gy[d] + r * (gu[d] * wc[d] - hat * inner)
                    galpha += total * v[d]
                    gv[d] += alpha * total
            else:
                for d in range(D):
                    galpha += gy[d] * v[d]
                    gv[d] += alpha * gy[d]
            s = a * rk * rh * root
            slope = alpha * (_ONE - alpha)
            if signed:
                size = abs(s)
                slope = slope * _HALF / np.float32(math.sqrt(size)) if size > GATE_FLOOR else np.float32(0.0)
            ds = galpha * slope * root
            both = ds * rk * rh
            key_part = ds * a * rh * rk * rk * rk * per
            query_part = ds * a * rk * rh * rh * rh * per
            k = kv_NE[n, m * D : (m + 1) * D]
            gk = gkv_NE[n, m * D : (m + 1) * D]
            h = h_NMD[n, m]
            gh = gh_NMD[n, m]
            w = w_MD[m]
            gw = gw_MD[m]
            for d in range(D):
                gk[d] = both * w[d] * h[d] - key_part * k[d]
                gh[d] = both * w[d] * k[d] - query_part * h[d]
                gw[d] += both * k[d] * h[d]


@kernel(fastmath=FAST, error_model="numpy")
def conv_forward(u_BSC, w_KC, dilation, y_BTC, out_BTC, begin, end):
    """out = y + silu(conv(u)) for places [begin, end) of the flattened [B, T]; S = T + (K-1) dilation."""
    K, C = w_KC.shape
    T = y_BTC.shape[1]
    for place in range(begin, end):
        b, t = place // T, place % T
        y, out = y_BTC[b, t], out_BTC[b, t]
        if K == 4:
            u0, u1 = u_BSC[b, t], u_BSC[b, t + dilation]
            u2, u3 = u_BSC[b, t + 2 * dilation], u_BSC[b, t + 3 * dilation]
            for c in range(C):
                z = w_KC[0, c] * u0[c] + w_KC[1, c] * u1[c] + w_KC[2, c] * u2[c] + w_KC[3, c] * u3[c]
                out[c] = y[c] + z * _sigmoid(z)
        else:
            for c in range(C):
                z = np.float32(0.0)
                for k in range(K):
                    z += w_KC[k, c] * u_BSC[b, t + k * dilation, c]
                out[c] = y[c] + z * _sigmoid(z)


@kernel(fastmath=FAST, error_model="numpy")
def conv_backward(u_BSC, w_KC, dilation, g_BTC, gu_BSC, gw_KC, scratch_C, b):
    """Gradients of sequence b: gu (zero on entry) and gw are added to. One sequence is one task: its sums overlap in time."""
    K, C = w_KC.shape
    for t in range(g_BTC.shape[1]):
        g = g_BTC[b, t]
        if K == 4:
            u0, u1 = u_BSC[b, t], u_BSC[b, t + dilation]
            u2, u3 = u_BSC[b, t + 2 * dilation], u_BSC[b, t + 3 * dilation]
            for c in range(C):
                z = w_KC[0, c] * u0[c] + w_KC[1, c] * u1[c] + w_KC[2, c] * u2[c] + w_KC[3, c] * u3[c]
                sigmoid = _sigmoid(z)
                scratch_C[c] = g[c] * (sigmoid + z * sigmoid * (_ONE - sigmoid))
        else:
            for c in range(C):
                z = np.float32(0.0)
                for k in range(K):
                    z += w_KC[k, c] * u_BSC[b, t + k * dilation, c]
                sigmoid = _sigmoid(z)
                scratch_C[c] = g[c] * (sigmoid + z * sigmoid * (_ONE - sigmoid))
        for k in range(K):
            u, gu, w, gw = u_BSC[b, t + k * dilation], gu_BSC[b, t + k * dilation], w_KC[k], gw_KC[k]
            for c in range(C):
                gu[c] += w[c] * scratch_C[c]
                gw[c] += u[c] * scratch_C[c]
