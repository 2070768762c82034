"""The search of an index, compiled: which patches can matter, and what those that do say.

A box, or a code, bounds the distance of a patch from below by that of its embedding. What is
further from the query than its limit is skipped, and an upper bound of its weight is added up;
what is left is compared exactly, from the bytes of the images, and enters the fold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS, NOTHING, keep
from scoremachine.engines.search.distances import (
    distance,
    filled_up,
    frame_of,
    from_node,
    in_bytes,
    norms_of,
    others_at,
    to_boxes,
)
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    add_each,
    add_fours,
    add_squares,
    broadcast,
    by_fours,
    isum,
    joined,
    load,
    load_bytes,
    load_counts,
    load_every,
    lowest,
    no_fours,
    none,
    prefetch,
    reaching,
    splat,
    store,
    weights,
)
from scoremachine.engines.search.patches import bring, middle_of, origin
from scoremachine.engines.search.tree import LEAF, NODE

ALL_BUT_ONE = 0xFFFE  # lanes
SLACK = 1e-6  # what rounding may do to a squared distance in float32, relatively, per 8 numbers
WAITING = 64  # patches that are compared together, at least: most of the time goes into memory
LOG2E = 1.4426950408889634
FAINT = 8.0  # nats below what may be skipped, from which on weights are not told apart
# What is known of a query in a node: see `_node`
SCALE, TWICE, START, UNIT, START_AGAIN, UNIT_AGAIN, X2, MORE, LESS, FAR_OFF, LIMIT, FAINTS = range(
    12
)
COSTS = np.array([40.0, 16.0, 25.0, 40.0])  # ns of a node, a leaf, a second look, a comparison


class Room(NamedTuple):
    """What a thread writes on."""

    low: np.ndarray  # where the numbers of a node begin (`filled_up`)
    step: np.ndarray  # and what a step of its codes is (`filled_up`)
    boxes: np.ndarray  # of its leaves, from there (low and high, first, 16)
    row: np.ndarray  # a query from there (`filled_up`)
    # of Q queries, and of one that reaches nothing:
    bytes: np.ndarray  # the first numbers of `row` times the steps: high and low bytes, flat
    again: np.ndarray  # the same without the norm of the others
    others: np.ndarray  # and these
    of: np.ndarray  # what else is known: see the names of columns (Q + 1, 16)
    in_leaves: np.ndarray  # who reaches each leaf, filled up to fours (leaves, Q + 3)
    numbers: np.ndarray  # how many do (leaves)
    close: np.ndarray  # those to which something in a leaf is not faint (Q + 4)
    reached: np.ndarray  # which of its patches can matter, a bit for each (Q + 4)
    bounds: np.ndarray  # of its patches (Q + 1, 16)
    waiting: np.ndarray  # how many patches are to be compared (1)
    places: np.ndarray  # where they are in the tree
    starts: np.ndarray  # where they begin in the images
    owners: np.ndarray  # the queries


@njit
def _room(t, Q):
    at, n = others_at(t.first), filled_up(t.first, t.m)
    room = Room(
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        np.empty(2 * t.first * LANES, np.float32),
        np.empty(n, np.float32),
        np.zeros((Q + 1) * 2 * at, np.int8),
        np.zeros((Q + 1) * 2 * at, np.int8),
        np.zeros((Q + 1) * 2 * (n - at), np.int8),
        np.zeros((Q + 1, 16), np.float32),
        np.empty((LEAF, Q + 3), np.uint32),
        np.empty(LEAF, np.int64),
        np.empty(Q + 4, np.uint32),
        np.empty(Q + 4, np.uint32),
        np.empty((Q + 1) * LANES, np.float32),
        np.zeros(1, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
    )
    room.of[Q, FAR_OFF] = -np.inf  # nothing is as near
    return room


@njit(fastmath=FLAGS, **BORROWED)
def fetch(t, w, room):
    """Where the patches that wait begin; has them brought near."""
    for k in range(room.waiting[0]):
        start = origin(w, np.int64(t.ids[room.places[k]]))
        room.starts[k] = start
        bring(w, start)


@njit(fastmath=FLAGS, inline="always")
def _at_least(w, q, query, start):
    """|q - s|^2 or very little less, from products of bytes.

    With s = bytes / 127.5 - 1 it is |q + 1|^2 - (2 / 127.5) sum (q + 1 - 64 / 127.5) bytes
    + sum bytes (bytes - 128) / 127.5^2.
    """
    high, low, squares = none(), none(), none()
    wide, stride = len(q.inside), w.shape[1] * w.shape[2]
    o = query * w.size[0] * 2 * wide
    for a in range(w.size[0]):
        for b in range(0, wide, 4 * LANES):
            p = start + a * stride + b
            high = add_each(high, w.flat, p, q.bytes, o + b)
            low = add_each(low, w.flat, p, q.bytes, o + wide + b)
            squares = add_squares(squares, w.flat, p, q.inside, b)
        o += 2 * wide
    product = q.unit[query] * (256 * isum(high) + isum(low))
    return q.known[query] - product * (2 / 127.5) + isum(squares) * (1 / 127.5**2)


@njit(fastmath=FLAGS, inline="always")
def _decode_boxes(t, node, room):
    """The boxes of a node's leaves from where the node begins."""
    o = node * 2 * t.first * LEAF
    for side in range(2):
        for j in range(t.first):
            k = (side * t.first + j) * LANES
            store(room.boxes, k, load_bytes(t.boxes, o + k) * broadcast(room.step, j))


@njit(fastmath=FLAGS, inline="always")
def _shrunk(limit, radius, m):
    """(a, b) such that (sqrt(x) - radius)^2 >= a x - b for x >= 0, tight where it is `limit`.

    By 2 radius sqrt(x) <= c x + radius^2 / c for any c. Allows for x summed up in float32.
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
def _absorb(w, q, query, start, times, reach, best, ref, left, m, Z, Z2, S, logits, places):
    """A patch enters the fold of a query, with the logit -|q - s|^2 / 2 sigma^2."""
    d2 = distance(w, q, query, start)
    half = q.half[query]
    if q.fixed:
        if d2 > best[query] + reach[query]:
            return
    elif d2 < best[query]:
        best[query] = d2
        if (ref[query] - d2) * half > 20:  # keep the weights of what is skipped in range
            scale = float32(math.exp((d2 - ref[query]) * half))
            store(left, query * LANES, load(left, query * LANES) * scale)
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
    middle = middle_of(w, start)
    o = middle * w.shape[2]
    for c in range(S.shape[1]):
        S[query, c] += times * x * (w.flat[o + c] * (1.0 / 127.5) - 1.0)
    if len(logits) > 0 and l > logits[-1, query, 0]:
        keep(l, middle, logits, places, query, 0)


@njit(fastmath=FLAGS, **BORROWED)
def _compare(t, w, q, room, patch_reach, best, ref, left, m, Z, Z2, S, logits, places):
    """Compares the patches that wait, by bytes first: what is too far away is skipped."""
    fetch(t, w, room)
    for k in range(room.waiting[0]):
        o, query, start = room.places[k], room.owners[k], room.starts[k]
        if len(q.bytes) > 0:
            d2 = _at_least(w, q, query, start)
            if d2 > best[query] + patch_reach[query]:
                x = splat(float32((ref[query] - d2) * q.half[query] * LOG2E))
                weight = weights(x, int64(ALL_BUT_ONE)) * float32(t.times[o])
                store(left, query * LANES, load(left, query * LANES) + weight)
                continue
        times = t.times[o]
        _absorb(
            w, q, query, start, times, patch_reach, best, ref, left, m, Z, Z2, S, logits, places
        )
    room.waiting[0] = 0


@njit(fastmath=FLAGS, inline="always")
def _skipped(lower, bits, ref, half):
    """An upper bound of the weights of lanes whose bit is 0, and that are at least as far as."""
    x = (splat(float32(ref * (1 + SLACK))) - lower) * float32(half * LOG2E)
    return weights(x, bits)


@njit(fastmath=FLAGS, **BORROWED)
def _narrow(
    boxes, counts, g, t, q, asked, count, reach, radius, best, ref, left, cost, most, who, numbers
):  # fmt: skip
    """Of the queries asked[:count]: which of sixteen boxes they reach.

    Fills who[box, : numbers[box]]. Leaves out those that have cost more than `most`. The boxes are
    the g-th sixteen, and `counts` says how many patches each holds.
    """
    for box in range(LANES):
        numbers[box] = 0
    held = load(counts, g * LANES)
    real = ~reaching(held, splat(float32(0)))
    for k in range(count):
        query = int64(asked[k])
        if cost[query] > most:
            continue
        half = q.half[query]
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, radius + q.fuzz[query], t.first)
        o = g * 2 * t.first * LANES
        e = query * filled_up(t.first, t.m)
        d = _bound(to_boxes(q.E, e, boxes, o, t.first), a, b - tail)
        near = reaching(d, splat(float32(limit * (1 + SLACK)))) & real
        v = load(left, query * LANES) + _skipped(d, near, ref[query], half) * held
        store(left, query * LANES, v)
        while near:
            box = lowest(near)
            near &= near - 1
            who[box, numbers[box]] = query
            numbers[box] += 1


@njit(fastmath=FLAGS, **BORROWED)
def _node(
    t, w, q, node, asked, count, reach, patch_reach, pace, room,
    best, ref, left, m, Z, Z2, S, logits, places, cost,
):  # fmt: skip
    """The queries asked[:count] look at the patches of a node.

    A squared distance from codes c is |x|^2 + |step c|^2 - 2 sum_j x_j step_j c_j, where x is the
    query from where the node begins; the last sum is of products of bytes. Adds to `cost` what each
    query takes, and returns what they take together.
    """
    first = t.first
    others = others_at(first)
    frame_of(t, node, room.low, room.step)
    _decode_boxes(t, node, room)
    exact = 1 - SLACK * (t.m / 8 + 1)
    counts = load(t.leaf_counts, node * LEAF)
    for leaf in range(LEAF):
        room.numbers[leaf] = 0
    spent = 0.0
    for k in range(count):
        query, of = int64(asked[k]), room.of[k]
        half = q.half[query]
        x2 = from_node(q.E, query * filled_up(first, t.m), room.low, room.row, 0, others)
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, t.radii[node] + q.fuzz[query], t.m)
        d = _bound(to_boxes(room.row, 0, room.boxes, 0, first), a, b - tail)
        leaves = reaching(d, splat(float32(limit * (1 + SLACK))))
        total = load(left, query * LANES) + _skipped(d, leaves, ref[query], half) * counts
        store(left, query * LANES, total)
        of[SCALE], of[TWICE], of[LESS], of[X2] = a * exact, 2 * a, b, x2
        o = k * 2 * others
        bytes_ = room.bytes[o : o + 2 * others]
        of[UNIT], of[MORE] = in_bytes(room.row, room.step, 0, others, of[TWICE], bytes_)
        of[START] = of[SCALE] * x2 - of[MORE] - float32(b - tail)
        of[FAR_OFF] = (limit + FAINT / half) * (1 + SLACK)
        of[LIMIT] = (best[query] + patch_reach[query]) * (1 + SLACK)
        of[FAINTS], of[UNIT_AGAIN] = 0, -1
        price = pace[0]
        while leaves:
            leaf = lowest(leaves)
            leaves &= leaves - 1
            room.in_leaves[leaf, room.numbers[leaf]] = k
            room.numbers[leaf] += 1
            price += pace[1]
        cost[query] += price
        spent += price
    for leaf in range(LEAF):
        if room.numbers[leaf] > 0:
            close = _faint(t, node, leaf, room)
            if close > 0:
                spent += _leaf(t, q, node, leaf, asked, close, pace, room, ref, left, cost)
        if room.waiting[0] >= WAITING:
            _compare(t, w, q, room, patch_reach, best, ref, left, m, Z, Z2, S, logits, places)
    for k in range(count):
        query, of = int64(asked[k]), room.of[k]
        weight = _skipped(splat(of[FAR_OFF]), int64(0), ref[query], q.half[query])
        total = load(left, query * LANES) + weight * (of[FAINTS] / float32(LEAF))
        store(left, query * LANES, total)
    return spent


@njit(fastmath=FLAGS, inline="always")
def _of_four(codes, o, n, bytes_, wide, a, b, c, d):
    """`products_from` for the queries a, b, c and d, whose bytes lie 2 `wide` apart."""
    high, low = no_fours(), no_fours()
    for j in range(0, n, 4):
        i, p = 2 * wide * a + j, 2 * wide * b + j
        k, q = 2 * wide * c + j, 2 * wide * d + j
        high = add_fours(high, codes, o + j * LANES, bytes_, (i, p, k, q))
        low = add_fours(low, codes, o + j * LANES, bytes_, (i + wide, p + wide, k + wide, q + wide))
    return (
        joined(high[0], low[0]),
        joined(high[1], low[1]),
        joined(high[2], low[2]),
        joined(high[3], low[3]),
    )


@njit(fastmath=FLAGS, inline="always")
def _filled_up(who, n, room):
    """Fills the first n of `who` up to fours."""
    for i in range(n, by_fours(n)):
        who[i] = len(room.of) - 1


@njit(fastmath=FLAGS, inline="always")
def _faint(t, node, leaf, room):
    """A first look at the patches of a leaf: counts those that are faint, if they all are.

    Returns for how many queries they are not; these, and bounds, are in the room.
    """
    norms = norms_of(t, room.step, node, leaf, 0, t.first, 0)
    held, who, n = t.leaf_counts[node * LEAF + leaf], room.in_leaves[leaf], room.numbers[leaf]
    _filled_up(who, n, room)
    o, wide = (node * LEAF + leaf) * t.m * LANES, others_at(t.first)
    close = 0
    for i in range(0, n, 4):
        a, b, c, d = int64(who[i]), int64(who[i + 1]), int64(who[i + 2]), int64(who[i + 3])
        x, y, u, v = _of_four(t.codes, o, t.first, room.bytes, wide, a, b, c, d)
        close = _close(room, a, norms, x, held, close)
        close = _close(room, b, norms, y, held, close)
        close = _close(room, c, norms, u, held, close)
        close = _close(room, d, norms, v, held, close)
    return close


@njit(fastmath=FLAGS, inline="always")
def _close(room, k, norms, product, held, close):
    """What `_faint` does for a query when it knows the products; returns how many are close."""
    of = room.of[k]
    bound = norms * of[SCALE] + of[START] - product * of[UNIT]
    store(room.bounds, close * LANES, bound)
    room.close[close] = k
    near = reaching(bound, splat(of[FAR_OFF])) != 0
    of[FAINTS] += float32(0) if near else held
    return close + near


@njit(fastmath=FLAGS, inline="always")
def _leaf(t, q, node, leaf, asked, close, pace, room, ref, left, cost):
    """Has those patches of a leaf compared that can matter to the queries that are close."""
    copies = load_counts(t.times, node * NODE + leaf * LEAF)
    n = 0
    for i in range(close):
        k = int64(room.close[i])
        query = int64(asked[k])
        bound = load(room.bounds, i * LANES)
        bits = reaching(bound, splat(room.of[k, LIMIT]))
        total = (
            load(left, query * LANES) + _skipped(bound, bits, ref[query], q.half[query]) * copies
        )
        store(left, query * LANES, total)
        room.close[n], room.reached[n] = k, bits
        n += bits != 0
    price = 0.0
    if t.first < t.m and n > 0:
        price = pace[2]
        _again(t, q, node, leaf, asked, n, copies, room, ref, left)
    spent = n * price
    for i in range(n):
        query, bits = int64(asked[room.close[i]]), int64(room.reached[i])
        cost[query] += price
        while bits:
            o = node * NODE + leaf * LEAF + lowest(bits)
            bits &= bits - 1
            if t.times[o] > 0:
                cost[query] += pace[3]
                spent += pace[3]
                prefetch(t.ids, o)
                room.places[room.waiting[0]], room.owners[room.waiting[0]] = o, query
                room.waiting[0] += 1
    return spent


@njit(fastmath=FLAGS, inline="always")
def _again(t, q, node, leaf, asked, n, copies, room, ref, left):
    """A second look at the patches of a leaf, for the first n that are close."""
    first, others, end = t.first, others_at(t.first), filled_up(t.first, t.m)
    for i in range(n):
        k = int64(room.close[i])
        if room.of[k, UNIT_AGAIN] < 0:
            _set_again(t, q, int64(asked[k]), k, room)
    _filled_up(room.close, n, room)
    norms = _norms_again(t, room, node, leaf, others)
    o = (node * LEAF + leaf) * t.m * LANES
    for i in range(0, n, 4):
        a, b = int64(room.close[i]), int64(room.close[i + 1])
        c, d = int64(room.close[i + 2]), int64(room.close[i + 3])
        xs = _of_four(t.codes, o, first, room.again, others, a, b, c, d)
        p = o + first * LANES
        ys = _of_four(t.codes, p, t.m - first, room.others, end - others, a, b, c, d)
        _near(q, asked, i, n, norms, xs[0], ys[0], copies, room, ref, left)
        _near(q, asked, i + 1, n, norms, xs[1], ys[1], copies, room, ref, left)
        _near(q, asked, i + 2, n, norms, xs[2], ys[2], copies, room, ref, left)
        _near(q, asked, i + 3, n, norms, xs[3], ys[3], copies, room, ref, left)


@njit(fastmath=FLAGS, inline="always")
def _near(q, asked, i, n, norms, x, y, copies, room, ref, left):
    """What `_again` does for the i-th query when it knows the products."""
    if i >= n:
        return
    k = int64(room.close[i])
    query, of, bits = int64(asked[k]), room.of[k], int64(room.reached[i])
    bound = norms * of[SCALE] + of[START_AGAIN] - x * of[UNIT] - y * of[UNIT_AGAIN]
    again = reaching(bound, splat(of[LIMIT]))
    skipped = _skipped(bound, again | ~bits, ref[query], q.half[query]) * copies
    store(left, query * LANES, load(left, query * LANES) + skipped)
    room.reached[i] = bits & again


@njit(fastmath=FLAGS, inline="always")
def _set_again(t, q, query, k, room):
    """What a second look needs of a query: the others stand in the place of their norm."""
    of, others, end = room.of[k], others_at(t.first), filled_up(t.first, t.m)
    y2 = from_node(q.E, query * end, room.low, room.row, others, end)
    norm = q.E[query * end + t.first - 1] - room.low[t.first - 1]
    wide = end - others
    bytes_ = room.others[2 * wide * k : 2 * wide * (k + 1)]
    unit, more = in_bytes(room.row, room.step, others, end, of[TWICE], bytes_)
    y2 = of[SCALE] * (of[X2] + y2 - norm * norm)
    of[UNIT_AGAIN] = unit
    of[START_AGAIN] = y2 - of[MORE] - more - of[LESS] + q.tails[query, 1]
    o = 2 * others * k
    for j in range(2 * others):
        room.again[o + j] = room.bytes[o + j]
    room.again[o + t.first - 1], room.again[o + others + t.first - 1] = 0, 0


@njit(fastmath=FLAGS, inline="always")
def _norms_again(t, room, node, leaf, others):
    """|.|^2 of the numbers of a leaf's patches, the others in the place of their norm."""
    last = load_every(t.codes, ((node * LEAF + leaf) * t.m + t.first - 4) * LANES, 3)
    last = last * broadcast(room.step, t.first - 1)
    more = norms_of(t, room.step, node, leaf, t.first, t.m, others)
    return norms_of(t, room.step, node, leaf, 0, t.first, 0) - last * last + more


@njit(fastmath=FLAGS, **BORROWED)
def _groups(
    start, parts, t, w, q, asked, reach, patch_reach, pace, budget, most, room,
    in_supers, of_supers, in_nodes, of_nodes,
    best, ref, left, m, Z, Z2, S, logits, places, cost,
):  # fmt: skip
    """What `seek` does once there is room; returns whether it did everything."""
    nodes, supers = len(t.radii), len(t.widest)
    spent = 0.0
    for g in range(start, (supers + LANES - 1) // LANES, parts):
        radius = float32(0)
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            radius = max(radius, t.widest[s])
        _narrow(
            t.super_boxes, t.super_counts, g, t, q, asked, len(asked), reach, radius,
            best, ref, left, cost, most, in_supers, of_supers,
        )  # fmt: skip
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            if of_supers[s % LANES] == 0:
                continue
            _narrow(
                t.node_boxes, t.node_counts, s, t, q, in_supers[s % LANES], of_supers[s % LANES],
                reach, t.widest[s], best, ref, left, cost, most, in_nodes, of_nodes,
            )  # fmt: skip
            for node in range(s * LANES, min((s + 1) * LANES, nodes)):
                if of_nodes[node % LANES] > 0:
                    spent += _node(
                        t, w, q, node, in_nodes[node % LANES], of_nodes[node % LANES], reach,
                        patch_reach, pace, room, best, ref, left, m, Z, Z2, S, logits, places, cost,
                    )  # fmt: skip
            if spent > budget:
                return False
    _compare(t, w, q, room, patch_reach, best, ref, left, m, Z, Z2, S, logits, places)
    return True


@njit(fastmath=FLAGS, nogil=True, cache=True)
def seek(
    part, _, begun, parts, t, w, q, asked, reach, patch_reach, pace, budget, most,
    best, ref, left, m, Z, Z2, S, logits, places, cost, whole,
):  # fmt: skip
    """The fold of the queries `asked` over the groups of part begun + `part` of `parts`.

    What may be more than `reach` (a box) or `patch_reach` (a patch) further than the nearest patch
    known, in squared distance, is skipped; an upper bound of its weight, in units of
    exp(-ref / 2 sigma^2), is added to `left`. `best` is |q - s|^2 of the nearest patch known.
    `cost` is what each query has cost at the prices `pace` (see `COSTS`); stops where that is more
    than `budget` in all, and `whole` says if it has not. A query goes no further where it has cost
    more than `most`.
    """
    A = len(asked)
    whole[0] = _groups(
        part + begun, parts, t, w, q, asked, reach, patch_reach, pace, budget, most, _room(t, A),
        np.empty((LANES, A), np.uint32), np.empty(LANES, np.int64),
        np.empty((LANES, A), np.uint32), np.empty(LANES, np.int64),
        best, ref, left, m, Z, Z2, S, logits, places, cost,
    )  # fmt: skip
