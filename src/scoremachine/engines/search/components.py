"""Components of patches, compiled: see `embedding`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    MOST,
    ROWS,
    add_rows,
    add_sums,
    no_sums,
)
from scoremachine.engines.search.patches import bring, origin, rows_of


class Sizes(NamedTuple):
    """What the numbers of e are.

    Attributes:
        computed, kept, leading: Components.
        first: How many numbers bound a distance by themselves.
        edges: Where groups of trailing components begin and end, int64.
    """

    computed: int
    kept: int
    leading: int
    first: int
    edges: np.ndarray


class Columns(NamedTuple):
    """V and, behind it, the mean, for products with bytes of images.

    Attributes:
        bytes: By 32 columns what `floats.add_rows` reads for every four bytes of the rows of a
            patch, int8 flat.
        units: What 1 is in each column, float64.
        offsets: What is taken off a product, float64.
        square: |mean|^2 in the units of bytes, as the product with the mean is.
    """

    bytes: np.ndarray
    units: np.ndarray
    offsets: np.ndarray
    square: float


@njit(fastmath=FLAGS, cache=True, **BORROWED)
def products(part, parts, s, V, z):
    """Adds the components s V of patches s to z."""
    n, D = s.shape
    for k in range(part * n // parts, (part + 1) * n // parts):
        for d in range(D):
            x = s[k, d]
            for j in range(V.shape[1]):
                z[k, j] += x * V[d, j]


@njit(fastmath=FLAGS, **BORROWED)
def _numbers(z, o, square, sizes, E, k):
    """Row k of E from the components z[o:] of a patch and its |s|^2."""
    at = sizes.leading
    for j in range(sizes.leading):
        E[k, j] = z[o + j]
    for g in range(len(sizes.edges) - 1):
        lo, hi = sizes.edges[g], sizes.edges[g + 1]
        total = 0.0
        if hi <= sizes.computed:
            for j in range(lo, hi):
                total += z[o + j] ** 2
        else:  # what the others leave, by Pythagoras
            total = square
            for j in range(lo):
                total -= z[o + j] ** 2
        E[k, at] = np.sqrt(max(total, 0.0))
        at += 1
    if sizes.kept > sizes.leading:
        total = 0.0
        for j in range(sizes.leading, sizes.kept):
            total += z[o + j] ** 2
            E[k, sizes.first + j - sizes.leading] = z[o + j]
        E[k, sizes.first - 1] = np.sqrt(total)


@njit(fastmath=FLAGS, cache=True, **BORROWED)
def numbers(part, parts, z, squares, sizes, E):
    """The numbers of e from the components z of patches, and their |s|^2."""
    n = len(squares)
    for k in range(part * n // parts, (part + 1) * n // parts):
        _numbers(z, k * sizes.computed, squares[k], sizes, E, k)


@njit(fastmath=FLAGS, inline="always")
def origins(w, places, k, stop):
    """Where the patches at places[k] and the next begin: as many as `ROWS`, the last again."""
    return (
        origin(w, np.int64(places[k])),
        origin(w, np.int64(places[min(k + 1, stop - 1)])),
        origin(w, np.int64(places[min(k + 2, stop - 1)])),
        origin(w, np.int64(places[min(k + 3, stop - 1)])),
    )


@njit(fastmath=FLAGS, inline="always")
def components(w, starts, columns, some, z):
    """Fills z (rows, columns), flat, with `some` components of the patches that begin there."""
    (line, row), count, at = rows_of(w), len(columns.units), 0
    z[:] = 0
    for lo in range(0, some, 2 * LANES):
        sums, words = no_sums(), 0
        for a in range(w.size[0]):
            for b in range(0, row, 4):
                o = a * line + b
                where = starts[0] + o, starts[1] + o, starts[2] + o, starts[3] + o
                sums = add_rows(sums, w.flat, where, columns.bytes, at)
                at, words = at + 4 * 4 * LANES, words + 1
                if words == MOST // 4:  # no more can be added up
                    add_sums(z, lo, count, sums)
                    sums, words = no_sums(), 0
        add_sums(z, lo, count, sums)
    for r in range(ROWS):
        for j in range(some):
            z[r * count + j] = z[r * count + j] * columns.units[j] - columns.offsets[j]


@njit(fastmath=FLAGS, **BORROWED)
def _square(w, start):
    """The sum of the squares of the bytes of a patch."""
    total, (line, row) = 0, rows_of(w)
    for a in range(w.size[0]):
        for b in range(start + a * line, start + a * line + row):
            x = np.int32(w.flat[b])
            total += x * x
    return total


@njit(fastmath=FLAGS, **BORROWED)
def _embedded(part, parts, w, places, columns, sizes, z, E, squares):
    """What `embedded` does once there is room."""
    n, count, mean = len(places), len(columns.units), sizes.computed
    stop = (part + 1) * n // parts
    for k in range(part * n // parts, stop, ROWS):
        starts = origins(w, places, k, stop)
        for later in range(k + ROWS, min(k + 2 * ROWS, stop)):
            bring(w, origin(w, np.int64(places[later])))
        components(w, starts, columns, mean + 1, z)
        for r in range(min(ROWS, stop - k)):
            square = _square(w, starts[r]) + columns.square - 2 * z[r * count + mean]
            squares[k + r] = square / 127.5**2
            _numbers(z, r * count, squares[k + r], sizes, E, k + r)


@njit(nogil=True, cache=True)
def embedded(part, parts, w, places, columns, sizes, E, squares):
    """The numbers of e of the patches at `places`, (n, m), and their |s - mean|^2, (n)."""
    z = np.empty(ROWS * len(columns.units))
    _embedded(part, parts, w, places, columns, sizes, z, E, squares)
