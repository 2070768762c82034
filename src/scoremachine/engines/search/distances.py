"""What compiled code knows of an index and of queries, and how far one is from the other.

A distance is exact, from the bytes of the images; or bounded from below by that of embeddings, from
boxes or codes. Products with codes are of bytes: see `floats`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32, njit
from numba.extending import register_jitable

from scoremachine.engines import simd
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.floats import (
    LANES,
    WHOLE,
    add_products,
    broadcast,
    hmax,
    hsum,
    joined,
    larger,
    load,
    load_every,
    nearest,
    none,
    smaller,
    splat,
    store,
    store_halves,
)
from scoremachine.engines.search.tree import LEAF

FAR = np.float32(1e15)  # where boxes of nothing lie
LEAST = 1e-30  # numbers up to this are not multiplied


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
        E: Embeddings, float32 (Q, `filled_up`) flat: the first numbers, and from `others_at` on
            the others, both filled up to whole vectors.
        y: The windows, float64 (Q, h, row) flat, rows filled up to whole vectors.
        mask: Ones, and zeros where filled up, float64 (row).
        half: 1 / (2 sigma^2), float64 (Q).
        fuzz: What rounding may do to a distance between embeddings, float32 (Q).
        tails: What the components that are not looked at add to a squared distance beyond the
            differences of their norms, in the first look and in the second, float32 (Q, 2).
        bytes: The windows + 1 - 64 / 127.5 in whole multiples of `unit`, high and low bytes, rows
            filled up to 64, int8 (Q, h, 2, wide) flat; empty where patches are too small for that
            to pay.
        inside: 255, and zeros where filled up, uint8 (wide).
        unit: float64 (Q).
        known: What |q - s|^2 is at least, but for products with the bytes of s, float64 (Q).
        fixed: Whether reach is from the nearest patch known at first, and only what is within it
            enters the fold; otherwise it is from the nearest patch met.
    """

    E: np.ndarray
    y: np.ndarray
    mask: np.ndarray
    half: np.ndarray
    fuzz: np.ndarray
    tails: np.ndarray
    bytes: np.ndarray
    inside: np.ndarray
    unit: np.ndarray
    known: np.ndarray
    fixed: bool


@register_jitable
def others_at(first):
    """Where the numbers begin that follow the first ones, in whole vectors."""
    return (first + LANES - 1) // LANES * LANES


@register_jitable
def filled_up(first, m):
    """How many numbers whole vectors of an embedding have."""
    return others_at(first) + (m - first + LANES - 1) // LANES * LANES


def in_vectors(E: np.ndarray, first: int) -> np.ndarray:
    """Embeddings (n, m), the first numbers and the others filled up to whole vectors."""
    at = others_at(first)
    filled = np.zeros((len(E), filled_up(first, E.shape[1])), np.float32)
    filled[:, :first], filled[:, at : at + E.shape[1] - first] = E[:, :first], E[:, first:]
    return filled


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
def to_codes(t, row, step, node, leaf, lo, hi, at):
    """sum_j (row[at + j - lo] - codes[j])^2 over lo <= j < hi, of a leaf's patches."""
    a, b = splat(float32(0)), splat(float32(0))
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi, 4):
        p, k = o + j * LANES, at + j - lo
        u = broadcast(row, k) - broadcast(step, k) * load_every(t.codes, p, 0)
        v = broadcast(row, k + 1) - broadcast(step, k + 1) * load_every(t.codes, p, 1)
        x = broadcast(row, k + 2) - broadcast(step, k + 2) * load_every(t.codes, p, 2)
        y = broadcast(row, k + 3) - broadcast(step, k + 3) * load_every(t.codes, p, 3)
        a, b = a + u * u + v * v, b + x * x + y * y
    return a + b


@njit(fastmath=FLAGS, inline="always")
def norms_of(t, step, node, leaf, lo, hi, at):
    """sum_j (step[at + j - lo] codes[j])^2 over lo <= j < hi, of a leaf's patches."""
    a, b = splat(float32(0)), splat(float32(0))
    o = (node * LEAF + leaf) * t.m * LANES
    for j in range(lo, hi, 4):
        p, k = o + j * LANES, at + j - lo
        u = broadcast(step, k) * load_every(t.codes, p, 0)
        v = broadcast(step, k + 1) * load_every(t.codes, p, 1)
        x = broadcast(step, k + 2) * load_every(t.codes, p, 2)
        y = broadcast(step, k + 3) * load_every(t.codes, p, 3)
        a, b = a + u * u + v * v, b + x * x + y * y
    return a + b


@njit(fastmath=FLAGS, inline="always")
def products_from(codes, o, n, bytes_, at):
    """sum_j bytes_[at + j] codes[j] over j < n, of sixteen whose codes begin at o."""
    high, low = none(), none()
    half = len(bytes_) // 2
    for j in range(0, n, 4):
        high = add_products(high, codes, o + j * LANES, bytes_, at + j)
        low = add_products(low, codes, o + j * LANES, bytes_, half + at + j)
    return joined(high, low)


@njit(fastmath=FLAGS, inline="always")
def products(t, node, leaf, lo, hi, bytes_, at):
    """sum_j bytes_[at + j - lo] codes[j] over lo <= j < hi, of a leaf's patches."""
    o = ((node * LEAF + leaf) * t.m + lo) * LANES
    return products_from(t.codes, o, hi - lo, bytes_, at)


@njit(fastmath=FLAGS, inline="always")
def in_bytes(row, step, lo, hi, scale, bytes_):
    """Writes row * step * scale, rounded, as bytes; returns (unit, more).

    With the bytes n, sum_j row_j step_j scale c_j is at most `more` above unit sum_j n_j c_j, for
    codes c_j of 0 to 255.
    """
    most = splat(float32(0))
    low = len(bytes_) // 2 - lo
    for j in range(lo, hi, LANES):
        x = load(row, j) * load(step, j)
        most = larger(most, larger(x, splat(float32(0)) - x))
    largest = hmax(most) * scale
    if not largest > float32(LEAST):
        for j in range(lo, hi, LANES):
            store_halves(bytes_, j - lo, low + j, splat(float32(0)))
        return float32(0), largest * float32(255 * (hi - lo))
    grow = float32(WHOLE) / largest * scale
    off = splat(float32(0))
    for j in range(lo, hi, LANES):
        x = load(row, j) * load(step, j) * grow
        n = nearest(x)
        off = off + larger(x - n, splat(float32(0)))
        store_halves(bytes_, j - lo, low + j, n)
    unit = largest / float32(WHOLE)
    return unit, hsum(off) * unit * float32(255)


@njit(fastmath=FLAGS, inline="always")
def from_node(E, e, low, row, lo, hi):
    """A query from where a node begins: fills row[lo:hi], and returns its |.|^2."""
    total = splat(float32(0))
    for j in range(lo, hi, LANES):
        x = load(E, e + j) - load(low, j)
        store(row, j, x)
        total = total + x * x
    return hsum(total)


@njit(fastmath=FLAGS, inline="always")
def frame_of(t, node, low, step):
    """Where the numbers of a node begin and what a step of its codes is, in whole vectors."""
    at = others_at(t.first)
    for j in range(t.m):
        k = j if j < t.first else at + j - t.first
        low[k], step[k] = t.frames[node * 2 * t.m + j], t.frames[(node * 2 + 1) * t.m + j]
