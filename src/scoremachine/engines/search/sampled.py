"""Importance sampling of patches, compiled: see `sampling`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int64

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.distances import FAR
from scoremachine.engines.search.floats import (
    BORROWED,
    LANES,
    broadcast,
    exp2,
    hmax,
    hsum,
    larger,
    load,
    load_bytes,
    load_counts,
    prefetch,
    reaching,
    splat,
    store,
    weights,
)
from scoremachine.engines.search.patches import centre_of, origin, prefetch_patch, strides_of
from scoremachine.engines.search.tree import LEAF, NODE

REPLICATES = 32  # replicates of a sample, whose spread gives the standard error
BATCH = 64  # sampled patches that are read from memory together


class Surrogate(NamedTuple):
    """A Gaussian for every node at one noise level, flat, in vectors of sixteen nodes.

    Attributes:
        leading: The number of its components.
        mean: float32 (supers, leading, 16).
        precision: log2 e / (2 (sigma^2 + variance)), float32 (supers, leading, 16).
        offset: An addend of log2 of a node's weight, float32 (supers, 16).
        widening: A factor of a node's sampling weight for the variation of its patches' weights,
            float32 (supers, 16).
    """

    leading: int
    mean: np.ndarray
    precision: np.ndarray
    offset: np.ndarray
    widening: np.ndarray


@njit(fastmath=FLAGS, nogil=True, cache=True)
def moments(part, parts, t, mean, variance):
    """Fills `Moments` for a chunk of the nodes."""
    nodes = len(t.radii)
    for node in range(part * nodes // parts, (part + 1) * nodes // parts):
        _moments_of_node(t, node, mean, variance)


@njit(fastmath=FLAGS, **BORROWED)
def _moments_of_node(t, node, mean, variance):
    s, lane, count = node // LANES, node % LANES, t.node_counts[node]
    for j in range(t.first):
        total, squares = splat(float32(0)), splat(float32(0))
        for leaf in range(LEAF):
            held = load_counts(t.times, node * NODE + leaf * LANES)
            x = load_bytes(t.codes, ((node * LEAF + leaf) * t.m + j) * LANES)
            total, squares = total + x * held, squares + x * x * held
        m, step = hsum(total) / count, t.frames[(node * 2 + 1) * t.m + j]
        mean[s, j, lane] = t.frames[node * 2 * t.m + j] + step * m
        variance[s, j, lane] = step * step * max(float32(0), hsum(squares) / count - m * m)


class Group(NamedTuple):
    """Queries that share their samples; log2 of a weight is `constant` + E s - |s|^2 `unit`.

    Attributes:
        members: Which queries they are (G).
        E: Their components, float32 (G, kept) flat, multiplied by 2 `unit` like `windows`.
        windows: Their windows minus the mean, float32 (G, D) flat, D padded to whole vectors.
        constant: float32 (G).
        total: log2 of the sum of the weights of the surrogates, float32 (G).
        cut: log2 of the weight above which patches are in the enumerated stratum, float32 (G).
        unit: log2 e / (2 sigma^2).
        mean: The mean of the patches plus 1, float32 (D and more).
    """

    members: np.ndarray
    E: np.ndarray
    windows: np.ndarray
    constant: np.ndarray
    total: np.ndarray
    cut: np.ndarray
    unit: np.float32
    mean: np.ndarray


class Workspace(NamedTuple):
    """The workspace of a thread."""

    proposal: np.ndarray  # of all nodes
    codes: np.ndarray  # the components of the patches of a leaf, decoded (kept, 16)
    score: np.ndarray  # the mean share of each in the posteriors of the group (16)
    row: np.ndarray  # a patch minus the mean (D and more)
    log: np.ndarray  # its inner products with the queries (G)
    places: np.ndarray  # positions of the sampled patches in the tree
    starts: np.ndarray  # offsets of their first bytes in the images
    factors: np.ndarray  # inverse inclusion probabilities, times the number of copies
    replicates: np.ndarray  # their replicates


@njit(fastmath=FLAGS, **BORROWED)
def _propose(t, q, s, g, log, weight, proposal):
    """Fills `proposal` with the mean over a group of the normalized weights of the surrogates."""
    supers, stride, G = len(t.widest), t.m, len(g.members)
    for k in range(supers):
        for i in range(G):
            e, x = g.members[i] * stride, load(s.offset, k * LANES)
            for j in range(s.leading):
                o = (k * s.leading + j) * LANES
                d = broadcast(q.E, e + j) - load(s.mean, o)
                x = x - d * d * load(s.precision, o)
            store(log, (i * supers + k) * LANES, x)
    proposal[:] = 0
    for i in range(G):
        top, total, o = splat(-FAR), splat(float32(0)), i * supers * LANES
        for k in range(supers):
            top = larger(top, load(log, o + k * LANES))
        largest = hmax(top)
        for k in range(supers):
            x = exp2(load(log, o + k * LANES) - splat(largest)) * load(s.widening, k * LANES)
            store(weight, k * LANES, x)
            total = total + x
        for k in range(supers):
            x = load(weight, k * LANES) * (float32(1) / (hsum(total) * G))
            store(proposal, k * LANES, load(proposal, k * LANES) + x)
        g.total[i] += largest + math.log2(hsum(total))


@njit(fastmath=FLAGS, **BORROWED)
def _score(t, s, g, node, leaf, work):
    """Fills `work.score` with the mean shares of the patches of a leaf, from their codes."""
    G, n = len(g.members), 0
    norm, score = splat(float32(0)), splat(float32(0))
    for j in range(t.m):
        if j < s.leading or j >= t.first:  # the others are norms
            low, step = t.frames[node * 2 * t.m + j], t.frames[(node * 2 + 1) * t.m + j]
            x = load_bytes(t.codes, ((node * LEAF + leaf) * t.m + j) * LANES)
            x = x * step + low
            store(work.codes, n * LANES, x)
            norm, n = norm + x * x * g.unit, n + 1
    for i in range(0, G, 4):
        a, b = splat(g.constant[i] - g.total[i]), splat(g.constant[i + 1] - g.total[i + 1])
        c, d = splat(g.constant[i + 2] - g.total[i + 2]), splat(g.constant[i + 3] - g.total[i + 3])
        for j in range(n):
            x, e = load(work.codes, j * LANES), i * n + j
            a, b = a + x * broadcast(g.E, e), b + x * broadcast(g.E, e + n)
            c, d = c + x * broadcast(g.E, e + 2 * n), d + x * broadcast(g.E, e + 3 * n)
        score = score + exp2(a - norm) + exp2(b - norm) + exp2(c - norm) + exp2(d - norm)
    held = load_counts(t.times, node * NODE + leaf * LANES)
    store(work.score, 0, score * held * (float32(1) / G))


@njit(fastmath=FLAGS, inline="always")
def _read(w, start, mean, row):
    """Writes a patch minus the mean to `row`; returns the sum of its squares."""
    (line, width), D = strides_of(w), len(row) - LANES
    for a in range(w.size[0]):
        for b in range(0, width, LANES):
            x = load_bytes(w.flat, start + a * line + b) * float32(1 / 127.5)
            store(row, a * width + b, x - load(mean, a * width + b))
    row[w.size[0] * width :] = 0
    total = splat(float32(0))
    for j in range(0, D, LANES):
        total = total + load(row, j) * load(row, j)
    return hsum(total)


@njit(fastmath=FLAGS, **BORROWED)
def _compare(t, w, g, count, work, sums):
    """Adds the first `count` sampled patches to the sums of the queries of a group."""
    G, C, D = len(g.members), w.shape[2], len(work.row) - LANES
    for k in range(count):
        work.starts[k] = origin(w, int64(t.ids[work.places[k]]))
        prefetch_patch(w, work.starts[k])
    for k in range(count):
        square = splat(_read(w, work.starts[k], g.mean, work.row) * g.unit)
        for i in range(0, G, 4):
            a, b = splat(float32(0)), splat(float32(0))
            c, d = splat(float32(0)), splat(float32(0))
            for j in range(0, D, LANES):
                x, o = load(work.row, j), i * D + j
                a, b = a + x * load(g.windows, o), b + x * load(g.windows, o + D)
                c, d = c + x * load(g.windows, o + 2 * D), d + x * load(g.windows, o + 3 * D)
            work.log[i], work.log[i + 1] = hsum(a), hsum(b)
            work.log[i + 2], work.log[i + 3] = hsum(c), hsum(d)
        middle = centre_of(w, work.starts[k]) * C
        o = work.replicates[k] * (3 + C) * G
        for i in range(0, G, LANES):
            x = load(work.log, i) - square + load(g.constant, i)
            weight = exp2(x) * weights(splat(float32(0)), reaching(load(g.cut, i), x))
            x = weight * work.factors[k]
            store(sums, o + i, load(sums, o + i) + x)
            store(sums, o + G + i, load(sums, o + G + i) + x * weight)
            store(sums, o + 2 * G + i, load(sums, o + 2 * G + i) + x * x)
            for c in range(C):
                p = o + (3 + c) * G + i
                value = float32(w.flat[middle + c] * (1 / 127.5) - 1)
                store(sums, p, load(sums, p) + x * value)


@njit(fastmath=FLAGS, **BORROWED)
def _sample_leaves(t, w, s, g, size, start, work, sums, spent):
    """Samples about size[0] leaves, and about size[1] of their patches."""
    of_leaves, of_patches, dealt, count = start, start, 0, 0
    for node in range(len(t.radii)):
        chance = min(1.0, size[0] / LEAF * work.proposal[node])
        if of_leaves + LEAF * chance < 1:  # none of its leaves is sampled
            of_leaves += LEAF * chance
            continue
        for leaf in range(LEAF):
            of_leaves += chance
            if of_leaves < 1 or t.leaf_counts[node * LEAF + leaf] == 0:
                continue
            of_leaves, dealt = of_leaves - 1, dealt + 1
            spent[0] += 1
            _score(t, s, g, node, leaf, work)
            for lane in range(LANES):
                share = min(1.0, size[1] * work.score[lane] / chance)
                of_patches += share
                if of_patches < 1:
                    continue
                of_patches -= 1
                place = (node * LEAF + leaf) * LANES + lane
                prefetch(t.ids, place)
                work.places[count], work.factors[count] = place, t.times[place] / (share * chance)
                dealt += chance == 1 and share < 1
                certain = chance == 1 and share == 1
                work.replicates[count] = REPLICATES if certain else dealt % REPLICATES
                count += 1
        if count >= BATCH:
            _compare(t, w, g, count, work, sums)
            spent[1], count = spent[1] + count, 0
    _compare(t, w, g, count, work, sums)
    spent[1] += count


@njit(fastmath=FLAGS, nogil=True, cache=True)
def sample(
    group, groups, t, w, q, s, unit, mean,
    members, E, windows, constant, total, cut, size, start, spent, sums,
):  # fmt: skip
    """The sums of a group of queries over a sample of about size[0] leaves and size[1] patches.

    Fills `sums`, float32 (REPLICATES + 1, 3 + C, G) flat, with the sums of weights, of their
    squares, of the squares of the samples' contributions, and of weights times values; the last
    replicate has the patches with inclusion probability 1. Fills `spent` with the numbers of leaves
    and patches.
    """
    nodes, G, most = len(t.widest) * LANES, len(members), BATCH + NODE
    g = Group(members, E, windows, constant, total, cut, unit, mean)
    work = Workspace(
        np.empty(nodes, np.float32),
        np.empty(len(E) // G * LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(len(windows) // G + LANES, np.float32),
        np.empty(G, np.float32),
        np.empty(most, np.int64),
        np.empty(most, np.int64),
        np.empty(most, np.float32),
        np.empty(most, np.int64),
    )
    log, weight = np.empty(G * nodes, np.float32), np.empty(nodes, np.float32)
    _propose(t, q, s, g, log, weight, work.proposal)
    _sample_leaves(t, w, s, g, size, start[0], work, sums, spent)
