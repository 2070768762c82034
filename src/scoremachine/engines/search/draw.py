"""Drawing lots, compiled: which patches stand for all where too many matter to compare every one.

The weights of patches are known at four levels, each nearer to the truth and dearer than the last:

    0   all patches of a node by a Gaussian in their leading components
    1   those of a leaf by one in all kept components
    2   a patch by the codes of its kept components
    3   a patch by its bytes: the weight itself

Level 0 is summed up over all nodes. Then some nodes are drawn and looked at on level 1, some of
their leaves on level 2, some patches of these on level 3. What is drawn with a probability p
counts 1 / p times, and

    sum w_0  +  sum (w_1 - w_0) / p  +  sum (w_2 - w_1) / p  +  sum (w_3 - w_2) / p
    all nodes   nodes drawn             leaves drawn            patches drawn

is the sum of all w_3, on average (Horvitz & Thompson 1952). Only what two neighbouring levels make
different is left to chance (Giles 2008). What is drawn most is what the error of S / Z hears most
of: p is in proportion to w |v - D| sqrt(e^x - 1), and 1 where that is large. v is what a patch
answers with, D about what the answer will be, and x = |s|^2 / sigma^2 for the components of the
patch that the next level adds, and what a Gaussian smooths over: in noise they change its weight by
a factor of variance e^x - 1. Lots are drawn in the order of the tree at even distances (Madow
1949), so that like patches are drawn evenly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.distances import (
    FAR,
    filled_up,
    frame_of,
    from_node,
    in_bytes,
    norms_of,
    others_at,
    products,
    products_from,
)
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    add_totals,
    broadcast,
    by_fours,
    floor,
    hmax,
    hsum,
    inverse,
    larger,
    load,
    load_bytes,
    load_counts,
    load_every,
    logs,
    lowest,
    prefetch,
    reaching,
    root,
    running,
    smaller,
    splat,
    store,
    weights,
)
from scoremachine.engines.search.patches import middle_of, origin
from scoremachine.engines.search.seek import LOG2E, WAITING, fetch
from scoremachine.engines.search.tree import LEAF, NODE

TURNS = 32  # parts of what is drawn that are compared with each other
# Sums: 0 and 1 of nodes, 1 and 2 of leaves, 2 and 3 of patches, and w_3^2 with what patches weigh
# on level 2 that turn out to be known
LEVELS = 7
STAND_IN, NODES, LEAVES, AGAIN, PATCHES, TRULY, SQUARED = range(LEVELS)
# What chance does where leaves go from level 1 to 2, by the draws of nodes and of leaves; and where
# patches go from level 2 to 3, by the draws of nodes, of leaves and of patches
STAGES = 5
BY_NODE, BY_LEAF, OF_NODE, OF_LEAF, OF_PATCH = range(STAGES)
QUAD = 4  # numbers that are summed up side by side
# log2 of how many patches they hold
OF_A_NODE, OF_A_LEAF = np.float32(math.log2(NODE)), np.float32(math.log2(LANES))
LINE = 64  # bytes that are brought near together
AWAY = 0.01  # the least (v - D)^2 of a channel
ALIKE = 0.25  # of a patch's relative variance, what is left in that of a leaf's sum
DOUBT, DOUBTFUL = np.float32(0.02), np.float32(10)  # the least, the largest relative variance


class Gaussians(NamedTuple):
    """What stands in for nodes at a noise level sigma, in sixteens.

    Attributes:
        mean: Of the leading components, float32 (supers, leading, 16).
        precision: log2 e / (2 (sigma^2 + variance)), float32 (supers, leading, 16).
        plus: What is added to log2 of a node's weight, float32 (supers, 16).
        doubt: By how much, relatively, the weight of a patch of a node may change on the levels
            that follow, float32 (supers, 16).
        middles: The mean of the pixels that its patches answer with, float32 (supers, C, 16).
    """

    mean: np.ndarray
    precision: np.ndarray
    plus: np.ndarray
    doubt: np.ndarray
    middles: np.ndarray


class Known(NamedTuple):
    """What is known of patches before anything is asked, flat.

    Attributes:
        values: The pixels that patches answer with, uint8 (nodes, leaves, C, 16).
        means: Of every leaf their mean, and the root of their variance, uint8 (nodes, C + 1, 16).
        moments: Mean and standard deviation of the first codes in every leaf, uint8 (nodes, 2,
            first, 16).
        centres: Means of the codes that follow, uint8 (nodes, (m - first) / 4, 16, 4).
    """

    values: np.ndarray
    means: np.ndarray
    moments: np.ndarray
    centres: np.ndarray


class Pixels(NamedTuple):
    """What lots are drawn for.

    Attributes:
        E: Components of the windows in whole vectors, as in `seek.Queries`, and zeros where norms
            are, float32 (Q, `seek.filled_up`) flat.
        leading: How many lead.
        following: How many kept ones follow.
        others: The |.|^2 of the components that follow, float64 (Q).
        rest: The |.|^2 of everything beyond the leading components, float64 (Q).
        y: The windows, float32 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float32 (row).
        half: 1 / (2 sigma^2).
        top: log2 of the largest weight of a node, float32 (Q).
        total: Sum of the weights of the nodes in units of 2^top, and of weights times middles,
            float64 (Q, 1 + C).
        answer: About what the answer will be, float32 (Q, C).
        shares: What the nodes of a super may contribute to its error, float32 (Q, supers).
        scale: The sum of that, float64 (Q).
        amounts: How many nodes, leaves and patches to draw, float64 (Q, 3).
        start: Where to begin, in [0, 1), float64 (Q).
        cut: log2 of the weight from which on a patch is known and needs no lots, float32 (Q): no
            level takes a patch to weigh more.
        near: The sum of the weights that are known, in units of 2^top, and of weights times
            values, float64 (Q, 1 + C).
    """

    E: np.ndarray
    leading: int
    following: int
    others: np.ndarray
    rest: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: float
    top: np.ndarray
    total: np.ndarray
    answer: np.ndarray
    shares: np.ndarray
    scale: np.ndarray
    amounts: np.ndarray
    start: np.ndarray
    cut: np.ndarray
    near: np.ndarray


class Room(NamedTuple):
    """What a thread writes on."""

    mean: np.ndarray  # of leading components, of the leaves of a node (leading, 16)
    precision: np.ndarray  # log2 e / (2 (sigma^2 + variance)), likewise (leading, 16)
    plus: np.ndarray  # what is added to log2 of what leaves weigh (16)
    ratio: np.ndarray  # sigma^2 / (sigma^2 + variance) of the components that follow (16)
    norm: np.ndarray  # |.|^2 / (2 sigma^2) log2 e of their means, from where a node begins (16)
    doubt: np.ndarray  # by how much, relatively, that may change on level 2 (16)
    middles: np.ndarray  # the means of what their patches answer with (C, 16)
    spread: np.ndarray  # the mean (v - middle)^2, summed over channels (16)
    norms: np.ndarray  # |.|^2 / (2 sigma^2) log2 e of patches' codes (leaves, 16)
    held: np.ndarray  # copies (leaves, 16)
    doubts: np.ndarray  # by how much, relatively, weights may change on level 3 (leaves, 16)
    values: np.ndarray  # what patches answer with (leaves, C, 16)
    seen: np.ndarray  # sums over patches (1 + C, 16)
    low: np.ndarray  # where the components of a node begin, and zeros where norms are (`filled_up`)
    step: np.ndarray  # and what a step of its codes is, likewise (`filled_up`)
    row: np.ndarray  # a query from there (`filled_up`)
    bytes: np.ndarray  # that times the steps: high and low bytes (2, `filled_up`)
    lots: np.ndarray  # how far it is to the next lot: of nodes, leaves, patches (3, Q)
    turn: np.ndarray  # whose turn it is (Q)
    who: np.ndarray  # the queries that drew each node of sixteen (16, Q)
    times: np.ndarray  # for how many it stands (16, Q)
    stand_in: np.ndarray  # its weight on level 0 (16, Q)
    counts: np.ndarray  # how many queries that are (16)
    waiting: np.ndarray  # how many patches are to be compared (1)
    places: np.ndarray  # where they are in the tree
    starts: np.ndarray  # where they begin in the images
    owners: np.ndarray  # the queries that drew them
    offsets: np.ndarray  # where what they say is added up
    stand_for: np.ndarray  # how many they stand for, their leaves, their nodes; and times what they
    # weigh on level 2 (4, ...)
    shares: np.ndarray  # of a lot, of sixteen nodes, leaves or patches
    weight: np.ndarray  # what sixteen weigh
    away: np.ndarray  # the |v - D| of sixteen leaves
    reach: np.ndarray  # for how many of a node's leaves each stands (16)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def middles(part, parts, t, w, values, of_leaves, of_nodes):
    """The pixels that patches answer with, uint8 (nodes, leaves, C, 16); of leaves the means and
    the root of the variance, uint8 (nodes, C + 1, 16), and of nodes the means (nodes, C)."""
    nodes, C = len(t.radii), w.shape[2]
    starts = np.empty(NODE, np.int64)
    sums = np.empty(C)
    for node in range(part * nodes // parts, (part + 1) * nodes // parts):
        for k in range(NODE):
            starts[k] = middle_of(w, origin(w, np.int64(t.ids[node * NODE + k]))) * C
            prefetch(w.flat, starts[k])
        total = 0.0
        of_nodes[node] = 0
        for leaf in range(LEAF):
            n, squares = 0.0, 0.0
            sums[:] = 0
            for lane in range(LANES):
                k = leaf * LANES + lane
                times = float(t.times[node * NODE + k])
                for c in range(C):
                    value = w.flat[starts[k] + c]
                    values[((node * LEAF + leaf) * C + c) * LANES + lane] = value
                    sums[c] += times * value
                    squares += times * value * value
                n += times
            squares /= max(n, 1.0)
            for c in range(C):
                of_nodes[node, c] += sums[c]
                m = sums[c] / max(n, 1.0)
                squares -= m * m
                of_leaves[(node * (C + 1) + c) * LEAF + leaf] = round(m)
            deviation = math.sqrt(max(squares, 0.0))
            of_leaves[(node * (C + 1) + C) * LEAF + leaf] = round(min(deviation, 255.0))
            total += n
        for c in range(C):
            of_nodes[node, c] = of_nodes[node, c] / (total * 127.5) - 1


@njit(fastmath=FLAGS, **BORROWED)
def _moments(part, parts, t, of_leaves, centres, mean, variance):
    """What `moments` does."""
    nodes, following = len(t.radii), t.m - t.first
    for node in range(part * nodes // parts, (part + 1) * nodes // parts):
        s, lane = node // LANES, node % LANES
        n = t.node_counts[node]
        for j in range(t.first):
            o = (node * 2 * t.first + j) * LEAF
            total, squares = float32(0), float32(0)
            for leaf in range(LEAF):
                held = load_counts(t.times, node * NODE + leaf * LANES)
                x = load_every(t.codes, ((node * LEAF + leaf) * t.m + j // 4 * 4) * LANES, j % 4)
                u, v = hsum(x * held), hsum(x * x * held)
                part_of = max(t.leaf_counts[node * LEAF + leaf], float32(1))
                total, squares = total + u, squares + v
                m = u / part_of
                deviation = math.sqrt(max(v / part_of - m * m, float32(0)))
                of_leaves[o + leaf] = round(m)
                of_leaves[o + t.first * LEAF + leaf] = round(deviation)
            m, step = total / n, t.frames[(node * 2 + 1) * t.m + j]
            mean[s, j, lane] = t.frames[node * 2 * t.m + j] + step * m
            variance[s, j, lane] = step * step * max(float32(0), squares / n - m * m)
        for leaf in range(LEAF):
            held = load_counts(t.times, node * NODE + leaf * LANES)
            part_of = max(t.leaf_counts[node * LEAF + leaf], float32(1))
            o = ((node * LEAF + leaf) * t.m + t.first) * LANES
            at = node * following * LEAF + leaf * 4
            for j in range(following):
                x = load_every(t.codes, o + j // 4 * 4 * LANES, j % 4)
                centres[at + j // 4 * 4 * LEAF + j % 4] = round(hsum(x * held) / part_of)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def moments(part, parts, t, of_leaves, centres, mean, variance):
    """Means and standard deviations of the first codes in every leaf, uint8 (nodes, 2, first, 16);
    means of those that follow, uint8 (nodes, (m - first) / 4, 16, 4); means and variances of the
    first numbers in every node, float32 (supers, first, 16)."""
    _moments(part, parts, t, of_leaves, centres, mean, variance)


@njit(fastmath=FLAGS, inline="always")
def _stood_in(gaussians, s, E, e, leading, top, at_most):
    """What the Gaussians of sixteen nodes or leaves weigh, in units of 2^top: log2 of that."""
    even, odd = load(gaussians.plus, s * LANES), splat(-top)
    for j in range(0, leading - 1, 2):
        o = (s * leading + j) * LANES
        d = broadcast(E, e + j) - load(gaussians.mean, o)
        u = broadcast(E, e + j + 1) - load(gaussians.mean, o + LANES)
        even = even - d * d * load(gaussians.precision, o)
        odd = odd - u * u * load(gaussians.precision, o + LANES)
    if leading % 2 == 1:
        o = (s * leading + leading - 1) * LANES
        d = broadcast(E, e + leading - 1) - load(gaussians.mean, o)
        even = even - d * d * load(gaussians.precision, o)
    return smaller(even + odd, splat(at_most))


@njit(fastmath=FLAGS, inline="always")
def _away(values, k, answer, query, least):
    """(v - D)^2 of the k-th sixteen values (k, C, 16), summed over channels, and `least`."""
    C = answer.shape[1]
    total = splat(float32(C * least))
    for c in range(C):
        d = load(values, (k * C + c) * LANES) - splat(answer[query, c])
        total = total + d * d
    return total


@njit(fastmath=FLAGS, **BORROWED)
def _weigh(part, parts, g, E, leading, cut, w, top, total, answer, shares, scale):
    """What `weigh` does once there is room."""
    Q, C = len(top), total.shape[1] - 1
    K, supers = len(E) // Q, len(g.plus) // LANES
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        most = splat(float32(-FAR))
        for s in range(supers):
            x = _stood_in(g, s, E, query * K, leading, float32(0), cut[query] + OF_A_NODE)
            most = larger(most, x)
            store(w, s * LANES, x)
        top[query] = hmax(most)
        sum_ = splat(float32(0))
        for s in range(supers):
            x = weights(load(w, s * LANES) - splat(top[query]), int64(0))
            store(w, s * LANES, x)
            sum_ = sum_ + x
        total[query, 0] = hsum(sum_)
        for c in range(C):
            sum_ = splat(float32(0))
            for s in range(supers):
                sum_ = sum_ + load(w, s * LANES) * load(g.middles, (s * C + c) * LANES)
            total[query, c + 1] = hsum(sum_)
            answer[query, c] = total[query, c + 1] / total[query, 0]
        scale[query] = 0
        for s in range(supers):
            away = root(_away(g.middles, s, answer, query, AWAY)) * load(g.doubt, s * LANES)
            shares[query, s] = hsum(load(w, s * LANES) * away)
            scale[query] += shares[query, s]


@njit(fastmath=FLAGS, nogil=True, cache=True)
def weigh(part, parts, g, E, leading, cut, top, total, answer, shares, scale):
    """What all nodes weigh on level 0: see `Pixels`."""
    w = np.empty(len(g.plus), np.float32)
    _weigh(part, parts, g, E, leading, cut, w, top, total, answer, shares, scale)


@njit(fastmath=FLAGS, **BORROWED)
def _drawn(portions, shares, lots, query):
    """Which of sixteen a query draws: a bit for each. `shares` are their portions, at most one."""
    total = lots[query] + hsum(portions)
    if total < 1:
        lots[query] = total
        return int64(0)
    at_most = smaller(portions, splat(float32(1)))
    store(shares, 0, at_most)
    upto = running(at_most) + splat(float32(lots[query]))
    total = hmax(upto)
    lots[query] = total - math.floor(total)
    return reaching(floor(upto - at_most) + splat(float32(1)), floor(upto))


@njit(fastmath=FLAGS, **BORROWED)
def _nodes(g, p, s, room):
    """Which nodes of a super the queries draw."""
    Q, K = len(p.top), len(p.E) // len(p.top)
    room.counts[:] = 0
    for query in range(Q):
        amount = p.amounts[query, 0] / p.scale[query]
        total = room.lots[0, query] + p.shares[query, s] * amount
        if total < 1:  # none, as `_drawn` would find
            room.lots[0, query] = total
            continue
        most = p.cut[query] - p.top[query] + OF_A_NODE
        w = weights(_stood_in(g, s, p.E, query * K, p.leading, p.top[query], most), int64(0))
        away = root(_away(g.middles, s, p.answer, query, AWAY)) * load(g.doubt, s * LANES)
        bits = _drawn(w * away * float32(amount), room.shares, room.lots[0], query)
        store(room.weight, 0, w)
        while bits:
            lane = lowest(bits)
            bits &= bits - 1
            n = room.counts[lane]
            room.who[lane, n] = query
            room.times[lane, n] = 1 / room.shares[lane]
            room.stand_in[lane, n] = room.weight[lane]
            room.counts[lane] = n + 1


@njit(fastmath=FLAGS, inline="always")
def _square(t, node, leaf, lo, hi):
    """The sum of the squares of the numbers lo to hi of the patches of a leaf."""
    total = splat(float32(0))
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi):
        x = load_every(t.codes, o + j // 4 * 4 * LANES, j % 4)
        x = x * broadcast(t.frames, (node * 2 + 1) * t.m + j)
        x = x + broadcast(t.frames, node * 2 * t.m + j)
        total = total + x * x
    return total


@njit(fastmath=FLAGS, inline="always")
def _doubt(x):
    """About e^x - 1: the variance of the weight that |s|^2 = x sigma^2 in noise stands for."""
    return smaller(x + x * x * float32(0.5), splat(DOUBTFUL)) + splat(DOUBT)


@njit(fastmath=FLAGS, inline="always")
def _moment(t, known, node, j):
    """Mean and standard deviation of the j-th number of the patches of sixteen leaves."""
    o, k = (node * 2 * t.first + j) * LEAF, node * 2 * t.m + j
    step = broadcast(t.frames, k + t.m)
    mean = load_bytes(known.moments, o) * step + broadcast(t.frames, k)
    return mean, load_bytes(known.moments, o + t.first * LEAF) * step


@njit(fastmath=FLAGS, **BORROWED)
def _open(t, known, node, C, half, leading, following, room):
    """Works out what the queries that drew a node share: what stands in for its leaves."""
    frame_of(t, node, room.low, room.step)
    for j in range(leading, t.first):  # norms are no components
        room.low[j], room.step[j] = 0, 0
    one, within, log = splat(float32(1)), splat(float32(0)), splat(float32(0))
    narrow = one
    for j in range(leading):
        mean, deviation = _moment(t, known, node, j)
        more = deviation * deviation * float32(2 * half)
        store(room.mean, j * LANES, mean)
        store(room.precision, j * LANES, inverse(one + more) * float32(half * LOG2E))
        within, narrow = within + more, narrow * (one + more)
        if j % 4 == 3 or j == leading - 1:  # no more, or else it overflows
            log, narrow = log + logs(narrow), one
    log = log * float32(0.5)
    if t.m > t.first:  # the norm of the other kept components comes last
        mean, deviation = _moment(t, known, node, t.first - 1)
        squares, norm = mean * mean + deviation * deviation, splat(float32(0))
        at = others_at(t.first)
        for j in range(t.m - t.first):
            o = (node * (t.m - t.first) + j // 4 * 4) * LEAF
            x = load_every(known.centres, o, j % 4) * broadcast(room.step, at + j)
            norm = norm + x * x
            x = x + broadcast(room.low, at + j)
            squares = squares - x * x
        more = larger(squares, splat(float32(0))) * float32(2 * half)
        wider = one + more * float32(1 / following)
        store(room.ratio, 0, inverse(wider))
        store(room.norm, 0, norm * float32(half * LOG2E))
        within, log = within + more, log + logs(wider) * float32(0.5 * following)
    store(room.plus, 0, logs(load(t.leaf_counts, node * LEAF)) - log)
    store(room.doubt, 0, root(_doubt(within) * float32(ALIKE)))
    for c in range(C):
        v = load_bytes(known.means, (node * (C + 1) + c) * LEAF)
        store(room.middles, c * LANES, v * float32(1 / 127.5) - float32(1))
    s = load_bytes(known.means, (node * (C + 1) + C) * LEAF) * float32(1 / 127.5)
    store(room.spread, 0, s * s)


@njit(fastmath=FLAGS, inline="always")
def _open_leaf(t, values, node, leaf, C, half, leading, room):
    """Works out what the queries that drew a leaf share."""
    scale, o = float32(half * LOG2E), leaf * LANES
    norm = norms_of(t, room.step, node, leaf, 0, by_fours(leading), 0)
    norm = norm + norms_of(t, room.step, node, leaf, t.first, t.m, others_at(t.first))
    store(room.norms, o, norm * scale)
    store(room.held, o, load_counts(t.times, node * NODE + o))
    rest = _square(t, node, leaf, leading, t.first - (1 if t.m > t.first else 0))
    store(room.doubts, o, root(_doubt(rest * float32(2 * half))))
    for c in range(C):
        v = load_bytes(values, ((node * LEAF + leaf) * C + c) * LANES)
        store(room.values, (leaf * C + c) * LANES, v * float32(1 / 127.5) - float32(1))


@njit(fastmath=FLAGS, inline="always")
def _distance(w, p, query, start):
    """|q - s|^2 in float32."""
    h, row, stride = w.size[0], len(p.mask), w.shape[1] * w.shape[2]
    total = splat(float32(0))
    o = query * h * row
    for a in range(h):
        for b in range(0, row - LANES, LANES):
            d = load_bytes(w.flat, start + a * stride + b) - load(p.y, o + a * row + b)
            total = total + d * d
        b = row - LANES
        d = load_bytes(w.flat, start + a * stride + b) - load(p.y, o + a * row + b)
        d = d * load(p.mask, b)
        total = total + d * d
    return hsum(total) * float32(1 / 127.5**2)


@njit(fastmath=FLAGS, **BORROWED)
def _total(sums, o, seen, K, times):
    """Adds the K numbers that have been seen, `times` times, to sums[o : o + K]."""
    for k in range(0, K, QUAD):
        add_totals(sums, o + k, seen, k * LANES, times)


@njit(fastmath=FLAGS, **BORROWED)
def _stand_in(sums, o, middles, k, stride, C, x):
    """Adds x, and x times middles[k], middles[k + stride] ..., to sums[o : o + 1 + C]."""
    sums[o] += x
    for c in range(C):
        sums[o + c + 1] += x * middles[k + c * stride]


@njit(fastmath=FLAGS, **BORROWED)
def _compare(t, w, p, room, sums, spread, spent, chance):
    """Compares the patches that wait: several at once, for most of the time goes into memory."""
    C = w.shape[2]
    W = by_fours(1 + C)
    fetch(t, w, room)
    for k in range(room.waiting[0]):
        place, start, query = room.places[k], room.starts[k], room.owners[k]
        log = (p.rest[query] - _distance(w, p, query, start)) * p.half - p.top[query] / LOG2E
        o = room.offsets[k]
        known = room.stand_for[3, k]
        x = room.stand_for[0, k] * t.times[place] * math.exp(log)
        if log * LOG2E > p.cut[query] - p.top[query]:
            x = 0.0
            sums[o + SQUARED * W + 1] += known
        sums[o + PATCHES * W] += known
        sums[o + TRULY * W] += x
        sums[o + SQUARED * W] += x * math.exp(log)
        spread[query, 2] += x * x / known
        middle, away = middle_of(w, start) * C, 0.0
        for c in range(C):
            value = w.flat[middle + c] * (1 / 127.5) - 1
            sums[o + PATCHES * W + c + 1] += known * value
            sums[o + TRULY * W + c + 1] += x * value
            away += (value - p.answer[query, c]) ** 2
        away *= (x - known) ** 2 / room.stand_for[0, k]
        chance[query, OF_NODE] += (room.stand_for[2, k] - 1) * away
        chance[query, OF_LEAF] += (room.stand_for[1, k] - room.stand_for[2, k]) * away
        chance[query, OF_PATCH] += (room.stand_for[0, k] - room.stand_for[1, k]) * away
        spent[query, 2] += 1
    room.waiting[0] = 0


@njit(fastmath=FLAGS, **BORROWED)
def _see(seen, middles, o, C, w):
    """What sixteen weigh, and that times what they answer with."""
    store(seen, 0, w)
    for c in range(C):
        store(seen, (c + 1) * LANES, w * load(middles, o + c * LANES))


@njit(fastmath=FLAGS, **BORROWED)
def _visit(t, w, p, known, node, lane, middle, room, sums, spread, spent, chance):
    """The queries that drew a node look at it."""
    Q, C = len(p.top), w.shape[2]
    others_from, end = others_at(t.first), filled_up(t.first, t.m)
    leading, scale = by_fours(p.leading), float32(p.half * LOG2E)
    W = by_fours(1 + C)
    of_turn = Q * LEVELS * W
    opened = int64(0)
    for k in range(room.counts[lane]):
        query, times, u = room.who[lane, k], room.times[lane, k], room.stand_in[lane, k]
        mine = query * LEVELS * W
        room.turn[query] += 1
        group = room.turn[query] % TURNS
        cut = p.cut[query] - p.top[query]
        most = cut + OF_A_LEAF
        far = from_node(p.E, query * end, room.low, room.row, 0, others_from)
        others = from_node(p.E, query * end, room.low, room.row, others_from, end)
        unit, _ = in_bytes(room.row, room.step, 0, end, scale + scale, room.bytes)
        v = _stood_in(room, 0, p.E, query * end, p.leading, p.top[query], float32(FAR))
        if t.m > t.first:
            o, n = node * (t.m - t.first) * LEAF, t.m - t.first
            x = products_from(known.centres, o, n, room.bytes, others_from) * unit
            x = splat(others * scale) - x + load(room.norm, 0)
            v = v - x * load(room.ratio, 0) + splat(float32(p.others[query]) * scale)
        v = weights(smaller(v, splat(most)), int64(0))
        again = hsum(v)
        spread[query, 0] += times * again * again / u if u > 0 else 0.0
        spent[query, 0] += 1
        o = (TURNS if times == 1 else group) * of_turn + mine
        _stand_in(sums, o + STAND_IN * W, middle, 0, 1, C, times * u)
        _see(room.seen, room.middles, 0, C, v)
        _total(sums, o + NODES * W, room.seen, W, times)
        away = root(_away(room.middles, 0, p.answer, query, AWAY) + load(room.spread, 0))
        amount = float32(p.amounts[query, 1] / p.scale[query]) * times
        bits = _drawn(v * away * load(room.doubt, 0) * amount, room.shares, room.lots[1], query)
        if bits == 0:
            continue
        store(room.weight, 0, v)
        store(room.away, 0, away)
        store(room.reach, 0, inverse(load(room.shares, 0)) * times)
        new = bits & ~opened
        while new:
            _fetch_leaf(t, known.values, node, lowest(new), C)
            new &= new - 1
        far = (far + others - float32(p.others[query])) * scale + p.top[query]
        while bits:
            leaf = lowest(bits)
            bits &= bits - 1
            if not opened >> leaf & 1:
                _open_leaf(t, known.values, node, leaf, C, p.half, p.leading, room)
                opened |= int64(1) << leaf
            u, leaf_times, leaf_group = room.weight[leaf], room.reach[leaf], group
            if times == 1 and leaf_times > 1:
                room.turn[query] += 1
                leaf_group = room.turn[query] % TURNS
            log = products(t, node, leaf, 0, leading, room.bytes, 0)
            log = log + products(t, node, leaf, t.first, t.m, room.bytes, others_from)
            log = log * unit - load(room.norms, leaf * LANES) - splat(far)
            log = smaller(log, splat(cut))
            v = weights(log, int64(0)) * load(room.held, leaf * LANES)
            away = root(_away(room.values, leaf, p.answer, query, AWAY))
            again = hsum(v)
            spread[query, 1] += leaf_times * again * again / u if u > 0 else 0.0
            spent[query, 1] += 1
            x = hsum(v * away) - u * room.away[leaf]
            chance[query, BY_NODE] += (times - 1) * leaf_times * x * x
            chance[query, BY_LEAF] += (leaf_times - times) * leaf_times * x * x
            o = (TURNS if leaf_times == 1 else leaf_group) * of_turn + mine
            _stand_in(sums, o + LEAVES * W, room.middles, leaf, LANES, C, leaf_times * u)
            _see(room.seen, room.values, leaf * C * LANES, C, v)
            _total(sums, o + AGAIN * W, room.seen, W, leaf_times)
            amount = float32(p.amounts[query, 2] / p.scale[query]) * leaf_times
            portions = v * away * load(room.doubts, leaf * LANES) * amount
            of_leaf = _drawn(portions, room.shares, room.lots[2], query)
            while of_leaf:
                patch = lowest(of_leaf)
                of_leaf &= of_leaf - 1
                place = node * NODE + leaf * LANES + patch
                prefetch(t.ids, place)
                i = room.waiting[0]
                room.places[i], room.owners[i] = place, query
                patch_times = leaf_times / room.shares[patch]
                room.stand_for[0, i], room.stand_for[1, i] = patch_times, leaf_times
                room.stand_for[2, i] = times
                room.stand_for[3, i] = patch_times * room.seen[patch]
                patch_group = leaf_group
                if patch_times == 1:
                    patch_group = TURNS
                elif leaf_times == 1:
                    room.turn[query] += 1
                    patch_group = room.turn[query] % TURNS
                room.offsets[i] = patch_group * of_turn + mine
                room.waiting[0] = i + 1
        if room.waiting[0] >= WAITING:
            _compare(t, w, p, room, sums, spread, spent, chance)


@njit(inline="always")
def _fetch_node(t, known, node, C):
    """Has what stands in for the leaves of a node brought near."""
    for o in range(0, 2 * t.first * LEAF, LINE):
        prefetch(known.moments, node * 2 * t.first * LEAF + o)
    for o in range(0, (t.m - t.first) * LEAF, LINE):
        prefetch(known.centres, node * (t.m - t.first) * LEAF + o)
    for o in range(0, 2 * t.m, LINE // 4):
        prefetch(t.frames, node * 2 * t.m + o)
    prefetch(t.leaf_counts, node * LEAF)
    prefetch(known.means, node * (C + 1) * LEAF)


@njit(inline="always")
def _fetch_leaf(t, values, node, leaf, C):
    """Has the codes and the values of a leaf brought near."""
    at = node * LEAF + leaf
    for o in range(0, t.m * LANES, LINE):
        prefetch(t.codes, at * t.m * LANES + o)
    prefetch(t.times, at * LANES)
    prefetch(values, at * C * LANES)


@njit(fastmath=FLAGS, **BORROWED)
def _draw(part, parts, t, w, g, p, known, middle, room, sums, spread, spent, chance):
    """What `draw` does once there is room."""
    Q, C = len(p.top), w.shape[2]
    supers, nodes = len(t.widest), len(t.radii)
    for query in range(Q):
        room.turn[query] = part
        for k in range(3):
            room.lots[k, query] = (p.start[query] * (k + 1) + part * 0.7548776662) % 1.0
    for s in range(part * supers // parts, (part + 1) * supers // parts):
        _nodes(g, p, s, room)
        here = min(LANES, nodes - s * LANES)
        for lane in range(here):
            if room.counts[lane] > 0:
                _fetch_node(t, known, s * LANES + lane, C)
        for lane in range(here):
            node = s * LANES + lane
            if room.counts[lane] == 0:
                continue
            _open(t, known, node, C, p.half, p.leading, p.following, room)
            for c in range(C):
                middle[c] = g.middles[(s * C + c) * LANES + lane]
            _visit(t, w, p, known, node, lane, middle, room, sums, spread, spent, chance)
    _compare(t, w, p, room, sums, spread, spent, chance)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def draw(part, parts, t, w, g, p, known, sums, spread, spent, chance):
    """What the queries draw of a part of the nodes.

    Fills `sums`, (TURNS + 1, Q, LEVELS, `by_fours(1 + C)`) flat: of weights and of weights times
    values, the last of what was not left to chance. `spread`, (Q, 3), has the sums of v^2 / u,
    where u is what nodes, leaves and patches weigh by one level and v what they weigh by the next.
    `spent` counts them, (Q, 3). `chance`, (Q, STAGES), is in proportion to what each stage of the
    draws adds to the variance of the sum of a level, if no patch tells anything about another: with
    x an amount by which the level changes what stands for n such, and for n' at the stage before,
    (n - n') n x^2 summed over what was drawn.
    """
    Q, C, end = len(p.top), w.shape[2], filled_up(t.first, t.m)
    room = Room(
        np.empty(p.leading * LANES, np.float32),
        np.empty(p.leading * LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(C * LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(LEAF * C * LANES, np.float32),
        np.zeros(by_fours(1 + C) * LANES, np.float32),
        np.zeros(end, np.float32),
        np.zeros(end, np.float32),
        np.empty(end, np.float32),
        np.empty(2 * end, np.int8),
        np.empty((3, Q)),
        np.empty(Q, np.int64),
        np.empty((LANES, Q), np.int64),
        np.empty((LANES, Q), np.float32),
        np.empty((LANES, Q), np.float32),
        np.empty(LANES, np.int64),
        np.zeros(1, np.int64),
        np.empty(WAITING + NODE, np.int64),
        np.empty(WAITING + NODE, np.int64),
        np.empty(WAITING + NODE, np.int64),
        np.empty(WAITING + NODE, np.int64),
        np.empty((4, WAITING + NODE)),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    middle = np.empty(C, np.float32)
    _draw(part, parts, t, w, g, p, known, middle, room, sums, spread, spent, chance)
