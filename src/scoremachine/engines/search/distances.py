"""What compiled code knows of an index and of queries, and how far one is from the other.

A distance is exact, from the bytes of the images; or bounded from below by that of embeddings, from
boxes or codes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32

from scoremachine.engines import simd
from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.floats import (
    LANES,
    broadcast,
    larger,
    load,
    load_every,
    smaller,
    splat,
    store,
)
from scoremachine.engines.search.tree import LEAF

FAR = np.float32(1e15)  # where boxes of nothing lie
LOG2E = 1.4426950408889634


class Tree(NamedTuple):
    """An index as compiled code takes it, arrays flat where lanes are read from them.

    Attributes:
        m, first: How many numbers an embedding has, and how many bound a distance by themselves.
        codes: uint8 (nodes, 16 leaves, m / 4, 16 patches, 4).
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


class Queries(NamedTuple):
    """What is searched for.

    Attributes:
        E: Embeddings, float32 (Q, m) flat.
        y: The windows, float64 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float64 (row).
        half: 1 / (2 sigma^2), float64 (Q).
        fuzz: What rounding may do to a distance between embeddings, float32 (Q).
        tails: What the components that are not looked at add to a squared distance beyond the
            differences of their norms, in the first bound and in the second, float32 (Q, 2).
        fixed: Whether radii are from the nearest patch known at first, and only what is within
            them enters the fold; otherwise they are from the nearest patch met.
    """

    E: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: np.ndarray
    fuzz: np.ndarray
    tails: np.ndarray
    fixed: bool


@njit(fastmath=FLAGS, inline="always")
def distance(w, q, query, start):
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
def to_boxes(rows, r, boxes, o, first):
    """The squared distances of `first` numbers at rows[r] to sixteen boxes."""
    even, odd = splat(float32(0)), splat(float32(0))
    for j in range(0, first, 2):
        x, y = broadcast(rows, r + j), broadcast(rows, r + j + 1)
        p, h = o + j * LANES, o + (first + j) * LANES
        d = x - smaller(larger(x, load(boxes, p)), load(boxes, h))
        e = y - smaller(larger(y, load(boxes, p + LANES)), load(boxes, h + LANES))
        even, odd = even + d * d, odd + e * e
    return even + odd


@njit(fastmath=FLAGS, inline="always")
def decode(t, node, leaf, lo, hi, codes):
    """Writes the numbers lo to hi of the patches of a leaf, from the origin of their node, to codes
    (m, 16) flat; returns the sums of their squares."""
    total, o = splat(float32(0)), (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi):
        x = load_every(t.codes, o + j // 4 * 4 * LANES, j % 4)
        x = x * t.frames[(node * 2 + 1) * t.m + j]
        store(codes, j * LANES, x)
        total = total + x * x
    return total
