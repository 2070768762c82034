"""Quality, novelty and variety of pictures, by features that need no download."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scoremachine.data.corpus import Corpus
from scoremachine.data.pixels import to_uint8
from scoremachine.lab.comparison.parts import built_machines, held_out_and_source
from scoremachine.lab.denoising_error import ELS_IMAGES
from scoremachine.lab.networks.network import Network
from scoremachine.machines import IdealScore, build
from scoremachine.machines.machine import Machine
from scoremachine.provenance.novelty import explained, originals_of
from scoremachine.provenance.originals import Found
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer
from scoremachine.sampling.generate import generate

SUBSETS = 100  # subsets of pictures over which the distance is averaged, as in KID
UNSEEN = "held-out images"


Made = tuple[str, np.ndarray, np.ndarray, float]  # label, pictures, features beside them, seconds


@dataclass
class Quality:
    """Measures of the pictures of one denoiser.

    Attributes:
        label: The denoiser's.
        kernel_distance, spread: To held-out images (see `kernel_distance`), and its standard
            deviation over subsets.
        nearest: Root mean square differences to the nearest training image, of each picture.
        explained: The share of each of the first pictures that its most alike training image
            explains, aligned (`provenance.novelty`).
        variety: Mean squared distance between features of two pictures, divided by that of held-out
            images: 1 is as varied as the data, 0 always the same.
        pictures: uint8 (n, C, H, W).
        seconds: The time for generating them.
    """

    label: str
    kernel_distance: float
    spread: float
    nearest: np.ndarray
    explained: np.ndarray
    variety: float
    pictures: np.ndarray
    seconds: float


def features(images: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients of images uint8 (n, C, H, W): (n, F).

    scikit-image's, on 8 x 8 cells over the picture, or as many as fit (Dalal & Triggs 2005).
    """
    from skimage.feature import hog  # slow to import

    side = max(2, min(images.shape[2:]) // 8)
    settings = {"pixels_per_cell": (side, side), "cells_per_block": (2, 2), "channel_axis": 0}
    return np.stack([hog(image, **settings) for image in images])


def kernel_distance(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features a (n, F) and b (m, F), unbiased: mean, spread.

    With the kernel (x.y / F + 1)^3, averaged over random subsets: the kernel distance KID of
    Binkowski et al. 1801.01401, in other features than those of Inception. Its expectation is 0 if
    both have the same distribution; the estimate can be negative.
    """
    from sklearn.metrics.pairwise import polynomial_kernel

    n = min(len(a), len(b), 1000)
    if n < 2:
        raise ValueError(f"{len(a)} and {len(b)} pictures; expected at least two of each")
    size = max(2, n // 2)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SUBSETS):
        x, y = (v[rng.choice(len(v), size, replace=False)] for v in (a, b))
        xx, yy, xy = polynomial_kernel(x), polynomial_kernel(y), polynomial_kernel(x, y)
        pairs = size * (size - 1)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / pairs
        found.append(within - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


def variety(f: np.ndarray) -> float:
    """The mean squared distance between two different features."""
    n = len(f)
    return float(2 * n / (n - 1) * ((f - f.mean(0)) ** 2).sum(1).mean())


def qualities(
    networks: Sequence[Network],
    machines: Sequence[str | Machine],
    corpus: Corpus,
    count: int = 64,
    steps: int = 20,
    seed: int = 0,
    max_images_els: int = ELS_IMAGES,
) -> list[Quality]:
    """Generates pictures with networks (including VAEs) and machines, and evaluates them.

    Arguments:
        networks: Trained on the corpus, with the same images held out, if any.
        machines: As in `compare`.
        corpus: The images; pictures are compared with held-out ones.
        count: The number of pictures of each denoiser, >= 2.
        steps: Noise levels of a trajectory, on the first network's schedule if there is one.
        seed: Of all noise.
        max_images_els: The most images of machines that compare all positions.

    Returns:
        The measures, first those of held-out images: one half compared with the other.

    Raises:
        ValueError: For too few pictures, or as `compare`.
    """
    check_integer("steps", steps)
    if check_integer("count", count) < 2:
        raise ValueError("one picture has neither a distribution nor variety; count two or more")
    for network in networks:
        network.check_corpus(corpus)
    held, source = held_out_and_source(networks, corpus, max(count, 128), seed)
    if len(held) < 4:
        raise ValueError(
            f"{len(held)} images are held out; expected at least 4: train with more, or use a "
            "larger corpus"
        )
    built = built_machines(machines, source, max_images_els)
    levels = steps
    if networks:  # all denoisers follow the same noise levels
        first, levels = networks[0].on_noise_levels(steps)
        schedule = first.schedule
        built = {label: m.clone_with(m.corpus, schedule=schedule) for label, m in built.items()}
    ideal = build("ideal", source)
    assert isinstance(ideal, IdealScore)
    real = np.asarray(corpus.images[held])
    known = features(real)
    half = np.random.default_rng(seed).permutation(len(real))
    one, other = half[: len(half) // 2], half[len(half) // 2 :]

    def judged(made: Made, originals: list[Found]) -> Quality:
        label, images, against, seconds = made
        f = features(images)
        distance, spread = kernel_distance(f, against, seed)
        x = torch.from_numpy(images).float() / 127.5 - 1
        _, far = ideal.nearest(x)
        return Quality(
            label, distance, spread, far.numpy(), explained(originals),
            variety(f) / variety(known), images, seconds,
        )  # fmt: skip

    made: list[Made] = [(UNSEEN, real[one], known[other], math.nan)]
    with bar("Drawing", total=len(networks) + len(built)) as progress:
        named: list[tuple[str, Network | Machine]] = [(n.name, n) for n in networks]
        for label, denoiser in [*named, *built.items()]:
            start = time.perf_counter()
            if isinstance(denoiser, Network):
                x = denoiser.draw(count, steps, seed)
            else:
                x = generate(denoiser, count, levels, seed, bandwidth=denoiser.bandwidth)
            made.append((label, to_uint8(x.numpy()), known, time.perf_counter() - start))
            progress.advance()
    originals = originals_of([(images, None) for _, images, _, _ in made], source)
    return [judged(*pair) for pair in zip(made, originals, strict=True)]
