"""The fold of a single site that is the whole image, on the CPU, directly from the bytes.

It needs no buffer and no table: a logit is one inner product, and the corpus is read once.
"""

from __future__ import annotations

import math

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.chunks import PARTS, fill
from scoremachine.engines.compiled import FLAGS, NOTHING, keep
from scoremachine.engines.simd import LANES, hsum, load, load_bytes, splat, store


@njit(fastmath=FLAGS, inline="always")
def _inner(u, row):
    """sum_d x_d row_d of an image x = u / 127.5 - 1."""
    bulk = len(u) // (2 * LANES) * 2 * LANES
    even, odd = splat(0.0), splat(0.0)
    for d in range(0, bulk, 2 * LANES):
        even = even + (load_bytes(u, d) * (1.0 / 127.5) - 1.0) * load(row, d)
        odd = odd + (load_bytes(u, d + LANES) * (1.0 / 127.5) - 1.0) * load(row, d + LANES)
    total = hsum(even + odd)
    for d in range(bulk, len(u)):
        total += (u[d] * (1.0 / 127.5) - 1.0) * row[d]
    return total


@njit(fastmath=FLAGS, inline="always")
def _logit(u, row):
    """sum_d x_d (row_d - x_d / 2) of an image x = u / 127.5 - 1."""
    bulk = len(u) // (2 * LANES) * 2 * LANES
    even, odd = splat(0.0), splat(0.0)
    for d in range(0, bulk, 2 * LANES):
        v = load_bytes(u, d) * (1.0 / 127.5) - 1.0
        w = load_bytes(u, d + LANES) * (1.0 / 127.5) - 1.0
        even = even + v * (load(row, d) - v * 0.5)
        odd = odd + w * (load(row, d + LANES) - w * 0.5)
    total = hsum(even + odd)
    for d in range(bulk, len(u)):
        x = u[d] * (1.0 / 127.5) - 1.0
        total += x * (row[d] - 0.5 * x)
    return total


@njit(fastmath=FLAGS, inline="always")
def _add_bytes(total, w, u):
    """total += w u."""
    bulk = len(u) // LANES * LANES
    for d in range(0, bulk, LANES):
        store(total, d, load(total, d) + load_bytes(u, d) * w)
    for d in range(bulk, len(u)):
        total[d] += w * u[d]


@njit(fastmath=FLAGS, nogil=True, cache=True)
def _fold(chunk, chunks, flat, index, y, scale, T, middle, m, Z, Z2, S, logits, places):
    """The first pass over a chunk."""
    B, D = y.shape
    N, k = len(index), logits.shape[1]
    lo, hi = chunk * N // chunks, (chunk + 1) * N // chunks
    l = np.empty((B, hi - lo))
    for n in range(lo, hi):
        u = flat[index[n]]
        for p in range(B):
            l[p, n - lo] = _logit(u, y[p]) * scale[p]
    for p in range(B):
        leader = NOTHING
        for n in range(hi - lo):
            leader = max(leader, l[p, n])
        m[p, 0, 0] = leader
        for n in range(hi - lo):
            if k > 0 and l[p, n] > logits[p, k - 1, 0, 0]:
                keep(l[p, n], index[lo + n] * middle[0] + middle[1], logits[p], places[p], 0, 0)
            if l[p, n] >= leader - T[p]:
                w = math.exp(l[p, n] - leader)
                Z[p, 0, 0] += w
                Z2[p, 0, 0] += w * w
                _add_bytes(S[p], w, flat[index[lo + n]])
        for d in range(D):
            S[p, d] = S[p, d] * (1.0 / 127.5) - Z[p, 0, 0]


def fold_whole(
    images: np.ndarray, index: np.ndarray, y: np.ndarray, scale: np.ndarray, T: np.ndarray, k: int
) -> tuple[np.ndarray, ...]:
    """The fold of one site that is the whole image, with chunks along axis 0."""
    B, C, H, W = y.shape
    chunks = min(PARTS, len(index))
    m = np.full((chunks, B, 1, 1), NOTHING)
    Z, Z2 = np.zeros((chunks, B, 1, 1)), np.zeros((chunks, B, 1, 1))
    S = np.zeros((chunks, B, C * H * W))
    logits = np.full((chunks, B, k, 1, 1), NOTHING)
    places = np.full((chunks, B, k, 1, 1), -1)
    flat, middle = images.reshape(len(images), -1), (H * W, H // 2 * W + W // 2)
    arguments = flat, index, y.reshape(B, -1), scale, T, middle
    fill(_fold, arguments, (m, Z, Z2, S, logits, places))
    return m, Z, Z2, S.reshape(chunks, B, C, H, W), logits, places


@njit(fastmath=FLAGS, nogil=True, cache=True)
def _accumulate(chunk, chunks, flat, index, y, u, scale, T, m, Z, b_mean, total):
    """The second pass over a chunk."""
    N = len(index)
    B, D = y.shape
    total_weight = np.zeros(B)
    for n in range(chunk * N // chunks, (chunk + 1) * N // chunks):
        image = flat[index[n]]
        for p in range(B):
            l = _logit(image, y[p]) * scale[p] - m[p, 0, 0]
            if l >= -T[p]:
                w = math.exp(l) / Z[p, 0, 0] * (_inner(image, u[p]) - b_mean[p, 0, 0])
                total_weight[p] += w
                _add_bytes(total[p], w, image)
    for p in range(B):
        for d in range(D):
            total[p, d] = total[p, d] * (1.0 / 127.5) - total_weight[p]


def accumulate_whole(
    images: np.ndarray,
    index: np.ndarray,
    y: np.ndarray,
    u: np.ndarray,
    scale: np.ndarray,
    T: np.ndarray,
    known: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """sum_s w_s (b_s - mean of b) s of whole images, (chunks, B, C, H, W).

    `known`: m, Z and the mean of b at every site.
    """
    B = len(y)
    total = np.zeros((min(PARTS, len(index)), *y.shape))
    flat, D = images.reshape(len(images), -1), total.reshape(len(total), B, -1)
    fill(_accumulate, (flat, index, y.reshape(B, -1), u, scale, T, *known), (D,))
    return total
