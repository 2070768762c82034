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

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.chunks import PARTS, side_by_side

NONE = np.float32(-1e30)  # the logit of no source
LEAST = 1e-8  # the least weight that is added
FEW = 1e-5  # the same among candidates
NEIGHBOURS = 2  # candidates taken from each of the four neighbours
RANDOM = 6  # random candidates, each within half the distance of the one before


@njit(nogil=True)
def _hash(seed, i, j, k):
    """A number of 64 bits that looks random."""
    h = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    h ^= np.uint64(i) * np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= np.uint64(j) * np.uint64(0x165667B19E3779F9)
    h ^= np.uint64(k) * np.uint64(0x27D4EB2F165667C5)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@njit(nogil=True, fastmath=True)
def _logit(y, i, j, s, a, b, P, C, scale, weight, u, v):
    """l_ab of the box at (i, j); scale: 1 / (2 sigma^2); u, v: the positions of both."""
    total = np.float32(0)
    for r in range(P):
        for t in range(P * C):
            d = y[i + r, j * C + t] - s[a + r, b * C + t]
            total += d * d
    du, dv = u[0] - v[0], u[1] - v[1]
    return -scale * total - weight * (du * du + dv * dv)


@njit(nogil=True)
def _enter(l, a, b, logits, places):
    """Enters a candidate among those of a box, the best first."""
    K = len(logits)
    if l <= logits[K - 1]:
        return
    for k in range(K):
        if places[k, 0] == a and places[k, 1] == b and logits[k] > NONE:
            return
    k = K - 1
    while k > 0 and logits[k - 1] < l:
        logits[k] = logits[k - 1]
        places[k, 0] = places[k - 1, 0]
        places[k, 1] = places[k - 1, 1]
        k -= 1
    logits[k] = l
    places[k, 0] = a
    places[k, 1] = b


@njit(nogil=True, fastmath=True, cache=True)
def _search(rows, y, s, valid, u, v, old, P, C, scale, weight, seed, logits, places):
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
                    if 0 <= a < high and 0 <= b < wide and valid[a, b]:
                        l = _logit(y, i, j, s, a, b, P, C, scale, weight, u[i, j], v[a, b])
                        _enter(l, a, b, logits[i, j], places[i, j])
            for k in range(RANDOM):
                far = max(high, wide) >> k
                h = _hash(seed, i, j, k)
                a = places[i, j, 0, 0] + np.int64(h % np.uint64(2 * far + 1)) - far
                b = places[i, j, 0, 1] + np.int64((h >> np.uint64(32)) % np.uint64(2 * far + 1))
                b -= far
                if 0 <= a < high and 0 <= b < wide and valid[a, b]:
                    l = _logit(y, i, j, s, a, b, P, C, scale, weight, u[i, j], v[a, b])
                    _enter(l, a, b, logits[i, j], places[i, j])


@njit(nogil=True, fastmath=True, cache=True)
def _dense(rows, y, s, valid, u, v, P, C, scale, weight, logits):
    high, wide = valid.shape
    for i in range(rows[0], rows[1]):
        for j in range(logits.shape[1]):
            for a in range(high):
                for b in range(wide):
                    logits[i, j, a, b] = (
                        _logit(y, i, j, s, a, b, P, C, scale, weight, u[i, j], v[a, b])
                        if valid[a, b]
                        else NONE
                    )


@njit(nogil=True, fastmath=True, cache=True)
def _add(rows, s, places, weights, P, C, D):
    """Adds the means of boxes to the rows [rows[0], rows[1]) of D."""
    sites_down, sites_across, K, _ = places.shape
    first, last = rows
    for i in range(max(0, first - P + 1), min(sites_down, last)):
        for j in range(sites_across):
            for k in range(K):
                w, a, b = weights[i, j, k], places[i, j, k, 0], places[i, j, k, 1]
                if w < FEW:
                    continue
                for r in range(max(0, first - i), min(P, last - i)):
                    for t in range(P * C):
                        D[i + r, j * C + t] += w * s[a + r, b * C + t]


@njit(nogil=True, fastmath=True, cache=True)
def _add_all(rows, s, weights, P, C, D):
    """`_add`, of all sources: weights (sites, places)."""
    sites_down, sites_across, high, wide = weights.shape
    first, last = rows
    for i in range(max(0, first - P + 1), min(sites_down, last)):
        for j in range(sites_across):
            for a in range(high):
                for b in range(wide):
                    w = weights[i, j, a, b]
                    if w < LEAST:
                        continue
                    for r in range(max(0, first - i), min(P, last - i)):
                        for t in range(P * C):
                            D[i + r, j * C + t] += w * s[a + r, b * C + t]


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
    logits, places = np.empty(old.shape[:3], dtype=np.float32), np.empty_like(old)
    half, weight = np.float32(scale[0]), np.float32(scale[1])

    def some(rows: tuple[int, int]) -> None:
        _search(rows, y, s, valid, u, v, old, P, C, half, weight, seed, logits, places)

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
    logits = np.empty((*u.shape[:2], *valid.shape), dtype=np.float32)
    half, weight = np.float32(scale[0]), np.float32(scale[1])

    def some(rows: tuple[int, int]) -> None:
        _dense(rows, y, s, valid, u, v, P, C, half, weight, logits)

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
    D = np.zeros((frame[0], frame[1] * C), dtype=np.float32)

    def some(rows: tuple[int, int]) -> None:
        if places is None:
            _add_all(rows, s, weights, P, C, D)
        else:
            _add(rows, s, places, weights, P, C, D)

    side_by_side(some, _rows(frame[0]))
    return D.reshape(*frame, C)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Weights along the last axis."""
    w = logits - logits.max(-1, keepdims=True)
    np.exp(w, out=w)
    w /= w.sum(-1, keepdims=True)
    return w


def balanced(logits: np.ndarray, valid: np.ndarray, strength: float, rounds: int = 4) -> np.ndarray:
    """Logits (boxes, patches) by which patches are used more equally.

    Each round lowers the logit of a patch by `strength` times the log of how much it is used,
    relative to the mean: with strength 1 and many rounds every patch is used equally (Sinkhorn's
    iteration; the bidirectional similarity of GPNN, Granot et al. 2103.15545, as a posterior).
    """
    if not strength:
        return logits
    ratio = valid.sum() / len(logits)
    for _ in range(rounds):
        used = softmax(logits).sum(0) * ratio
        logits = logits - np.float32(strength) * np.log(used + np.float32(1e-3))
    return logits


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
