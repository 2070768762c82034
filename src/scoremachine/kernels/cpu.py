"""The fold on the CPU: numba, all cores, uint8 in, no patches gathered.

Eight images at a time fill the lanes of SIMD vectors. For one displacement (dy, dx) between query
and source the logit of every site is a box sum of

    v = sum_c s_c (y_c - s_c / 2),        |y - s|^2 = |y|^2 - 2 sum v,

made by running sums along both axes, so that its cost does not depend on the window's size. The
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

from scoremachine.kernels.simd import LANES, exp, hmax, hsum, load, splat, store
from scoremachine.posterior import SKIPPED, TILE, Fold
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


@njit(fastmath=FLAGS)
def _slide(l, y, Hq, Wq, s, half, C, H, W, dy, dx, P, Q, cut, prefix, history):
    """Box sums of v for one displacement, into l as (rows, columns, LANES); returns its shape.

    y: (C, Hq, Wq) flat; s: (C, H, W, LANES) flat. Rows and columns beyond the overlap count as
    zero where windows are cut off.
    """
    a0, a1, py, rows = _overlap(dy, Hq, H, P, cut)
    b0, b1, px, columns = _overlap(dx, Wq, W, Q, cut)
    if rows <= 0 or columns <= 0:
        return 0, 0
    n = b1 - b0
    zero = splat(0.0)
    for b in range(px + 1):
        store(prefix, b * LANES, zero)
    for i in range(P * columns):
        store(history, i * LANES, zero)
    yc, sc = Hq * Wq, H * W * LANES
    for step in range(a1 - a0 + 2 * py):
        a = a0 + step - py
        inside = a0 <= a < a1
        if inside:
            # prefix sums of v along the row; the query's pixels are the same for all lanes
            total = zero
            q = a * Wq + b0
            o = ((a + dy) * W + b0 + dx) * LANES
            e = (px + 1) * LANES
            if C == 3:
                for b in range(n):
                    i = o + b * LANES
                    v = y[q + b] * load(s, i) - load(half, i)
                    v = v + y[q + b + yc] * load(s, i + sc)
                    v = v + y[q + b + 2 * yc] * load(s, i + 2 * sc)
                    total = total + v
                    store(prefix, e + b * LANES, total)
            else:
                for b in range(n):
                    i = o + b * LANES
                    v = splat(0.0) - load(half, i)
                    for c in range(C):
                        v = v + y[q + b + c * yc] * load(s, i + c * sc)
                    total = total + v
                    store(prefix, e + b * LANES, total)
            for b in range(px):
                store(prefix, e + (n + b) * LANES, total)
        # running sums down the columns: add this row's boxes, take away those P rows up
        slot = (step % P) * columns * LANES
        out = max(step - P + 1, 0) * columns * LANES
        last = max(step - P, 0) * columns * LANES
        for b in range(columns):
            i = b * LANES
            box = zero
            if inside:
                box = load(prefix, i + Q * LANES) - load(prefix, i)
            total = box - load(history, slot + i)
            if step > 0:
                total = total + load(l, last + i)
            store(l, out + i, total)
            store(history, slot + i, box)
    return rows, columns


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
    l, rows, columns, i0, j0, r0, c0, scale, T, s, alive, ids, C, H, W,
    m, floor, Z, Z2, S, logits, places, eight,
):  # fmt: skip
    """Merges the logits of one displacement into the sites' folds.

    The window of row a, column b belongs to site (i0 + a, j0 + b); the source pixel it answers
    with is (r0 + a, c0 + b). `floor` is the smallest box sum that still matters.
    """
    k = logits.shape[0]
    for a in range(rows):
        i = i0 + a
        for b in range(columns):
            j = j0 + b
            v = load(l, (a * columns + b) * LANES)
            top = hmax(v)
            if top <= floor[i, j]:
                continue
            leader = m[i, j]
            if top * scale > leader:
                rescale = math.exp(leader - top * scale)
                leader = top * scale
                m[i, j] = leader
                Z[i, j] *= rescale
                Z2[i, j] *= rescale * rescale
                for c in range(S.shape[0]):
                    S[c, i, j] *= rescale
            w = exp(v * scale - leader) * load(alive, 0)
            Z[i, j] += hsum(w)
            Z2[i, j] += hsum(w * w)
            pixel = (r0 + a) * W + c0 + b
            for c in range(S.shape[0]):
                S[c, i, j] += hsum(w * load(s, (c * H * W + pixel) * LANES))
            floor[i, j] = (leader - T) / scale
            if k > 0:
                store(eight, 0, v)
                for n in range(LANES):
                    if alive[n] > 0 and eight[n] * scale > logits[k - 1, i, j]:
                        _keep(eight[n] * scale, ids[n] * H * W + pixel, logits, places, i, j)
                floor[i, j] = min(floor[i, j], logits[k - 1, i, j] / scale)


@njit(parallel=True, fastmath=FLAGS, nogil=True, cache=True)
def _fold(images, index, y, scale, T, P, Q, shifts, cut, wraps, pixels, grid, C_out, k, m_known):
    """The first pass: (m, Z, Z2, S, logits, places) of every part, axis 0."""
    _, C, H, W = images.shape
    B, _, Hq, Wq = y.shape
    N = index.shape[0]
    Hs, Ws = grid
    blocks = (N + LANES - 1) // LANES
    K = shifts.shape[0]
    parts = min(PARTS, blocks * K)
    m = np.full((parts, B, Hs, Ws), NOTHING)
    Z = np.zeros((parts, B, Hs, Ws))
    Z2 = np.zeros((parts, B, Hs, Ws))
    S = np.zeros((parts, B, C_out, Hs, Ws))
    logits = np.full((parts, B, k, Hs, Ws), NOTHING)
    places = np.full((parts, B, k, Hs, Ws), -1)
    for part in prange(parts):
        s = np.empty(C * H * W * LANES)
        half = np.empty(H * W * LANES)
        l = np.empty(Hs * Ws * LANES)
        prefix = np.empty((max(W, Wq) + Q + 1) * LANES)
        history = np.empty(P * Ws * LANES)
        alive = np.empty(LANES)
        eight = np.empty(LANES)
        ids = np.empty(LANES, dtype=np.int64)
        floor = np.empty((B, Hs, Ws))
        for p in range(B):
            for i in range(Hs):
                for j in range(Ws):
                    floor[p, i, j] = NOTHING if k > 0 else (m_known[p, i, j] - T) / scale[p]
        held = -1
        for task in range(part * blocks * K // parts, (part + 1) * blocks * K // parts):
            block, shift = task // K, task % K
            if block != held:
                _load_block(images, index, block, s, half, alive)
                for n in range(LANES):
                    ids[n] = index[min(block * LANES + n, N - 1)]
                held = block
            dy, dx = shifts[shift, 0], shifts[shift, 1]
            a0, _, py, _ = _overlap(dy, Hq, H, P, cut)
            b0, _, px, _ = _overlap(dx, Wq, W, Q, cut)
            # a window's middle; with cut boxes row a of the box sums is already its middle row
            ry = P // 2 - py
            rx = Q // 2 - px
            i0 = a0 + (ry if pixels and not wraps else 0)
            j0 = b0 + (rx if pixels and not wraps else 0)
            for p in range(B):
                rows, columns = _slide(
                    l, y[p].reshape(C * Hq * Wq), Hq, Wq, s, half, C, H, W,
                    dy, dx, P, Q, cut, prefix, history,
                )  # fmt: skip
                _absorb(
                    l, rows, columns, i0, j0, a0 + dy + ry, b0 + dx + rx, scale[p], T,
                    s, alive, ids, C, H, W, m[part, p], floor[p], Z[part, p], Z2[part, p],
                    S[part, p], logits[part, p], places[part, p], eight,
                )  # fmt: skip
    return m, Z, Z2, S, logits, places


@njit(fastmath=FLAGS)
def _spread(w, nonzero, Hs, Ws, P, Q, s, C, H, W, prefix, history, column, D):
    """Adds sum_i (box of site i) w_i s to D (C, H, W), for a block of images.

    A few non-zero weights are painted box by box; many are spread by running sums, as in `_slide`.
    """
    if nonzero * P * Q < 4 * H * W:
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
    zero = splat(0.0)
    for b in range(W):
        store(column, b * LANES, zero)
    for i in range(P * W):
        store(history, i * LANES, zero)
    store(prefix, 0, zero)
    for a in range(H):
        slot = (a % P) * W * LANES
        if a < Hs:
            total = zero
            for j in range(Ws):
                total = total + load(w, (a * Ws + j) * LANES)
                store(prefix, (j + 1) * LANES, total)
        for b in range(W):
            i = b * LANES
            box = zero
            if a < Hs:
                hi, lo = min(b + 1, Ws), max(b - Q + 1, 0)
                box = load(prefix, hi * LANES) - load(prefix, lo * LANES)
            total = load(column, i) + box - load(history, slot + i)
            store(column, i, total)
            store(history, slot + i, box)
            for c in range(C):
                D[c, a, b] += hsum(total * load(s, ((c * H + a) * W + b) * LANES))


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
        l = np.empty(Hs * Ws * LANES)
        prefix = np.empty((W + Q + 1) * LANES)
        history = np.empty(P * W * LANES)
        column = np.empty(W * LANES)
        alive = np.empty(LANES)
        for block in range(part * blocks // parts, (part + 1) * blocks // parts):
            _load_block(images, index, block, s, half, alive)
            for p in range(B):
                rows, columns = _slide(
                    l, y[p].reshape(C * H * W), H, W, s, half, C, H, W,
                    0, 0, P, Q, False, prefix, history,
                )  # fmt: skip
                nonzero = 0
                for i in range(rows):
                    for j in range(columns):
                        o = (i * columns + j) * LANES
                        v = load(l, o)
                        if hmax(v) * scale[p] <= m[p, i, j] - T:
                            store(l, o, splat(0.0))
                            continue
                        w = exp(v * scale[p] - m[p, i, j]) * load(alive, 0) * (1.0 / Z[p, i, j])
                        store(l, o, w)
                        for n in range(LANES):
                            if l[o + n] > SKIPPED / (2.0 * N):
                                nonzero += 1
                            else:
                                l[o + n] = 0.0
                if nonzero > 0:
                    _spread(
                        l, nonzero, Hs, Ws, P, Q, s, C, H, W, prefix, history, column, D[part, p]
                    )
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
    padded = (D + LANES - 1) // LANES * LANES
    for part in prange(parts):
        lo, hi = part * N // parts, (part + 1) * N // parts
        l = np.empty((B, hi - lo))
        s = np.zeros(padded)
        q = np.zeros((B, padded))
        for p in range(B):
            for d in range(D):
                q[p, d] = y[p, d]
        for n in range(lo, hi):
            u = flat[index[n]]
            for d in range(D):
                s[d] = u[d] * (1.0 / 127.5) - 1.0
            for p in range(B):
                row = q[p]
                even, odd = splat(0.0), splat(0.0)
                for d in range(0, padded - LANES, 2 * LANES):
                    v, w = load(s, d), load(s, d + LANES)
                    even = even + v * (load(row, d) - v * 0.5)
                    odd = odd + w * (load(row, d + LANES) - w * 0.5)
                if padded // LANES % 2:
                    v = load(s, padded - LANES)
                    even = even + v * (load(row, padded - LANES) - v * 0.5)
                l[p, n - lo] = hsum(even + odd) * scale[p]
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
                    for d in range(D):
                        S[part, p, d] += w * (u[d] * (1.0 / 127.5) - 1.0)
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
    """The fold over images[index]; see `scoremachine.kernels.Kernel`."""
    B, C, _, _ = y.shape
    scale = (1 / sigma**2).numpy()
    query = np.ascontiguousarray(y.numpy())
    grid = collection.grid
    if collection.whole:
        return _merged(_call(_fold_whole, images, index, query.reshape(B, -1), scale, T, leaders))
    best, found = known, []
    for shifts in _pieces(len(index), collection):
        m_known = np.full((B, *grid), NOTHING) if best is None else best.m.numpy()
        part = _merged(
            _call(
                _fold,
                images,
                index,
                query,
                scale,
                T,
                *collection.window,
                shifts,
                collection.cut,
                collection.wraps,
                collection.sites == "pixels",
                grid,
                C if collection.response == "pixel" else 0,
                leaders,
                m_known,
            )
        )
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
    """sum_i r_i mu_i over images[index], for box responses; see `scoremachine.kernels.Kernel`."""
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
