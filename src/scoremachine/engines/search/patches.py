"""The patches of an index, as bytes in its images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.compiled import FLAGS
from scoremachine.engines.search.floats import BORROWED, prefetch


class Windows(NamedTuple):
    """The positions of the patches of an index in the images.

    Attributes:
        flat: The images' bytes, uint8 (N H W C + 64).
        shape: (H, W, C).
        tops, lefts: (first, count) of the positions of their top rows, and of their left columns.
        size: (h, w).
        middle: The position (row, column) in a patch of the pixel that is its value.
    """

    flat: np.ndarray
    shape: tuple[int, int, int]
    tops: tuple[int, int]
    lefts: tuple[int, int]
    size: tuple[int, int]
    middle: tuple[int, int]


@njit(fastmath=FLAGS, inline="always")
def origin(w, place):
    """The offset in `flat` of the first byte of a patch."""
    H, W, C = w.shape
    rest = place // w.lefts[1]
    row = rest // w.tops[1] * H + rest % w.tops[1] + w.tops[0]
    return (row * W + place % w.lefts[1] + w.lefts[0]) * C


@njit(inline="always")
def centre_of(w, start):
    """The position (n H + row) W + column of the middle of a patch that begins at `start`."""
    return start // w.shape[2] + w.middle[0] * w.shape[1] + w.middle[1]


@njit(inline="always")
def strides_of(w):
    """The number of bytes in a row of an image, and in a row of a patch."""
    return w.shape[1] * w.shape[2], w.size[1] * w.shape[2]


@njit(fastmath=FLAGS, inline="always")
def prefetch_patch(w, start):
    """Prefetches the rows of the patch that begins at `start` into the CPU cache."""
    line, row = strides_of(w)
    for a in range(w.size[0]):
        prefetch(w.flat, start + a * line)
        prefetch(w.flat, start + a * line + row - 1)


@njit(cache=True, **BORROWED)
def extract(part, parts, w, places, out):
    """Writes the patches at `places` to out (n, D), in [-1, 1]."""
    n, (line, row) = len(places), strides_of(w)
    for k in range(part * n // parts, (part + 1) * n // parts):
        start = origin(w, np.int64(places[k]))
        for a in range(w.size[0]):
            o, d = start + a * line, a * row
            for b in range(row):
                out[k, d + b] = w.flat[o + b] * (1 / 127.5) - 1


@njit(inline="always", **BORROWED)
def _word(flat, o):
    """Eight bytes as an integer, little-endian."""
    word = np.uint64(0)
    for byte in range(8):
        word |= np.uint64(flat[o + byte]) << np.uint64(8 * byte)
    return word


@njit(cache=True, **BORROWED)
def hashes(part, parts, w, places, out):
    """A hash of every patch at `places`."""
    n, (line, row) = len(places), strides_of(w)
    last = (np.uint64(1) << np.uint64(8 * (row % 8))) - np.uint64(1)  # the bytes after whole words
    for k in range(part * n // parts, (part + 1) * n // parts):
        start = origin(w, np.int64(places[k]))
        total = np.uint64(14695981039346656037)
        for a in range(w.size[0]):
            o = start + a * line
            for b in range(0, row, 8):
                word = _word(w.flat, o + b)
                if b + 8 > row:
                    word &= last
                total = (total ^ word) * np.uint64(0x9E3779B97F4A7C15)
                total ^= total >> np.uint64(29)
        out[k] = total


@njit(**BORROWED)
def _equal(w, p, q):
    """Whether the patches that begin at p and q are equal."""
    line, row = strides_of(w)
    for a in range(w.size[0]):
        for b in range(a * line, a * line + row):
            if w.flat[p + b] != w.flat[q + b]:
                return False
    return True


@njit(cache=True, **BORROWED)
def count_equal(w, places, order, h, unique, times):
    """Finds equal patches among patches sorted by their hashes h.

    Fills `unique` with the places of the different patches and `times` with their counts; returns
    how many there are.
    """
    n, last = 0, np.int64(0)
    for k in range(len(order)):
        start = origin(w, np.int64(places[order[k]]))
        same = k > 0 and h[order[k]] == h[order[k - 1]]
        if same and _equal(w, start, last):
            times[n - 1] += 1
        else:
            unique[n], times[n], last = places[order[k]], 1, start
            n += 1
    return n
