"""SIMD vectors for compiled code: a numba type of several numbers, and plain arithmetic.

LLVM lowers a vector to the instructions of the processor (AVX-512, AVX2, NEON). `simd` defines
vectors of eight doubles with this module, `search.floats` of sixteen floats:

    u + v, u - v, u * v    with vectors of the same type, or numbers
    loads(...)             makes a function load(a, i): a[i : i + lanes], from a flat array
    stores(...)            makes store(a, i, v)
    splats(...)            makes splat(x): the vector whose lanes all hold x
    broadcasts(...)        makes broadcast(a, i): the vector of a[i]
    each(...)              makes a function that applies an LLVM intrinsic lane by lane
    totals(...)            makes hsum(v): the sum of the lanes
    maxima(...)            makes hmax(v): the largest lane
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

FLAGS = ("contract", "reassoc", "nsz", "arcp")
NUMBERS: dict[Any, tuple[ir.Type, str]] = {  # type of a lane: its LLVM type, and LLVM's suffix
    types.float64: (ir.DoubleType(), "f64"),
    types.float32: (ir.FloatType(), "f32"),
    types.int32: (ir.IntType(32), "i32"),
}


class Vector(types.Type):
    """The numba type of `lanes` numbers of type `scalar`: float32, float64 or int32."""

    def __init__(self, scalar: Any, lanes: int) -> None:
        self.scalar, self.lanes = scalar, lanes
        super().__init__(name=f"Vector({scalar}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        """The type in LLVM."""
        return ir.VectorType(NUMBERS[self.scalar][0], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def pointer(context: Any, builder: Any, array_type: Any, array: Any, i: Any, vector: Any) -> Any:
    """The address of array[i], as a pointer to an LLVM vector."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), vector.as_pointer())


def loads(
    vector: Vector,
    align: int,
    stored: Any = None,
    convert: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Makes a function that loads a vector; `stored` is its LLVM type in memory if it differs."""

    @intrinsic
    def load(typing: Any, array: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = vector.llvm if stored is None else stored
            v = builder.load(pointer(context, builder, signature.args[0], *args, kind))
            v.align = align
            return v if convert is None else convert(builder, v)

        return vector(array, types.intp), generate

    return load


def stores(vector: Vector, align: int) -> Any:
    """Makes a function that stores a vector."""

    @intrinsic
    def store(typing: Any, array: Any, i: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = pointer(context, builder, signature.args[0], args[0], args[1], vector.llvm)
            builder.store(args[2], place).align = align
            return context.get_dummy_value()

        return types.none(array, types.intp, vector), generate

    return store


def splatted(builder: Any, vector: Vector, x: Any) -> Any:
    """The LLVM vector whose lanes all hold x."""
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def splats(vector: Vector) -> Any:
    """Makes a function that fills all lanes with a number."""

    @intrinsic
    def splat(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return splatted(builder, vector, args[0])

        return vector(vector.scalar), generate

    return splat


def broadcasts(vector: Vector) -> Any:
    """Makes a function that fills all lanes with one element of an array."""

    @intrinsic
    def broadcast(typing: Any, array: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, args[0]).data
            return splatted(builder, vector, builder.load(builder.gep(data, [args[1]])))

        return vector(array, types.intp), generate

    return broadcast


@intrinsic
def _like(typing: Any, u: Any, x: Any) -> Any:
    """The vector of u's type whose lanes all hold x."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splatted(builder, signature.args[0], args[1])

    return u(u, u.scalar), generate


def _overload(op: Callable[..., Any], name: str) -> None:
    @intrinsic
    def operation(typing: Any, u: Any, v: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args, flags=FLAGS)

        return u(u, u), generate

    @overload(op, inline="always")
    def choose(u, v):
        if isinstance(u, Vector) and isinstance(v, Vector):
            return lambda u, v: operation(u, v)
        if isinstance(u, Vector):
            return lambda u, v: operation(u, _like(u, v))
        if isinstance(v, Vector):
            return lambda u, v: operation(_like(v, u), v)
        return None


_overload(operator.add, "fadd")
_overload(operator.sub, "fsub")
_overload(operator.mul, "fmul")


def llvm(
    vector: Vector, name: str, result: Any, *arguments: Any, start: tuple[Any, ...] = ()
) -> Any:
    """The LLVM intrinsic llvm.NAME on vectors, as (builder, args, fastmath) -> value."""
    number = NUMBERS[vector.scalar][1]

    def call(builder: Any, args: Any, fastmath: tuple[str, ...]) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(result, arguments),
            f"llvm.{name}.v{vector.lanes}{number}",
        )
        return builder.call(function, [*start, *args], fastmath=fastmath)

    return call


def each(vector: Vector, name: str) -> Any:
    """Makes a function that applies the LLVM intrinsic llvm.NAME lane by lane."""
    call = llvm(vector, name, vector.llvm, vector.llvm)

    @intrinsic
    def function(typing: Any, v: Any) -> Any:
        return vector(vector), lambda context, builder, _, args: call(builder, args, ())

    return function


def maxima(vector: Vector, fastmath: tuple[str, ...] = ()) -> Any:
    """Makes a function that finds the largest lane."""
    most = llvm(vector, "vector.reduce.fmax", vector.llvm.element, vector.llvm)

    @intrinsic
    def hmax(typing: Any, v: Any) -> Any:
        return vector.scalar(vector), lambda context, builder, _, args: most(
            builder, args, fastmath
        )

    return hmax


def totals(vector: Vector) -> Any:
    """Makes a function that adds the lanes up."""
    number = vector.llvm.element
    start = (ir.Constant(number, 0.0),)
    add = llvm(vector, "vector.reduce.fadd", number, number, vector.llvm, start=start)

    @intrinsic
    def hsum(typing: Any, v: Any) -> Any:
        return vector.scalar(vector), lambda context, builder, _, args: add(
            builder, args, ("reassoc",)
        )

    return hsum
