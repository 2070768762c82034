"""How much of pictures their most alike training images explain, beside held-out images.

The distance to the nearest training image says little by itself: it misses copies that are shifted,
mirrored or relit, and smooth pictures are close to many images. The share that one aligned image
explains (`originals`) misses neither, and that of held-out images says how large it is for pictures
that are no copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scoremachine.data.corpus import Corpus
from scoremachine.provenance.originals import Found, Originals
from scoremachine.runtime.progress import bar

COMPARED = 32  # the most pictures of a set for which originals are looked for


def originals_of(
    sets: Sequence[tuple[np.ndarray, np.ndarray | None]], corpus: Corpus
) -> list[list[Found]]:
    """What is found of sets of pictures in a corpus; nothing in a corpus of one image.

    Arguments:
        sets: Pictures, uint8 (n, C, H, W), and for each the position of an image of the corpus that
            it is not compared with, int64 (n); None: it is compared with all.
        corpus: The images.
    """
    if len(corpus) < 2:
        return [[] for _ in sets]
    originals, result = Originals.of(corpus), list[list[Found]]()
    with bar("Looking for originals", total=sum(len(images) for images, _ in sets)) as progress:
        for images, left_out in sets:
            result.append([])
            for found in originals.find(images, left_out):
                result[-1].append(found)
                progress.advance()
    return result


def left_out(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """`COMPARED` images of a corpus, evenly spread, or all, and their positions.

    A set for `originals_of`: each is compared with the others.
    """
    chosen = np.unique(np.linspace(0, len(corpus) - 1, COMPARED).astype(np.int64))
    return np.asarray(corpus.images[chosen]), chosen


def explained(found: Sequence[Found]) -> np.ndarray:
    """The shares that the most alike images explain, float64 (n)."""
    return np.array([each.share for each in found])
