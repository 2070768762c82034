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
    """What is found of the first pictures of each set in a corpus; nothing if it has one image.

    Arguments:
        sets: Pictures, uint8 (n, C, H, W), and for each the position of an image of the corpus that
            it is not compared with, int64 (n); None: it is compared with all.
        corpus: The images.

    Returns:
        For each set, what is found of its first `COMPARED` pictures.
    """
    if len(corpus) < 2:
        return [[] for _ in sets]
    originals, result = Originals.of(corpus), list[list[Found]]()
    total = sum(min(len(images), COMPARED) for images, _ in sets)
    with bar("Looking for originals", total=total) as progress:
        for images, apart in sets:
            result.append([])
            some = None if apart is None else apart[:COMPARED]
            for found in originals.find(images[:COMPARED], some):
                result[-1].append(found)
                progress.advance()
    return result


def left_out(corpus: Corpus, most: int = COMPARED) -> tuple[np.ndarray, np.ndarray]:
    """Some images of a corpus, evenly spread, and their positions.

    A set for `originals_of`: each is compared with the others.
    """
    chosen = np.unique(np.linspace(0, len(corpus) - 1, min(most, COMPARED)).astype(np.int64))
    return np.asarray(corpus.images[chosen]), chosen


def explained(found: Sequence[Found]) -> np.ndarray:
    """The shares that the most alike images explain, float64 (n)."""
    return np.array([each.share for each in found])
