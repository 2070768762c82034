"""Sixteen floats at once, and products of bytes: the few operations that a scan of an index needs.

The searching twin of `kernels.simd`, in float32 and over bytes:

    load(a, i)             a[i : i + LANES], from a flat contiguous float32 array
    load_bytes(a, i)       the same of a uint8 array, as floats
    load_every(a, i, k)    a[i + k : i + k + 4 LANES : 4] of a uint8 array, as floats, 0 <= k < 4
    load_counts(a, i)      the same of a uint32 array
    store(a, i, v)
    splat(x), broadcast(a, i)
    u + v, u - v, u * v    with vectors or floats
    larger(u, v), smaller(u, v)    lane by lane
    root(v)                its square root
    inverse(v)             1 / v
    nearest(v), floor(v)   whole numbers
    running(v)             the sum of the lanes up to each
    hsum(v), hmax(v)       the sum of the lanes, and the largest
    add_totals(sums, k, a, i, x)    sums[k : k + 4] += x times the sums of 4 vectors from a[i] on
    prefetch(a, i)         has a[i] brought near
    reaching(u, v)         a bit for every lane of u that is at most v's, as an integer
    weights(x, bits)       2^x or a little more in the lanes whose bit is 0, and 0 in the others
    logs(v)                log2 or a little less of positive numbers

Products are of numbers from -32,512 to 32,512, a high and a low byte each (`halves`), with bytes:

    store_halves(a, i, j, v)       writes whole v: high bytes from a[i] on, low ones from a[j] on
    none()                         sixteen sums, all 0
    add_products(sums, a, i, b, j) adds the sum of a[i + 4 l + k] b[j + k] over k < 4 in lane l
    add_each(sums, a, i, b, j)     the same of 64 bytes from b[j] on, four in a lane
    add_squares(sums, a, i, b, j)  adds the sums of x (x - 128), x being a[i + k] & b[j + k]
    no_fours(), add_fours(sums, a, i, b, j)    the same for b[j[r]], r < 4, at once
    joined(high, low)              256 high + low, as floats
    isum(sums)                     the sum of the lanes, an integer

And of `ROWS` rows of bytes at once with 32 columns of such numbers, of which b holds the high bytes
of the first 16, then of the others, then their low bytes, by four:

    no_sums()                      sums of their products, all 0
    add_rows(sums, a, i, b, j)     adds those of a[i[r] : i[r] + 4], without a sign, for r < ROWS
    add_sums(z, k, step, sums)     adds them to z[k + step r : k + step r + 32], float64
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from scoremachine.engines.vectors import (
    Vector,
    broadcasts,
    each,
    llvm,
    loads,
    pointer,
    splats,
    splatted,
    stores,
    totals,
)

BORROWED: dict[str, Any] = {
    "nogil": True,
    "_nrt": False,
    "error_model": "numpy",
}  # counts no references to arrays
LANES = 16
ROWS = 4
WHOLE = 32_512  # the largest number of two bytes that each have a sign
MOST = 60_000  # bytes up to which their products can be added up

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
root = each(floats, "sqrt")
nearest = each(floats, "rint")
floor = each(floats, "floor")
integers = Vector(types.int32, LANES)


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
def hmax(typing: Any, v: Any) -> Any:
    """The largest lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v, width = args[0], LANES
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(
                    v, v, ir.Constant(ir.VectorType(ir.IntType(32), width), some)
                )
                for some in (list(range(width)), list(range(width, 2 * width)))
            )
            v = builder.select(builder.fcmp_ordered(">", low, high), low, high)
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return types.float32(floats), generate


@intrinsic
def inverse(typing: Any, v: Any) -> Any:
    """1 / v, lane by lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(ir.Constant(VECTOR, [1.0] * LANES), args[0])

    return floats(floats), generate


@intrinsic
def running(typing: Any, v: Any) -> Any:
    """Of every lane the sum of those up to it, itself counted."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, step = args[0], 1
        zeros = ir.Constant(VECTOR, [0.0] * LANES)
        while step < LANES:
            places = [LANES] * step + list(range(LANES - step))
            mask = ir.Constant(INTEGERS, places)
            total = builder.fadd(total, builder.shuffle_vector(total, zeros, mask))
            step *= 2
        return total

    return floats(floats), generate


@register_jitable
def by_fours(n):
    """n, or the next multiple of four."""
    return (n + 3) // 4 * 4


def halves(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low bytes of whole numbers up to `WHOLE`: n = 256 high + low, int8."""
    high = np.floor((n + 128) / 256)
    return high.astype(np.int8), (n - 256 * high).astype(np.int8)


def _words(context: Any, builder: Any, array_type: Any, array: Any, i: Any, kind: Any) -> Any:
    """Bytes of an array from array[i] on, four to a word."""
    return builder.load(pointer(context, builder, array_type, array, i, kind), align=1)


@intrinsic
def load_every(typing: Any, array: Any, i: Any, k: Any) -> Any:
    """Every fourth of 64 bytes from array[i] on, the k-th and so on, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = _words(context, builder, signature.args[0], *args[:2], INTEGERS)
        bits = builder.trunc(builder.shl(args[2], ir.Constant(ir.IntType(64), 3)), ir.IntType(32))
        byte = builder.and_(
            builder.lshr(words, splatted(builder, integers, bits)),
            ir.Constant(INTEGERS, [255] * LANES),
        )
        return builder.sitofp(byte, VECTOR)

    return floats(array, types.intp, types.intp), generate


@intrinsic
def none(typing: Any) -> Any:
    """Sixteen sums of products that are 0."""
    return integers(), lambda *_: ir.Constant(INTEGERS, [0] * LANES)


@intrinsic
def store_halves(typing: Any, array: Any, i: Any, j: Any, v: Any) -> Any:
    """Writes whole numbers of at most 32,512: v = 256 array[i :] + array[j :], of int8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(n: int) -> Any:
            return ir.Constant(INTEGERS, [n] * LANES)

        v = builder.fptosi(args[3], INTEGERS)
        high = builder.ashr(builder.add(v, constant(128)), constant(8))
        low = builder.sub(v, builder.shl(high, constant(8)))
        bytes_ = ir.VectorType(ir.IntType(8), LANES)
        for half, at in ((high, args[1]), (low, args[2])):
            place = pointer(context, builder, signature.args[0], args[0], at, bytes_)
            builder.store(builder.trunc(half, bytes_), place).align = 1
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, floats), generate


def _multiplied(context: Any, builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Adds the products of 64 bytes, a's without and b's with a sign, four to a lane."""
    if "+avx512vnni" not in context.codegen().magic_tuple()[2].split(","):
        return _added(builder, sums, a, b)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(INTEGERS, [INTEGERS] * 3),
        "llvm.x86.avx512.vpdpbusd.512",
    )
    return builder.call(function, [sums, a, b])


def _added(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """`_multiplied` for any machine: in pairs of 16 bits, which most multiply and add at once."""
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    wide = ir.VectorType(ir.IntType(32), 2 * LANES)
    low = ir.Constant(INTEGERS, [0x00FF00FF] * LANES)
    for first in range(2):
        shifted = builder.lshr(a, ir.Constant(INTEGERS, [8 * first] * LANES))
        x = builder.zext(builder.bitcast(builder.and_(shifted, low), halves), wide)
        # two of every four bytes of b, each with its sign
        up = builder.bitcast(builder.shl(b, ir.Constant(INTEGERS, [8 - 8 * first] * LANES)), halves)
        y = builder.sext(builder.ashr(up, ir.Constant(halves, [8] * 2 * LANES)), wide)
        product = builder.mul(x, y)
        for pick in range(2):
            mask = ir.Constant(INTEGERS, list(range(pick, 2 * LANES, 2)))
            sums = builder.add(sums, builder.shuffle_vector(product, product, mask))
    return sums


def _adds(second: Any, change: Callable[[Any, Any, Any], Any]) -> Any:
    """Makes a function add(sums, a, i, b, j): products of bytes from a[i] on, and from b[j] on.

    The latter are of the LLVM type `second`; what is multiplied is change(builder, these, those).
    """

    @intrinsic
    def add(typing: Any, sums: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            u = _words(context, builder, signature.args[1], *args[1:3], INTEGERS)
            v = _words(context, builder, signature.args[3], *args[3:], second)
            return _multiplied(context, builder, args[0], *change(builder, u, v))

        return integers(integers, a, types.intp, b, types.intp), generate

    return add


def _within(builder: Any, u: Any, v: Any) -> tuple[Any, Any]:
    """x and x - 128, for the bytes x of u & v."""
    x = builder.and_(u, v)
    return x, builder.xor(x, ir.Constant(INTEGERS, [0x80808080] * LANES))


add_products = _adds(ir.IntType(32), lambda builder, u, v: (u, splatted(builder, integers, v)))
add_each = _adds(INTEGERS, lambda builder, u, v: (u, v))
add_squares = _adds(INTEGERS, _within)
_SUM = llvm(integers, "vector.reduce.add", ir.IntType(32), INTEGERS)


@intrinsic
def isum(typing: Any, sums: Any) -> Any:
    """The sum of the lanes, an integer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_SUM(builder, args, ()), ir.IntType(64))

    return types.int64(integers), generate


@intrinsic
def joined(typing: Any, high: Any, low: Any) -> Any:
    """256 high + low, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scaled = builder.shl(args[0], ir.Constant(INTEGERS, [8] * LANES))
        return builder.sitofp(builder.add(scaled, args[1]), VECTOR)

    return floats(integers, integers), generate


_FOURS = types.UniTuple(integers, 4)
_SUMS = types.UniTuple(integers, 4 * ROWS)


def _zeros(kind: Any) -> Any:
    """Makes a function that returns sums of products that are 0."""

    @intrinsic
    def zeros(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.make_tuple(
                builder, kind, [ir.Constant(INTEGERS, [0] * LANES)] * len(kind)
            )

        return kind(), generate

    return zeros


no_fours, no_sums = _zeros(_FOURS), _zeros(_SUMS)


@intrinsic
def add_fours(typing: Any, sums: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Adds the products of 64 bytes from a[i] on with four bytes from b[j[r]] on, r < 4."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, places = (cgutils.unpack_tuple(builder, args[k]) for k in (0, 4))
        u = _words(context, builder, a, *args[1:3], INTEGERS)
        for r, place in enumerate(places):
            v = _words(context, builder, b, args[3], place, ir.IntType(32))
            sums[r] = _multiplied(context, builder, sums[r], u, splatted(builder, integers, v))
        return context.make_tuple(builder, _FOURS, sums)

    return _FOURS(_FOURS, a, types.intp, b, types.UniTuple(types.int64, 4)), generate


@intrinsic
def add_rows(typing: Any, sums: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Adds the products of four bytes of each row, from a[i[r]] on, with 32 columns at b[j]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, places = (cgutils.unpack_tuple(builder, args[k]) for k in (0, 2))
        word = ir.IntType(32)
        rows = [
            splatted(builder, integers, _words(context, builder, a, args[1], place, word))
            for place in places
        ]
        column = pointer(context, builder, b, args[3], args[4], INTEGERS)
        for k in range(4):
            v = builder.load(builder.gep(column, [ir.Constant(ir.IntType(64), k)]), align=1)
            for r, row in enumerate(rows):
                n = 4 * r + k
                sums[n] = _multiplied(context, builder, sums[n], row, v)
        return context.make_tuple(builder, _SUMS, sums)

    return _SUMS(_SUMS, a, types.UniTuple(types.int64, ROWS), b, types.intp), generate


@intrinsic
def add_sums(typing: Any, z: Any, k: Any, step: Any, sums: Any) -> Any:
    """Adds the sums of row r to the 32 numbers from z[k + step r] on, in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, doubles = (ir.VectorType(kind, LANES) for kind in (ir.IntType(64), ir.DoubleType()))
        sums, at = cgutils.unpack_tuple(builder, args[3]), args[1]
        for r in range(ROWS):
            for v in range(2):
                high, low = (builder.sext(sums[4 * r + n + v], wide) for n in (0, 2))
                scaled = builder.shl(high, ir.Constant(wide, [8] * LANES))
                total = builder.sitofp(builder.add(scaled, low), doubles)
                into = pointer(context, builder, signature.args[0], args[0], at, doubles)
                into = builder.gep(into, [ir.Constant(ir.IntType(64), v)])
                total = builder.fadd(builder.load(into, align=8), total)
                builder.store(total, into, align=8)
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(z, types.intp, types.intp, _SUMS), generate


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
def _bits(typing: Any, v: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.bitcast(args[0], INTEGERS), VECTOR)

    return floats(floats), generate


@njit(inline="always")
def logs(v):
    """A lower bound of log2 of positive numbers, at most 0.09 below: the inverse of `weights`."""
    return (_bits(v) - types.float32(1065353216.0)) * types.float32(1 / 8388608)


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
