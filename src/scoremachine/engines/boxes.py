"""Posterior means of the boxes of one picture, compared with patches of a few others.

A box at rows i.. and columns j.. of y has the logits

    l_ab = -1/2 |y_ij - s_ab|^2 / sigma^2 - weight/2 |u_ij - u_ab|^2

u being positions in the picture and in the source. `dense` computes them all; `search` computes
those of a few candidates, found by propagation (PatchMatch, Barnes et al. 2009): a box's own former
ones, those of its neighbours moved along, and random ones near the best. Pictures are float32
(H, W C), rows of pixels with their channels. Results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from numba import types

from scoremachine.engines.caching import njit
from scoremachine.engines.chunks import PARTS, side_by_side
from scoremachine.engines.vectors import Vector, loads, splats, stores, totals

NONE = np.float32(-1e30)  # the logit of no source
LEAST = 1e-8  # the least weight that is added
FEW = 1e-5  # the same among candidates
NEIGHBOURS = 2  # candidates taken from each of the four neighbours
RANDOM = 6  # random candidates, each within half the distance of the one before
LANES = 8  # pixels' channels that are compared at once; pictures end with as many zeros

BORROWED: dict[str, Any] = {
    "nogil": True,
    "fastmath": True,
    "_nrt": False,
}  # without reference counts

floats = Vector(types.float32, LANES)
load, store = loads(floats, 4), stores(floats, 4)
splat, hsum = splats(floats), totals(floats)


@njit(**BORROWED)
def _hash(seed, i, j, k):
    """A number of 64 bits that looks random."""
    h = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    h ^= np.uint64(i) * np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= np.uint64(j) * np.uint64(0x165667B19E3779F9)
    h ^= np.uint64(k) * np.uint64(0x27D4EB2F165667C5)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


# Inner functions take whole arrays and positions in them: a slice counts its references, and two
# threads that count the references of one array wait for each other.


@njit(**BORROWED)
def _logit(y, i, j, s, a, b, P, last, scale, weight, u, v, least):
    """l_ab of the box at (i, j), or NONE if it is below `least`; scale: 1 / (2 sigma^2).

    last: Which of the lanes behind the last whole vector of a row of P pixels are pixels: 1 or 0.
    """
    y, C, W = y
    s, w = s
    du, dv = u[i, j, 0] - v[a, b, 0], u[i, j, 1] - v[a, b, 1]
    l = -weight * (du * du + dv * dv)
    some, whole = load(last, 0), P * C // LANES * LANES
    total = splat(np.float32(0))
    for r in range(P):
        m, n = ((i + r) * W + j) * C, ((a + r) * w + b) * C
        for t in range(0, whole, LANES):
            d = load(y, m + t) - load(s, n + t)
            total = total + d * d
        d = (load(y, m + whole) - load(s, n + whole)) * some
        total = total + d * d
        if r % 3 == 2 and least > NONE and l - scale * hsum(total) < least:
            return NONE
    return l - scale * hsum(total)


@njit(**BORROWED)
def _try(a, b, y, i, j, s, valid, u, v, P, last, scale, weight, logits, places):
    """Enters a place among the candidates of a box, the best first, if it is new and good."""
    high, wide = valid.shape
    if not (0 <= a < high and 0 <= b < wide and valid[a, b]):
        return
    K = logits.shape[2]
    for k in range(K):
        if places[i, j, k, 0] == a and places[i, j, k, 1] == b:
            return
    l = _logit(y, i, j, s, a, b, P, last, scale, weight, u, v, logits[i, j, K - 1])
    if l <= logits[i, j, K - 1]:
        return
    k = K - 1
    while k > 0 and logits[i, j, k - 1] < l:
        logits[i, j, k] = logits[i, j, k - 1]
        places[i, j, k, 0] = places[i, j, k - 1, 0]
        places[i, j, k, 1] = places[i, j, k - 1, 1]
        k -= 1
    logits[i, j, k] = l
    places[i, j, k, 0] = a
    places[i, j, k, 1] = b


@njit(cache=True, **BORROWED)
def _search(rows, y, s, valid, u, v, old, P, last, scale, weight, seed, logits, places):
    sites_down, sites_across, K, _ = old.shape
    high, wide = valid.shape
    steps = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    for i in range(rows[0], rows[1]):
        for j in range(sites_across):
            for k in range(K):
                logits[i, j, k] = NONE
                places[i, j, k, 0] = -1
                places[i, j, k, 1] = -1
            for n in range(len(steps)):
                di, dj = steps[n]
                if not (0 <= i + di < sites_down and 0 <= j + dj < sites_across):
                    continue
                for k in range(K if n == 0 else min(NEIGHBOURS, K)):
                    a, b = old[i + di, j + dj, k, 0] - di, old[i + di, j + dj, k, 1] - dj
                    _try(a, b, y, i, j, s, valid, u, v, P, last, scale, weight, logits, places)
            for k in range(RANDOM):
                far = max(high, wide) >> k
                h = _hash(seed, i, j, k)
                a = places[i, j, 0, 0] + np.int64(h % np.uint64(2 * far + 1)) - far
                b = places[i, j, 0, 1] + np.int64((h >> np.uint64(32)) % np.uint64(2 * far + 1))
                b -= far
                _try(a, b, y, i, j, s, valid, u, v, P, last, scale, weight, logits, places)


@njit(cache=True, **BORROWED)
def _dense(rows, y, s, valid, u, v, P, last, scale, weight, logits):
    high, wide = valid.shape
    for i in range(rows[0], rows[1]):
        for j in range(logits.shape[1]):
            for a in range(high):
                for b in range(wide):
                    logits[i, j, a, b] = (
                        _logit(y, i, j, s, a, b, P, last, scale, weight, u, v, NONE)
                        if valid[a, b]
                        else NONE
                    )


@njit(**BORROWED)
def _add_patch(rows, i, j, s, a, b, w, P, last, D):
    """Adds w times a patch to D at (i, j), in the rows [rows[0], rows[1]) only."""
    s, C, across = s
    D, wide = D
    some, whole = load(last, 0), P * C // LANES * LANES
    for r in range(max(0, rows[0] - i), min(P, rows[1] - i)):
        m, n = (i + r) * wide + j * C, ((a + r) * across + b) * C
        for t in range(0, whole, LANES):
            store(D, m + t, load(D, m + t) + load(s, n + t) * w)
        store(D, m + whole, load(D, m + whole) + load(s, n + whole) * (some * w))


@njit(cache=True, **BORROWED)
def _add(rows, s, places, weights, P, last, D):
    """Adds the means of boxes to the rows [rows[0], rows[1]) of D."""
    sites_down, sites_across, K, _ = places.shape
    for i in range(max(0, rows[0] - P + 1), min(sites_down, rows[1])):
        for j in range(sites_across):
            for k in range(K):
                w = weights[i, j, k]
                if w >= FEW:
                    a, b = places[i, j, k, 0], places[i, j, k, 1]
                    _add_patch(rows, i, j, s, a, b, w, P, last, D)


@njit(cache=True, **BORROWED)
def _add_all(rows, s, weights, P, last, D):
    """`_add`, of all sources: weights (sites, places)."""
    sites_down, sites_across, high, wide = weights.shape
    for i in range(max(0, rows[0] - P + 1), min(sites_down, rows[1])):
        for j in range(sites_across):
            for a in range(high):
                for b in range(wide):
                    w = weights[i, j, a, b]
                    if w >= LEAST:
                        _add_patch(rows, i, j, s, a, b, w, P, last, D)


@njit(cache=True, **BORROWED)
def _origins(rows, places, weights, P, wraps, pixels, shares, origins, share):
    """For the rows [rows[0], rows[1]): the source pixel with the largest share, and that share."""
    down, across, K, _ = places.shape
    for i in range(rows[0], rows[1]):
        for j in range(origins.shape[1]):
            n, covering, best = 0, 0, 0
            for r in range(P):
                for c in range(P):
                    y, x = i - r, j - c
                    if wraps:
                        y, x = y % down, x % across
                    elif not (0 <= y < down and 0 <= x < across):
                        continue
                    covering += 1
                    for k in range(K):
                        w = weights[y, x, k]
                        if w < FEW:
                            continue
                        a, b = places[y, x, k, 0] + r, places[y, x, k, 1] + c
                        m = 0
                        while m < n and (pixels[m, 0] != a or pixels[m, 1] != b):
                            m += 1
                        if m == n:
                            pixels[n, 0], pixels[n, 1], shares[n] = a, b, 0
                            n += 1
                        shares[m] += w
                        if shares[m] > shares[best]:
                            best = m
            origins[i, j, 0], origins[i, j, 1] = pixels[best, 0], pixels[best, 1]
            share[i, j] = shares[best] / covering


@njit(cache=True, **BORROWED)
def _used(rows, w, v, used):
    """How much each patch is used by some boxes, divided by its factor v."""
    used[:] = 0
    for i in range(rows[0], rows[1]):
        total = np.float32(1e-30)
        for k in range(len(v)):
            total += w[i, k] * v[k]
        total = 1 / total
        for k in range(len(v)):
            used[k] += w[i, k] * total


def _last(n: int) -> np.ndarray:
    """Which lanes behind the last whole vector of n numbers are among them, 1 or 0."""
    return (np.arange(LANES) < n % LANES).astype(np.float32)


def _flat(y: np.ndarray, s: np.ndarray, C: int) -> tuple[Any, Any]:
    """Pictures (H, W C), flat and with zeros behind, as `_logit` takes them."""
    flat = [np.concatenate([x.ravel(), np.zeros(LANES, np.float32)]) for x in (y, s)]
    return (flat[0], C, y.shape[1] // C), (flat[1], s.shape[1] // C)


def _rows(n: int) -> list[tuple[int, int]]:
    """Rows in pieces, as many whatever the number of threads."""
    edges = np.linspace(0, n, min(n, PARTS) + 1).astype(np.int64).tolist()
    return list(itertools.pairwise(edges))


def search(
    y: np.ndarray,
    s: np.ndarray,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    old: np.ndarray,
    window: tuple[int, int],
    scale: tuple[float, float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One round: better candidates than the old ones, and their logits.

    Arguments:
        y: The picture, float32 (H, W C).
        s: The source, float32 (h, w C).
        at: Where patches may begin in it, bool (h - P + 1, w - P + 1); positions of the boxes,
            float32 (*sites, 2), and of the patches.
        old: The candidates' first rows and columns, the best first, int32 (*sites, K, 2).
        window: P and C.
        scale: 1 / (2 sigma^2), and half the weight of positions.
        seed: Of the random candidates.

    Returns:
        int32 (*sites, K, 2), -1: none; float32 (*sites, K).
    """
    (valid, u, v), (P, C) = at, window
    both, last = _flat(y, s, C), _last(P * C)
    logits, places = np.empty(old.shape[:3], dtype=np.float32), np.empty_like(old)
    half, weight = np.float32(scale[0]), np.float32(scale[1])

    def some(rows: tuple[int, int]) -> None:
        _search(rows, *both, valid, u, v, old, P, last, half, weight, seed, logits, places)

    side_by_side(some, _rows(len(old)))
    return places, logits


def dense(
    y: np.ndarray,
    s: np.ndarray,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    window: tuple[int, int],
    scale: tuple[float, float],
) -> np.ndarray:
    """All logits, float32 (*sites, h - P + 1, w - P + 1); see `search`."""
    (valid, u, v), (P, C) = at, window
    both, last = _flat(y, s, C), _last(P * C)
    logits = np.empty((*u.shape[:2], *valid.shape), dtype=np.float32)
    half, weight = np.float32(scale[0]), np.float32(scale[1])

    def some(rows: tuple[int, int]) -> None:
        _dense(rows, *both, valid, u, v, P, last, half, weight, logits)

    side_by_side(some, _rows(len(u)))
    return logits


def composed(
    s: np.ndarray,
    places: np.ndarray | None,
    weights: np.ndarray,
    window: tuple[int, int],
    frame: tuple[int, int],
) -> np.ndarray:
    """The sum over boxes of their means, float32 (H, W, C).

    Arguments:
        s: The source, float32 (h, w C).
        places: Candidates (*sites, K, 2); None: the weights are those of all patches.
        weights: float32 (*sites, K), or (*sites, h - P + 1, w - P + 1).
        window: P and C.
        frame: H and W.
    """
    P, C = window
    H, W = frame
    D = np.zeros((H, W * C + LANES), dtype=np.float32)  # lanes behind a row stay 0
    source, last = (_flat(s, s, C)[0]), _last(P * C)
    into = D.reshape(-1), D.shape[1]

    def some(rows: tuple[int, int]) -> None:
        if places is None:
            _add_all(rows, source, weights, P, last, into)
        else:
            _add(rows, source, places, weights, P, last, into)

    side_by_side(some, _rows(H))
    return D[:, : W * C].reshape(H, W, C)


def origins(
    places: np.ndarray, weights: np.ndarray, P: int, frame: tuple[int, int], wraps: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The source pixel that gives most to each pixel, int32 (H, W, 2), and its share.

    Arguments:
        places, weights: Of the candidates, (*sites, K, 2) and (*sites, K); other sources do not
            count, so that the shares are at least these.
        P: Side of the boxes.
        frame: H and W.
        wraps: Whether boxes reach beyond the border.
    """
    found = np.empty((*frame, 2), dtype=np.int32)
    share = np.empty(frame, dtype=np.float32)
    most = P * P * places.shape[2] + 1

    def some(rows: tuple[int, int]) -> None:
        pixels, shares = np.empty((most, 2), np.int32), np.zeros(most, np.float32)
        _origins(rows, places, weights, P, wraps, pixels, shares, found, share)

    side_by_side(some, _rows(frame[0]))
    return found, share


def softmax(logits: np.ndarray) -> np.ndarray:
    """Weights along the last axis."""
    return torch.from_numpy(logits).softmax(-1).numpy()


def balanced(logits: np.ndarray, valid: np.ndarray, strength: float, rounds: int = 4) -> np.ndarray:
    """Weights of (boxes, patches), by which patches are used more equally.

    Each round divides the weight of a patch by how much it is used relative to the mean, to the
    power `strength`: with 1 and many rounds every patch is used equally (Sinkhorn's iteration; the
    bidirectional similarity of GPNN, Granot et al. 2103.15545, as a posterior).
    """
    w = softmax(logits)
    if not strength:
        return w
    ratio = np.float32(valid.sum() / len(w))
    v = np.ones(w.shape[1], dtype=np.float32)
    parts = _rows(len(w))
    used = np.empty((len(parts), w.shape[1]), dtype=np.float32)

    def some(part: int) -> None:
        _used(parts[part], w, v, used[part])

    for _ in range(rounds):
        side_by_side(some, range(len(parts)))
        v /= (used.sum(0) * v * ratio + np.float32(1e-3)) ** np.float32(strength)
        v /= v.max()
    w *= v
    w /= w.sum(1, keepdims=True)
    return w


def omitted(
    y: np.ndarray,
    s: np.ndarray,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    window: tuple[int, int],
    scale: tuple[float, float],
    found: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The exact posterior mass of some boxes that is not among their candidates.

    Arguments:
        found: The boxes, int64 (n, 2), and the logits of their candidates, float32 (n, K).
    """
    valid, u, v = at
    P, C = window
    boxes, logits = found
    mass = np.empty(len(boxes))
    for n, (i, j) in enumerate(boxes.tolist()):
        of = np.ascontiguousarray(y[i : i + P, j * C : (j + P) * C])
        l = dense(of, s, (valid, u[i : i + 1, j : j + 1], v), window, scale)
        top = float(l.max())
        total = float(np.exp(l - top).sum(dtype=np.float64))
        known = float(np.exp(logits[n] - top).sum(dtype=np.float64))
        mass[n] = max(0.0, 1 - known / total)
    return mass


def effective_scale(sigma: float) -> float:
    """1 / (2 sigma^2)."""
    return 1 / (2 * sigma**2) if sigma > 0 else math.inf
