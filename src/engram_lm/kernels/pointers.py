"""Numbers at addresses: arrays of any count in one compiled call, which a signature of arrays could not take.

Nothing is checked here: whoever calls compares the place with the size first, and keeps the array alive.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _load(bits):
    def load(typing_context, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], ir.IntType(bits).as_pointer()), align=1)
            return builder.zext(value, ir.IntType(64))

        return types.int64(types.int64), codegen

    load.__doc__ = f"The {bits} bits at an address, int64: a number from 0 where they are fewer than 64."
    return intrinsic(load)


load8, load16, load32, load64 = (_load(bits) for bits in (8, 16, 32, 64))


def _store(bits):
    def store(typing_context, address, value):
        def codegen(context, builder, signature, args):
            word = ir.IntType(bits)
            builder.store(builder.trunc(args[1], word), builder.inttoptr(args[0], word.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    store.__doc__ = f"Write the low {bits} bits of an int64 to an address."
    return intrinsic(store)


store16, store32 = _store(16), _store(32)


@intrinsic
def load_flag(typing_context, address):
    """The byte at an address; what was written before `set_flag` is seen after it."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8)
        value = builder.load_atomic(builder.inttoptr(args[0], byte.as_pointer()), "acquire", 1)
        return builder.zext(value, ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def set_flag(typing_context, address):
    """Write 1 to the byte at an address, after everything that was written before."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8)
        builder.store_atomic(ir.Constant(byte, 1), builder.inttoptr(args[0], byte.as_pointer()), "release", 1)
        return context.get_dummy_value()

    return types.void(types.int64), codegen
