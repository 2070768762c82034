"""The tree of an index: patches are split in halves along the coordinate of most variance."""

from __future__ import annotations

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.floats import BORROWED

LEAF = 16  # patches that are compared together
NODE = 256  # patches whose codes have the same origin and steps


@njit(**BORROWED)
def _select(values, order, lo, hi, k):
    """Partitions order[lo:hi] so that no value before k is larger than one from k on."""
    hi -= 1
    while lo < hi:
        a, b, c = values[order[lo]], values[order[(lo + hi) // 2]], values[order[hi]]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = lo, hi
        while i <= j:
            while values[order[i]] < pivot:
                i += 1
            while values[order[j]] > pivot:
                j -= 1
            if i <= j:
                order[i], order[j] = order[j], order[i]
                i += 1
                j -= 1
        if k <= j:
            hi = j
        elif k >= i:
            lo = i
        else:
            return


@njit(**BORROWED)
def _widest(E, order, lo, hi, axes, sums, squares):
    """The coordinate with the largest variance among the first `axes`."""
    origin = order[lo]
    for j in range(axes):
        sums[j], squares[j] = 0, 0
    for k in range(lo, hi):
        row = order[k]
        for j in range(axes):
            x = E[row, j] - E[origin, j]
            sums[j] += x
            squares[j] += x * x
    best, most = 0, -1.0
    for j in range(axes):
        variance = np.float64(squares[j]) - np.float64(sums[j]) * sums[j] / (hi - lo)
        if variance > most:
            best, most = j, variance
    return best


@njit(nogil=True, cache=True)
def arrange(part, parts, E, starts, axes, order):
    """Orders the patches of every piece starts[k] : starts[k + 1] into leaves."""
    values = np.empty(len(E), np.float32)
    sums, squares = np.empty(axes, np.float32), np.empty(axes, np.float32)
    stack = np.empty((128, 2), np.int64)
    pieces = len(starts) - 1
    for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
        stack[0, 0], stack[0, 1] = starts[piece], starts[piece + 1]
        height = 1
        while height > 0:
            height -= 1
            lo, hi = stack[height, 0], stack[height, 1]
            if hi - lo <= LEAF:
                continue
            j = _widest(E, order, lo, hi, axes, sums, squares)
            for k in range(lo, hi):
                values[order[k]] = E[order[k], j]
            unit = NODE if hi - lo > NODE else LEAF
            middle = lo + ((hi - lo + unit - 1) // unit + 1) // 2 * unit
            _select(values, order, lo, hi, middle)
            stack[height, 0], stack[height, 1] = lo, middle
            stack[height + 1, 0], stack[height + 1, 1] = middle, hi
            height += 2


@njit(nogil=True, cache=True)
def top_of(E, axes, depth, split_axes, split_values):
    """The first `depth` levels of the tree, from a sample E; node n has the children 2n + 1, +2."""
    n = len(E)
    order = np.arange(n)
    values = np.empty(n, np.float32)
    sums, squares = np.empty(axes, np.float32), np.empty(axes, np.float32)
    bounds = np.zeros((2 ** (depth + 1), 2), np.int64)
    bounds[0, 1] = n
    for node in range(2**depth - 1):
        lo, hi = bounds[node]
        middle = (lo + hi) // 2
        j = 0
        if hi > lo:
            j = _widest(E, order, lo, hi, axes, sums, squares)
            for k in range(lo, hi):
                values[order[k]] = E[order[k], j]
            _select(values, order, lo, hi, middle)
            split_values[node] = values[order[middle]]
        split_axes[node] = j
        bounds[2 * node + 1] = lo, middle
        bounds[2 * node + 2] = middle, hi


@njit(cache=True, **BORROWED)
def descend(z, depth, axes, values, bucket):
    """The bucket, at the bottom of the top levels, of patches with leading coordinates z."""
    for k in range(len(z)):
        node = 0
        for _ in range(depth):
            node = 2 * node + 1 + (z[k, axes[node]] >= values[node])
        bucket[k] = node - (2**depth - 1)


@njit(cache=True, **BORROWED)
def grouped(bucket, at, order):
    """Fills `order` with the positions of the patches, bucket by bucket; `at`: their starts."""
    for k in range(len(bucket)):
        b = bucket[k]
        order[at[b]] = k
        at[b] += 1


@njit(nogil=True, cache=True)
def encode(
    part, parts, E, order, places, counts, starts, nodes, first, rounding,
    codes, boxes, ids, times, frames, radii,
):  # fmt: skip
    """The arrays of the nodes of all pieces, see `distances.Tree`; piece k begins at nodes[k]."""
    m = E.shape[1]
    pieces = len(starts) - 1
    low, high = np.empty(m, np.float32), np.empty(m, np.float32)
    rows, off = np.empty((NODE, m), np.float32), np.empty(NODE, np.float32)
    lines = np.empty((NODE, m), np.uint8)
    for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
        node = nodes[piece]
        for start in range(starts[piece], starts[piece + 1], NODE):
            _encode_node(
                E, order, places, counts, start, min(start + NODE, starts[piece + 1]), node,
                first, rounding, rows, low, high, off, lines,
                codes, boxes, ids, times, frames, radii,
            )  # fmt: skip
            node += 1


@njit(fastmath=FLAGS, **BORROWED)
def _encode_node(
    E, order, places, counts, start, stop, node, first, rounding,
    rows, low, high, off, lines, codes, boxes, ids, times, frames, radii,
):  # fmt: skip
    """The arrays of one node of the patches order[start:stop], padded with the last patch."""
    m = E.shape[1]
    for k in range(NODE):
        row = order[min(start + k, stop - 1)]
        for j in range(m):
            rows[k, j] = E[row, j]
        real = start + k < stop
        ids[node, k] = places[row] if real else 0
        times[node, k] = counts[row] if real else 0
    for j in range(m):
        low[j], high[j] = rows[0, j], rows[0, j]
    for k in range(NODE):
        for j in range(m):
            x = rows[k, j]
            low[j] = x if x < low[j] else low[j]
            high[j] = x if x > high[j] else high[j]
    for j in range(m):
        frames[node, 0, j], frames[node, 1, j] = low[j], (high[j] - low[j]) / np.float32(255)
        high[j] = np.float32(255) / (high[j] - low[j]) if high[j] > low[j] else np.float32(0)
    for k in range(NODE):
        total = np.float32(0)
        for j in range(m):
            x = rows[k, j] - low[j]
            code = np.int32(x * high[j] + np.float32(0.5))
            code = min(code, np.int32(255))
            e = x - frames[node, 1, j] * np.float32(code)
            total += e * e
            lines[k, j] = code
        off[k] = total
    furthest = np.float32(0)
    for k in range(NODE):
        furthest = max(furthest, off[k])
    radii[node] = np.sqrt(furthest) * 1.0001 + rounding
    for leaf in range(NODE // LEAF):
        for j in range(m):
            least, most = np.uint8(255), np.uint8(0)
            for lane in range(LEAF):
                code = lines[leaf * LEAF + lane, j]
                codes[node, leaf, j, lane] = code
                least, most = min(least, code), max(most, code)
            if j < first:
                boxes[node, 0, j, leaf], boxes[node, 1, j, leaf] = least, most
