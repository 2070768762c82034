"""The form of an index and of queries in compiled code, and their distances.

A distance is computed exactly from the bytes of the images, or bounded from below by the distance
of embeddings, from boxes or codes.
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
    load_bytes,
    smaller,
    splat,
    store,
)
from scoremachine.engines.search.tree import LEAF

FAR = np.float32(1e15)  # the position of empty boxes
LOG2E = 1.4426950408889634


class Tree(NamedTuple):
    """An index in the form of compiled code; arrays that are read in vectors are flat.

    A leaf has 16 patches, a node 16 leaves, a super-node 16 nodes, a group 16 super-nodes.

    Attributes:
        m, first: The dimension of an embedding, and of its first part, which alone bounds a
            distance.
        codes: uint8 (nodes, 16 leaves, m, 16 patches).
        boxes: uint8 (nodes, low and high, first, 16 leaves), in the units of codes.
        ids, times: uint32 (nodes, 256): the places of the patches, and their counts.
        frames: float32 (nodes, 2, m): the value of code 0, and the step between codes.
        radii: float32 (nodes): an upper bound of the distance of a patch from its code.
        node_boxes: float32 (supers, low and high, first, 16 nodes).
        super_boxes: float32 (groups, low and high, first, 16 supers).
        widest: float32 (supers): the largest radius of its nodes.
        leaf_counts, node_counts, super_counts: float32 (nodes, 16), (supers, 16), (groups, 16):
            the number of patches in each, copies counted.
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
    """The queries of a search: noisy windows.

    Attributes:
        E: Embeddings, float32 (Q, m) flat.
        y: The windows, float64 (Q, h, row) flat, rows padded to whole vectors.
        mask: Ones, and zeros in the padding, float64 (row).
        half: 1 / (2 sigma^2), float64 (Q).
        fuzz: The largest rounding error of a distance between embeddings, float32 (Q).
        tails: What components that are summarized by norms add to a squared distance beyond the
            differences of their norms, in the first bound and in the second, float32 (Q, 2).
        fixed: If true, radii are relative to the nearest patch known at the start, and only patches
            within them enter the fold; otherwise relative to the nearest patch found so far.
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
    """The squared distances of the `first` coordinates at rows[r] to sixteen boxes."""
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
    """Decodes the coordinates lo to hi of the patches of a leaf, relative to their node's origin.

    Writes them to codes (m, 16) flat; returns the sums of their squares.
    """
    total, o = splat(float32(0)), (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi):
        x = load_bytes(t.codes, o + j * LANES) * t.frames[(node * 2 + 1) * t.m + j]
        store(codes, j * LANES, x)
        total = total + x * x
    return total
