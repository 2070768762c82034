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

from scoremachine.kernels import simd
from scoremachine.kernels.whole import FLAGS, NOTHING, keep
from scoremachine.search.floats import (
    LANES,
    broadcast,
    larger,
    load,
    load_bytes,
    load_counts,
    lowest,
    reaching,
    splat,
    store,
    weights,
)
from scoremachine.search.tree import BORROWED, LEAF, NODE, window_at

FAR = np.float32(1e15)  # where boxes of nothing lie
COMPARED, NEAR = 2_000, 2.0  # patches compared for it at most, and within how many nats
ENOUGH = 200.0  # patches as heavy as the nearest known, from which on it need not be known better
GUESSED = 64  # nodes that are looked into for a first guess
SLACK = 1e-6  # what rounding may do to a squared distance in float32, relatively, per 8 numbers
LOG2E = 1.4426950408889634
FAINT = 8.0  # nats below what may be skipped, from which on weights are not told apart
COSTS = np.array([40.0, 16.0, 25.0, 40.0])  # ns of a node, a leaf, a second look, a comparison


class Tree(NamedTuple):
    """An index as compiled code takes it, arrays flat where lanes are read from them.

    Attributes:
        m, first: How many numbers an embedding has, and how many bound a distance by themselves.
        codes: uint8 (nodes, 16 leaves, m, 16 patches).
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


class Windows(NamedTuple):
    """Where the patches of an index are.

    Attributes:
        flat: The images' bytes, uint8 (N H W C + 16).
        shape: (H, W, C).
        tops, lefts: First and number of their rows, and columns.
        size: (h, w).
        middle: What a patch answers with: this pixel of it.
    """

    flat: np.ndarray
    shape: tuple[int, int, int]
    tops: tuple[int, int]
    lefts: tuple[int, int]
    size: tuple[int, int]
    middle: tuple[int, int]


class Queries(NamedTuple):
    """What is searched for.

    Attributes:
        E: Embeddings, float32 (Q, m) flat.
        y: The windows, float64 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float64 (row).
        half: 1 / (2 sigma^2), float64 (Q).
        fuzz: What rounding may do to a distance between embeddings, float32 (Q).
        tails: What the components that are not looked at add to a squared distance beyond the
            differences of their norms, in the first look and in the second, float32 (Q, 2).
    """

    E: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: np.ndarray
    fuzz: np.ndarray
    tails: np.ndarray


@njit(fastmath=FLAGS, inline="always")
def origin(w, place):
    """Where in `flat` a patch begins, and the place (n H + row) W + column of its middle."""
    H, W, C = w.shape
    n, top, left = window_at(place, w.tops, w.lefts)
    return ((n * H + top) * W + left) * C, (n * H + top + w.middle[0]) * W + left + w.middle[1]


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
def _to_boxes(rows, r, boxes, o, first):
    """The squared distances of `first` numbers at rows[r] to sixteen boxes."""
    even, odd = splat(float32(0)), splat(float32(0))
    zero = splat(float32(0))
    for j in range(0, first - 1, 2):
        x, y = broadcast(rows, r + j), broadcast(rows, r + j + 1)
        p, h = o + j * LANES, o + (first + j) * LANES
        d = larger(larger(load(boxes, p) - x, x - load(boxes, h)), zero)
        e = larger(larger(load(boxes, p + LANES) - y, y - load(boxes, h + LANES)), zero)
        even, odd = even + d * d, odd + e * e
    if first % 2 == 1:
        j = first - 1
        x = broadcast(rows, r + j)
        d = larger(load(boxes, o + j * LANES) - x, x - load(boxes, o + (first + j) * LANES))
        d = larger(d, zero)
        even = even + d * d
    return even + odd


@njit(fastmath=FLAGS, inline="always")
def _to_codes(rows, r, lines, o, lo, hi):
    """sum_j (rows[r + j] - lines[o + j])^2 over lo <= j < hi."""
    a, b = splat(float32(0)), splat(float32(0))
    c, d = splat(float32(0)), splat(float32(0))
    j = lo
    while j + 3 < hi:
        p = o + j * LANES
        u = broadcast(rows, r + j) - load(lines, p)
        v = broadcast(rows, r + j + 1) - load(lines, p + LANES)
        x = broadcast(rows, r + j + 2) - load(lines, p + 2 * LANES)
        y = broadcast(rows, r + j + 3) - load(lines, p + 3 * LANES)
        a, b, c, d = a + u * u, b + v * v, c + x * x, d + y * y
        j += 4
    while j < hi:
        u = broadcast(rows, r + j) - load(lines, o + j * LANES)
        a = a + u * u
        j += 1
    return (a + b) + (c + d)


@njit(fastmath=FLAGS, inline="always")
def _decode_boxes(t, node, lines):
    """The boxes of a node's leaves from where the node begins: fills lines (2, first, 16)."""
    o = node * 2 * t.first * LEAF
    for side in range(2):
        for j in range(t.first):
            k = (side * t.first + j) * LANES
            step = broadcast(t.frames, (node * 2 + 1) * t.m + j)
            store(lines, k, load_bytes(t.boxes, o + k) * step)


@njit(fastmath=FLAGS, inline="always")
def _decode(t, node, leaf, lo, hi, lines, out):
    """The numbers lo to hi of a leaf's patches from where the node begins: lines[out:] (m, 16)."""
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi):
        step = broadcast(t.frames, (node * 2 + 1) * t.m + j)
        store(lines, out + j * LANES, load_bytes(t.codes, o + j * LANES) * step)


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
def _absorb(w, q, query, place, times, best, ref, left, m, Z, Z2, S, logits, places):
    """The patch at `place` enters the fold of a query, with the logit -|q - s|^2 / 2 sigma^2."""
    start, middle = origin(w, np.int64(place))
    d2 = _distance(w, q, query, start)
    half = q.half[query]
    if d2 < best[query]:
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
    C = w.shape[2]
    o = start + (w.middle[0] * w.shape[1] + w.middle[1]) * C
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


@njit(fastmath=FLAGS, nogil=True, cache=True)
def guess(part, parts, t, w, q, best, known):
    """The nearest nodes are looked into for near patches.

    Fills `best` with the smallest |q - s|^2 met, and `known` with the weight of the patches that
    were compared, the nearest's being 1.
    """
    Q = len(q.half)
    lines = np.empty(max(t.m, 2 * t.first) * LANES, np.float32)
    row = np.empty(t.m, np.float32)
    values = np.empty(max(len(t.widest), GUESSED * LANES) + LANES, np.float32)
    near, found = np.empty(GUESSED, np.int64), np.empty(GUESSED, np.int64)
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        best[query], known[query] = _guess(t, w, q, query, lines, row, values, near, found)


@njit(fastmath=FLAGS, **BORROWED)
def _guess(t, w, q, query, lines, row, values, near, found):
    supers, nodes = len(t.widest), len(t.radii)
    e = query * t.m
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
        for j in range(t.m):
            row[j] = q.E[e + j] - t.frames[node * 2 * t.m + j]
        for leaf in range(LEAF):
            _decode(t, node, leaf, 0, t.m, lines, 0)
            d = _to_codes(row, 0, lines, 0, 0, t.first - (t.m > t.first))
            if t.m > t.first:
                d = d + _to_codes(row, 0, lines, 0, t.first, t.m)
            bits = reaching(d, splat(bound))
            store(values, 0, d)
            while bits:
                lane = lowest(bits)
                bits &= bits - 1
                o = node * NODE + leaf * LEAF + lane
                if t.times[o] > 0 and values[lane] <= bound:
                    start, _ = origin(w, np.int64(t.ids[o]))
                    d2 = _distance(w, q, query, start)
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
    boxes, counts, g, t, q, asked, count, masks, place, reach, radius, best, ref, left, cost, most,
    out, bits,
):  # fmt: skip
    """Of the queries asked[k] whose mask has the bit `place`: which boxes of sixteen they reach.

    Fills `out` and `bits`; returns how many reach any. Leaves out those that have cost more than
    `most`. The boxes are the g-th sixteen, and `counts` says how many patches each holds.
    """
    n = 0
    held = load(counts, g * LANES)
    real = ~reaching(held, splat(float32(0)))
    for k in range(count):
        query = asked[k]
        if not masks[k] >> place & 1 or cost[query] > most:
            continue
        half = q.half[query]
        limit = best[query] + reach[query]
        tail = q.tails[query, 0]
        a, b = _shrunk(limit - tail, radius + q.fuzz[query], t.first)
        o = g * 2 * t.first * LANES
        d = _bound(_to_boxes(q.E, query * t.m, boxes, o, t.first), a, b - tail)
        near = reaching(d, splat(float32(limit * (1 + SLACK)))) & real
        v = load(left, query * LANES) + _skipped(d, near, ref[query], half) * held
        store(left, query * LANES, v)
        if near:
            out[n], bits[n] = query, near
            n += 1
    return n


@njit(fastmath=FLAGS, **BORROWED)
def _node(
    t, w, q, node, asked, count, masks, place, reach, patch_reach, pace,
    rows, lines, more, best, ref, left, m, Z, Z2, S, logits, places, cost,
):  # fmt: skip
    """The queries asked[k] whose mask has the bit `place` look at the patches of a node.

    Adds to `cost` what each takes, and returns what they take together.
    """
    first, M = t.first, t.m
    shared = first - 1 if first < M else first  # without the norm that stands for the rest
    _decode_boxes(t, node, lines)
    boxes = 2 * first * LANES
    decoded, decoded_more = int64(0), int64(0)
    spent = 0.0
    for k in range(count):
        if not masks[k] >> place & 1:
            continue
        query = asked[k]
        half = q.half[query]
        for j in range(M):
            rows[j] = q.E[query * M + j] - t.frames[node * 2 * M + j]
        limit = best[query] + reach[query]
        tail, less = q.tails[query, 0], q.tails[query, 1]
        a, b = _shrunk(limit - tail, t.radii[node] + q.fuzz[query], M)
        d = _bound(_to_boxes(rows, 0, lines, 0, first), a, b - tail)
        leaves = reaching(d, splat(float32(limit * (1 + SLACK))))
        total = load(left, query * LANES)
        total = total + _skipped(d, leaves, ref[query], half) * load(t.leaf_counts, node * LEAF)
        price = pace[0]
        far = splat(float32((limit + FAINT / half) * (1 + SLACK)))
        faint = float32(0)
        while leaves:
            leaf = lowest(leaves)
            leaves &= leaves - 1
            o = boxes + leaf * first * LANES
            if not decoded >> leaf & 1:
                _decode(t, node, leaf, 0, first, lines, o)
                decoded |= int64(1) << leaf
            limits = splat(float32((best[query] + patch_reach[query]) * (1 + SLACK)))
            d = _to_codes(rows, 0, lines, o, 0, shared)
            bound = d
            if first < M:
                e = broadcast(rows, shared) - load(lines, o + shared * LANES)
                bound = d + e * e
            bound = _bound(bound, a, b - tail)
            price += pace[1]
            if reaching(bound, far) == 0:
                faint += t.leaf_counts[node * LEAF + leaf]
                continue
            bits = reaching(bound, limits)
            copies = load_counts(t.times, node * NODE + leaf * LEAF)
            total = total + _skipped(bound, bits, ref[query], half) * copies
            if bits == 0:
                continue
            if first < M:
                o = (leaf * M) * LANES
                if not decoded_more >> leaf & 1:
                    _decode(t, node, leaf, first, M, more, o)
                    decoded_more |= int64(1) << leaf
                bound = _bound(d + _to_codes(rows, 0, more, o, first, M), a, b - less)
                again = reaching(bound, limits)
                price += pace[2]
                total = total + _skipped(bound, again | ~bits, ref[query], half) * copies
                bits &= again
            if bits:
                store(left, query * LANES, total)
                while bits:
                    o = node * NODE + leaf * LEAF + lowest(bits)
                    bits &= bits - 1
                    if t.times[o] > 0:
                        price += pace[3]
                        _absorb(
                            w, q, query, t.ids[o], t.times[o],
                            best, ref, left, m, Z, Z2, S, logits, places,
                        )  # fmt: skip
                total = load(left, query * LANES)
        total = total + _skipped(far, int64(0), ref[query], half) * (faint / float32(LEAF))
        store(left, query * LANES, total)
        cost[query] += price
        spent += price
    return spent


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
    first, M, A = t.first, t.m, len(asked)
    nodes, supers = len(t.radii), len(t.widest)
    lines = np.empty((2 * first + LEAF * first) * LANES, np.float32)
    more = np.empty(LEAF * M * LANES, np.float32)
    rows = np.empty(M, np.float32)
    everyone = np.full(A, 1, np.int64)
    in_group, group_bits = np.empty(A, np.int64), np.empty(A, np.int64)
    in_super, super_bits = np.empty(A, np.int64), np.empty(A, np.int64)
    spent = 0.0
    for g in range(begun + part, (supers + LANES - 1) // LANES, parts):
        radius = float32(0)
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            radius = max(radius, t.widest[s])
        near = _narrow(
            t.super_boxes, t.super_counts, g, t, q, asked, A, everyone, 0, reach, radius,
            best, ref, left, cost, most, in_group, group_bits,
        )  # fmt: skip
        for s in range(g * LANES, min((g + 1) * LANES, supers)):
            count = _narrow(
                t.node_boxes, t.node_counts, s, t, q, in_group, near, group_bits, s - g * LANES,
                reach, t.widest[s], best, ref, left, cost, most, in_super, super_bits,
            )  # fmt: skip
            if count == 0:
                continue
            for node in range(s * LANES, min((s + 1) * LANES, nodes)):
                any_near = False
                for k in range(count):
                    any_near |= super_bits[k] >> (node - s * LANES) & 1 == 1
                if any_near:
                    spent += _node(
                        t, w, q, node, in_super, count, super_bits, node - s * LANES, reach,
                        patch_reach, pace, rows, lines, more,
                        best, ref, left, m, Z, Z2, S, logits, places, cost,
                    )  # fmt: skip
            if spent > budget:
                return
    whole[0] = 1
