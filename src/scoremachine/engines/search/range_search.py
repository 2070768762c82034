"""The range search of an index, compiled: patches within some distance enter the fold.

Boxes and codes bound the distance of a patch from below by that of its embedding. Patches further
from the query than the radius are skipped, and an upper bound of their weight is added to the
omitted mass; the others are compared exactly, from the bytes of the images.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS, NOTHING, keep
from scoremachine.engines.search.distances import LOG2E, decode, distance, to_boxes
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    broadcast,
    by_fours,
    load,
    load_bytes,
    load_counts,
    lowest,
    prefetch,
    reaching,
    splat,
    store,
    weights,
)
from scoremachine.engines.search.patches import centre_of, origin, prefetch_patch
from scoremachine.engines.search.tree import LEAF, NODE

SLACK = 1e-6  # relative rounding error of a squared distance in float32, per 8 coordinates
BATCH = 64  # the least number of patches that are compared together, to hide memory latency
COSTS = np.array([40.0, 16.0, 25.0, 40.0])  # ns of a node, a leaf, a second bound, a comparison
# Columns of `Workspace.bounds_of`: the bound of a query is SCALE norms + START - TWICE products;
# SECOND takes the place of START where all kept components are known.
SCALE, TWICE, START, SECOND, LIMIT = range(5)


class Workspace(NamedTuple):
    """The workspace of a thread, for A queries."""

    boxes: np.ndarray  # of the leaves of a node, relative to its origin (low and high, first, 16)
    codes: np.ndarray  # of the patches of a leaf, relative to it (m, 16)
    rows: np.ndarray  # of the queries, relative to it (A, m)
    bounds_of: np.ndarray  # factors that turn products into bounds, see the columns above (A, 5)
    in_leaves: np.ndarray  # queries that reach each leaf, padded to fours (leaves, A + 3)
    numbers: np.ndarray  # how many do (leaves)
    close: np.ndarray  # queries within reach of some patch of a leaf (A + 4)
    reached: np.ndarray  # a bit mask of these patches for each such query (A + 4)
    products: np.ndarray  # inner products of first coordinates, patches with queries (A + 4, 16)
    waiting: np.ndarray  # how many patches are to be compared (1)
    places: np.ndarray  # their positions in the tree
    starts: np.ndarray  # the offsets of their first bytes in the images
    owners: np.ndarray  # their queries


@njit
def _workspace(t, A):
    return Workspace(
        np.empty(2 * t.first * LANES, np.float32),
        np.empty(t.m * LANES, np.float32),
        np.empty(A * t.m, np.float32),
        np.empty((A, 5), np.float32),
        np.empty((LEAF, A + 3), np.uint32),
        np.empty(LEAF, np.int64),
        np.empty(A + 4, np.uint32),
        np.empty(A + 4, np.uint32),
        np.empty((A + 4) * LANES, np.float32),
        np.zeros(1, np.int64),
        np.empty(BATCH + A * LEAF, np.int64),
        np.empty(BATCH + A * LEAF, np.int64),
        np.empty(BATCH + A * LEAF, np.int64),
    )


@njit(fastmath=FLAGS, inline="always")
def _decode_boxes(t, node, work):
    """Decodes the boxes of a node's leaves, relative to the node's origin."""
    o = node * 2 * t.first * LEAF
    for side in range(2):
        for j in range(t.first):
            k = (side * t.first + j) * LANES
            store(work.boxes, k, load_bytes(t.boxes, o + k) * t.frames[(node * 2 + 1) * t.m + j])


@njit(fastmath=FLAGS, inline="always")
def _shrunk(limit, radius, m):
    """(a, b) such that (sqrt(x) - radius)^2 >= a x - b for x >= 0, tight where that is `limit`.

    By 2 radius sqrt(x) <= c x + radius^2 / c for any c. Allows for rounding of x in float32.
    """
    c = min(0.5, radius / (math.sqrt(max(limit, 0.0)) + radius + 1e-30))
    slack = 1 - SLACK * (m / 8 + 1)
    if c <= 1e-9:
        return slack, 0.0
    return (1 - c) * slack, radius * radius * (1 / c - 1)


@njit(fastmath=FLAGS, inline="always")
def _bound(x, a, b):
    return x * float32(a) - float32(b)


@njit(fastmath=FLAGS, inline="always")
def _absorb(w, q, query, start, times, reach, best, ref, omitted, m, Z, Z2, S, logits, places):
    """Adds a patch to the fold of a query, with the logit -|q - s|^2 / (2 sigma^2)."""
    d2 = distance(w, q, query, start)
    half = q.half[query]
    if q.fixed:
        if d2 > best[query] + reach[query]:
            return
    elif d2 < best[query]:
        best[query] = d2
        if (ref[query] - d2) * half > 20:  # keep skipped weights in float32's range
            scale = float32(math.exp((d2 - ref[query]) * half))
            store(omitted, query * LANES, load(omitted, query * LANES) * scale)
            ref[query] = d2
    l = -d2 * half
    if l > m[query]:
        scale = math.exp(m[query] - l) if m[query] > NOTHING else 0.0
        Z[query] *= scale
        Z2[query] *= scale * scale
        for c in range(S.shape[1]):
            S[query, c] *= scale
        m[query] = l
    x = math.exp(l - m[query])
    Z[query] += times * x
    Z2[query] += times * x * x
    middle = centre_of(w, start)
    o = middle * w.shape[2]
    for c in range(S.shape[1]):
        S[query, c] += times * x * (w.flat[o + c] * (1.0 / 127.5) - 1.0)
    if len(logits) > 0 and l > logits[-1, query, 0]:
        keep(l, middle, logits, places, query, 0)


@njit(fastmath=FLAGS, **BORROWED)
def _compare(t, w, q, work, patch_reach, best, ref, omitted, m, Z, Z2, S, logits, places):
    """Compares the waiting patches."""
    for k in range(work.waiting[0]):
        work.starts[k] = origin(w, int64(t.ids[work.places[k]]))
        prefetch_patch(w, work.starts[k])
    for k in range(work.waiting[0]):
        _absorb(
            w, q, work.owners[k], work.starts[k], t.times[work.places[k]], patch_reach,
            best, ref, omitted, m, Z, Z2, S, logits, places,
        )  # fmt: skip
    work.waiting[0] = 0


@njit(fastmath=FLAGS, inline="always")
def _skipped(lower, bits, ref, half):
    """An upper bound of weights from lower bounds of squared distances; 0 if a lane's bit is 1."""
    x = (splat(float32(ref * (1 + SLACK))) - lower) * float32(half * LOG2E)
    return weights(x, bits)


@njit(fastmath=FLAGS, **BORROWED)
def _narrow(
    boxes, counts, g, t, q, active, count, reach, radius,
    best, ref, omitted, cost, most, who, numbers,
):  # fmt: skip
    """Finds which of the queries active[:count] reach each of sixteen boxes.

    Fills who[box, : numbers[box]]. Queries that have cost more than `most` are left out. The boxes
    are the g-th sixteen, and `counts` has the number of patches in each.
    """
    for box in range(LANES):
        numbers[box] = 0
    held = load(counts, g * LANES)
    real = ~reaching(held, splat(float32(0)))
    for k in range(count):
        query = int64(active[k])
        if cost[query] > most:
            continue
        half = q.half[query]
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, radius + q.fuzz[query], t.first)
        o = g * 2 * t.first * LANES
        e = query * t.m
        d = _bound(to_boxes(q.E, e, boxes, o, t.first), a, b - tail)
        near = reaching(d, splat(float32(limit * (1 + SLACK)))) & real
        v = load(omitted, query * LANES) + _skipped(d, near, ref[query], half) * held
        store(omitted, query * LANES, v)
        while near:
            box = lowest(near)
            near &= near - 1
            who[box, numbers[box]] = query
            numbers[box] += 1


@njit(fastmath=FLAGS, **BORROWED)
def _node(
    t, w, q, node, active, count, reach, patch_reach, pace, work,
    best, ref, omitted, m, Z, Z2, S, logits, places, cost,
):  # fmt: skip
    """Compares the queries active[:count] with the patches of a node.

    A squared distance from codes c is |x|^2 + |c|^2 - 2 x c, where x is the query, and both are
    relative to the origin of the node. Adds the cost of each query to `cost`, and returns the sum.
    """
    _decode_boxes(t, node, work)
    exact = 1 - SLACK * (t.m / 8 + 1)
    counts = load(t.leaf_counts, node * LEAF)
    for leaf in range(LEAF):
        work.numbers[leaf] = 0
    spent = 0.0
    for k in range(count):
        query, of, o = int64(active[k]), work.bounds_of[k], k * t.m
        half, tails = q.half[query], q.tails[query]
        first, others = float32(0), float32(0)
        for j in range(t.m):
            x = q.E[query * t.m + j] - t.frames[node * 2 * t.m + j]
            work.rows[o + j] = x
            if j < t.first:
                first += x * x
            else:
                others += x * x
        limit = best[query] + reach[query]
        a, b = _shrunk(limit - tails[0], t.radii[node] + q.fuzz[query], t.m)
        d = _bound(to_boxes(work.rows, o, work.boxes, 0, t.first), a, b - tails[0])
        leaves = reaching(d, splat(float32(limit * (1 + SLACK))))
        total = load(omitted, query * LANES) + _skipped(d, leaves, ref[query], half) * counts
        store(omitted, query * LANES, total)
        of[SCALE], of[TWICE] = a * exact, 2 * a
        of[START] = of[SCALE] * first - (b - tails[0])
        if t.first < t.m:  # the other components replace their norm
            norm = work.rows[o + t.first - 1]
            of[SECOND] = of[SCALE] * (first - norm * norm + others) - (b - tails[1])
        of[LIMIT] = (best[query] + patch_reach[query]) * (1 + SLACK)
        price = pace[0]
        while leaves:
            leaf = lowest(leaves)
            leaves &= leaves - 1
            work.in_leaves[leaf, work.numbers[leaf]] = k
            work.numbers[leaf] += 1
            price += pace[1]
        cost[query] += price
        spent += price
    for leaf in range(LEAF):
        if work.numbers[leaf] > 0:
            spent += _leaf(t, q, node, leaf, active, pace, work, ref, omitted, cost)
        if work.waiting[0] >= BATCH:
            _compare(t, w, q, work, patch_reach, best, ref, omitted, m, Z, Z2, S, logits, places)
    return spent


@njit(fastmath=FLAGS, inline="always")
def _products(t, work, lo, hi, who, i):
    """The inner products of the coordinates lo to hi of sixteen patches and four queries."""
    a, b = int64(who[i]) * t.m, int64(who[i + 1]) * t.m
    c, d = int64(who[i + 2]) * t.m, int64(who[i + 3]) * t.m
    x, y, u, v = splat(float32(0)), splat(float32(0)), splat(float32(0)), splat(float32(0))
    for j in range(lo, hi):
        s = load(work.codes, j * LANES)
        x, y = x + s * broadcast(work.rows, a + j), y + s * broadcast(work.rows, b + j)
        u, v = u + s * broadcast(work.rows, c + j), v + s * broadcast(work.rows, d + j)
    return x, y, u, v


@njit(fastmath=FLAGS, inline="always")
def _fill_up(who, n):
    """Pads the first n of `who` to a multiple of four; results of the padding are ignored."""
    for i in range(n, by_fours(n)):
        who[i] = 0


@njit(fastmath=FLAGS, inline="always")
def _screen(q, active, i, norms, products, copies, n, leaf, work, ref, omitted):
    """The first bound of the patches of a leaf, for the i-th query that reaches it.

    Records the patches within reach in `work.reached`; returns n, plus one if there are any.
    """
    if i >= work.numbers[leaf]:
        return n
    k = int64(work.in_leaves[leaf, i])
    of, query = work.bounds_of[k], int64(active[k])
    bound = norms * of[SCALE] + of[START] - products * of[TWICE]
    bits = reaching(bound, splat(of[LIMIT]))
    skipped = _skipped(bound, bits, ref[query], q.half[query]) * copies
    store(omitted, query * LANES, load(omitted, query * LANES) + skipped)
    work.close[n], work.reached[n] = k, bits
    store(work.products, n * LANES, products)
    return n + (bits != 0)


@njit(fastmath=FLAGS, inline="always")
def _leaf(t, q, node, leaf, active, pace, work, ref, omitted, cost):
    """Queues the patches of a leaf that are within reach of its queries for comparison."""
    norms = decode(t, node, leaf, 0, t.first, work.codes)
    copies = load_counts(t.times, node * NODE + leaf * LEAF)
    who, n = work.in_leaves[leaf], 0
    _fill_up(who, work.numbers[leaf])
    for i in range(0, work.numbers[leaf], 4):
        x, y, u, v = _products(t, work, 0, t.first, who, i)
        n = _screen(q, active, i, norms, x, copies, n, leaf, work, ref, omitted)
        n = _screen(q, active, i + 1, norms, y, copies, n, leaf, work, ref, omitted)
        n = _screen(q, active, i + 2, norms, u, copies, n, leaf, work, ref, omitted)
        n = _screen(q, active, i + 3, norms, v, copies, n, leaf, work, ref, omitted)
    price = 0.0
    if t.first < t.m and n > 0:
        price = pace[2]
        _refine(t, q, node, leaf, norms, active, n, copies, work, ref, omitted)
    spent = n * price
    for i in range(n):
        query, bits = int64(active[work.close[i]]), int64(work.reached[i])
        cost[query] += price
        while bits:
            o = node * NODE + leaf * LEAF + lowest(bits)
            bits &= bits - 1
            if t.times[o] > 0:
                cost[query] += pace[3]
                spent += pace[3]
                prefetch(t.ids, o)
                work.places[work.waiting[0]], work.owners[work.waiting[0]] = o, query
                work.waiting[0] += 1
    return spent


@njit(fastmath=FLAGS, inline="always")
def _refine(t, q, node, leaf, norms, active, n, copies, work, ref, omitted):
    """A second bound, from all kept components, for the patches of a leaf and n queries."""
    norm = load(work.codes, (t.first - 1) * LANES)
    norms = norms - norm * norm + decode(t, node, leaf, t.first, t.m, work.codes)
    _fill_up(work.close, n)
    for i in range(0, n, 4):
        x, y, u, v = _products(t, work, t.first, t.m, work.close, i)
        _reach(t, q, active, i, n, norms, norm, x, copies, work, ref, omitted)
        _reach(t, q, active, i + 1, n, norms, norm, y, copies, work, ref, omitted)
        _reach(t, q, active, i + 2, n, norms, norm, u, copies, work, ref, omitted)
        _reach(t, q, active, i + 3, n, norms, norm, v, copies, work, ref, omitted)


@njit(fastmath=FLAGS, inline="always")
def _reach(t, q, active, i, n, norms, norm, products, copies, work, ref, omitted):
    """`_refine` for the i-th query, from the products of the remaining components."""
    if i >= n:
        return
    k = int64(work.close[i])
    query, of, bits = int64(active[k]), work.bounds_of[k], int64(work.reached[i])
    products = products + load(work.products, i * LANES)
    products = products - norm * broadcast(work.rows, k * t.m + t.first - 1)
    bound = norms * of[SCALE] + of[SECOND] - products * of[TWICE]
    again = reaching(bound, splat(of[LIMIT]))
    skipped = _skipped(bound, again | ~bits, ref[query], q.half[query]) * copies
    store(omitted, query * LANES, load(omitted, query * LANES) + skipped)
    work.reached[i] = bits & again


@njit(fastmath=FLAGS, **BORROWED)
def _search_groups(
    start, parts, t, w, q, active, reach, patch_reach, pace, budget, most, work,
    in_supers, of_supers, in_nodes, of_nodes,
    best, ref, omitted, m, Z, Z2, S, logits, places, cost,
):  # fmt: skip
    """`range_search` with a workspace; returns whether it is complete."""
    nodes, supers = len(t.radii), len(t.widest)
    spent = 0.0
    for g in range(start, (supers + LANES - 1) // LANES, parts):
        radius = float32(0)
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            radius = max(radius, t.widest[s])
        _narrow(
            t.super_boxes, t.super_counts, g, t, q, active, len(active), reach, radius,
            best, ref, omitted, cost, most, in_supers, of_supers,
        )  # fmt: skip
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            if of_supers[s % LANES] == 0:
                continue
            _narrow(
                t.node_boxes, t.node_counts, s, t, q, in_supers[s % LANES], of_supers[s % LANES],
                reach, t.widest[s], best, ref, omitted, cost, most, in_nodes, of_nodes,
            )  # fmt: skip
            for node in range(s * LANES, min((s + 1) * LANES, nodes)):
                if of_nodes[node % LANES] > 0:
                    spent += _node(
                        t, w, q, node, in_nodes[node % LANES], of_nodes[node % LANES], reach,
                        patch_reach, pace, work,
                        best, ref, omitted, m, Z, Z2, S, logits, places, cost,
                    )  # fmt: skip
            if spent > budget:
                return False
    _compare(t, w, q, work, patch_reach, best, ref, omitted, m, Z, Z2, S, logits, places)
    return True


@njit(fastmath=FLAGS, nogil=True, cache=True)
def range_search(
    part, _, begun, parts, t, w, q, active, reach, patch_reach, pace, budget, most,
    best, ref, omitted, m, Z, Z2, S, logits, places, cost, whole,
):  # fmt: skip
    """The fold of the queries `active` over the groups of chunk begun + `part` of `parts`.

    Boxes and patches whose squared distance may exceed that of the nearest patch known by more than
    `reach` or `patch_reach` are skipped; an upper bound of their weight, in units of
    exp(-ref / (2 sigma^2)), is added to `omitted`. `best` is |q - s|^2 of the nearest patch known.
    `cost` is the cost of each query at the prices `pace` (see `COSTS`). The search stops if the
    total is more than `budget`; `whole` says whether it is complete. It stops for a query that has
    cost more than `most`.
    """
    A = len(active)
    whole[0] = _search_groups(
        part + begun, parts, t, w, q, active, reach, patch_reach, pace, budget, most,
        _workspace(t, A),
        np.empty((LANES, A), np.uint32), np.empty(LANES, np.int64),
        np.empty((LANES, A), np.uint32), np.empty(LANES, np.int64),
        best, ref, omitted, m, Z, Z2, S, logits, places, cost,
    )  # fmt: skip
