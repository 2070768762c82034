"""Detection of copies of held-out images, which would leak them into the source.

An image is a copy of another if their root mean square difference is below 5% (`NEAR`) of the
median difference between two images: equal pixels, or differences of compression, rounding or a
little noise. (In CIFAR-10, MNIST, digits and faces, images that are not copies differ by at least
12%.) Shifted, mirrored or recropped copies differ more, and are not detected.
"""

from __future__ import annotations

import numpy as np

from scoremachine.data.corpus import Corpus
from scoremachine.runtime.progress import say

NEAR = 0.05  # share of the median difference, below which two images are copies
WORKSPACE = 2**22  # pixels in memory at once


def copies(images: np.ndarray, held: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images are copies of which: bool (len(held), len(others)).

    Exact: sums of squares of gray levels are whole numbers, which float64 holds.

    Arguments:
        images: uint8 (N, C, H, W).
        held, others: Positions; an image is not a copy of itself.
    """
    if len(held) == 0 or len(others) == 0:
        return np.zeros((len(held), len(others)), dtype=bool)
    pixels = int(np.prod(images.shape[1:]))
    a = np.asarray(images[held]).reshape(len(held), pixels).astype(np.float64)
    squares = np.empty((len(held), len(others)))
    step = max(1, WORKSPACE // pixels)
    for first in range(0, len(others), step):
        b = np.asarray(images[others[first : first + step]]).reshape(-1, pixels).astype(np.float64)
        squares[:, first : first + step] = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * (a @ b.T)
    different = np.asarray(held)[:, None] != np.asarray(others)
    typical = np.median(squares[different]) if different.any() else 0.0
    return different & ((squares == 0) | (squares < NEAR**2 * typical))


def without_copies(corpus: Corpus, held: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The source without copies of held-out images."""
    return source[~copies(corpus.images, held, source).any(0)]


def tell(corpus: Corpus, count: int) -> None:
    """Prints how many copies were left out, if any."""
    if count:
        say(
            f"{corpus.name}: {count:,} of {len(corpus):,} images are left out of the source too, "
            "since they are exact or near copies of held-out ones"
        )


def single(corpus: Corpus, candidates: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of some images, without those that have a copy anywhere in the corpus.

    For images that a network has not seen: if it was trained on a copy, it has seen the image.
    """
    everything, found, skipped = corpus.indices(), candidates[:0], 0
    for first in range(0, len(candidates), max(1, count)):
        some = candidates[first : first + count]
        alone = ~copies(corpus.images, some, everything).any(1)
        skipped += int((~alone).sum())
        found = np.concatenate([found, some[alone]])[:count]
        if len(found) == count:
            break
    if skipped:
        say(
            f"{corpus.name}: {skipped:,} images that the network has not seen are skipped, since "
            "they are exact or near copies of others"
        )
    return found
