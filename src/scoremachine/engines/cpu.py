"""The fold on the CPU: numba, all cores, uint8 in, no patches gathered.

Eight images at a time fill the lanes of SIMD vectors. For one displacement (dy, dx) between query
and source the logit of every site is a box sum of

    v = sum_c s_c (y_c - s_c / 2),        |y - s|^2 = |y|^2 - 2 sum v,

taken from a summed-area table of v, so that its cost does not depend on the window's size (tapered
boxes filter v by rows and columns instead, masks read such tables at few positions). The term |y|^2
is the same for every source of a site: it is added once, at the end. All sums are in float64, where
rounding costs less than 1e-6 nats at sigma = 0.002 (float32 would cost tens of nats and a second
pass). A vector of eight logits is processed only if its largest is within T = ln(2 |S| / 1e-5) nats
of the site's leader: the total weight of skipped sources is below 5e-6.

Every picture of a batch has its own state, and the work is cut into at most `PARTS` chunks whatever
the number of threads, merged in order: the result depends on neither batch nor threads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import torch

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import BATCH, TILE, ScanRequest
from scoremachine.core.posterior import tiles as tiles
from scoremachine.core.windows import Masks, Soft
from scoremachine.engines import fourier as rolled
from scoremachine.engines import pytorch as device
from scoremachine.engines import strips
from scoremachine.engines.caching import njit
from scoremachine.engines.chunks import PARTS, fill
from scoremachine.engines.compiled import FLAGS, NOTHING, keep
from scoremachine.engines.simd import (
    LANES,
    above,
    any_above,
    any_reaches,
    broadcast,
    exp,
    hmax,
    hsum,
    load,
    load_at,
    splat,
    store,
    sums,
)
from scoremachine.engines.whole import accumulate_whole, fold_whole

ROLLED = 2**20  # values in a piece of `rolled`: they stay in the processor's cache
WORKSPACE = 2**26  # approximate number of values (512 MB) in all chunks of a call
BOX, SOFT, MASKS = 0, 1, 2


class Plan(NamedTuple):
    """The windows of a collection in the form of compiled code.

    Attributes:
        kind: BOX, SOFT or MASKS.
        cut: Whether boxes are truncated at the border.
        middles: Whether the index of a site is its window's middle pixel; else it is the first.
        weights: The box's weights, (P, Q).
        rows: A tapered box's factors by row, (K, P).
        columns: Its factors by column, (K, Q).
        terms, starts: See `Masks.by_sign`; the terms are offsets in values, not in vectors.
    """

    kind: int
    cut: bool
    middles: bool
    weights: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    terms: np.ndarray
    starts: np.ndarray


def plan_of(c: Collection) -> Plan:
    """The `Plan` of a collection."""
    P, Q = c.window.shape
    kind, weights, rows, columns = BOX, np.ones((P, Q)), np.empty((0, P)), np.empty((0, Q))
    terms, starts = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    if isinstance(c.window, Soft):
        kind, weights, rows, columns = SOFT, c.window.weights, c.window.rows, c.window.columns
    elif isinstance(c.window, Masks):
        kind, (terms, starts) = MASKS, c.window.by_sign
        terms = terms * np.int32(LANES)
    return Plan(
        kind,
        c.cut,
        c.sites == "pixels" and not c.wraps,
        np.ascontiguousarray(weights),
        np.ascontiguousarray(rows),
        np.ascontiguousarray(columns),
        terms,
        starts,
    )


@njit
def _mirror(s, C, H, W, rows, columns):
    """Turns images (C, H, W, LANES) upside down (`rows`), left to right (`columns`), or both."""
    for c in range(C):
        for a in range(H):
            for b in range(W):
                there = ((H - 1 - a if rows else a) * W + (W - 1 - b if columns else b)) * LANES
                here = (a * W + b) * LANES
                if here < there:
                    here, there = here + c * H * W * LANES, there + c * H * W * LANES
                    v = load(s, here)
                    store(s, here, load(s, there))
                    store(s, there, v)


@njit(fastmath=FLAGS)
def _load_block(images, index, block, variant, s, half, alive):
    """Reads a variant of the images index[8 block : 8 block + 8]: s, and half = sum_c s^2 / 2.

    s is (C, H, W, LANES) flat; lanes past the end repeat the last image and are not `alive`.
    """
    N = index.shape[0]
    _, C, H, W = images.shape
    D = C * H * W
    first = block * LANES
    for k in range(LANES):
        alive[k] = 1.0 if first + k < N else 0.0
    u0 = images[index[first]].reshape(D)
    u1 = images[index[min(first + 1, N - 1)]].reshape(D)
    u2 = images[index[min(first + 2, N - 1)]].reshape(D)
    u3 = images[index[min(first + 3, N - 1)]].reshape(D)
    u4 = images[index[min(first + 4, N - 1)]].reshape(D)
    u5 = images[index[min(first + 5, N - 1)]].reshape(D)
    u6 = images[index[min(first + 6, N - 1)]].reshape(D)
    u7 = images[index[min(first + 7, N - 1)]].reshape(D)
    scale, offset = variant[2] / 127.5, variant[3] - variant[2]
    for d in range(D):
        i = d * LANES
        s[i] = u0[d] * scale + offset
        s[i + 1] = u1[d] * scale + offset
        s[i + 2] = u2[d] * scale + offset
        s[i + 3] = u3[d] * scale + offset
        s[i + 4] = u4[d] * scale + offset
        s[i + 5] = u5[d] * scale + offset
        s[i + 6] = u6[d] * scale + offset
        s[i + 7] = u7[d] * scale + offset
    if variant[0] or variant[1]:
        _mirror(s, C, H, W, variant[0], variant[1])
    for d in range(H * W):
        total = splat(0.0)
        for c in range(C):
            v = load(s, (c * H * W + d) * LANES)
            total = total + v * v
        store(half, d * LANES, total * 0.5)


@njit(inline="always")
def _overlap(shift, n_query, n_source, p, cut):
    """The overlap of query and source along an axis: (first query row, rows, padding, windows).

    Where a border of the query coincides with the same border of the source, windows are truncated.
    """
    lo = max(0, -shift)
    n = min(n_query, n_source - shift) - lo
    before = p // 2 if cut and shift == 0 else 0
    after = p // 2 if cut and n_query + shift == n_source else 0
    return lo, n, before, max(n + before + after - p + 1, 0)


class Region(NamedTuple):
    """The part of the query that overlaps the source at a displacement, and its windows."""

    a0: int  # its first row in the query
    b0: int  # its first column
    n: int  # its height
    width: int
    py: int  # rows of the first windows that lie outside, at the top
    px: int  # columns that lie outside, at the left
    rows: int  # rows of windows
    columns: int  # columns of windows
    dy: int  # the displacement
    dx: int


@njit
def _region(plan, Hq, Wq, H, W, shift):
    """The `Region` of a displacement; without windows, `rows` is 0."""
    P, Q = plan.weights.shape
    a0, n, py, rows = _overlap(shift[0], Hq, H, P, plan.cut)
    b0, width, px, columns = _overlap(shift[1], Wq, W, Q, plan.cut)
    if columns == 0:
        rows = 0
    return Region(a0, b0, n, width, py, px, rows, columns, shift[0], shift[1])


@njit(inline="always")
def _window(table, width, top, bottom, left, right):
    """The sum over rows [top, bottom) and columns [left, right) by a summed-area table."""
    hi, lo = bottom * width, top * width
    return (
        load(table, (hi + right) * LANES)
        - load(table, (hi + left) * LANES)
        - load(table, (lo + right) * LANES)
        + load(table, (lo + left) * LANES)
    )


@njit
def _table_size(plan, H, W):
    """The largest number of values in a table of H x W pixels."""
    tables = 3 if plan.kind == MASKS else 1
    return max(tables * (H + 1) * (W + 1), len(plan.rows) * H * W) * LANES


@njit
def _clear(table, n):
    """Sets the first n vectors to 0."""
    for b in range(n):
        store(table, b * LANES, splat(0.0))


@njit(inline="always")
def _value(y, q, yc, s, half, i, sc, C):
    """v = sum_c y_c s_c - half of one pixel; the query's pixels are the same for all lanes."""
    if C == 3:  # unrolled, since a loop over channels costs as much as the sums
        v = broadcast(y, q) * load(s, i) - load(half, i)
        v = v + broadcast(y, q + yc) * load(s, i + sc)
        return v + broadcast(y, q + 2 * yc) * load(s, i + 2 * sc)
    v = splat(0.0) - load(half, i)
    for c in range(C):
        v = v + broadcast(y, q + c * yc) * load(s, i + c * sc)
    return v


@njit(fastmath=FLAGS)
def _add_sums(table, a, n, y, q, yc, s, half, o, sc, C):
    """Computes row a + 1 of the summed-area table from row a of v, which is n pixels wide."""
    above = a * (n + 1) * LANES
    here = above + (n + 1) * LANES
    if a == 0:
        _clear(table, n + 1)
    store(table, here, splat(0.0))
    total = splat(0.0)
    for b in range(n):
        total = total + _value(y, q + b, yc, s, half, o + b * LANES, sc, C)
        store(table, here + (b + 1) * LANES, total + load(table, above + (b + 1) * LANES))


@njit(fastmath=FLAGS)
def _add_terms(table, a, n, size, y, q, yc, s, half, o, sc, C):
    """Adds row a of v to the three tables of `Masks`, of `size` vectors each."""
    above = a * (n + 1) * LANES
    here = above + (n + 1) * LANES
    size *= LANES
    total = splat(0.0)
    if a == 0:
        _clear(table, n + 1)
    for b in range(n):
        v = _value(y, q + b, yc, s, half, o + b * LANES, sc, C)
        total = total + v
        o_T = here + (b + 1) * LANES
        store(table, o_T, total + load(table, above + (b + 1) * LANES))
        store(table, o_T + size, total)
        store(table, o_T + 2 * size, v)


@njit(fastmath=FLAGS)
def _add_filtered(plan, g, table, a, y, q, yc, s, half, o, sc, C, buffer):
    """Adds row a of v, filtered by each of the K `columns`, to the table, (n, K, columns)."""
    K, Q = plan.columns.shape
    taps = plan.columns.reshape(K * Q)
    for b in range(g.width):
        store(buffer, b * LANES, _value(y, q + b, yc, s, half, o + b * LANES, sc, C))
    for k in range(K):
        for b in range(g.columns):
            total = splat(0.0)
            left = b - g.px
            for t in range(max(0, -left), min(Q, g.width - left)):
                total = total + broadcast(taps, k * Q + t) * load(buffer, (left + t) * LANES)
            store(table, ((a * K + k) * g.columns + b) * LANES, total)


@njit
def _add_row(plan, g, table, a, y, Hq, Wq, s, half, C, H, W, buffer):
    """Adds row a of the region's v to the table from which `_window_sums` reads windows."""
    q, o = (g.a0 + a) * Wq + g.b0, ((g.a0 + a + g.dy) * W + g.b0 + g.dx) * LANES
    if plan.kind == SOFT:
        _add_filtered(plan, g, table, a, y, q, Hq * Wq, s, half, o, H * W * LANES, C, buffer)
    elif plan.kind == MASKS:
        size = (g.n + 1) * (g.width + 1)
        _add_terms(table, a, g.width, size, y, q, Hq * Wq, s, half, o, H * W * LANES, C)
    else:
        _add_sums(table, a, g.width, y, q, Hq * Wq, s, half, o, H * W * LANES, C)


@njit(inline="always")
def _last_row(plan, g, a):
    """The number of leading rows of the region that the windows of row a need."""
    return g.n if plan.kind == MASKS else min(a - g.py + plan.weights.shape[0], g.n)


@njit(inline="always")
def _gather(table, places, first, last):
    """The sum of the table's vectors at places[first : last], as four independent sums."""
    t0, t1, t2, t3 = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    rest = last - (last - first) % 4
    for k in range(first, rest, 4):
        t0 = t0 + load_at(table, places, k)
        t1 = t1 + load_at(table, places, k + 1)
        t2 = t2 + load_at(table, places, k + 2)
        t3 = t3 + load_at(table, places, k + 3)
    for k in range(rest, last):
        t0 = t0 + load_at(table, places, k)
    return (t0 + t1) + (t2 + t3)


@njit(fastmath=FLAGS)
def _window_sums(plan, g, table, a, sums_):
    """The sums over the windows of row a, from a table that contains the rows they need."""
    P, Q = plan.weights.shape
    top, bottom = max(a - g.py, 0), min(a - g.py + P, g.n)
    if plan.kind == BOX:
        for b in range(g.columns):
            left, right = max(b - g.px, 0), min(b - g.px + Q, g.width)
            store(sums_, b * LANES, _window(table, g.width + 1, top, bottom, left, right))
    elif plan.kind == SOFT:
        K = len(plan.rows)
        taps = plan.rows.reshape(K * P)
        for b in range(g.columns):
            total = splat(0.0)
            for k in range(K):
                for r in range(top, bottom):
                    q = broadcast(taps, k * P + r - a + g.py)
                    total = total + q * load(table, ((r * K + k) * g.columns + b) * LANES)
            store(sums_, b * LANES, total)
    else:
        for b in range(g.columns):
            site = a * g.columns + b
            added, taken = plan.starts[2 * site], plan.starts[2 * site + 1]
            total = _gather(table, plan.terms, added, taken)
            total = total - _gather(table, plan.terms, taken, plan.starts[2 * site + 2])
            store(sums_, b * LANES, total)


@njit(fastmath=FLAGS)
def _merge_sources(
    plan, g, tables, lines, y, u, Hq, Wq, s, v_s, half, alive, ids, C, H, W, values, scale, T,
    m, floor, totals, logits, places, lane_logits,
):  # fmt: skip
    """Merges the sources of one displacement into the folds of a picture's sites.

    y is (C, Hq, Wq), the keys s and the values v_s are (C, H, W, LANES), all flat. `floor` is the
    smallest window sum that still matters; `totals` holds Z, Z2 and S of every site, eight numbers
    each. If u is not empty, a source's value is the inner product of v_s with u.
    """
    P, Q = plan.weights.shape
    # offset of a window's middle from its first pixel; truncated windows are named by their middle
    ry, rx = P // 2 - g.py, Q // 2 - g.px
    k, Ws = logits.shape[0], m.shape[1]
    table, table_u, nothing = tables
    line, line_u, buffer = lines
    ready, zero = np.int64(0), splat(0.0)  # a literal would compile for another type
    for a in range(g.rows):
        while ready < _last_row(plan, g, a):
            _add_row(plan, g, table, ready, y, Hq, Wq, s, half, C, H, W, buffer)
            if len(u) > 0:
                _add_row(plan, g, table_u, ready, u, Hq, Wq, v_s, nothing, C, H, W, buffer)
            ready += 1
        _window_sums(plan, g, table, a, line)
        if len(u) > 0:
            _window_sums(plan, g, table_u, a, line_u)
        i = g.a0 + a + (ry if plan.middles else 0)
        for b in range(g.columns):
            v = load(line, b * LANES)
            j = g.b0 + b + (rx if plan.middles else 0)
            if not any_reaches(v, broadcast(floor, i * Ws + j)):
                continue
            leader = m[i, j]
            total = load(totals, (i * Ws + j) * LANES)
            l = v * scale
            if any_above(l, splat(leader)):
                highest = hmax(l)
                rescale = math.exp(leader - highest)
                total = total * rescale
                leader = highest
                m[i, j] = leader
                store(totals, (i * Ws + j) * LANES, total)
                totals[(i * Ws + j) * LANES + 1] *= rescale  # Z2 is rescaled by the square
                total = load(totals, (i * Ws + j) * LANES)
                floor[i * Ws + j] = max(floor[i * Ws + j], (leader - T) / scale)
            w = exp(l - leader) * load(alive, 0)
            pixel = (g.a0 + a + g.dy + ry) * W + g.b0 + b + g.dx + rx
            o = pixel * LANES
            if len(u) > 0:
                w0, w1, w2, w3 = w * load(line_u, b * LANES), zero, zero, zero
            else:
                w0 = w * load(v_s, o) if values > 0 else zero
                w1 = w * load(v_s, o + H * W * LANES) if values > 1 else zero
                w2 = w * load(v_s, o + 2 * H * W * LANES) if values > 2 else zero
                w3 = w * load(v_s, o + 3 * H * W * LANES) if values > 3 else zero
            store(totals, (i * Ws + j) * LANES, total + sums(w, w * w, w0, w1, w2, w3))
            if k > 0:
                store(lane_logits, 0, l)
                for lane in range(LANES):
                    if alive[lane] > 0 and lane_logits[lane] > logits[k - 1, i, j]:
                        place = ids[lane] * H * W + pixel
                        keep(lane_logits[lane], place, logits, places, i, j)
                floor[i * Ws + j] = min((leader - T) / scale, logits[k - 1, i, j] / scale)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def _fold(
    chunk, chunks, images, averaged, separate, index, y, u, scale, T, plan, shifts, variants,
    v_variants, values, m_known, m, totals, logits, places,
):  # fmt: skip
    """The first pass over a chunk: fills m, totals (Z, Z2, S, 0 ...), logits, places of sites."""
    total_images, C, H, W = images.shape
    B, _, Hq, Wq = y.shape
    N = index.shape[0]
    _, k, Hs, Ws = logits.shape
    blocks = (N + LANES - 1) // LANES
    K, V = shifts.shape[0], variants.shape[0]
    s = np.empty(C * H * W * LANES)
    half = np.empty(H * W * LANES)
    size = _table_size(plan, min(H, Hq), min(W, Wq))
    tables = (
        np.empty(size),
        np.empty(size if u.shape[1] > 0 else 0),
        np.zeros(H * W * LANES if u.shape[1] > 0 else 0),
    )
    lines = (np.empty(W * LANES), np.empty(W * LANES), np.empty(W * LANES))
    alive = np.empty(LANES)
    lane_logits = np.empty(LANES)
    ids = np.empty(LANES, dtype=np.int64)
    v_s = np.empty(C * H * W * LANES) if separate else s
    spare = np.empty(H * W * LANES if separate else 0)
    floor = np.empty((B, Hs * Ws))
    for p in range(B):
        for i in range(Hs):
            for j in range(Ws):
                floor[p, i * Ws + j] = NOTHING if k > 0 else (m_known[p, i, j] - T[p]) / scale[p]
    loaded = -1
    for task in range(chunk * blocks * V * K // chunks, (chunk + 1) * blocks * V * K // chunks):
        copy, shift = task // K, task % K
        if copy != loaded:
            block, v = copy // V, copy % V
            _load_block(images, index, block, variants[v], s, half, alive)
            if separate:
                _load_block(averaged, index, block, v_variants[v], v_s, spare, alive)
            for n in range(LANES):
                ids[n] = v * total_images + index[min(block * LANES + n, N - 1)]
            loaded = copy
        g = _region(plan, Hq, Wq, H, W, shifts[shift])
        for p in range(B):
            _merge_sources(
                plan, g, tables, lines, y[p].reshape(C * Hq * Wq), u[p], Hq, Wq, s, v_s, half,
                alive, ids, C, H, W, values, scale[p], T[p], m[p], floor[p],
                totals[p], logits[p], places[p], lane_logits,
            )  # fmt: skip


@njit(fastmath=FLAGS)
def _weigh(
    plan, g, tables, lines, y, u, Hq, Wq, s, v_s, half, alive, C, H, W, pixel, scale, T, m, Z,
    b_mean, w,
):  # fmt: skip
    """Fills w (rows, columns) with the weights a_is of one displacement; returns how many vectors.

    `pixel`: whether u has a value for the sites' own pixels, rather than for all of their windows.
    """
    P, Q = plan.weights.shape
    ry, rx = P // 2 - g.py, Q // 2 - g.px
    by, bx = (ry, rx) if plan.middles else (0, 0)
    table, table_u, nothing = tables
    line, line_u, buffer = lines
    filled, ready = np.int64(0), np.int64(0)
    least = math.exp(-T)
    for a in range(g.rows):
        while ready < _last_row(plan, g, a):
            _add_row(plan, g, table, ready, y, Hq, Wq, s, half, C, H, W, buffer)
            ready += 1
        _window_sums(plan, g, table, a, line)
        i = g.a0 + a + by
        for b in range(g.columns):
            v, j, o = load(line, b * LANES), g.b0 + b + bx, (a * g.columns + b) * LANES
            if not any_reaches(v, splat((m[i, j] - T) / scale)):
                store(w, o, splat(0.0))
                continue
            v = exp(v * scale - m[i, j]) * load(alive, 0) * (1.0 / Z[i, j])
            store(w, o, above(v, least))
            filled += 1
    if filled == 0 or len(u) == 0:
        return filled
    Hs, Ws = m.shape
    if not pixel:
        for a in range(g.n):
            _add_row(plan, g, table_u, a, u, Hq, Wq, v_s, nothing, C, H, W, buffer)
    for a in range(g.rows):
        if not pixel:
            _window_sums(plan, g, table_u, a, line_u)
        i = g.a0 + a + by
        for b in range(g.columns):
            j, o = g.b0 + b + bx, (a * g.columns + b) * LANES
            inner = splat(-b_mean[i, j])
            if pixel:
                source = ((g.a0 + a + g.dy + ry) * W + g.b0 + b + g.dx + rx) * LANES
                for c in range(C):
                    q = broadcast(u, (c * Hs + i) * Ws + j)
                    inner = inner + q * load(v_s, source + c * H * W * LANES)
            else:
                inner = inner + load(line_u, b * LANES)
            store(w, o, load(w, o) * inner)
    return filled


@njit(inline="always")
def _add_pixel(weighted, g, a, b, Hq, Wq, s, C, H, W, D):
    """Adds weighted s to D, for the pixel (a, b) of the region."""
    q = ((g.a0 + a) * Wq + g.b0 + b) * LANES
    o = ((g.a0 + a + g.dy) * W + g.b0 + b + g.dx) * LANES
    for c in range(C):
        total = load(D, q + c * Hq * Wq * LANES) + weighted * load(s, o + c * H * W * LANES)
        store(D, q + c * Hq * Wq * LANES, total)


@njit(fastmath=FLAGS)
def _add_corners(plan, g, table, a, b, weight):
    """Adds a window's weight at its terms or corners; `_adjoint_sums` expands them to pixels."""
    if plan.kind == MASKS:
        site = a * g.columns + b
        for sign in range(2):
            for k in range(plan.starts[2 * site + sign], plan.starts[2 * site + sign + 1]):
                o = plan.terms[k]
                store(table, o, load(table, o) + weight * (1.0 - 2.0 * sign))
        return
    P, Q = plan.weights.shape
    top, bottom = max(a - g.py, 0), min(a - g.py + P, g.n)
    left, right = max(b - g.px, 0), min(b - g.px + Q, g.width)
    for row, sign in ((bottom, 1.0), (top, -1.0)):
        o = (row * (g.width + 1) + right) * LANES
        store(table, o, load(table, o) + weight * sign)
        o = (row * (g.width + 1) + left) * LANES
        store(table, o, load(table, o) - weight * sign)


@njit(fastmath=FLAGS)
def _adjoint_sums(plan, g, w, table, Hq, Wq, s, C, H, W, D):
    """Adds sum_i q_i w_i s to D, from corners or terms, by reversed cumulative sums."""
    width = g.width + 1
    size = (g.n + 1) * width
    _clear(table, 3 * size if plan.kind == MASKS else size)
    for a in range(g.rows):
        for b in range(g.columns):
            weight = load(w, (a * g.columns + b) * LANES)
            if any_above(weight * weight, splat(0.0)):
                _add_corners(plan, g, table, a, b, weight)
    for a in range(g.n, 0, -1):
        total, row = splat(0.0), splat(0.0)
        for b in range(g.width, 0, -1):
            o = (a * width + b) * LANES
            total = total + load(table, o)
            weighted = total
            if a < g.n:
                weighted = weighted + load(table, o + width * LANES)
            store(table, o, weighted)
            if plan.kind == MASKS:
                row = row + load(table, o + size * LANES)
                weighted = weighted + row + load(table, o + 2 * size * LANES)
            _add_pixel(weighted, g, a - 1, b - 1, Hq, Wq, s, C, H, W, D)


@njit(fastmath=FLAGS)
def _adjoint_soft(plan, g, w, table, Hq, Wq, s, C, H, W, D):
    """Adds sum_i q_i w_i s to D for tapered boxes: filters w vertically, then horizontally."""
    K, P = plan.rows.shape
    Q = plan.columns.shape[1]
    down, across = plan.rows.reshape(K * P), plan.columns.reshape(K * Q)
    for a in range(g.n):
        first, last = max(0, a + g.py - P + 1), min(g.rows, a + g.py + 1)
        for k in range(K):
            for b in range(g.columns):
                total = splat(0.0)
                for r in range(first, last):
                    q = broadcast(down, k * P + a + g.py - r)
                    total = total + q * load(w, (r * g.columns + b) * LANES)
                store(table, ((a * K + k) * g.columns + b) * LANES, total)
    for a in range(g.n):
        for b in range(g.width):
            first, last = max(0, b + g.px - Q + 1), min(g.columns, b + g.px + 1)
            total = splat(0.0)
            for k in range(K):
                for c in range(first, last):
                    q = broadcast(across, k * Q + b + g.px - c)
                    total = total + q * load(table, ((a * K + k) * g.columns + c) * LANES)
            _add_pixel(total, g, a, b, Hq, Wq, s, C, H, W, D)


@njit(fastmath=FLAGS)
def _adjoint_few(plan, g, w, Hq, Wq, s, C, H, W, D):
    """Adds sum_i q_i w_i s to D, window by window."""
    P, Q = plan.weights.shape
    for a in range(g.rows):
        for b in range(g.columns):
            weight = load(w, (a * g.columns + b) * LANES)
            if not any_above(weight * weight, splat(0.0)):
                continue
            top, left = a - g.py, b - g.px
            for r in range(max(top, 0), min(top + P, g.n)):
                for c in range(max(left, 0), min(left + Q, g.width)):
                    weighted = weight * plan.weights[r - top, c - left]
                    _add_pixel(weighted, g, r, c, Hq, Wq, s, C, H, W, D)


@njit(fastmath=FLAGS, nogil=True, cache=True)
def _accumulate(
    chunk, chunks, images, averaged, separate, index, y, u, pixel, scale, T, plan, shifts, variants,
    v_variants, m, Z, b_mean, D,
):  # fmt: skip
    """The second pass over a chunk: adds its sum_is q_i a_is s to D, (B, C, Hq, Wq)."""
    _, C, H, W = images.shape
    B, _, Hq, Wq = y.shape
    N = index.shape[0]
    P, Q = plan.weights.shape
    _, Hs, Ws = m.shape
    blocks = (N + LANES - 1) // LANES
    K, V = shifts.shape[0], variants.shape[0]
    s = np.empty(C * H * W * LANES)
    half = np.empty(H * W * LANES)
    size = _table_size(plan, min(H, Hq), min(W, Wq))
    windowed = u.shape[1] > 0 and not pixel
    tables = (
        np.empty(size),
        np.empty(size if windowed else 0),
        np.zeros(H * W * LANES if windowed else 0),
    )
    lines = (np.empty(W * LANES), np.empty(W * LANES), np.empty(W * LANES))
    w = np.empty(Hs * Ws * LANES)
    alive = np.empty(LANES)
    totals = np.zeros((B, C * Hq * Wq * LANES))
    v_s = np.empty(C * H * W * LANES) if separate else s
    spare = np.empty(H * W * LANES if separate else 0)
    weighted = s if u.shape[1] > 0 else v_s  # in a derivative the keys are weighted
    loaded = -1
    for task in range(chunk * blocks * V * K // chunks, (chunk + 1) * blocks * V * K // chunks):
        copy, shift = task // K, task % K
        if copy != loaded:
            _load_block(images, index, copy // V, variants[copy % V], s, half, alive)
            if separate:
                _load_block(averaged, index, copy // V, v_variants[copy % V], v_s, spare, alive)
            loaded = copy
        g = _region(plan, Hq, Wq, H, W, shifts[shift])
        for p in range(B):
            filled = _weigh(
                plan, g, tables, lines, y[p].reshape(C * Hq * Wq), u[p], Hq, Wq, s, v_s, half,
                alive, C, H, W, pixel, scale[p], T[p], m[p], Z[p], b_mean[p], w,
            )  # fmt: skip
            if filled == 0:
                continue
            if plan.kind != MASKS and filled * P * Q < 2 * g.n * g.width:
                _adjoint_few(plan, g, w, Hq, Wq, weighted, C, H, W, totals[p])
            elif plan.kind == SOFT:
                _adjoint_soft(plan, g, w, tables[0], Hq, Wq, weighted, C, H, W, totals[p])
            else:
                _adjoint_sums(plan, g, w, tables[0], Hq, Wq, weighted, C, H, W, totals[p])
    for p in range(B):
        flat = D[p].reshape(C * Hq * Wq)
        for d in range(C * Hq * Wq):
            flat[d] += hsum(load(totals[p], d * LANES))


def fold(request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
    """The fold over the source; see `scoremachine.core.posterior.Engine`."""
    images, index, c = request.keys, request.index, request.collection
    if c.source == "rolled":
        return rolled.fold(request, leaders, torch.device("cpu"), ROLLED)
    if c.whole and request.values is not None:
        return device.fold(request, leaders, known)
    into, _ = strips.cut(c, len(index))
    if into and request.u is None and request.values is None:
        return strips.fold(request, leaders, into, fold)
    y, u, scale, T = _arrays(request)
    if c.whole and request.u is None:
        return Fold.of_parts(*fold_whole(images, index, y, scale, T, leaders))
    B, C, _, _ = y.shape
    values = 1 if request.u is not None else C if c.response == "pixel" else 0
    plan, variants, source = plan_of(c), _variants(c, images), _source(request)
    v_variants = _variants(c, request.averaged)
    best, found = known, []
    for shifts in _pieces(len(index), c):
        chunks = _chunk_count(index, variants, shifts, _state_size(c, leaders))
        m = np.full((chunks, B, *c.grid), NOTHING)
        totals = np.zeros((chunks, B, math.prod(c.grid) * LANES))
        # in memory the leaders of a site lie side by side
        logits = np.moveaxis(np.full((chunks, B, *c.grid, leaders), NOTHING), -1, 2)
        places = np.moveaxis(np.full((chunks, B, *c.grid, leaders), -1), -1, 2)
        m_known = m[0] if best is None else best.m.numpy()
        windows = plan, shifts, variants, v_variants
        arguments = *source, index, y, u, scale, T, *windows, values, m_known
        fill(_fold, arguments, (m, totals, logits, places))
        totals = totals.reshape(*m.shape, LANES)
        Z, Z2, S = totals[..., 0], totals[..., 1], np.moveaxis(totals, -1, 2)[:, :, 2 : 2 + values]
        piece = Fold.of_parts(m, Z, Z2, S, logits, places)
        found.append(piece)
        best = piece if best is None else best.merge(piece)
    return functools.reduce(Fold.merge, found)


def accumulate_response(request: ScanRequest, known: Fold) -> torch.Tensor:
    """sum_is q_i a_is s; see `scoremachine.core.posterior.Engine`."""
    images, index, c = request.keys, request.index, request.collection
    if c.source == "rolled":
        return rolled.accumulate_response(request, known, torch.device("cpu"), ROLLED)
    if c.whole and request.values is not None:
        return device.accumulate_response(request, known)
    y, u, scale, T = _arrays(request)
    plan, variants, source = plan_of(c), _variants(c, images), _source(request)
    v_variants = _variants(c, request.averaged)
    m, Z = known.m.numpy(), known.Z.numpy()
    b_mean = m if request.u is None else known.mean[:, 0].contiguous().numpy()
    if c.whole and request.u is not None:
        D = accumulate_whole(images, index, y, u, scale, T, (m, Z, b_mean))
    else:
        most = _most_chunks(math.prod(y.shape[1:]))
        D = np.zeros((most, *y.shape))
        for shifts in _pieces(len(index), c):
            windows = plan, shifts, variants, v_variants
            arguments = y, u, c.response == "pixel", scale, T, *windows, m, Z, b_mean
            chunks = _chunk_count(index, variants, shifts, math.prod(y.shape[1:]))
            fill(_accumulate, (*source, index, *arguments), (D[:chunks],))
    return torch.from_numpy(functools.reduce(np.add, D))


def response_covariance(request: ScanRequest, known: Fold) -> torch.Tensor:
    """Cov_i(v_sp, b_is) at every pixel; see `scoremachine.core.posterior.Engine`."""
    return device.response_covariance(request, known)


def _arrays(request: ScanRequest) -> tuple[np.ndarray, ...]:
    """y, u as (B, C ...) or (B, 0), 1 / sigma^2, and T."""
    B = len(request.y)
    u = np.empty((B, 0)) if request.u is None else request.u.reshape(B, -1).contiguous().numpy()
    scale = (1 / request.sigma**2).numpy()
    return np.ascontiguousarray(request.y.numpy()), u, scale, request.log_cutoff.numpy()


def _variants(c: Collection, images: np.ndarray) -> np.ndarray:
    """The variants of images for `_load_block`; adjusted for floats, which are in units of x."""
    rows = np.array([astuple(variant) for variant in c.variants], dtype=np.float64)
    if images.dtype != np.uint8:
        rows[:, 2] *= 127.5
        rows[:, 3] += rows[:, 2]
    return rows


def _source(request: ScanRequest) -> tuple[np.ndarray, np.ndarray, bool]:
    """The keys, the values, and whether these differ."""
    return request.keys, request.averaged, request.values is not None


def _state_size(c: Collection, leaders: int) -> int:
    """The number of values in the state of a chunk of the first pass, for one picture."""
    return math.prod(c.grid) * (1 + LANES + 2 * leaders)


def _most_chunks(numbers: int) -> int:
    """The most chunks with `numbers` values of state each: fewer for large pictures."""
    return max(2, min(PARTS, WORKSPACE // numbers))


def _chunk_count(index: np.ndarray, variants: np.ndarray, shifts: np.ndarray, numbers: int) -> int:
    """The number of chunks, which does not depend on the number of threads."""
    return min(_most_chunks(numbers), -(-len(index) // LANES) * len(variants) * len(shifts))


def batch(collection: Collection, channels: int, leaders: int) -> int:
    """The number of pictures whose state fits into the workspace; see `Engine`."""
    first = _state_size(collection, leaders)
    second = channels * math.prod(collection.frame) * 2  # wrapped pictures are larger
    lanes = LANES * second  # in each of a few threads
    largest = max(_most_chunks(first) * first, _most_chunks(second) * second + 2 * lanes)
    return min(BATCH, max(1, WORKSPACE // largest))


def _pieces(n: int, collection: Collection) -> Iterator[np.ndarray]:
    """Cuts the displacements into short calls, so that Ctrl-C is handled between them."""
    blocks = -(-n // LANES) * len(collection.variants)
    step = max(1, TILE // (blocks * LANES * math.prod(collection.grid)))
    for start in range(0, len(collection.shifts), step):
        yield collection.shifts[start : start + step]
