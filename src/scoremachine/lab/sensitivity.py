"""Sensitivity of a denoiser: how much D at a pixel depends on y at every offset from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.data.heatmaps import gradients
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer

SHARE = 0.9  # share of a map within its width
BATCH = 16  # gradients that are computed together


class Denoises(Protocol):
    """A machine or a network: D, differentiable by y."""

    def denoise(self, y: Tensor, sigma: float | Tensor) -> Tensor:
        """D(y, sigma)."""


@dataclass
class Sensitivity:
    """Mean squared gradients of D by y, by the offset between their pixels.

    Attributes:
        label: The denoiser's.
        sigmas: The K noise levels.
        maps: float64 (K, 2 H - 1, 2 W - 1): maps[k, H - 1 + a, W - 1 + b] is the mean square of
            dD[i, j] / dy[i + a, j + b], over output pixels (i, j), channels and pictures. It is 0
            at offsets that no measured pair of pixels has.
    """

    label: str
    sigmas: list[float]
    maps: np.ndarray

    def width(self, k: int, share: float = SHARE) -> int:
        """The side of the smallest centred square that holds a share of the map: odd, in pixels.

        It corresponds to the patch size of a box-window machine. 0 for a map of zeros.
        """
        m = self.maps[k]
        a, b = (n // 2 for n in m.shape)
        total = m.sum()
        if not total > 0:
            return 0
        for r in range(max(a, b) + 1):
            inside = m[max(0, a - r) : a + r + 1, max(0, b - r) : b + r + 1].sum()
            if inside >= share * total * (1 - 1e-9):  # sums are rounded
                return 2 * r + 1
        return 2 * max(a, b) + 1


def sensitivity(
    denoiser: Denoises,
    corpus: Corpus,
    sigmas: Sequence[float] | np.ndarray,
    label: str = "denoiser",
    count: int = 4,
    pixels: int = 32,
    seed: int = 0,
) -> Sensitivity:
    """Measures the sensitivity of a denoiser on noised images.

    Arguments:
        denoiser: A machine or a network.
        corpus: The images, which should be neither in the source of the machine nor seen by the
            network, since a denoiser that has memorized an image does not depend on y near it.
        sigmas: Noise levels.
        label: Its label.
        count: The number of images.
        pixels: The number of random output values of each.
        seed: Of images, noise and pixels.

    Raises:
        ValueError: For an invalid count, or no noise level.
    """
    C, H, W = corpus.shape
    check_integer("count", count)
    check_integer("pixels", pixels)
    levels = [float(s) for s in sigmas]
    if not levels:
        raise ValueError("there is no noise level; expected at least one")
    rng = np.random.default_rng(seed)
    picks = np.sort(rng.choice(len(corpus), min(count, len(corpus)), replace=False))
    x = torch.from_numpy(np.array(corpus.images[picks])).float() / 127.5 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    asked = [rng.choice(C * H * W, min(pixels, C * H * W), replace=False) for _ in x]
    maps = []
    with bar(f"Differentiating {label}", total=len(levels) * len(x) * len(asked[0])) as progress:
        for sigma in levels:
            squares = np.zeros((2 * H - 1, 2 * W - 1))
            pairs = np.zeros_like(squares)
            for y, outputs in zip(x + sigma * eps, asked, strict=True):
                for first in range(0, len(outputs), BATCH):
                    some = torch.from_numpy(outputs[first : first + BATCH])
                    found = gradients(partial(denoiser.denoise, sigma=sigma), y, some)
                    for d, g in zip(some.tolist(), found, strict=True):
                        i, j = divmod(d % (H * W), W)
                        at = slice(H - 1 - i, 2 * H - 1 - i), slice(W - 1 - j, 2 * W - 1 - j)
                        squares[at] += (g.double() ** 2).sum(0).numpy()
                        pairs[at] += 1
                    progress.advance(len(some))
            maps.append(squares / np.maximum(pairs, 1))
    return Sensitivity(label, levels, np.stack(maps))
