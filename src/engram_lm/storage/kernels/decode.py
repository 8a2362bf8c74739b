"""Gather and decode in one pass: records at addresses to float32 or bfloat16 rows, on the CPU, one thread, nogil.

    out[i] = decode(records[address[i]])         plain twins: `storage.codecs`, whose numbers these give bit for bit

What counts is the cache miss, so the record of address i + PREFETCH_ROWS is asked for while record i is decoded (see
`kernels.rows`), and the decoding is LLVM vector code, written out as 32 numbers at a time: numba's own loops over views
of a record took three times as long.

e4m3 to float32 through float16: exponent and fraction, shifted to their place there, are the number times 2^-8, subnormals
included, and every processor with F16C (x86 since 2012) or NEON widens eight of them in one instruction. Elsewhere the
plain twins do it.
"""

import platform
from collections.abc import Callable

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engram_lm.kernels.compiled import kernel
from engram_lm.storage.kernels.rows import CACHE_LINE, PREFETCH_ROWS, _prefetch

_SAFE = 27  # e8m0 codes from 2^-100 up
LANES = 32  # numbers at a time; those left over one by one

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


class _Lanes:
    """Vector code over `count` numbers: thin names over an LLVM builder."""

    def __init__(self, builder: ir.IRBuilder, count: int) -> None:
        self.builder, self.count = builder, count

    def type(self, scalar: ir.Type) -> ir.Type:
        return ir.VectorType(scalar, self.count)

    def constant(self, value: float, scalar: ir.Type = _I32) -> ir.Value:
        return ir.Constant(self.type(scalar), [value] * self.count)

    def load(self, address: ir.Value, scalar: ir.Type) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, self.type(scalar).as_pointer()), align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def all_of(self, value: ir.Value) -> ir.Value:
        empty = ir.Constant(self.type(value.type), ir.Undefined)
        first = self.builder.insert_element(empty, value, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, empty, self.constant(0))

    def as_float(self, bits: ir.Value) -> ir.Value:
        return self.builder.bitcast(bits, self.type(_F32))

    def as_bits(self, values: ir.Value) -> ir.Value:
        return self.builder.bitcast(values, self.type(_I32))

    # ---- codecs: each gives float32 from what lies at an address ---------------------------------------------------

    def fp32(self, address: ir.Value) -> ir.Value:
        return self.load(address, _F32)

    def bf16(self, address: ir.Value) -> ir.Value:
        bits = self.builder.zext(self.load(address, _I16), self.type(_I32))
        return self.as_float(self.builder.shl(bits, self.constant(16)))

    def e4m3(self, address: ir.Value) -> ir.Value:
        """The numbers times 2^-8."""
        b = self.builder
        code = b.zext(self.load(address, _I8), self.type(_I16))
        low = b.and_(code, self.constant(0x7F, _I16))
        sign = b.shl(b.and_(code, self.constant(0x80, _I16)), self.constant(8, _I16))
        nan = b.icmp_unsigned("==", low, self.constant(0x7F, _I16))
        bits = b.select(nan, self.constant(0x7E00, _I16), b.shl(low, self.constant(7, _I16)))
        half = b.bitcast(b.or_(bits, sign), self.type(ir.HalfType()))
        return b.fpext(half, self.type(_F32))

    # ---- what leaves ------------------------------------------------------------------------------------------------

    def put_fp32(self, values: ir.Value, address: ir.Value) -> None:
        self.store(values, address)

    def put_exact_bf16(self, values: ir.Value, address: ir.Value) -> None:
        """Of numbers that bfloat16 holds: the upper halves."""
        bits = self.builder.lshr(self.as_bits(values), self.constant(16))
        self.store(self.builder.trunc(bits, self.type(_I16)), address)

    def put_tame_bf16(self, values: ir.Value, address: ir.Value) -> None:
        """To nearest, ties to even, of numbers whose NaNs are those of `e4m3`: rounding leaves them NaNs."""
        self.store(self.builder.trunc(self._rounded(self.as_bits(values)), self.type(_I16)), address)

    def _rounded(self, bits: ir.Value) -> ir.Value:
        b = self.builder
        odd = b.and_(b.lshr(bits, self.constant(16)), self.constant(1))
        return b.lshr(b.add(b.add(bits, self.constant(0x7FFF)), odd), self.constant(16))

    def put_bf16(self, values: ir.Value, address: ir.Value) -> None:
        """To nearest, ties to even; a NaN stays one."""
        b = self.builder
        bits = self.as_bits(values)
        half, rounded = b.lshr(bits, self.constant(16)), self._rounded(bits)
        nan = b.icmp_unsigned(">", b.and_(bits, self.constant(0x7FFFFFFF)), self.constant(0x7F800000))
        bits = b.select(nan, b.or_(half, self.constant(0x40)), rounded)
        self.store(b.trunc(bits, self.type(_I16)), address)


def _lanes(take: str, put: str, count: int) -> Callable:
    """An intrinsic (source, target, scale): `count` numbers of codec `take`, times scale, left as `put`."""

    @intrinsic
    def move(typing_context, source, target, scale):
        signature = types.void(types.uintp, types.uintp, types.float32)

        def codegen(context, builder, signature, args):
            lanes = _Lanes(builder, count)
            values = getattr(lanes, take)(args[0])
            if take == "e4m3":
                # first the power of two, which is exact, so that a scale near the largest float does not overflow
                values = builder.fmul(values, lanes.constant(256.0, _F32))
                values = builder.fmul(values, lanes.all_of(args[2]))
            getattr(lanes, f"put_{put}")(values, args[1])
            return context.get_dummy_value()

        return signature, codegen

    return move


@intrinsic
def _byte(typing_context, address):
    """The byte at an address, as int32."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.load(builder.inttoptr(args[0], _I8.as_pointer())), _I32)

    return types.int32(types.uintp), codegen


@intrinsic
def _power(typing_context, code):
    """2^(code - 127) for codes 1 to 254."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.shl(args[0], ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), codegen


@kernel
def _rare_power(code):
    # 2^-127 is a subnormal float32
    return np.float32(np.nan) if code == 255 else np.float32(2.0**-127) if code == 0 else _power(code)


@kernel(inline="always")
def _later(base, address_N, i, record_bytes):
    """Where the record lies that is asked for while record i is decoded; the last ones ask for themselves."""
    return base + np.uint64(address_N[min(i + PREFETCH_ROWS, address_N.shape[0] - 1)]) * record_bytes


def _kernel_named(name: str, function: Callable) -> Callable:
    function.__name__ = function.__qualname__ = name
    return kernel(function)


def _flat(take: str, put: str) -> Callable:
    """Kernel of a codec whose record is `width` numbers under one scale."""
    code_bytes = {"fp32": 4, "bf16": 2, "e4m3": 1}[take]
    row_bytes = {"fp32": 4, "bf16": 2}[put]
    if (take, put) == ("e4m3", "bf16"):
        put = "tame_bf16"
    many, some, one = (_lanes(take, put, count) for count in (LANES, 8, 1))
    in_step, out_step = np.uint64(code_bytes), np.uint64(row_bytes)

    def gather(base, address_N, out, width, scale):
        record_bytes, n = np.uint64(width) * in_step, np.uint64(width)
        for i in range(address_N.shape[0]):
            # a line at a time between the numbers: all at once they would fill the queue of misses and stop the decoding
            later = _later(base, address_N, i, record_bytes)
            _prefetch(later + record_bytes - np.uint64(1))
            source = base + np.uint64(address_N[i]) * record_bytes
            target = out + np.uint64(i) * n * out_step
            w = np.uint64(0)
            while w + np.uint64(LANES) <= n:
                for line in range(0, LANES * in_step, CACHE_LINE):
                    _prefetch(later + w * in_step + np.uint64(line))
                many(source + w * in_step, target + w * out_step, scale)
                w += np.uint64(LANES)
            while w + np.uint64(8) <= n:
                some(source + w * in_step, target + w * out_step, scale)
                w += np.uint64(8)
            while w < n:
                one(source + w * in_step, target + w * out_step, scale)
                w += np.uint64(1)

    return _kernel_named(f"{take}_as_{put}", gather)


def _blocks(put: str) -> Callable:
    """Kernel of `fp8_e4m3_e8m0`: codes, then a scale for each 32 of them."""
    move = _lanes("e4m3", "tame_bf16" if put == "bf16" else put, 32)
    # four significant bits times a power of two: exact in bfloat16, unless the product is next to its smallest numbers
    exact = _lanes("e4m3", "exact_bf16", 32) if put == "bf16" else move
    out_step = np.uint64({"fp32": 4, "bf16": 2}[put])

    def gather(base, address_N, out, width, unused):
        n, block, n_blocks = np.uint64(width), np.uint64(32), np.uint64(width >> 5)
        record_bytes = n + n_blocks
        for i in range(address_N.shape[0]):
            later = _later(base, address_N, i, record_bytes)
            _prefetch(later + record_bytes - np.uint64(1))
            source = base + np.uint64(address_N[i]) * record_bytes
            target = out + np.uint64(i) * n * out_step
            k = np.uint64(0)
            while k < n_blocks:
                at = k * block
                _prefetch(later + at)
                code = _byte(source + n + k)
                if _SAFE <= code <= 254:
                    exact(source + at, target + at * out_step, _power(code))
                else:
                    move(source + at, target + at * out_step, _rare_power(code))
                k += np.uint64(1)

    return _kernel_named(f"e4m3_e8m0_as_{put}", gather)


# (codec, what leaves) -> kernel(base pointer, addresses int64 [N], out pointer, width, scale float32). Addresses must be
# in range. fp32 to fp32 and bf16 to bf16 are copies: `storage.kernels.rows.gather`.
KERNELS: dict[tuple[str, str], Callable] = {
    ("fp32", "bf16"): _flat("fp32", "bf16"),
    ("bf16", "fp32"): _flat("bf16", "fp32"),
}
if platform.machine() == "aarch64" or llvmlite.binding.get_host_cpu_features().get("f16c"):
    KERNELS |= {
        ("fp8_e4m3", "fp32"): _flat("e4m3", "fp32"),
        ("fp8_e4m3", "bf16"): _flat("e4m3", "bf16"),
        ("fp8_e4m3_e8m0", "fp32"): _blocks("fp32"),
        ("fp8_e4m3_e8m0", "bf16"): _blocks("bf16"),
    }
