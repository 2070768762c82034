"""Sixteen floats at once: the few operations that a scan of an index needs.

The searching twin of `kernels.simd`, in float32 and over bytes:

    load(a, i)             a[i : i + LANES], from a flat contiguous float32 array
    load_bytes(a, i)       the same of a uint8 array, as floats
    load_counts(a, i)      the same of a uint32 array
    store(a, i, v)
    splat(x), broadcast(a, i)
    u + v, u - v, u * v    with vectors or floats
    larger(u, v), smaller(u, v)    lane by lane
    root(v)                its square root
    hsum(v)                the sum of the lanes
    add_totals(sums, k, a, i, x)    sums[k : k + 4] += x times the sums of 4 vectors from a[i] on
    prefetch(a, i)         has a[i] brought near
    reaching(u, v)         a bit for every lane of u that is at most v's, as an integer
    weights(x, bits)       2^x or a little more in the lanes whose bit is 0, and 0 in the others
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from scoremachine.kernels.vectors import (
    Vector,
    broadcasts,
    loads,
    pointer,
    splats,
    stores,
    totals,
)

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
splat = splats(floats)
broadcast = broadcasts(floats)
hsum = totals(floats)


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
def root(typing: Any, v: Any) -> Any:
    """The square root, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(VECTOR, [VECTOR]), "llvm.sqrt.v16f32"
        )
        return builder.call(function, args)

    return floats(floats), generate


@intrinsic
def add_totals(typing: Any, sums: Any, k: Any, rows: Any, i: Any, x: Any) -> Any:
    """Adds x times the sums of four vectors, rows[i : i + 64], to sums[k : k + 4] in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def shuffled(u: Any, v: Any, places: list[int]) -> Any:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
            return builder.shuffle_vector(u, v, mask)

        def folded(u: Any, v: Any, pattern: list[int], more: int) -> Any:
            low = [p + quarter for quarter in range(0, LANES, 4) for p in pattern]
            return builder.fadd(shuffled(u, v, low), shuffled(u, v, [p + more for p in low]))

        place = pointer(context, builder, signature.args[2], args[2], args[3], VECTOR)
        a, b, c, d = (
            builder.load(builder.gep(place, [ir.Constant(ir.IntType(64), n)]), align=4)
            for n in range(4)
        )
        # the sums of every fourth number, side by side: a, b, c, d in each quarter
        pairs = [folded(u, v, [0, LANES, 1, LANES + 1], 2) for u, v in ((a, b), (c, d))]
        four = folded(*pairs, [0, 1, LANES, LANES + 1], 2)
        width = LANES
        while width > 4:
            width //= 2
            low, high = list(range(width)), list(range(width, 2 * width))
            four = builder.fadd(shuffled(four, four, low), shuffled(four, four, high))
        doubles = ir.VectorType(ir.DoubleType(), 4)
        into = pointer(context, builder, signature.args[0], args[0], args[1], doubles)
        four = builder.fpext(four, doubles)
        scale = ir.Constant(doubles, ir.Undefined)
        for lane in range(4):
            scale = builder.insert_element(scale, args[4], ir.Constant(ir.IntType(32), lane))
        total = builder.fadd(builder.load(into, align=8), builder.fmul(four, scale))
        builder.store(total, into, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.intp, rows, types.intp, types.float64), generate


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


@intrinsic
def prefetch(typing: Any, array: Any, i: Any) -> Any:
    """Has an element of a flat array brought into the cache, for it will be read."""

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
