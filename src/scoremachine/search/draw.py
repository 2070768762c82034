"""Drawing lots, compiled: which patches stand for all where too many matter to compare every one.

The weights of patches are known at four levels, each nearer to the truth and dearer than the last:

    0   all patches of a node by a Gaussian in their leading components
    1   a patch by the codes of its leading components
    2   a patch by the codes of all its kept components
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
patch that the next level adds: in noise they change its weight by a factor of variance e^x - 1.
Lots are drawn in the order of the tree at even distances (Madow 1949), so that like patches are
drawn evenly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64, njit

from scoremachine.kernels.whole import FLAGS
from scoremachine.search.floats import (
    LANES,
    add_totals,
    broadcast,
    hmax,
    hsum,
    larger,
    load,
    load_bytes,
    load_counts,
    load_every,
    prefetch,
    root,
    smaller,
    splat,
    store,
    weights,
)
from scoremachine.search.seek import (
    FAR,
    LOG2E,
    WAITING,
    fetch,
    filled_up,
    frame_of,
    from_node,
    in_bytes,
    middle_of,
    norms_of,
    origin,
    others_at,
    products,
)
from scoremachine.search.tree import BORROWED, LEAF, NODE, by_fours

TURNS = 32  # parts of what is drawn that are compared with each other
LEVELS = 7  # sums: 0 and 1 of nodes, 1 and 2 of leaves, 2 and 3 of patches, and w_3^2
STAND_IN, NODES, LEAVES, AGAIN, PATCHES, TRULY, SQUARED = range(LEVELS)
# What chance does where leaves go from level 1 to 2, by the draws of nodes and of leaves; and where
# patches go from level 2 to 3, by the draws of nodes, of leaves and of patches
STAGES = 5
BY_NODE, BY_LEAF, OF_NODE, OF_LEAF, OF_PATCH = range(STAGES)
QUAD = 4  # numbers that are summed up side by side
AWAY = 0.01  # the least (v - D)^2 of a channel
DOUBT, DOUBTFUL = np.float32(0.02), np.float32(10)  # the least, the largest relative variance


class Gaussians(NamedTuple):
    """What stands in for nodes at a noise level sigma, in sixteens.

    Attributes:
        mean: Of the leading components, float32 (supers, leading, 16).
        precision: 1 / (2 (sigma^2 + variance)), float32 (supers, leading, 16).
        less: What is missing in the logarithm of a node's weight, float32 (supers, 16).
        doubt: By how much, relatively, the weight of a patch of a node may change on the levels
            that follow, float32 (supers, 16).
        middles: The mean of the pixels that its patches answer with, float32 (supers, C, 16).
    """

    mean: np.ndarray
    precision: np.ndarray
    less: np.ndarray
    doubt: np.ndarray
    middles: np.ndarray


class Pixels(NamedTuple):
    """What lots are drawn for.

    Attributes:
        E: Components of the windows in whole vectors, as in `seek.Queries`, and zeros where norms
            are, float32 (Q, `seek.filled_up`) flat.
        leading: How many lead.
        others: The |.|^2 of the components that follow, float64 (Q).
        rest: The |.|^2 of everything beyond the leading components, float64 (Q).
        y: The windows, float32 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float32 (row).
        half: 1 / (2 sigma^2).
        top: log2 of the largest weight of a node, float32 (Q).
        total: Sum of the weights of the nodes in units of 2^top, and of weights times middles,
            float64 (Q, 1 + C).
        answer: About what the answer will be, float32 (Q, C).
        scale: Sum of what the nodes may contribute to its error, float64 (Q).
        amounts: How many nodes, leaves and patches to draw, float64 (Q, 3).
        start: Where to begin, in [0, 1), float64 (Q).
    """

    E: np.ndarray
    leading: int
    others: np.ndarray
    rest: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: float
    top: np.ndarray
    total: np.ndarray
    answer: np.ndarray
    scale: np.ndarray
    amounts: np.ndarray
    start: np.ndarray


class Room(NamedTuple):
    """What a thread writes on."""

    norms: np.ndarray  # |.|^2 / (2 sigma^2) log2 e of the codes: leading, others (2, leaves, 16)
    held: np.ndarray  # copies (leaves, 16)
    doubt: np.ndarray  # the relative variance of weights on level 2, and its root on level 3 (2,
    # leaves, 16)
    values: np.ndarray  # middles (leaves, C, 16)
    seen: np.ndarray  # sums over leaves: level 1 of all, 1 and 2 of those drawn for sure, 1 and 2
    # of one that is left to chance (5, 1 + C, 16)
    low: np.ndarray  # where the components of a node begin, and zeros where norms are (`filled_up`)
    step: np.ndarray  # and what a step of its codes is, likewise (`filled_up`)
    row: np.ndarray  # a query from there (`filled_up`)
    bytes: np.ndarray  # that times the steps: high and low bytes (2, `filled_up`)
    logs: np.ndarray  # log2 of what the patches of a node weigh on level 1 (leaves, 16)
    known: np.ndarray  # and what that is (leaves, 16)
    away: np.ndarray  # their (v - D)^2 (leaves, 16)
    parts: np.ndarray  # the squares of what each may make wrong (leaves, 16)
    totals: np.ndarray  # sums over leaves: of what is known, of these squares (2, leaves)
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
    shares: np.ndarray  # for how many they stand, their leaves, their nodes; their level 2 (4, ...)
    lanes: np.ndarray  # sixteen numbers
    portions: np.ndarray  # and sixteen


@njit(fastmath=FLAGS, nogil=True, cache=True)
def middles(part, parts, t, w, values, means):
    """The pixels that patches answer with, uint8 (nodes, leaves, C, 16); and of nodes the means."""
    nodes, C = len(t.radii), w.shape[2]
    starts = np.empty(NODE, np.int64)
    for node in range(part * nodes // parts, (part + 1) * nodes // parts):
        for k in range(NODE):
            starts[k] = middle_of(w, origin(w, np.int64(t.ids[node * NODE + k]))) * C
            prefetch(w.flat, starts[k])
        n = 0.0
        means[node] = 0
        for k in range(NODE):
            times = t.times[node * NODE + k]
            o = (node * LEAF + k // LANES) * C * LANES + k % LANES
            for c in range(C):
                value = w.flat[starts[k] + c]
                values[o + c * LANES] = value
                means[node, c] += times * np.float32(value)
            n += times
        for c in range(C):
            means[node, c] = means[node, c] / (n * 127.5) - 1


@njit(fastmath=FLAGS, **BORROWED)
def _moments(part, parts, t, mean, variance):
    """What `moments` does."""
    nodes = len(t.radii)
    for node in range(part * nodes // parts, (part + 1) * nodes // parts):
        s, lane = node // LANES, node % LANES
        n = t.node_counts[node]
        for j in range(t.first):
            sum_, squares = splat(float32(0)), splat(float32(0))
            for leaf in range(LEAF):
                x = load_every(t.codes, ((node * LEAF + leaf) * t.m + j // 4 * 4) * LANES, j % 4)
                u = x * load_counts(t.times, node * NODE + leaf * LANES)
                sum_, squares = sum_ + u, squares + u * x
            m, step = hsum(sum_) / n, t.frames[(node * 2 + 1) * t.m + j]
            mean[s, j, lane] = t.frames[node * 2 * t.m + j] + step * m
            variance[s, j, lane] = step * step * max(float32(0), hsum(squares) / n - m * m)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def moments(part, parts, t, mean, variance):
    """Mean and variance of the first numbers in every node, float32 (supers, first, 16)."""
    _moments(part, parts, t, mean, variance)


@njit(fastmath=FLAGS, inline="always")
def _logs(g, E, e, s, leading):
    """log2 of what sixteen nodes weigh on level 0."""
    even, odd = load(g.less, s * LANES), splat(float32(0))
    for j in range(0, leading - 1, 2):
        o = (s * leading + j) * LANES
        d = broadcast(E, e + j) - load(g.mean, o)
        u = broadcast(E, e + j + 1) - load(g.mean, o + LANES)
        even = even + d * d * load(g.precision, o)
        odd = odd + u * u * load(g.precision, o + LANES)
    if leading % 2 == 1:
        o = (s * leading + leading - 1) * LANES
        d = broadcast(E, e + leading - 1) - load(g.mean, o)
        even = even + d * d * load(g.precision, o)
    return (even + odd) * float32(-LOG2E)


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
def _weigh(part, parts, g, E, leading, logs, top, total, answer, scale):
    """What `weigh` does once there is room."""
    Q, C = len(top), total.shape[1] - 1
    K, supers = len(E) // Q, len(g.less) // LANES
    for query in range(part * Q // parts, (part + 1) * Q // parts):
        most = splat(float32(-FAR))
        for s in range(supers):
            x = _logs(g, E, query * K, s, leading)
            most = larger(most, x)
            store(logs, s * LANES, x)
        top[query] = hmax(most)
        sum_ = splat(float32(0))
        for s in range(supers):
            x = weights(load(logs, s * LANES) - splat(top[query]), int64(0))
            store(logs, s * LANES, x)
            sum_ = sum_ + x
        total[query, 0] = hsum(sum_)
        for c in range(C):
            sum_ = splat(float32(0))
            for s in range(supers):
                sum_ = sum_ + load(logs, s * LANES) * load(g.middles, (s * C + c) * LANES)
            total[query, c + 1] = hsum(sum_)
            answer[query, c] = total[query, c + 1] / total[query, 0]
        sum_ = splat(float32(0))
        for s in range(supers):
            away = root(_away(g.middles, s, answer, query, AWAY)) * load(g.doubt, s * LANES)
            sum_ = sum_ + load(logs, s * LANES) * away
        scale[query] = hsum(sum_)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def weigh(part, parts, g, E, leading, top, total, answer, scale):
    """What all nodes weigh on level 0: see `Pixels`."""
    logs = np.empty(len(g.less), np.float32)
    _weigh(part, parts, g, E, leading, logs, top, total, answer, scale)


@njit(fastmath=FLAGS, **BORROWED)
def _nodes(g, p, s, room):
    """Which nodes of a super the queries draw."""
    Q, K = len(p.top), len(p.E) // len(p.top)
    for lane in range(LANES):
        room.counts[lane] = 0
    for query in range(Q):
        w = weights(_logs(g, p.E, query * K, s, p.leading) - splat(p.top[query]), int64(0))
        away = root(_away(g.middles, s, p.answer, query, AWAY)) * load(g.doubt, s * LANES)
        portions = w * away * float32(p.amounts[query, 0] / p.scale[query])
        lots = room.lots[0, query] + hsum(portions)
        if lots < 1:
            room.lots[0, query] = lots
            continue
        store(room.lanes, 0, w)
        store(room.portions, 0, portions)
        lots = room.lots[0, query]
        for lane in range(LANES):
            share = min(room.portions[lane], float32(1))
            lots += share
            if share == 1 or lots >= 1:
                lots -= 1
                n = room.counts[lane]
                room.who[lane, n] = query
                room.times[lane, n] = 1 / share
                room.stand_in[lane, n] = room.lanes[lane]
                room.counts[lane] = n + 1
        room.lots[0, query] = lots


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


@njit(fastmath=FLAGS, **BORROWED)
def _open(t, values, node, C, half, leading, room):
    """Works out what the queries that drew a node share."""
    scale = float32(half * LOG2E)
    frame_of(t, node, room.low, room.step)
    for j in range(leading, t.first):  # norms are no components
        room.low[j], room.step[j] = 0, 0
    for leaf in range(LEAF):
        norm = norms_of(t, room.step, node, leaf, 0, by_fours(leading), 0)
        store(room.norms, leaf * LANES, norm * scale)
        store(room.held, leaf * LANES, load_counts(t.times, node * NODE + leaf * LANES))
        groups, more = t.first, splat(float32(0))
        if t.m > t.first:  # the norm of the other kept components comes last
            groups -= 1
            more = _square(t, node, leaf, groups, t.first)
        rest = _square(t, node, leaf, leading, groups)
        store(room.doubt, leaf * LANES, _doubt(more * float32(2 * half)))
        store(room.doubt, NODE + leaf * LANES, root(_doubt(rest * float32(2 * half))))
        for c in range(C):
            v = load_bytes(values, ((node * LEAF + leaf) * C + c) * LANES)
            v = v * float32(1 / 127.5) - float32(1)
            store(room.values, (leaf * C + c) * LANES, v)


@njit(fastmath=FLAGS, inline="always")
def _distance(w, p, query, start):
    """|q - s|^2 in float32."""
    h, row, stride = w.size[0], len(p.mask), w.shape[1] * w.shape[2]
    total = splat(float32(0))
    o = query * h * row
    for a in range(h):
        for b in range(0, row, LANES):
            s = load_bytes(w.flat, start + a * stride + b) * float32(1 / 127.5) - float32(1)
            d = (s - load(p.y, o + a * row + b)) * load(p.mask, b)
            total = total + d * d
    return hsum(total)


@njit(fastmath=FLAGS, inline="always")
def _add(room, sum_, K, C, leaf, w):
    """Adds weights, and weights times what a leaf's patches answer with, to a sum."""
    o = sum_ * K * LANES
    store(room.seen, o, load(room.seen, o) + w)
    for c in range(C):
        o += LANES
        store(room.seen, o, load(room.seen, o) + w * load(room.values, (leaf * C + c) * LANES))


@njit(fastmath=FLAGS, inline="always")
def _put(room, sum_, K, C, leaf, w):
    """Weights, and weights times what a leaf's patches answer with, instead of a sum."""
    o = sum_ * K * LANES
    store(room.seen, o, w)
    for c in range(C):
        o += LANES
        store(room.seen, o, w * load(room.values, (leaf * C + c) * LANES))


@njit(fastmath=FLAGS, inline="always")
def _total(sums, o, room, sum_, K, times):
    """Adds the K numbers of a sum, `times` times, to sums[o : o + K]."""
    for k in range(0, K, QUAD):
        add_totals(sums, o + k, room.seen, (sum_ * K + k) * LANES, times)


@njit(fastmath=FLAGS, inline="always")
def _all_leaves(room, C):
    """The totals of the leaves, and the first sum: what is known of all leaves together."""
    room.totals[:] = 0
    for leaf in range(0, LEAF, QUAD):
        add_totals(room.totals, leaf, room.known, leaf * LANES, 1.0)
        add_totals(room.totals, LEAF + leaf, room.parts, leaf * LANES, 1.0)
    for c in range(-1, C):
        even, odd = splat(float32(0)), splat(float32(0))
        for leaf in range(0, LEAF, 2):
            u, v = load(room.known, leaf * LANES), load(room.known, (leaf + 1) * LANES)
            if c >= 0:
                u = u * load(room.values, (leaf * C + c) * LANES)
                v = v * load(room.values, ((leaf + 1) * C + c) * LANES)
            even, odd = even + u, odd + v
        store(room.seen, (c + 1) * LANES, even + odd)


@njit(fastmath=FLAGS, **BORROWED)
def _visit(
    t, w, p, values, node, query, times, stand_in, middle, room, known, sums, spread, spent, chance
):  # fmt: skip
    """A query looks at a node that it has drawn; returns of which leaves all norms are known."""
    Q, C = len(p.top), w.shape[2]
    others_from, end = others_at(t.first), filled_up(t.first, t.m)
    leading = by_fours(p.leading)
    W = by_fours(1 + C)
    of_turn = Q * LEVELS * W
    mine = query * LEVELS * W
    e, scale = query * end, float32(p.half * LOG2E)
    room.turn[query] += 1
    group = room.turn[query] % TURNS
    far = from_node(p.E, e, room.low, room.row, 0, others_from) * scale + p.top[query]
    unit, _ = in_bytes(room.row, room.step, 0, others_from, scale + scale, room.bytes)
    others, unit_again = float32(-1), float32(0)
    of_leaves = float32(p.amounts[query, 1] / p.scale[query])
    of_patches = float32(p.amounts[query, 2] / p.scale[query])
    lots_leaves, lots_patches = room.lots[1, query], room.lots[2, query]
    n_leaves = 0
    for k in range(W, 3 * W):
        store(room.seen, k * LANES, splat(float32(0)))
    for leaf in range(LEAF):
        o = leaf * LANES
        log = products(t, node, leaf, 0, leading, room.bytes, 0) * unit - load(room.norms, o) - far
        u = weights(log, int64(0)) * load(room.held, o)
        away = _away(room.values, leaf, p.answer, query, AWAY)
        store(room.logs, o, log)
        store(room.known, o, u)
        store(room.away, o, away)
        store(room.parts, o, u * u * away * load(room.doubt, o))
    _all_leaves(room, C)
    for leaf in range(LEAF):
        total = room.totals[leaf]
        share = min(float32(math.sqrt(room.totals[LEAF + leaf])) * of_leaves * times, float32(1))
        lots_leaves += share
        if share < 1 and lots_leaves < 1:
            continue
        lots_leaves -= 1
        leaf_times, leaf_group = times / share, group
        n_leaves += 1
        if times == 1:
            room.turn[query] += 1
            leaf_group = room.turn[query] % TURNS
        held, away = load(room.held, leaf * LANES), load(room.away, leaf * LANES)
        u, log = load(room.known, leaf * LANES), load(room.logs, leaf * LANES)
        v, again, away = u, total, root(away)
        if t.m > t.first:
            if others < 0:
                others = from_node(p.E, e, room.low, room.row, others_from, end)
                unit_again, _ = in_bytes(
                    room.row, room.step, others_from, end, scale + scale, room.bytes
                )
            if not known >> leaf & 1:
                norm = norms_of(t, room.step, node, leaf, t.first, t.m, others_from)
                store(room.norms, NODE + leaf * LANES, norm * scale)
                known |= int64(1) << leaf
            log = log + products(t, node, leaf, t.first, t.m, room.bytes, others_from) * unit_again
            log = log - load(room.norms, NODE + leaf * LANES)
            log = log - splat((others - float32(p.others[query])) * scale)
            v = weights(log, int64(0)) * held
            again = hsum(v)
            spread[query, 1] += leaf_times * again * again / total if total > 0 else 0.0
            x = hsum((v - u) * away)
            chance[query, BY_NODE] += (times - 1) * leaf_times * x * x
            chance[query, BY_LEAF] += (leaf_times - times) * leaf_times * x * x
            if share == 1:
                _add(room, 1, W, C, leaf, u)
                _add(room, 2, W, C, leaf, v)
            else:
                _put(room, 3, W, C, leaf, u)
                _put(room, 4, W, C, leaf, v)
                o = leaf_group * of_turn + mine
                _total(sums, o + LEAVES * W, room, 3, W, leaf_times)
                _total(sums, o + AGAIN * W, room, 4, W, leaf_times)
        amount = of_patches * leaf_times
        portions = v * away * load(room.doubt, NODE + leaf * LANES) * amount
        lots = lots_patches + hsum(portions)
        if lots < 1:
            lots_patches = lots
            continue
        store(room.lanes, 0, v)
        store(room.portions, 0, portions)
        for lane in range(LANES):
            share = min(room.portions[lane], float32(1))
            lots_patches += share
            if share > 0 and (share == 1 or lots_patches >= 1):
                lots_patches -= 1
                place = node * NODE + leaf * LANES + lane
                prefetch(t.ids, place)
                n = room.waiting[0]
                room.places[n], room.owners[n] = place, query
                patch_times = leaf_times / share
                room.shares[0, n], room.shares[1, n] = patch_times, leaf_times
                room.shares[2, n], room.shares[3, n] = times, patch_times * room.lanes[lane]
                patch_group = leaf_group
                if patch_times == 1:
                    patch_group = TURNS
                elif leaf_times == 1:
                    room.turn[query] += 1
                    patch_group = room.turn[query] % TURNS
                room.offsets[n] = patch_group * of_turn + mine
                room.waiting[0] = n + 1
    room.lots[1, query], room.lots[2, query] = lots_leaves, lots_patches
    o = (TURNS if times == 1 else group) * of_turn + mine
    sums[o + STAND_IN * W] += times * stand_in
    for c in range(C):
        sums[o + STAND_IN * W + c + 1] += times * stand_in * middle[c]
    _total(sums, o + NODES * W, room, 0, W, times)
    if t.m > t.first:
        _total(sums, o + LEAVES * W, room, 1, W, times)
        _total(sums, o + AGAIN * W, room, 2, W, times)
    total = hsum(load(room.seen, 0))
    spread[query, 0] += times * total * total / stand_in if stand_in > 0 else 0.0
    spent[query, 0] += 1
    spent[query, 1] += n_leaves
    return known


@njit(fastmath=FLAGS, **BORROWED)
def _compare(t, w, p, room, sums, spread, spent, chance):
    """Compares the patches that wait: several at once, for most of the time goes into memory."""
    C = w.shape[2]
    W = by_fours(1 + C)
    fetch(t, w, room)
    for k in range(room.waiting[0]):
        place, start, query = room.places[k], room.starts[k], room.owners[k]
        log = (p.rest[query] - _distance(w, p, query, start)) * p.half - p.top[query] / LOG2E
        x = room.shares[0, k] * t.times[place] * math.exp(log)
        o = room.offsets[k]
        known = room.shares[3, k]
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
        away *= (x - known) ** 2 / room.shares[0, k]
        chance[query, OF_NODE] += (room.shares[2, k] - 1) * away
        chance[query, OF_LEAF] += (room.shares[1, k] - room.shares[2, k]) * away
        chance[query, OF_PATCH] += (room.shares[0, k] - room.shares[1, k]) * away
        spent[query, 2] += 1
    room.waiting[0] = 0


@njit(fastmath=FLAGS, **BORROWED)
def _draw(part, parts, t, w, g, p, values, middle, room, sums, spread, spent, chance):
    """What `draw` does once there is room."""
    Q, C = len(p.top), w.shape[2]
    supers, nodes = len(t.widest), len(t.radii)
    for query in range(Q):
        room.turn[query] = part
        for k in range(3):
            room.lots[k, query] = (p.start[query] * (k + 1) + part * 0.7548776662) % 1.0
    for s in range(part * supers // parts, (part + 1) * supers // parts):
        _nodes(g, p, s, room)
        for lane in range(LANES):
            node = s * LANES + lane
            if room.counts[lane] == 0 or node >= nodes:
                continue
            _open(t, values, node, C, p.half, p.leading, room)
            for c in range(C):
                middle[c] = g.middles[(s * C + c) * LANES + lane]
            known = int64(0)
            for k in range(room.counts[lane]):
                known = _visit(
                    t, w, p, values, node, room.who[lane, k], room.times[lane, k],
                    room.stand_in[lane, k], middle, room, known, sums, spread, spent, chance,
                )  # fmt: skip
                if room.waiting[0] >= WAITING:
                    _compare(t, w, p, room, sums, spread, spent, chance)
    _compare(t, w, p, room, sums, spread, spent, chance)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def draw(part, parts, t, w, g, p, values, sums, spread, spent, chance):
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
        np.empty(2 * NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(2 * NODE, np.float32),
        np.empty(LEAF * C * LANES, np.float32),
        np.zeros(5 * by_fours(1 + C) * LANES, np.float32),
        np.zeros(end, np.float32),
        np.zeros(end, np.float32),
        np.empty(end, np.float32),
        np.empty(2 * end, np.int8),
        np.empty(NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(NODE, np.float32),
        np.empty(2 * LEAF),
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
    )
    middle = np.empty(C, np.float32)
    _draw(part, parts, t, w, g, p, values, middle, room, sums, spread, spent, chance)
