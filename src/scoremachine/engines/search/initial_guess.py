"""The initial guess of a search, compiled: a patch near every query, before the range search.

The nearest patch known determines the radius of the search. So some nodes are searched first. Since
adjacent windows share most of their pixels, a patch near one of them, shifted by the same offset,
is mostly near the other, so a good match spreads to its neighbours (PatchMatch: Barnes, Shechtman,
Finkelstein and Goldman 2009).
"""

from __future__ import annotations

import math

import numpy as np
from numba import float32

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.distances import decode, distance, to_boxes
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    broadcast,
    load,
    lowest,
    reaching,
    splat,
    store,
)
from scoremachine.engines.search.patches import origin
from scoremachine.engines.search.tree import LEAF, NODE

NODES = 64  # nodes that are searched for a query
COMPARED, NEAR = 2_000, 2.0  # the most patches compared, and within how many nats of the nearest
ENOUGH = 200.0  # total weight, relative to the nearest patch, at which the guess is good enough
FURTHEST = 2  # the largest offset, in pixels, of windows that propagate their matches


@njit(fastmath=FLAGS, **BORROWED)
def _nearest(values, count, chosen, most):
    """Fills `chosen` with the places of the `most` smallest of `count` values; returns how many."""
    n = 0
    for k in range(count):
        if n == most and values[k] >= values[chosen[n - 1]]:
            continue
        n = min(n + 1, most)
        at = n - 1
        while at > 0 and values[chosen[at - 1]] > values[k]:
            chosen[at] = chosen[at - 1]
            at -= 1
        chosen[at] = k
    return n


@njit(fastmath=FLAGS, nogil=True, cache=True)
def initial_guess(part, parts, t, w, q, best, known, places):
    """Searches the nearest nodes for near patches.

    Fills `best` with the smallest |q - s|^2 found, `places` with the place of that patch, and
    `known` with the total weight of the compared patches, relative to that of the nearest.
    """
    Q, values = len(q.half), np.empty(max(len(t.widest), NODES * LANES) + LANES, np.float32)
    codes = np.empty(t.m * LANES, np.float32)
    near, found = np.empty(NODES, np.int64), np.empty(NODES, np.int64)
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        best[query], known[query], places[query] = _guess(
            t, w, q, query, values, codes, near, found
        )


@njit(fastmath=FLAGS, inline="always")
def _to_codes(t, q, query, node, leaf, codes):
    """The squared distances of a query to the codes of a leaf, in all kept components."""
    decode(t, node, leaf, 0, t.m, codes)
    total = splat(float32(0))
    for j in range(t.m):
        if t.m > t.first and j == t.first - 1:  # the norm of the components that follow
            continue
        x = broadcast(q.E, query * t.m + j) - t.frames[node * 2 * t.m + j]
        d = x - load(codes, j * LANES)
        total = total + d * d
    return total


@njit(fastmath=FLAGS, **BORROWED)
def _guess(t, w, q, query, values, codes, near, found):
    supers, nodes = len(t.widest), len(t.radii)
    e = query * t.m
    box = 2 * t.first * LANES
    for g in range((supers + LANES - 1) // LANES):
        store(values, g * LANES, to_boxes(q.E, e, t.super_boxes, g * box, t.first))
    some = _nearest(values, supers, near, NODES)
    for k in range(some):
        store(values, k * LANES, to_boxes(q.E, e, t.node_boxes, near[k] * box, t.first))
    n = _nearest(values, some * LANES, found, NODES)
    for k in range(n):
        found[k] = near[found[k] // LANES] * LANES + found[k] % LANES
    # only patches whose codes are about as near as the nearest so far are compared
    best, bound, place = np.inf, np.float32(np.inf), np.int64(0)
    known, compared = 0.0, 0
    half = q.half[query]
    for k in range(n):
        node = found[k]
        if node >= nodes or compared > COMPARED or known > ENOUGH:
            continue
        for leaf in range(LEAF):
            d = _to_codes(t, q, query, node, leaf, codes)
            bits = reaching(d, splat(bound))
            store(values, 0, d)
            while bits:
                lane = lowest(bits)
                bits &= bits - 1
                o = node * NODE + leaf * LEAF + lane
                if t.times[o] > 0 and values[lane] <= bound:
                    d2 = distance(w, q, query, origin(w, np.int64(t.ids[o])))
                    compared += 1
                    if d2 < best:
                        known *= math.exp((d2 - best) * half)
                        best, place = d2, np.int64(t.ids[o])
                    known += t.times[o] * math.exp((best - d2) * half)
                    bound = min(bound, values[lane] + np.float32(NEAR / half))
    return best, known, place


@njit(fastmath=FLAGS, nogil=True, cache=True)
def propagate(part, parts, w, q, columns, best, places, nearer, there):
    """Compares a window with the nearest patches of adjacent windows, shifted by their offset.

    Fills `nearer` and `there` as `initial_guess` fills `best` and `places`. The queries are a grid
    with `columns` columns.
    """
    Q = len(best)
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        nearer[query], there[query] = _propagate(w, q, query, columns, best, places)


@njit(fastmath=FLAGS, **BORROWED)
def _propagate(w, q, query, columns, best, places):
    """`propagate` for one query."""
    nearest, place = best[query], places[query]
    rows, i, j = len(best) // columns, query // columns, query % columns
    for k in range(max(i - FURTHEST, 0), min(i + FURTHEST + 1, rows)):
        for l in range(max(j - FURTHEST, 0), min(j + FURTHEST + 1, columns)):
            p = places[k * columns + l]
            row, column = p // w.lefts[1] % w.tops[1] + i - k, p % w.lefts[1] + j - l
            if 0 <= row < w.tops[1] and 0 <= column < w.lefts[1]:
                p += (i - k) * w.lefts[1] + j - l
                if p != place:
                    d2 = distance(w, q, query, origin(w, p))
                    if d2 < nearest:
                        nearest, place = d2, p
    return nearest, place
