"""Row addresses of a whole batch on one CPU thread, in numba. The plain twin is `addressing.plain`.

    mix_n   = x_t m_0 XOR x_{t-1} m_1 XOR ... XOR x_{t-n+1} m_{n-1}          (arXiv 2601.07372 eq. for the hash heads)
    address = mix_n mod p_c + offset_c        for every column c of order n

A 64-bit division costs 3-13 ns an address, so the remainder is taken with a floating-point reciprocal, eight instructions
that vectorise over the columns of one token:

    q = round(float(mix) * (1 / p));   r = mix - q p;   r += p if r < 0

Why that is exact for p >= 2^13: three roundings (mix, 1/p, their product) err by at most 3 * 2^-53 of the quotient, which
is below 2^63 / 2^13 = 2^50, so by less than 3/8; rounding to the nearest integer adds 1/2. Hence |r| < 7/8 p and one
correction is enough. Rounding is the addition of 1.5 * 2^52, after which the integer stands in the low bits of the double.
For smaller p the mix is reduced in two steps, mix = high 2^31 + low, whose quotients stay below 2^45.

Addresses are written token-major, [B, T, C]: measured on two Xeon cores this is also the fastest order to compute them in
(1.2 ns an address against 1.7 column-major), and it is the order in which a gather writes rows.

Compiled on first use (about two seconds) and cached beside this file, or, where that cannot be written, in the user's
cache directory. Set NUMBA_CACHE_DIR to choose the place.
"""

import numpy as np
from numba import njit

# Smallest modulus for which one reciprocal step is exact.
ONE_STEP_FROM = 2**13
# Two steps need modulus * 2^31 in an int64, with room.
TWO_STEPS_BELOW = 2**31
_LOW_BITS = 31
_LOW_MASK = 2**31 - 1

_ROUND = 1.5 * 2.0**52
_ROUND_BITS = int(np.float64(_ROUND).view(np.int64))
# Tokens per block: the mixes of a block stay in the first-level cache.
_BLOCK = 32
# Columns that one mix is stored to at a time.
_GROUP = 8


def _compile(function):
    """njit with a cache on disk, or without where numba finds no directory that it may write."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return njit(nogil=True)(function)


def two_steps(moduli_C: np.ndarray) -> bool:
    """Whether these moduli need the two-step remainder."""
    if int(moduli_C.min()) >= ONE_STEP_FROM:
        return False
    if int(moduli_C.max()) >= TWO_STEPS_BELOW:
        raise ValueError(
            f"moduli from {moduli_C.min()} to {moduli_C.max()} fit neither remainder; see {__name__}"
        )
    return True


@_compile
def _stops(token, eos_E):
    for e in range(eos_E.shape[0]):
        if token == eos_E[e]:
            return True
    return False


@_compile
def _remainders(mix_KC, n_tokens, moduli_C, inverse_C, offset_C, out_KC):
    """out = mix mod p + offset, for p >= ONE_STEP_FROM."""
    for k in range(n_tokens):
        for c in range(moduli_C.shape[0]):
            mix, p = mix_KC[k, c], moduli_C[c]
            q = np.float64(np.float64(mix) * inverse_C[c] + _ROUND).view(np.int64) - _ROUND_BITS
            r = mix - q * p
            # The sign bit spread over the word: p where r is negative.
            r += (r >> 63) & p
            out_KC[k, c] = r + offset_C[c]


@_compile
def _remainders_in_two_steps(mix_KC, n_tokens, moduli_C, inverse_C, offset_C, out_KC):
    """out = mix mod p + offset, for p < TWO_STEPS_BELOW."""
    for k in range(n_tokens):
        for c in range(moduli_C.shape[0]):
            mix, p, inverse = mix_KC[k, c], moduli_C[c], inverse_C[c]
            high = mix >> _LOW_BITS
            q = np.float64(np.float64(high) * inverse + _ROUND).view(np.int64) - _ROUND_BITS
            r = high - q * p
            r += (r >> 63) & p
            rest = (r << _LOW_BITS) + (mix & _LOW_MASK)
            q = np.float64(np.float64(rest) * inverse + _ROUND).view(np.int64) - _ROUND_BITS
            r = rest - q * p
            r += (r >> 63) & p
            out_KC[k, c] = r + offset_C[c]


@_compile
def _mixes(history_X, reach_K, n_tokens, multipliers_N, heads_N, fill, mix_K, mix_KC):
    """mix_KC[k, c]: the mix of column c's order; history_X[N - 1 + k] is token k, and reach_K[k] how far it sees."""
    N = heads_N.shape[0]
    c = 0
    for d in range(N):
        m = multipliers_N[d]
        for k in range(n_tokens):
            x = history_X[N - 1 - d + k] if d <= reach_K[k] else fill
            mix_K[k] = x * m if d == 0 else mix_K[k] ^ (x * m)
        # Whole groups of constant length become vector stores; what runs over is overwritten by the next order.
        for group in range(c, c + heads_N[d], _GROUP):
            for k in range(n_tokens):
                for h in range(_GROUP):
                    mix_KC[k, group + h] = mix_K[k]
        c += heads_N[d]


@_compile
def _sums(history_X, reach_K, n_tokens, weights_NC, mix_KC):
    """mix_KC[k, c]: the sum of x_d weights_NC[d, c] over the places that token k sees; missing terms are 0."""
    N, C = weights_NC.shape
    for k in range(n_tokens):
        for c in range(C):
            mix_KC[k, c] = history_X[N - 1 + k] * weights_NC[0, c]
        for d in range(1, min(N - 1, reach_K[k]) + 1):
            for c in range(C):
                mix_KC[k, c] += history_X[N - 1 - d + k] * weights_NC[d, c]


@_compile
def addresses(
    ids_BT,
    previous_BP,
    starts_BT,
    mask_BT,
    multipliers_N,
    weights_NC,
    heads_N,
    moduli_C,
    inverse_C,
    offset_C,
    eos_E,
    fill,
    dead_stops,
    small_moduli,
    vocab_size,
    check,
    out_BTC,
):
    """Fill out_BTC. Returns -1, or, with `check`, the flat position of the first bad id (bad previous ids: -2 - position).

    weights_NC is empty for a mix and holds V^d mod p_c for a polynomial; heads_N[d] is the heads of order d + 1.
    After a bad id the rest of out_BTC is not written.
    """
    B, T = ids_BT.shape
    C, N = moduli_C.shape[0], heads_N.shape[0]
    polynomial = weights_NC.shape[0] > 0
    history_X = np.empty(N - 1 + _BLOCK, np.int64)
    reach_K = np.empty(_BLOCK, np.int64)
    mix_K = np.empty(_BLOCK, np.int64)
    # Wider than C: the mix is stored in groups of _GROUP columns, and the last group may run over.
    mix_KC = np.zeros((_BLOCK, C + _GROUP), np.int64)
    for b in range(B):
        # How many earlier places the next token sees.
        reach = 0
        for d in range(N - 1):
            history_X[d] = fill
        P = previous_BP.shape[1]
        for s in range(P):
            token = previous_BP[b, s]
            if check and (token < -1 or token >= vocab_size):
                return -2 - (b * P + s)
            dead = token < 0
            token = fill if dead else token
            history_X[N - 1 - P + s] = token
            reach = 0 if (dead and dead_stops) or _stops(token, eos_E) else reach + 1
        for block in range(0, T, _BLOCK):
            n_tokens = min(_BLOCK, T - block)
            for k in range(n_tokens):
                t = block + k
                token = ids_BT[b, t]
                if mask_BT.size and not mask_BT[b, t]:
                    token = -1
                if check and (token < -1 or token >= vocab_size):
                    return b * T + t
                if starts_BT.size and starts_BT[b, t]:
                    reach = 0
                if token < 0:
                    token = fill
                    reach = 0 if dead_stops else reach
                    reach_K[k] = reach
                    reach = 0 if dead_stops or _stops(token, eos_E) else reach + 1
                else:
                    reach_K[k] = reach
                    reach = 0 if _stops(token, eos_E) else reach + 1
                history_X[N - 1 + k] = token
            if polynomial:
                _sums(history_X, reach_K, n_tokens, weights_NC, mix_KC)
            else:
                _mixes(history_X, reach_K, n_tokens, multipliers_N, heads_N, fill, mix_K, mix_KC)
            for d in range(N - 1):
                history_X[d] = history_X[n_tokens + d]
            out_KC = out_BTC[b, block : block + n_tokens]
            if small_moduli:
                _remainders_in_two_steps(mix_KC, n_tokens, moduli_C, inverse_C, offset_C, out_KC)
            else:
                _remainders(mix_KC, n_tokens, moduli_C, inverse_C, offset_C, out_KC)
    return -1
