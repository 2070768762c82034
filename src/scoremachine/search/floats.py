"""Sixteen floats at once: the few operations that a scan of an index needs.

The searching twin of `kernels.simd`, in float32 and over bytes:

    load(a, i)             a[i : i + LANES], from a flat contiguous float32 array
    load_bytes(a, i)       the same of a uint8 array, as floats
    load_counts(a, i)      the same of a uint32 array
    store(a, i, v)
    splat(x), broadcast(a, i)
    u + v, u - v, u * v    with vectors or floats
    larger(u, v), smaller(u, v)    lane by lane
    reaching(u, v)         a bit for every lane of u that is at most v's, as an integer
    weights(x, bits)       2^x or a little more in the lanes whose bit is 0, and 0 in the others
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

FLAGS = ("contract", "reassoc", "nsz", "arcp")
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
BITS = ir.IntType(LANES)


class Floats(types.Type):
    """The numba type of a vector of `LANES` floats."""

    def __init__(self) -> None:
        super().__init__(name="Floats")


floats = Floats()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, i: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), vector.as_pointer())


@intrinsic
def load(typing: Any, array: Any, i: Any) -> Any:
    """array[i : i + LANES] as a vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_pointer(context, builder, signature.args[0], *args, VECTOR))
        v.align = 4
        return v

    return floats(array, types.intp), generate


@intrinsic
def load_bytes(typing: Any, array: Any, i: Any) -> Any:
    """array[i : i + LANES] of a uint8 array as a vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_pointer(context, builder, signature.args[0], *args, BYTES))
        v.align = 1
        return builder.sitofp(builder.zext(v, INTEGERS), VECTOR)

    return floats(array, types.intp), generate


@intrinsic
def load_counts(typing: Any, array: Any, i: Any) -> Any:
    """array[i : i + LANES] of a uint32 array as a vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_pointer(context, builder, signature.args[0], *args, INTEGERS))
        v.align = 4
        return builder.uitofp(v, VECTOR)

    return floats(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, i: Any, vector: Any) -> Any:
    """array[i : i + LANES] = vector."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1], VECTOR)
        builder.store(args[2], pointer).align = 4
        return context.get_dummy_value()

    return types.none(array, types.intp, floats), generate


def _splat(builder: Any, x: Any) -> Any:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(INTEGERS, [0] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """The vector whose lanes all hold x."""
    return floats(types.float32), lambda context, builder, _, args: _splat(builder, args[0])


@intrinsic
def broadcast(typing: Any, array: Any, i: Any) -> Any:
    """The vector whose lanes all hold array[i]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _splat(builder, builder.load(builder.gep(data, [args[1]])))

    return floats(array, types.intp), generate


def _arithmetic(name: str) -> Any:
    @intrinsic
    def operation(typing: Any, u: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args, flags=FLAGS)

        return floats(floats, floats), generate

    return operation


def _overload(op: Any, operation: Any) -> None:
    @overload(op, inline="always")
    def choose(u, v):
        if isinstance(u, Floats) and isinstance(v, Floats):
            return lambda u, v: operation(u, v)
        if isinstance(u, Floats):
            return lambda u, v: operation(u, splat(v))
        if isinstance(v, Floats):
            return lambda u, v: operation(splat(u), v)
        return None


_overload(operator.add, _arithmetic("fadd"))
_overload(operator.sub, _arithmetic("fsub"))
_overload(operator.mul, _arithmetic("fmul"))


@intrinsic
def larger(typing: Any, u: Any, v: Any) -> Any:
    """The larger of two vectors, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return floats(floats, floats), generate


@intrinsic
def smaller(typing: Any, u: Any, v: Any) -> Any:
    """The smaller of two vectors, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return floats(floats, floats), generate


@intrinsic
def reaching(typing: Any, u: Any, v: Any) -> Any:
    """A bit for every lane of u that is at most v's."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.bitcast(builder.fcmp_ordered("<=", *args), BITS)
        return builder.zext(mask, ir.IntType(64))

    return types.int64(floats, floats), generate


@intrinsic
def _powers(typing: Any, x: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.bitcast(builder.trunc(args[1], BITS), ir.VectorType(ir.IntType(1), LANES))
        whole = builder.fptosi(args[0], INTEGERS)
        return builder.select(
            mask, ir.Constant(VECTOR, [0.0] * LANES), builder.bitcast(whole, VECTOR)
        )

    return floats(floats, types.int64), generate


@njit(inline="always")
def weights(x, bits):
    """An upper bound of 2^x, at most 6.2% above, where a lane's bit is 0; 0 where it is 1.

    Read as an integer, a float is its logarithm with straight lines between the powers of two, and
    a chord of 2^x lies above it.
    """
    y = smaller(larger(x, splat(types.float32(-126.0))), splat(types.float32(126.0)))
    return _powers(y * types.float32(8388608.0) + types.float32(1065353216.0), bits)


@intrinsic
def lowest(typing: Any, bits: Any) -> Any:
    """The place of the lowest bit that is 1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate
