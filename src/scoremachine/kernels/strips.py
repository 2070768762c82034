"""Few large images as many narrow ones, which fill the lanes of vectors.

Where no window crosses a border an image is its patches, and cut into strips that overlap by a
window less one row it has the same ones: eight strips go through the kernel as eight images do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scoremachine.kernels.simd import LANES
from scoremachine.posterior import Fold, Question
from scoremachine.windows import Collection, Variant

WORTHWHILE = 0.8  # of the work


def cut(c: Collection, n: int) -> tuple[int, float]:
    """Into how many strips each of n images is cut, and what part of the work is left then.

    1 strip where cutting does not pay, or is not right.
    """
    (H, _), P, blocks = c.image, c.window.shape[0], -(-n // LANES)
    k = LANES // math.gcd(n, LANES)
    rows, rest = divmod(H - P + 1, k)
    if not c.wraps or c.variants != (Variant(),) or k == 1 or rows == 0:
        return 1, 1.0
    work = n * k // LANES * (rows + P - 1) + (blocks * (rest + P - 1) if rest else 0)
    share = work / (blocks * H)
    return (k, share) if share < WORTHWHILE else (1, 1.0)


def fold(
    question: Question, leaders: int, by: Callable[[Question, int, Fold | None], Fold]
) -> Fold:
    """The fold over the images, `by` a kernel, strip by strip."""
    c, (H, W) = question.collection, question.collection.image
    P, (k, _) = c.window.shape[0], cut(c, len(question.index))
    rows, rest = divmod(H - P + 1, k)  # of patches
    folds = []
    for start, number, high in ((0, k, rows), (k * rows, 1, rest)):
        if high == 0:
            continue
        tops = start + high * np.arange(number)
        of = np.repeat(question.index, number)
        top = np.tile(tops, len(question.index))
        strips = np.stack(
            [question.images[i, :, t : t + high + P - 1] for i, t in zip(of, top, strict=True)]
        )
        narrow = replace(c, image=strips.shape[2:], canvas=c.frame)
        asked = replace(question, images=strips, index=np.arange(len(strips)), collection=narrow)
        part = by(asked, leaders, None)
        some = part.places >= 0
        place = part.places[some].numpy()
        strip, place = np.divmod(place, strips.shape[2] * W)
        part.places[some] = part.places.new_tensor((of[strip] * H + top[strip]) * W + place)
        folds.append(part)
    return functools.reduce(Fold.merge, folds)
