"""The fold on the CPU: numba, all cores, uint8 in, no patches gathered.

Eight images at a time fill the lanes of SIMD vectors. For one displacement (dy, dx) between query
and source the logit of every site is a box sum of

    v = sum_c s_c (y_c - s_c / 2),        |y - s|^2 = |y|^2 - 2 sum v,

taken from a summed-area table of v, so that its cost does not depend on the window's size. The
term |y|^2 is the same for every source of a site: it is added once, at the end. All sums are in
float64, where rounding costs less than 1e-6 nats at sigma = 0.002 (float32 would cost tens of
nats and a second pass). A vector of eight logits is looked at only if its largest is within
T = ln(2 |S| / 1e-5) nats of the site's leader: what is left out weighs less than 5e-6 of the
whole.

Every picture of a batch has its own state, and the work is cut into `PARTS` parts whatever the
number of threads, merged in order: the answer depends on neither.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from numba import njit, prange

from scoremachine.kernels.simd import (
    LANES,
    above,
    any_above,
    broadcast,
    exp,
    hmax,
    hsum,
    load,
    load_bytes,
    splat,
    store,
    sums,
)
from scoremachine.posterior import TILE, Fold
from scoremachine.windows import Collection

PARTS = 32
NOTHING = -1e300  # the logit of no source at all

FLAGS = {"contract", "reassoc", "nsz", "arcp"}


@njit(fastmath=FLAGS)
def _load_block(images, index, block, s, half, alive):
    """Reads images index[8 block : 8 block + 8] as s = u / 127.5 - 1 and half = sum_c s^2 / 2.

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
    scale = 1.0 / 127.5
    for d in range(D):
        i = d * LANES
        s[i] = u0[d] * scale - 1.0
        s[i + 1] = u1[d] * scale - 1.0
        s[i + 2] = u2[d] * scale - 1.0
        s[i + 3] = u3[d] * scale - 1.0
        s[i + 4] = u4[d] * scale - 1.0
        s[i + 5] = u5[d] * scale - 1.0
        s[i + 6] = u6[d] * scale - 1.0
        s[i + 7] = u7[d] * scale - 1.0
    for d in range(H * W):
        total = splat(0.0)
        for c in range(C):
            v = load(s, (c * H * W + d) * LANES)
            total = total + v * v
        store(half, d * LANES, total * 0.5)


@njit(inline="always")
def _overlap(shift, n_query, n_source, p, cut):
    """Where query and source overlap along one axis: first query row, last, padding, windows."""
    lo = max(0, -shift)
    hi = min(n_query, n_source - shift)
    pad = p // 2 if cut and shift == 0 else 0
    return lo, hi, pad, hi - lo + 2 * pad - p + 1


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


@njit(inline="always")
def _first_row(table, width):
    """Begins a summed-area table: nothing lies above the first row."""
    for b in range(width):
        store(table, b * LANES, splat(0.0))


@njit(fastmath=FLAGS)
def _add_row(table, a, n, y, q, yc, s, half, o, sc, C):
    """Adds row a of v, n pixels wide, to the summed-area table, whose row a + 1 it becomes.

    The row's query pixels begin at y[q], a channel every yc; its source pixels at s[o], a channel
    every sc. The query's pixels are the same for all lanes.
    """
    above = a * (n + 1) * LANES
    here = above + (n + 1) * LANES
    store(table, here, splat(0.0))
    total = splat(0.0)
    for b in range(n):
        i = o + b * LANES
        if C == 3:  # spelled out, since a loop over channels costs as much as the sums
            v = broadcast(y, q + b) * load(s, i) - load(half, i)
            v = v + broadcast(y, q + b + yc) * load(s, i + sc)
            v = v + broadcast(y, q + b + 2 * yc) * load(s, i + 2 * sc)
        else:
            v = splat(0.0) - load(half, i)
            for c in range(C):
                v = v + broadcast(y, q + b + c * yc) * load(s, i + c * sc)
        total = total + v
        store(table, here + (b + 1) * LANES, total + load(table, above + (b + 1) * LANES))


@njit(fastmath=FLAGS)
def _keep(logit, place, logits, places, i, j):
    """Inserts (logit, place) into the k best of site (i, j), which fall."""
    k = logits.shape[0] - 1
    while k > 0 and logits[k - 1, i, j] < logit:
        logits[k, i, j] = logits[k - 1, i, j]
        places[k, i, j] = places[k - 1, i, j]
        k -= 1
    logits[k, i, j] = logit
    places[k, i, j] = place


@njit(fastmath=FLAGS)
def _absorb(
    table, y, Hq, Wq, s, half, alive, ids, C, H, W, dy, dx, P, Q, cut, pixels, values, scale, T,
    m, floor, totals, logits, places, eight,
):  # fmt: skip
    """Merges the sources of one displacement into the folds of a picture's sites.

    y is (C, Hq, Wq) and s is (C, H, W, LANES), both flat. `floor` is the smallest window sum that
    still matters; `totals` holds Z, Z2 and S of every site, eight numbers each.
    """
    a0, a1, py, rows = _overlap(dy, Hq, H, P, cut)
    b0, b1, px, columns = _overlap(dx, Wq, W, Q, cut)
    n, width = a1 - a0, b1 - b0
    # a window's middle, seen from its first pixel; cut windows are counted by their middle
    ry, rx = P // 2 - py, Q // 2 - px
    k, Ws = logits.shape[0], m.shape[1]
    if columns > 0:
        _first_row(table, width + 1)
    ready, zero = 0, splat(0.0)
    for a in range(rows if columns > 0 else 0):
        top, bottom = max(a - py, 0), min(a - py + P, n)
        while ready < bottom:
            q, o = (a0 + ready) * Wq + b0, ((a0 + ready + dy) * W + b0 + dx) * LANES
            _add_row(table, ready, width, y, q, Hq * Wq, s, half, o, H * W * LANES, C)
            ready += 1
        i = a0 + a + (ry if pixels else 0)
        for b in range(columns):
            v = _window(table, width + 1, top, bottom, max(b - px, 0), min(b - px + Q, width))
            j = b0 + b + (rx if pixels else 0)
            if not any_above(v, broadcast(floor, i * Ws + j)):
                continue
            leader = m[i, j]
            total = load(totals, (i * Ws + j) * LANES)
            highest = hmax(v) * scale
            if highest > leader:
                rescale = math.exp(leader - highest)
                total = total * rescale
                leader = highest
                m[i, j] = leader
                store(totals, (i * Ws + j) * LANES, total)
                totals[(i * Ws + j) * LANES + 1] *= rescale  # Z2 goes with its square
                total = load(totals, (i * Ws + j) * LANES)
            w = exp(v * scale - leader) * load(alive, 0)
            pixel = (a0 + a + dy + ry) * W + b0 + b + dx + rx
            o = pixel * LANES
            w0 = w * load(s, o) if values > 0 else zero
            w1 = w * load(s, o + H * W * LANES) if values > 1 else zero
            w2 = w * load(s, o + 2 * H * W * LANES) if values > 2 else zero
            w3 = w * load(s, o + 3 * H * W * LANES) if values > 3 else zero
            store(totals, (i * Ws + j) * LANES, total + sums(w, w * w, w0, w1, w2, w3))
            floor[i * Ws + j] = (leader - T) / scale
            if k > 0:
                store(eight, 0, v)
                for lane in range(LANES):
                    if alive[lane] > 0 and eight[lane] * scale > logits[k - 1, i, j]:
                        place = ids[lane] * H * W + pixel
                        _keep(eight[lane] * scale, place, logits, places, i, j)
                floor[i * Ws + j] = min((leader - T) / scale, logits[k - 1, i, j] / scale)


@njit(parallel=True, fastmath=FLAGS, nogil=True, cache=True)
def _fold(images, index, y, scale, T, P, Q, shifts, cut, pixels, grid, values, k, m_known):
    """The first pass, parts along axis 0: m, (Z, Z2, S, 0 ...) of every site, logits, places."""
    _, C, H, W = images.shape
    B, _, Hq, Wq = y.shape
    N = index.shape[0]
    Hs, Ws = grid
    blocks = (N + LANES - 1) // LANES
    K = shifts.shape[0]
    parts = min(PARTS, blocks * K)
    m = np.full((parts, B, Hs, Ws), NOTHING)
    totals = np.zeros((parts, B, Hs * Ws * LANES))
    logits = np.full((parts, B, k, Hs, Ws), NOTHING)
    places = np.full((parts, B, k, Hs, Ws), -1)
    for part in prange(parts):
        s = np.empty(C * H * W * LANES)
        half = np.empty(H * W * LANES)
        table = np.empty((min(H, Hq) + 1) * (min(W, Wq) + 1) * LANES)
        alive = np.empty(LANES)
        eight = np.empty(LANES)
        ids = np.empty(LANES, dtype=np.int64)
        floor = np.empty((B, Hs * Ws))
        for p in range(B):
            for i in range(Hs):
                for j in range(Ws):
                    floor[p, i * Ws + j] = NOTHING if k > 0 else (m_known[p, i, j] - T) / scale[p]
        held = -1
        for task in range(part * blocks * K // parts, (part + 1) * blocks * K // parts):
            block, shift = task // K, task % K
            if block != held:
                _load_block(images, index, block, s, half, alive)
                for n in range(LANES):
                    ids[n] = index[min(block * LANES + n, N - 1)]
                held = block
            for p in range(B):
                _absorb(
                    table, y[p].reshape(C * Hq * Wq), Hq, Wq, s, half, alive, ids, C, H, W,
                    shifts[shift, 0], shifts[shift, 1], P, Q, cut, pixels, values, scale[p], T,
                    m[part, p], floor[p], totals[part, p], logits[part, p], places[part, p], eight,
                )  # fmt: skip
    return m, totals.reshape((parts, B, Hs, Ws, LANES)), logits, places


@njit(fastmath=FLAGS)
def _spread(w, filled, Hs, Ws, P, Q, s, C, H, W, table, D):
    """Adds sum_i (box of site i) w_i s to D (C, H, W), for a block of images.

    Where few of the vectors are filled, each weight paints its box; where many are, every pixel
    takes the sum over the sites whose boxes hold it.
    """
    if filled * P * Q < 2 * H * W:
        for i in range(Hs):
            for j in range(Ws):
                o = (i * Ws + j) * LANES
                for n in range(LANES):
                    weight = w[o + n]
                    if weight > 0:
                        for c in range(C):
                            for a in range(i, i + P):
                                base = ((c * H + a) * W) * LANES + n
                                for b in range(j, j + Q):
                                    D[c, a, b] += weight * s[base + b * LANES]
        return
    _first_row(table, Ws + 1)
    for i in range(Hs):
        above = i * (Ws + 1) * LANES
        here = above + (Ws + 1) * LANES
        store(table, here, splat(0.0))
        total = splat(0.0)
        for j in range(Ws):
            total = total + load(w, (i * Ws + j) * LANES)
            store(table, here + (j + 1) * LANES, total + load(table, above + (j + 1) * LANES))
    for a in range(H):
        top, bottom = max(a - P + 1, 0), min(a + 1, Hs)
        for b in range(W):
            weight = _window(table, Ws + 1, top, bottom, max(b - Q + 1, 0), min(b + 1, Ws))
            for c in range(C):
                D[c, a, b] += hsum(weight * load(s, ((c * H + a) * W + b) * LANES))


@njit(parallel=True, fastmath=FLAGS, nogil=True, cache=True)
def _compose(images, index, y, scale, T, P, Q, m, Z):
    """The second pass of a box response: sum_i r_i mu_i of every part, (parts, B, C, H, W)."""
    _, C, H, W = images.shape
    B = y.shape[0]
    N = index.shape[0]
    Hs, Ws = H - P + 1, W - Q + 1
    blocks = (N + LANES - 1) // LANES
    parts = min(PARTS, blocks)
    D = np.zeros((parts, B, C, H, W))
    for part in prange(parts):
        s = np.empty(C * H * W * LANES)
        half = np.empty(H * W * LANES)
        table = np.empty((H + 1) * (W + 1) * LANES)
        w = np.empty(Hs * Ws * LANES)
        alive = np.empty(LANES)
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            _load_block(images, index, block, s, half, alive)
            for p in range(B):
                picture = y[p].reshape(C * H * W)
                filled = 0
                _first_row(table, W + 1)
                for a in range(H):
                    o = a * W * LANES
                    _add_row(table, a, W, picture, a * W, H * W, s, half, o, H * W * LANES, C)
                    i = a - P + 1
                    for j in range(Ws if i >= 0 else 0):
                        o = (i * Ws + j) * LANES
                        v = _window(table, W + 1, i, i + P, j, j + Q)
                        if not any_above(v, splat((m[p, i, j] - T) / scale[p])):
                            store(w, o, splat(0.0))
                            continue
                        v = exp(v * scale[p] - m[p, i, j]) * load(alive, 0) * (1.0 / Z[p, i, j])
                        store(w, o, above(v, math.exp(-T)))
                        filled += 1
                if filled > 0:
                    _spread(w, filled, Hs, Ws, P, Q, s, C, H, W, table, D[part, p])
    return D


@njit(parallel=True, fastmath=FLAGS, nogil=True, cache=True)
def _fold_whole(images, index, y, scale, T, k):
    """The fold of one site that is the whole image; S is (parts, B, D). Reads the corpus once."""
    N = index.shape[0]
    B, D = y.shape
    _, C, H, W = images.shape
    middle = H // 2 * W + W // 2
    flat = images.reshape(images.shape[0], D)
    parts = min(PARTS, N)
    m = np.full((parts, B, 1, 1), NOTHING)
    Z = np.zeros((parts, B, 1, 1))
    Z2 = np.zeros((parts, B, 1, 1))
    S = np.zeros((parts, B, D))
    logits = np.full((parts, B, k, 1, 1), NOTHING)
    places = np.full((parts, B, k, 1, 1), -1)
    step = 2 * LANES
    bulk = D // step * step
    for part in prange(parts):
        lo, hi = part * N // parts, (part + 1) * N // parts
        l = np.empty((B, hi - lo))
        for n in range(lo, hi):
            u = flat[index[n]]
            for p in range(B):
                row = y[p]
                even, odd = splat(0.0), splat(0.0)
                for d in range(0, bulk, step):
                    v = load_bytes(u, d) * (1.0 / 127.5) - 1.0
                    w = load_bytes(u, d + LANES) * (1.0 / 127.5) - 1.0
                    even = even + v * (load(row, d) - v * 0.5)
                    odd = odd + w * (load(row, d + LANES) - w * 0.5)
                total = hsum(even + odd)
                for d in range(bulk, D):
                    x = u[d] * (1.0 / 127.5) - 1.0
                    total += x * (row[d] - 0.5 * x)
                l[p, n - lo] = total * scale[p]
        for p in range(B):
            leader = NOTHING
            for n in range(hi - lo):
                leader = max(leader, l[p, n])
            m[part, p, 0, 0] = leader
            for n in range(hi - lo):
                if k > 0 and l[p, n] > logits[part, p, k - 1, 0, 0]:
                    place = index[lo + n] * H * W + middle
                    _keep(l[p, n], place, logits[part, p], places[part, p], 0, 0)
                if l[p, n] > leader - T:
                    w = math.exp(l[p, n] - leader)
                    Z[part, p, 0, 0] += w
                    Z2[part, p, 0, 0] += w * w
                    u = flat[index[lo + n]]
                    total_u = S[part, p]
                    for d in range(0, bulk, LANES):
                        store(total_u, d, load(total_u, d) + load_bytes(u, d) * w)
                    for d in range(bulk, D):
                        total_u[d] += w * u[d]
            for d in range(D):
                S[part, p, d] = S[part, p, d] * (1.0 / 127.5) - Z[part, p, 0, 0]
    return m, Z, Z2, S.reshape(parts, B, C, H, W), logits, places


def fold(
    images: np.ndarray,
    index: np.ndarray,
    y: torch.Tensor,
    sigma: torch.Tensor,
    collection: Collection,
    T: float,
    leaders: int,
    known: Fold | None,
) -> Fold:
    """The fold over images[index]; see `scoremachine.posterior.Kernel`."""
    B, C, _, _ = y.shape
    scale = (1 / sigma**2).numpy()
    query = np.ascontiguousarray(y.numpy())
    grid = collection.grid
    if collection.whole:
        return _merged(_call(_fold_whole, images, index, query.reshape(B, -1), scale, T, leaders))
    best, found = known, []
    for shifts in _pieces(len(index), collection):
        m_known = np.full((B, *grid), NOTHING) if best is None else best.m.numpy()
        values = C if collection.response == "pixel" else 0
        m, totals, logits, places = _call(
            _fold,
            images,
            index,
            query,
            scale,
            T,
            *collection.window,
            shifts,
            collection.cut,
            collection.sites == "pixels" and not collection.wraps,
            grid,
            values,
            leaders,
            m_known,
        )
        Z, Z2, *S = np.moveaxis(totals, -1, 0)[: 2 + values]
        S = np.stack(S, axis=2) if values else np.empty((*Z.shape[:2], 0, *grid))
        part = _merged((m, Z, Z2, S, logits, places))
        found.append(part)
        best = part if best is None else best.merge(part)
    return functools.reduce(Fold.merge, found)


def _call(compiled, *args):
    """Calls a compiled function; Ctrl-C in it comes out of numba as the root of SystemErrors."""
    try:
        return compiled(*args)
    except SystemError as error:
        root = error
        while isinstance(root, SystemError):
            root = root.__cause__
        if isinstance(root, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _pieces(n: int, collection: Collection) -> Iterator[np.ndarray]:
    """Cuts the displacements so that no call is long: between calls Ctrl-C is heard."""
    blocks = -(-n // LANES)
    step = max(1, TILE // (blocks * LANES * math.prod(collection.grid)))
    for start in range(0, len(collection.shifts), step):
        yield collection.shifts[start : start + step]


def _merged(parts: tuple[np.ndarray, ...]) -> Fold:
    """Merges what the parts of a call found, in order."""
    folds = (Fold(*map(torch.from_numpy, part)) for part in zip(*parts, strict=True))
    return functools.reduce(Fold.merge, folds)


def compose(
    images: np.ndarray,
    index: np.ndarray,
    y: torch.Tensor,
    sigma: torch.Tensor,
    collection: Collection,
    T: float,
    known: Fold,
) -> torch.Tensor:
    """sum_i r_i mu_i over images[index], for box responses; see `scoremachine.posterior.Kernel`."""
    D = _call(
        _compose,
        images,
        index,
        np.ascontiguousarray(y.numpy()),
        (1 / sigma**2).numpy(),
        T,
        *collection.window,
        known.m.numpy(),
        known.Z.numpy(),
    )
    return functools.reduce(torch.add, map(torch.from_numpy, D))
