"""Copies of held-out images: a source that holds one has seen what was to be unseen.

An image is a copy of another if their root mean square difference is below 5% (`NEAR`) of the
median difference between two images: equal pixels, and what another compression, rounding or a
little noise makes of them. (Of CIFAR-10, MNIST, digits and faces the nearest of two that are no
copies are 12% or more apart.) Shifted, mirrored or recropped copies are further apart, and stay.
"""

from __future__ import annotations

import numpy as np

from scoremachine.data.corpus import Corpus
from scoremachine.runtime.progress import say

NEAR = 0.05  # of the median difference, below which two images are copies
ROOM = 2**22  # pixels in memory at once


def copies(images: np.ndarray, held: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images are copies of which: bool (len(held), len(others)).

    Exact: sums of squares of gray levels are whole numbers, which float64 holds.

    Arguments:
        images: uint8 (N, C, H, W).
        held, others: Positions; an image is no copy of itself.
    """
    if len(held) == 0 or len(others) == 0:
        return np.zeros((len(held), len(others)), dtype=bool)
    pixels = int(np.prod(images.shape[1:]))
    a = np.asarray(images[held]).reshape(len(held), pixels).astype(np.float64)
    squares = np.empty((len(held), len(others)))
    step = max(1, ROOM // pixels)
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
    """Says how many copies were left out, if any."""
    if count:
        say(
            f"{corpus.name}: {count:,} of {len(corpus):,} images left out of the source too, as "
            "copies, exactly or nearly, of held-out ones"
        )


def single(corpus: Corpus, candidates: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of some images, passing over those with a copy anywhere in the corpus.

    For images that a network has not seen, which it has where it was trained on a copy.
    """
    everything, found, passed = corpus.indices(), candidates[:0], 0
    for first in range(0, len(candidates), max(1, count)):
        some = candidates[first : first + count]
        alone = ~copies(corpus.images, some, everything).any(1)
        passed += int((~alone).sum())
        found = np.concatenate([found, some[alone]])[:count]
        if len(found) == count:
            break
    if passed:
        say(
            f"{corpus.name}: {passed:,} images that the network has not seen passed over, as "
            "copies, exactly or nearly, of others"
        )
    return found
