"""SIMD vectors of sixteen floats, and the operations that a scan of an index needs.

Like `engines.simd`, but in float32 and with loads of bytes:

    load(a, i)             a[i : i + LANES], from a flat contiguous float32 array
    load_bytes(a, i)       the same of a uint8 array, as floats
    load_counts(a, i)      the same of a uint32 array
    store(a, i, v)
    splat(x), broadcast(a, i)
    u + v, u - v, u * v    with vectors or floats
    larger(u, v), smaller(u, v)    lane by lane
    floor(v)               lane by lane
    hsum(v), hmax(v)       the sum of the lanes, and the largest lane
    prefetch(a, i)         prefetches a[i] into the CPU cache
    reaching(u, v)         a mask as an integer, with bit k set if u[k] <= v[k]
    weights(x, bits)       an upper bound of 2^x in the lanes whose bit is 0, and 0 in the others
    exp2(x)                2^x
    lowest(bits)           the position of the lowest bit that is 1
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from scoremachine.engines.caching import njit
from scoremachine.engines.vectors import (
    Vector,
    broadcasts,
    each,
    loads,
    maxima,
    pointer,
    splats,
    stores,
    totals,
)

BORROWED: dict[str, Any] = {
    "nogil": True,
    "_nrt": False,
    "error_model": "numpy",
}  # options without reference counting of arrays
LANES = 16

VECTOR = ir.VectorType(ir.FloatType(), LANES)
INTEGERS = ir.VectorType(ir.IntType(32), LANES)
BITS = ir.IntType(LANES)

floats = Vector(types.float32, LANES)
load = loads(floats, 4)
load_bytes = loads(
    floats,
    1,
    ir.VectorType(ir.IntType(8), LANES),
    lambda builder, v: builder.sitofp(builder.zext(v, INTEGERS), VECTOR),
)
load_counts = loads(floats, 4, INTEGERS, lambda builder, v: builder.uitofp(v, VECTOR))
store = stores(floats, 4)
integers = Vector(types.int32, LANES)
splat = splats(floats)
broadcast = broadcasts(floats)
hsum, hmax = totals(floats), maxima(floats)
floor = each(floats, "floor")


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


@register_jitable
def by_fours(n):
    """n rounded up to a multiple of four."""
    return (n + 3) // 4 * 4


@intrinsic
def reaching(typing: Any, u: Any, v: Any) -> Any:
    """A mask as an integer: bit k is set if u[k] <= v[k]."""

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
    """An upper bound of 2^x, at most 6.2% above it, where a lane's bit is 0; 0 where it is 1.

    The bits of a float, read as an integer, are its logarithm, interpolated linearly between powers
    of two. So the inverse interpolates 2^x linearly, which is above 2^x since 2^x is convex.
    """
    y = smaller(larger(x, splat(types.float32(-126.0))), splat(types.float32(126.0)))
    return _powers(y * types.float32(8388608.0) + types.float32(1065353216.0), bits)


@njit(inline="always")
def exp2(x):
    """2^x with a relative error of at most 1e-5; 2^-126 for x below -126."""
    x = smaller(larger(x, splat(types.float32(-126.0))), splat(types.float32(126.0)))
    whole = floor(x)
    f = x - whole
    y = f * types.float32(0.013511545) + types.float32(0.051989599)
    y = f * y + types.float32(0.241508801)
    y = f * y + types.float32(0.692974285)
    y = f * y + types.float32(1.0)
    return y * _powers(whole * types.float32(8388608.0) + types.float32(1065353216.0), 0)


@intrinsic
def lowest(typing: Any, bits: Any) -> Any:
    """The position of the lowest bit that is 1."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Prefetches an element of a flat array into the CPU cache."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        where, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [where, number, number, number]),
            "llvm.prefetch.p0i8",
        )
        place = pointer(context, builder, signature.args[0], *args, ir.IntType(8))
        builder.call(function, [place, *(ir.Constant(number, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
