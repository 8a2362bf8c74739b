"""Row addresses of a whole batch on one CPU thread, in numba. The plain twin is `addressing.plain`.

    mix_n   = x_t m_0 XOR x_{t-1} m_1 XOR ... XOR x_{t-n+1} m_{n-1}          (arXiv 2601.07372 eq. for the hash heads)
    address = mix_n mod p_c + offset_c        for every column c of order n

A 64-bit division costs 3-13 ns an address, so the remainder is taken with a floating-point reciprocal, eight
instructions that vectorise over the addresses of a block:

    q = round(float(mix) * (1 / p));   r = mix - q p;   r += p if r < 0

Why that is exact for p >= 2^13: three roundings (mix, 1/p, their product) err by at most 3 * 2^-53 of the quotient,
which is below 2^63 / 2^13 = 2^50, so by 3/8; rounding to the nearest integer adds 1/2. Hence |r| < 7/8 p and one
correction is enough. Rounding is the addition of 1.5 * 2^52, after which the integer is in the low bits of the double.
For smaller p the mix is reduced in two steps, mix = high 2^31 + low, whose quotients stay below 2^45.

Where every order has a multiple of eight heads, eight addresses are one LLVM vector (`_eight`) that is computed from
the mix in a register and stored once: half the time of spreading the mixes over an array first and leaving the rest to
the loop vectoriser, which the other schemes take.

Addresses are written token-major, [B, T, C]: column-major is no faster to write and a gather would need the
transposition.

Compiled on first use (about two seconds), once for all processes (`compiled`).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engram_lm.kernels.compiled import kernel

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
# Columns that one mix is stored to at a time; `_mixes` is written for 8.
_GROUP = 8


def two_steps(moduli_C: np.ndarray) -> bool:
    """Whether these moduli need the two-step remainder."""
    if int(moduli_C.min()) >= ONE_STEP_FROM:
        return False
    if int(moduli_C.max()) >= TWO_STEPS_BELOW:
        raise ValueError(
            f"moduli from {moduli_C.min()} to {moduli_C.max()} fit neither remainder; see {__name__}"
        )
    return True


def takes_eights(moduli_C: np.ndarray, heads_N: np.ndarray, *, polynomial: bool) -> bool:
    """Whether `_eight` can compute this scheme."""
    return not polynomial and int(moduli_C.min()) >= ONE_STEP_FROM and not (heads_N % _GROUP).any()


@intrinsic
def _eight(typing_context, mix, modulus_C, inverse_C, offset_C, column, out_F, at):
    """out_F[at:at + 8] = mix mod p + offset for the eight columns from `column`, as `_remainders` does it."""
    signature = types.void(types.int64, modulus_C, inverse_C, offset_C, types.uintp, out_F, types.uintp)
    int64x8, float64x8 = ir.VectorType(ir.IntType(64), _GROUP), ir.VectorType(ir.DoubleType(), _GROUP)

    def codegen(context, builder, signature, args):
        mix, modulus, inverse, offset, column, out, at = args

        def pointer(argument, array, index, vector):
            data = context.make_array(signature.args[argument])(context, builder, array).data
            return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())

        def columns(argument, array, vector):
            return builder.load(pointer(argument, array, column, vector), align=8)

        def eight_of(value, vector):
            first = builder.insert_element(
                ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), _GROUP), [0] * _GROUP)
            return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lanes)

        def constant(value, vector):
            return ir.Constant(vector, [value] * _GROUP)

        p = columns(1, modulus, int64x8)
        x = eight_of(builder.sitofp(mix, ir.DoubleType()), float64x8)
        q = builder.fadd(builder.fmul(x, columns(2, inverse, float64x8)), constant(_ROUND, float64x8))
        q = builder.sub(builder.bitcast(q, int64x8), constant(_ROUND_BITS, int64x8))
        r = builder.sub(eight_of(mix, int64x8), builder.mul(q, p))
        r = builder.add(r, builder.and_(builder.ashr(r, constant(63, int64x8)), p))
        r = builder.add(r, columns(3, offset, int64x8))
        builder.store(r, pointer(5, out, at, int64x8), align=8)
        return context.get_dummy_value()

    return signature, codegen


@kernel
def _stops(token, eos_E):
    # numba has no any() over a generator.
    for e in range(eos_E.shape[0]):  # noqa: SIM110
        if token == eos_E[e]:
            return True
    return False


@kernel
def _remainders(mix_F, n, modulus_F, inverse_F, offset_F, out_F):
    """out = mix mod p + offset, for p >= ONE_STEP_FROM, or after `_shrink`."""
    for f in range(n):
        mix, p = mix_F[f], modulus_F[f]
        q = np.float64(np.float64(mix) * inverse_F[f] + _ROUND).view(np.int64) - _ROUND_BITS
        r = mix - q * p
        # The sign bit spread over the word: p where r is negative.
        r += (r >> 63) & p
        out_F[f] = r + offset_F[f]


@kernel
def _shrink(mix_F, n, modulus_F, inverse_F):
    """Put for each mix a number below p 2^31 with the same remainder, for p < TWO_STEPS_BELOW."""
    for f in range(n):
        mix, p = mix_F[f], modulus_F[f]
        high = mix >> _LOW_BITS
        q = np.float64(np.float64(high) * inverse_F[f] + _ROUND).view(np.int64) - _ROUND_BITS
        r = high - q * p
        r += (r >> 63) & p
        mix_F[f] = (r << _LOW_BITS) + (mix & _LOW_MASK)


@kernel
def _mixes(history_X, reach_K, n_tokens, multipliers_N, fill, mix_NK):
    """mix_NK[d, k]: token k's mix of order d + 1. history_X[N - 1 + k] is token k, which sees reach_K[k] back."""
    N = multipliers_N.shape[0]
    for k in range(n_tokens):
        mix_NK[0, k] = history_X[N - 1 + k] * multipliers_N[0]
    for d in range(1, N):
        m = multipliers_N[d]
        # A slice, so that the loop has no index that could be negative and stays vector code.
        earlier_X = history_X[N - 1 - d : N - 1 - d + n_tokens]
        for k in range(n_tokens):
            x = earlier_X[k] if d <= reach_K[k] else fill
            mix_NK[d, k] = mix_NK[d - 1, k] ^ (x * m)


@kernel
def _eights(mix_NK, n_tokens, heads_N, modulus_C, inverse_C, offset_C, out_F, start):
    """The addresses of a block from out_F[start] on, where every order has a multiple of eight heads."""
    eight, n_columns = np.uint64(_GROUP), np.uint64(modulus_C.shape[0])
    column = np.uint64(0)
    for d in range(heads_N.shape[0]):
        for _ in range(heads_N[d] // _GROUP):
            at = np.uint64(start) + column
            for k in range(n_tokens):
                _eight(mix_NK[d, k], modulus_C, inverse_C, offset_C, column, out_F, at)
                at += n_columns
            column += eight


@kernel
def _spread(mix_NK, n_tokens, heads_N, mix_F):
    """mix_F[k * C + c]: the mix of column c's order."""
    N = heads_N.shape[0]
    # Eight equal stores become two vector stores; what runs over is overwritten by the next order or token. Unsigned
    # positions and no inner loop: numba's treatment of negative indices would cost a fifth of the whole kernel here.
    start = np.uint64(0)
    for k in range(n_tokens):
        for d in range(N):
            mix, end = mix_NK[d, k], start + np.uint64(heads_N[d])
            f = start
            while f < end:
                mix_F[f] = mix
                mix_F[f + np.uint64(1)] = mix
                mix_F[f + np.uint64(2)] = mix
                mix_F[f + np.uint64(3)] = mix
                mix_F[f + np.uint64(4)] = mix
                mix_F[f + np.uint64(5)] = mix
                mix_F[f + np.uint64(6)] = mix
                mix_F[f + np.uint64(7)] = mix
                f += np.uint64(_GROUP)
            start = end


@kernel
def _sums(history_X, reach_K, n_tokens, weights_NC, mix_F):
    """mix_F[k * C + c]: the sum of x_d weights_NC[d, c] over the places that token k sees; missing terms are 0."""
    N, C = weights_NC.shape
    for k in range(n_tokens):
        for c in range(C):
            mix_F[k * C + c] = history_X[N - 1 + k] * weights_NC[0, c]
        for d in range(1, min(N - 1, reach_K[k]) + 1):
            for c in range(C):
                mix_F[k * C + c] += history_X[N - 1 - d + k] * weights_NC[d, c]


@kernel
def _ordinary(ids_K, eos_E, vocab_size):
    """Whether no id of a block is DEAD, an end of sequence or outside the vocabulary. Loops that vectorise."""
    odd = False
    for k in range(ids_K.shape[0]):
        odd |= (ids_K[k] < 0) | (ids_K[k] >= vocab_size)
    for e in range(eos_E.shape[0]):
        for k in range(ids_K.shape[0]):
            odd |= ids_K[k] == eos_E[e]
    return not odd


@kernel
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
    eights,
    vocab_size,
    check,
    out_BTC,
):
    """Fill out_BTC. Returns -1 or, with `check`, the flat position of the first bad id (previous ids: -2 - position).

    weights_NC is empty for a mix and holds V^d mod p_c for a polynomial; heads_N[d] is the heads of order d + 1;
    `eights` as from `takes_eights`.
    After a bad id the rest of out_BTC is not written.
    """
    B, T = ids_BT.shape
    C, N = moduli_C.shape[0], heads_N.shape[0]
    polynomial = weights_NC.shape[0] > 0
    masked, started = mask_BT.size > 0, starts_BT.size > 0
    history_X = np.empty(N - 1 + _BLOCK, np.int64)
    reach_K = np.empty(_BLOCK, np.int64)
    # One flat loop over a block's addresses, with the columns' constants repeated for each of its tokens.
    mix_F = np.zeros(_BLOCK * C + _GROUP, np.int64)
    mix_NK = np.empty((N, _BLOCK), np.int64)
    modulus_F = np.empty(_BLOCK * C, np.int64)
    inverse_F = np.empty(_BLOCK * C, np.float64)
    offset_F = np.empty(_BLOCK * C, np.int64)
    for k in range(0 if eights else min(_BLOCK, T)):
        for c in range(C):
            modulus_F[k * C + c] = moduli_C[c]
            inverse_F[k * C + c] = inverse_C[c]
            offset_F[k * C + c] = offset_C[c]
    out_F = out_BTC.reshape(B * T * C)
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
            ids_K = ids_BT[b, block : block + n_tokens]
            if not masked and not started and _ordinary(ids_K, eos_E, vocab_size):
                for k in range(n_tokens):
                    history_X[N - 1 + k] = ids_K[k]
                    reach_K[k] = reach + k
                reach += n_tokens
            else:
                for k in range(n_tokens):
                    t = block + k
                    token = ids_K[k]
                    if masked and not mask_BT[b, t]:
                        token = -1
                    if check and (token < -1 or token >= vocab_size):
                        return b * T + t
                    if started and starts_BT[b, t]:
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
            at = (b * T + block) * C
            if polynomial:
                _sums(history_X, reach_K, n_tokens, weights_NC, mix_F)
            else:
                _mixes(history_X, reach_K, n_tokens, multipliers_N, fill, mix_NK)
            if eights:
                _eights(mix_NK, n_tokens, heads_N, moduli_C, inverse_C, offset_C, out_F, at)
            else:
                if not polynomial:
                    _spread(mix_NK, n_tokens, heads_N, mix_F)
                if small_moduli:
                    _shrink(mix_F, n_tokens * C, modulus_F, inverse_F)
                n = n_tokens * C
                _remainders(mix_F, n, modulus_F, inverse_F, offset_F, out_F[at : at + n])
            for d in range(N - 1):
                history_X[d] = history_X[n_tokens + d]
    return -1
