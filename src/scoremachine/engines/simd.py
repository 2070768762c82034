"""A numba type for SIMD vectors of eight doubles, and the operations that the kernels need.

LLVM vectorizes the inner loop of a box filter only after checking at run time that no two arrays
overlap, which costs more than the loop. Explicit vectors avoid this check. LLVM lowers a vector of
eight doubles to the instructions of the processor (AVX-512, AVX2, NEON).

    load(a, i)              a[i : i + LANES], from a flat contiguous float64 array
    load_at(a, places, i)   load(a, places[i]), with an int32 array of positions
    store(a, i, v)
    u + v, u - v, u * v     with vectors or floats
    exp(v)                  of non-positive lanes, relative error below 1e-11
    hsum(v), hmax(v)        a float
    sums(a, b, c, d, e, f)  a vector of six horizontal sums and two zeros
    any_above(u, v)         whether some lane of u is larger than that of v
    any_reaches(u, v)       whether some lane of u is at least that of v
    above(v, x)             v, with the lanes that are not above the float x set to 0
    broadcast(a, i)         a vector of a[i], from a flat contiguous float64 array
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from scoremachine.engines.vectors import (
    Vector,
    broadcasts,
    each,
    llvm,
    loads,
    maxima,
    pointer,
    splats,
    splatted,
    stores,
    totals,
)

LANES = 8

DOUBLE = ir.DoubleType()
VECTOR = ir.VectorType(DOUBLE, LANES)
INTEGERS = ir.VectorType(ir.IntType(64), LANES)


lanes = Vector(types.float64, LANES)
load = loads(lanes, 8)
load_bytes = loads(
    lanes, 1, ir.VectorType(ir.IntType(8), LANES), lambda builder, v: builder.uitofp(v, VECTOR)
)
store = stores(lanes, 8)
splat = splats(lanes)
broadcast = broadcasts(lanes)
hsum = totals(lanes)
hmax = maxima(lanes, ("nnan",))
floor = each(lanes, "floor")


@intrinsic
def load_at(typing: Any, array: Any, places: Any, i: Any) -> Any:
    """array[places[i] : places[i] + LANES] as a vector, for places >= 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[1])(context, builder, args[1]).data
        place = builder.zext(builder.load(builder.gep(data, [args[2]])), ir.IntType(64))
        vector = builder.load(pointer(context, builder, signature.args[0], args[0], place, VECTOR))
        vector.align = 8
        return vector

    return lanes(array, places, types.intp), generate


_LARGER = llvm(lanes, "maxnum", VECTOR, VECTOR, VECTOR)


@intrinsic
def sums(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """(hsum(a), ..., hsum(f), 0, 0): six sums in three rounds, cheaper than six calls of hsum."""
    rounds = (
        ([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]),
        ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    )

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pick(u: Any, v: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(
                u, v, ir.Constant(ir.VectorType(ir.IntType(32), LANES), places)
            )

        zero = ir.Constant(VECTOR, [0.0] * LANES)
        left = [*args, zero, zero]
        for even, odd in rounds:
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [builder.fadd(pick(u, v, even), pick(u, v, odd)) for u, v in pairs]
        return left[0]

    return lanes(lanes, lanes, lanes, lanes, lanes, lanes), generate


def _any(comparison: str) -> Any:
    """Makes a function of u and v: whether the comparison holds in any lane."""

    @intrinsic
    def compare(typing: Any, u: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            mask = builder.bitcast(builder.fcmp_ordered(comparison, *args), ir.IntType(LANES))
            return builder.icmp_unsigned("!=", mask, ir.Constant(ir.IntType(LANES), 0))

        return types.boolean(lanes, lanes), generate

    return compare


any_above = _any(">")
any_reaches = _any(">=")


@intrinsic
def above(typing: Any, v: Any, x: Any) -> Any:
    """v where it is larger than x, and 0 elsewhere."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kept = builder.fcmp_ordered(">", args[0], splatted(builder, lanes, args[1]))
        return builder.select(kept, args[0], ir.Constant(VECTOR, [0.0] * LANES))

    return lanes(lanes, types.float64), generate


@intrinsic
def larger(typing: Any, u: Any, v: Any) -> Any:
    """The larger of two vectors, lane by lane."""
    return lanes(lanes, lanes), lambda context, builder, _, args: _LARGER(builder, args, ("nnan",))


@intrinsic
def power_of_two(typing: Any, k: Any) -> Any:
    """2^k for lanes with whole numbers in [-1022, 1023]: k is written to the exponent bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(n: int) -> Any:
            return ir.Constant(INTEGERS, [n] * LANES)

        exponent = builder.add(builder.fptosi(args[0], INTEGERS), constant(1023))
        return builder.bitcast(builder.shl(exponent, constant(52)), VECTOR)

    return lanes(lanes), generate


@njit(inline="always")
def exp(x):
    """exp of lanes <= 0: e^x = 2^k e^r with |r| <= ln(2) / 2, and a Taylor polynomial for e^r."""
    x = larger(x, splat(-708.0))
    k = floor(x * 1.4426950408889634 + 0.5)
    r = x - k * 0.6931471803691238 - k * 1.9082149292705877e-10
    p = r * (1 / 362880) + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    return p * power_of_two(k)
