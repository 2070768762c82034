"""Cuts few large images into many narrow strips, which fill the lanes of SIMD vectors.

If no window crosses a border, only the patches of an image matter. Strips that overlap by one row
(or column) less than a window contain the same patches, so eight strips can replace eight images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest
from scoremachine.core.windows import Variant
from scoremachine.engines.simd import LANES

WORTHWHILE = 0.8  # the largest share of the work with which strips are used
SITES = 2**14  # sites of a picture that are processed together

Folds = Callable[[ScanRequest, int, Fold | None], Fold]


class Group(NamedTuple):
    """Strips of one size.

    Attributes:
        corners: Row and column of each strip's first pixel.
        high: Rows of patches in each strip.
        wide: Columns of patches in each strip.
    """

    corners: list[tuple[int, int]]
    high: int
    wide: int


def groups(c: Collection, k: int) -> list[Group]:
    """k strips of rows; k strips of columns of the remaining rows; and what then remains."""
    high, wide = (n - p + 1 for n, p in zip(c.image, c.window.shape, strict=True))
    (rows, below), (columns, beside) = divmod(high, k), divmod(wide, k)
    found = [
        Group([(rows * i, 0) for i in range(k)], rows, wide),
        Group([(rows * k, columns * j) for j in range(k)], below, columns),
        Group([(rows * k, columns * k)], below, beside),
    ]
    return [group for group in found if group.high and group.wide]


def cut(c: Collection, n: int) -> tuple[list[Group], float]:
    """The strips into which each of n images is cut, and their work relative to whole images.

    No strips and 1.0 if strips would not be faster, or would change the result.
    """
    k = LANES // math.gcd(n, LANES)
    if not c.wraps or c.variants != (Variant(),) or k == 1:
        return [], 1.0
    P, Q = c.window.shape
    found = groups(c, k)
    work = sum(-(-n * len(g.corners) // LANES) * (g.high + P - 1) * (g.wide + Q - 1) for g in found)
    share = work / (-(-n // LANES) * math.prod(c.image))
    return (found, share) if share < WORTHWHILE else ([], 1.0)


def fold(request: ScanRequest, leaders: int, into: list[Group], by: Folds) -> Fold:
    """The fold over images cut `into` groups of strips, each folded `by` a kernel."""
    c, index = request.collection, request.index
    (P, Q), (H, W) = c.window.shape, c.image
    folds: list[Fold] = []
    for group in into:
        high, wide = group.high + P - 1, group.wide + Q - 1
        of = np.repeat(index, len(group.corners))
        top, left = np.array(group.corners * len(index)).T
        strips = np.stack(
            [
                request.keys[i, :, a : a + high, b : b + wide]
                for i, a, b in zip(of, top, left, strict=True)
            ]
        )
        narrow = replace(c, image=(high, wide), canvas=c.frame)
        asked = replace(request, keys=strips, index=np.arange(len(strips)), collection=narrow)
        part = _by_columns(asked, leaders, by)
        known = part.places >= 0
        strip, place = np.divmod(part.places[known].numpy(), high * wide)
        row, column = np.divmod(place, wide)
        place = (of[strip] * H + top[strip] + row) * W + left[strip] + column
        part.places[known] = torch.from_numpy(place)
        folds.append(part)
    return functools.reduce(Fold.merge, folds)


def _by_columns(request: ScanRequest, leaders: int, by: Folds) -> Fold:
    """The fold of large pictures, some columns at a time, so that data stays in the CPU cache."""
    c, Q = request.collection, request.collection.window.shape[1]
    rows, columns = c.frame
    step = max(1, SITES // rows)
    parts = []
    for start in range(0, columns, step):
        n = min(step, columns - start)
        y = request.y[..., start : start + n + Q - 1]
        asked = replace(request, y=y, collection=replace(c, canvas=(rows, n)))
        parts.append(by(asked, leaders, None))
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Fold(*(torch.cat(field, dim=-1) for field in fields))
