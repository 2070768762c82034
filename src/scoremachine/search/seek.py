"""The search of an index, compiled: which patches can matter, and what those that do say.

A box, or a code, bounds the distance of a patch from below by that of its embedding. What is
further from the query than its limit is skipped, and an upper bound of its weight is added up;
what is left is compared exactly, from the bytes of the images, and enters the fold.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64, njit
from numba.extending import register_jitable

from scoremachine.kernels import simd
from scoremachine.kernels.whole import FLAGS, NOTHING, keep
from scoremachine.search.floats import (
    BORROWED,
    LANES,
    WHOLE,
    add_each,
    add_products,
    add_squares,
    broadcast,
    hmax,
    hsum,
    isum,
    joined,
    larger,
    load,
    load_bytes,
    load_counts,
    load_every,
    lowest,
    nearest,
    none,
    prefetch,
    reaching,
    smaller,
    splat,
    store,
    store_halves,
    weights,
)
from scoremachine.search.patches import bring, middle_of, origin
from scoremachine.search.tree import LEAF, NODE

ALL_BUT_ONE = 0xFFFE  # lanes
FAR = np.float32(1e15)  # where boxes of nothing lie
COMPARED, NEAR = 2_000, 2.0  # patches compared for it at most, and within how many nats
ENOUGH = 200.0  # patches as heavy as the nearest known, from which on it need not be known better
GUESSED = 64  # nodes that are looked into for a first guess
SLACK = 1e-6  # what rounding may do to a squared distance in float32, relatively, per 8 numbers
LEAST = 1e-30  # numbers up to this are not multiplied
WAITING = 64  # patches that are compared together, at least: most of the time goes into memory
LOG2E = 1.4426950408889634
FAINT = 8.0  # nats below what may be skipped, from which on weights are not told apart
# What is known of a query in a node: see `_node`
SCALE, TWICE, START, UNIT, START_AGAIN, UNIT_AGAIN, X2, MORE, LESS, FAR_OFF, LIMIT, FAINTS = range(
    12
)
COSTS = np.array([40.0, 16.0, 25.0, 40.0])  # ns of a node, a leaf, a second look, a comparison


class Tree(NamedTuple):
    """An index as compiled code takes it, arrays flat where lanes are read from them.

    Attributes:
        m, first: How many numbers an embedding has, and how many bound a distance by themselves.
        codes: uint8 (nodes, 16 leaves, m / 4, 16 patches, 4).
        boxes: uint8 (nodes, low and high, first, 16 leaves), in the units of codes.
        ids, times: uint32 (nodes, 256): the patches' places, and how often each is there.
        frames: float32 (nodes, 2, m): what code 0 stands for, and a step.
        radii: float32 (nodes): no patch is further from its code.
        node_boxes: float32 (supers, low and high, first, 16 nodes).
        super_boxes: float32 (groups, low and high, first, 16 supers).
        widest: float32 (supers): the largest radius of its nodes.
        leaf_counts, node_counts, super_counts: float32 (nodes, 16), (supers, 16), (groups, 16):
            how many patches each holds, copies counted.
    """

    m: int
    first: int
    codes: np.ndarray
    boxes: np.ndarray
    ids: np.ndarray
    times: np.ndarray
    frames: np.ndarray
    radii: np.ndarray
    node_boxes: np.ndarray
    super_boxes: np.ndarray
    widest: np.ndarray
    leaf_counts: np.ndarray
    node_counts: np.ndarray
    super_counts: np.ndarray


class Queries(NamedTuple):
    """What is searched for.

    Attributes:
        E: Embeddings, float32 (Q, `filled_up`) flat: the first numbers, and from `others_at` on
            the others, both filled up to whole vectors.
        y: The windows, float64 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float64 (row).
        half: 1 / (2 sigma^2), float64 (Q).
        fuzz: What rounding may do to a distance between embeddings, float32 (Q).
        tails: What the components that are not looked at add to a squared distance beyond the
            differences of their norms, in the first look and in the second, float32 (Q, 2).
        bytes: The windows in whole multiples of `unit`, high and low bytes, rows filled up to 64,
            int8 (Q, h, 2, wide) flat; empty where patches are too small for that to pay.
        inside, ones: 255 and 1, and zeros where filled up, uint8 and int8 (wide).
        unit: float64 (Q).
        known: What |q - s|^2 is at least, but for products with the bytes of s, float64 (Q).
        fixed: Whether reach is from the nearest patch known at first, and only what is within it
            enters the fold; otherwise it is from the nearest patch met.
    """

    E: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: np.ndarray
    fuzz: np.ndarray
    tails: np.ndarray
    bytes: np.ndarray
    inside: np.ndarray
    ones: np.ndarray
    unit: np.ndarray
    known: np.ndarray
    fixed: bool


class Room(NamedTuple):
    """What a thread writes on."""

    low: np.ndarray  # where the numbers of a node begin (`filled_up`)
    step: np.ndarray  # and what a step of its codes is (`filled_up`)
    boxes: np.ndarray  # of its leaves, from there (low and high, first, 16)
    row: np.ndarray  # a query from there (`filled_up`)
    bytes: np.ndarray  # that times the steps, of Q queries: high and low bytes (Q, 2 `filled_up`)
    again: np.ndarray  # the last four of the first ones, without the norm of the others (Q, 8)
    of: np.ndarray  # what else is known of them: see the names of columns (Q, 16)
    in_leaves: np.ndarray  # the queries that reach each leaf (leaves, Q)
    numbers: np.ndarray  # how many these are (leaves)
    close: np.ndarray  # those to which something in a leaf is not faint (Q)
    bounds: np.ndarray  # of its patches (Q, 16)
    waiting: np.ndarray  # how many patches are to be compared (1)
    places: np.ndarray  # where they are in the tree
    starts: np.ndarray  # where they begin in the images
    owners: np.ndarray  # the queries


@register_jitable
def others_at(first):
    """Where the numbers begin that follow the first ones, in whole vectors."""
    return (first + LANES - 1) // LANES * LANES


@register_jitable
def filled_up(first, m):
    """How many numbers whole vectors of an embedding have."""
    return others_at(first) + (m - first + LANES - 1) // LANES * LANES


def in_vectors(E: np.ndarray, first: int) -> np.ndarray:
    """Embeddings (n, m), the first numbers and the others filled up to whole vectors."""
    at = others_at(first)
    filled = np.zeros((len(E), filled_up(first, E.shape[1])), np.float32)
    filled[:, :first], filled[:, at : at + E.shape[1] - first] = E[:, :first], E[:, first:]
    return filled


@njit
def _room(t, Q):
    n = filled_up(t.first, t.m)
    return Room(
        np.zeros(n, np.float32),
        np.zeros(n, np.float32),
        np.empty(2 * t.first * LANES, np.float32),
        np.empty(n, np.float32),
        np.empty((Q, 2 * n), np.int8),
        np.empty((Q, 8), np.int8),
        np.empty((Q, 16), np.float32),
        np.empty((LEAF, Q), np.int64),
        np.empty(LEAF, np.int64),
        np.empty(Q, np.int64),
        np.empty(Q * LANES, np.float32),
        np.zeros(1, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
        np.empty(WAITING + Q * LEAF, np.int64),
    )


@njit(fastmath=FLAGS, **BORROWED)
def fetch(t, w, room):
    """Where the patches that wait begin; has them brought near."""
    for k in range(room.waiting[0]):
        start = origin(w, np.int64(t.ids[room.places[k]]))
        room.starts[k] = start
        bring(w, start)


@njit(fastmath=FLAGS, inline="always")
def _distance(w, q, query, start):
    """|q - s|^2, exactly."""
    h = w.size[0]
    row, stride = len(q.mask), w.shape[1] * w.shape[2]
    total = simd.splat(0.0)
    o = query * h * row
    for a in range(h):
        for b in range(0, row, simd.LANES):
            s = simd.load_bytes(w.flat, start + a * stride + b) * (1.0 / 127.5) - 1.0
            d = (s - simd.load(q.y, o + a * row + b)) * simd.load(q.mask, b)
            total = total + d * d
    return simd.hsum(total)


@njit(fastmath=FLAGS, inline="always")
def _at_least(w, q, query, start):
    """|q - s|^2 or very little less, from products of bytes.

    With s = bytes / 127.5 - 1 it is |q|^2 + 2 sum q + sum 1 - (2 / 127.5) sum q bytes
    + sum (bytes^2 - 255 bytes) / 127.5^2.
    """
    high, low, squares, sums = none(), none(), none(), none()
    wide, stride = len(q.inside), w.shape[1] * w.shape[2]
    o = query * w.size[0] * 2 * wide
    for a in range(w.size[0]):
        for b in range(0, wide, 4 * LANES):
            p = start + a * stride + b
            high = add_each(high, w.flat, p, q.bytes, o + b)
            low = add_each(low, w.flat, p, q.bytes, o + wide + b)
            squares = add_squares(squares, w.flat, p, q.inside, b)
            sums = add_each(sums, w.flat, p, q.ones, b)
        o += 2 * wide
    product = q.unit[query] * (256 * isum(high) + isum(low))
    return (
        q.known[query] - product * (2 / 127.5) + (isum(squares) - 127 * isum(sums)) * (1 / 127.5**2)
    )


@njit(fastmath=FLAGS, inline="always")
def _to_boxes(rows, r, boxes, o, first):
    """The squared distances of `first` numbers at rows[r] to sixteen boxes."""
    even, odd = splat(float32(0)), splat(float32(0))
    for j in range(0, first, 2):
        x, y = broadcast(rows, r + j), broadcast(rows, r + j + 1)
        p, h = o + j * LANES, o + (first + j) * LANES
        d = x - smaller(larger(x, load(boxes, p)), load(boxes, h))
        e = y - smaller(larger(y, load(boxes, p + LANES)), load(boxes, h + LANES))
        even, odd = even + d * d, odd + e * e
    return even + odd


@njit(fastmath=FLAGS, inline="always")
def _to_codes(t, room, node, leaf, lo, hi, at):
    """sum_j (row[at + j - lo] - codes[j])^2 over lo <= j < hi, of a leaf's patches."""
    a, b = splat(float32(0)), splat(float32(0))
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi, 4):
        p, k = o + j * LANES, at + j - lo
        u = broadcast(room.row, k) - broadcast(room.step, k) * load_every(t.codes, p, 0)
        v = broadcast(room.row, k + 1) - broadcast(room.step, k + 1) * load_every(t.codes, p, 1)
        x = broadcast(room.row, k + 2) - broadcast(room.step, k + 2) * load_every(t.codes, p, 2)
        y = broadcast(room.row, k + 3) - broadcast(room.step, k + 3) * load_every(t.codes, p, 3)
        a, b = a + u * u + v * v, b + x * x + y * y
    return a + b


@njit(fastmath=FLAGS, inline="always")
def norms_of(t, step, node, leaf, lo, hi, at):
    """sum_j (step[at + j - lo] codes[j])^2 over lo <= j < hi, of a leaf's patches."""
    a, b = splat(float32(0)), splat(float32(0))
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi, 4):
        p, k = o + j * LANES, at + j - lo
        u = broadcast(step, k) * load_every(t.codes, p, 0)
        v = broadcast(step, k + 1) * load_every(t.codes, p, 1)
        x = broadcast(step, k + 2) * load_every(t.codes, p, 2)
        y = broadcast(step, k + 3) * load_every(t.codes, p, 3)
        a, b = a + u * u + v * v, b + x * x + y * y
    return a + b


@njit(fastmath=FLAGS, inline="always")
def products_from(codes, o, n, bytes_, at):
    """sum_j bytes_[at + j] codes[j] over j < n, of sixteen whose codes begin at o."""
    high, low = none(), none()
    half = len(bytes_) // 2
    for j in range(0, n, 4):
        high = add_products(high, codes, o + j * LANES, bytes_, at + j)
        low = add_products(low, codes, o + j * LANES, bytes_, half + at + j)
    return joined(high, low)


@njit(fastmath=FLAGS, inline="always")
def products(t, node, leaf, lo, hi, bytes_, at):
    """sum_j bytes_[at + j - lo] codes[j] over lo <= j < hi, of a leaf's patches."""
    o = ((node * LEAF + leaf) * t.m + lo) * LANES
    return products_from(t.codes, o, hi - lo, bytes_, at)


@njit(fastmath=FLAGS, inline="always")
def in_bytes(row, step, lo, hi, scale, bytes_):
    """Writes row * step * scale, rounded, as bytes; returns (unit, more).

    With the bytes n, sum_j row_j step_j scale c_j is at most `more` above unit sum_j n_j c_j, for
    codes c_j of 0 to 255.
    """
    most = splat(float32(0))
    for j in range(lo, hi, LANES):
        x = load(row, j) * load(step, j)
        most = larger(most, larger(x, splat(float32(0)) - x))
    largest = hmax(most) * scale
    if not largest > float32(LEAST):
        for j in range(lo, hi, LANES):
            store_halves(bytes_, j, len(bytes_) // 2 + j, splat(float32(0)))
        return float32(0), largest * float32(255 * (hi - lo))
    grow = float32(WHOLE) / largest * scale
    off = splat(float32(0))
    for j in range(lo, hi, LANES):
        x = load(row, j) * load(step, j) * grow
        n = nearest(x)
        off = off + larger(x - n, splat(float32(0)))
        store_halves(bytes_, j, len(bytes_) // 2 + j, n)
    unit = largest / float32(WHOLE)
    return unit, hsum(off) * unit * float32(255)


@njit(fastmath=FLAGS, inline="always")
def from_node(E, e, low, row, lo, hi):
    """A query from where a node begins: fills row[lo:hi], and returns its |.|^2."""
    total = splat(float32(0))
    for j in range(lo, hi, LANES):
        x = load(E, e + j) - load(low, j)
        store(row, j, x)
        total = total + x * x
    return hsum(total)


@njit(fastmath=FLAGS, inline="always")
def frame_of(t, node, low, step):
    """Where the numbers of a node begin and what a step of its codes is, in whole vectors."""
    at = others_at(t.first)
    for j in range(t.m):
        k = j if j < t.first else at + j - t.first
        low[k], step[k] = t.frames[node * 2 * t.m + j], t.frames[(node * 2 + 1) * t.m + j]


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
    d2 = _distance(w, q, query, start)
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


@njit(fastmath=FLAGS, nogil=True, cache=True)
def guess(part, parts, t, w, q, best, known):
    """The nearest nodes are looked into for near patches.

    Fills `best` with the smallest |q - s|^2 met, and `known` with the weight of the patches that
    were compared, the nearest's being 1.
    """
    Q = len(q.half)
    room = _room(t, 1)
    values = np.empty(max(len(t.widest), GUESSED * LANES) + LANES, np.float32)
    near, found = np.empty(GUESSED, np.int64), np.empty(GUESSED, np.int64)
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        best[query], known[query] = _guess(t, w, q, query, room, values, near, found)


@njit(fastmath=FLAGS, **BORROWED)
def _guess(t, w, q, query, room, values, near, found):
    supers, nodes = len(t.widest), len(t.radii)
    others = others_at(t.first)
    e = query * filled_up(t.first, t.m)
    box = 2 * t.first * LANES
    for g in range((supers + LANES - 1) // LANES):
        store(values, g * LANES, _to_boxes(q.E, e, t.super_boxes, g * box, t.first))
    some = _nearest(values, supers, near, GUESSED)
    for k in range(some):
        store(
            values,
            k * LANES,
            _to_boxes(q.E, e, t.node_boxes, near[k] * box, t.first),
        )
    n = _nearest(values, some * LANES, found, GUESSED)
    for k in range(n):
        found[k] = near[found[k] // LANES] * LANES + found[k] % LANES
    # compared are the patches whose codes are about as near as the nearest yet
    best, bound = np.inf, np.float32(np.inf)
    known, compared = 0.0, 0
    half = q.half[query]
    for k in range(n):
        node = found[k]
        if node >= nodes or compared > COMPARED or known > ENOUGH:
            continue
        frame_of(t, node, room.low, room.step)
        from_node(q.E, e, room.low, room.row, 0, filled_up(t.first, t.m))
        if t.m > t.first:  # the others stand in the place of their norm
            room.row[t.first - 1], room.step[t.first - 1] = 0, 0
        for leaf in range(LEAF):
            d = _to_codes(t, room, node, leaf, 0, t.first, 0)
            if t.m > t.first:
                d = d + _to_codes(t, room, node, leaf, t.first, t.m, others)
            bits = reaching(d, splat(bound))
            store(values, 0, d)
            while bits:
                lane = lowest(bits)
                bits &= bits - 1
                o = node * NODE + leaf * LEAF + lane
                if t.times[o] > 0 and values[lane] <= bound:
                    d2 = _distance(w, q, query, origin(w, np.int64(t.ids[o])))
                    compared += 1
                    if d2 < best:
                        known *= math.exp((d2 - best) * half)
                        best = d2
                    known += t.times[o] * math.exp((best - d2) * half)
                    bound = min(bound, values[lane] + np.float32(NEAR / half))
    return best, known


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
        query = asked[k]
        if cost[query] > most:
            continue
        half = q.half[query]
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, radius + q.fuzz[query], t.first)
        o = g * 2 * t.first * LANES
        e = query * filled_up(t.first, t.m)
        d = _bound(_to_boxes(q.E, e, boxes, o, t.first), a, b - tail)
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
        query, of = asked[k], room.of[k]
        half = q.half[query]
        x2 = from_node(q.E, query * filled_up(first, t.m), room.low, room.row, 0, others)
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, t.radii[node] + q.fuzz[query], t.m)
        d = _bound(_to_boxes(room.row, 0, room.boxes, 0, first), a, b - tail)
        leaves = reaching(d, splat(float32(limit * (1 + SLACK))))
        total = load(left, query * LANES) + _skipped(d, leaves, ref[query], half) * counts
        store(left, query * LANES, total)
        of[SCALE], of[TWICE], of[LESS], of[X2] = a * exact, 2 * a, b, x2
        of[UNIT], of[MORE] = in_bytes(room.row, room.step, 0, others, of[TWICE], room.bytes[k])
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
        query, of = asked[k], room.of[k]
        weight = _skipped(splat(of[FAR_OFF]), int64(0), ref[query], q.half[query])
        total = load(left, query * LANES) + weight * (of[FAINTS] / float32(LEAF))
        store(left, query * LANES, total)
    return spent


@njit(fastmath=FLAGS, inline="always")
def _faint(t, node, leaf, room):
    """A first look at the patches of a leaf: counts those that are faint, if they all are.

    Returns for how many queries they are not; these, and bounds, are in the room.
    """
    norms = norms_of(t, room.step, node, leaf, 0, t.first, 0)
    held = t.leaf_counts[node * LEAF + leaf]
    close = 0
    for i in range(room.numbers[leaf]):
        k = room.in_leaves[leaf, i]
        of = room.of[k]
        bound = norms * of[SCALE] + of[START]
        bound = bound - products(t, node, leaf, 0, t.first, room.bytes[k], 0) * of[UNIT]
        store(room.bounds, close * LANES, bound)
        room.close[close] = k
        near = reaching(bound, splat(of[FAR_OFF])) != 0
        of[FAINTS] += float32(0) if near else held
        close += near
    return close


@njit(fastmath=FLAGS, inline="always")
def _leaf(t, q, node, leaf, asked, close, pace, room, ref, left, cost):
    """A second look at the patches of a leaf; has those compared that can matter."""
    first, M = t.first, t.m
    others, end = others_at(first), filled_up(first, M)
    copies = load_counts(t.times, node * NODE + leaf * LEAF)
    ready, norms = False, splat(float32(0))
    spent = 0.0
    for i in range(close):
        k = room.close[i]
        query, of = asked[k], room.of[k]
        half = q.half[query]
        limits = splat(of[LIMIT])
        bound = load(room.bounds, i * LANES)
        bits = reaching(bound, limits)
        total = load(left, query * LANES) + _skipped(bound, bits, ref[query], half) * copies
        price = 0.0
        if bits and first < M:
            if of[UNIT_AGAIN] < 0:  # the others stand in the place of their norm
                y2 = from_node(q.E, query * end, room.low, room.row, others, end)
                norm = q.E[query * end + first - 1] - room.low[first - 1]
                unit, more = in_bytes(room.row, room.step, others, end, of[TWICE], room.bytes[k])
                y2 = of[SCALE] * (of[X2] + y2 - norm * norm)
                of[UNIT_AGAIN] = unit
                of[START_AGAIN] = y2 - of[MORE] - more - of[LESS] + q.tails[query, 1]
                for j in range(4):
                    room.again[k, j] = room.bytes[k, first - 4 + j]
                    room.again[k, 4 + j] = room.bytes[k, end + first - 4 + j]
                room.again[k, 3], room.again[k, 7] = 0, 0
            if not ready:
                ready, norms = True, _norms_again(t, room, node, leaf, others)
            d = products(t, node, leaf, 0, first - 4, room.bytes[k], 0)
            d = d + products(t, node, leaf, first - 4, first, room.again[k], 0)
            bound = norms * of[SCALE] + of[START_AGAIN] - d * of[UNIT]
            d = products(t, node, leaf, first, M, room.bytes[k], others)
            bound = bound - d * of[UNIT_AGAIN]
            again = reaching(bound, limits)
            price += pace[2]
            total = total + _skipped(bound, again | ~bits, ref[query], half) * copies
            bits &= again
        store(left, query * LANES, total)
        while bits:
            o = node * NODE + leaf * LEAF + lowest(bits)
            bits &= bits - 1
            if t.times[o] > 0:
                price += pace[3]
                prefetch(t.ids, o)
                room.places[room.waiting[0]], room.owners[room.waiting[0]] = o, query
                room.waiting[0] += 1
        cost[query] += price
        spent += price
    return spent


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
        np.empty((LANES, A), np.int64), np.empty(LANES, np.int64),
        np.empty((LANES, A), np.int64), np.empty(LANES, np.int64),
        best, ref, left, m, Z, Z2, S, logits, places, cost,
    )  # fmt: skip
