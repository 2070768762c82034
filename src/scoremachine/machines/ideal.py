"""The ideal score machine: the exact denoiser of a finite training set, which memorizes it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import regrouped, tracked, uncompiled, with_slope
from scoremachine.core.posterior import Scan, posterior, with_sigma_slope
from scoremachine.machines.machine import Label, Machine, gaussian_constant
from scoremachine.runtime.progress import bar
from scoremachine.sources.mixture import Mixture


class IdealScore(Machine):
    r"""E[x | y] when x is one of the images: whole images compared, whole images averaged.

    D(y, sigma) = sum_n softmax_n(-|y - x_n|^2 / (2 sigma^2)) x_n

    Karras et al. 2022 (2206.00364, eq. 57); Scarvelis et al. 2023 (2310.12395).
    """

    name = "ideal"
    accepts_mixtures = True
    source: Literal["same", "rolled"] = "same"

    @property
    def smooth_in_sigma(self) -> bool:  # type: ignore[override]
        plain = self.source == "same" and not isinstance(self.corpus, Mixture)
        return plain and isinstance(self.bandwidth, float)

    def collection(self) -> Collection:
        """The machine's row."""
        return Collection.of_images(self.corpus.shape[1:], self.source)

    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        if isinstance(self.corpus, Mixture):
            return self.corpus.posterior(y, sigma, self.collection())
        asked = self.kernel, self.compared, index, y, sigma, self.collection()
        return posterior(*asked, values=self.answers)[1]

    def nearest(self, y: Tensor, label: Label = None) -> tuple[Tensor, Tensor]:
        """The training image nearest to each picture, and how far it is.

        Returns:
            Positions in the corpus, int64 (B,), and root mean square differences, float64 (B,).
        """
        pictures, levels = self.check(y, 1.0)
        pictures = pictures.detach()
        found = torch.empty(len(pictures), dtype=torch.int64)
        distance = torch.empty(len(pictures), dtype=torch.float64)
        C, H, W = self.corpus.shape
        for members, index in self.by_label(label, len(pictures)):
            asked = self.corpus.images, index, pictures[members], levels[members]
            fold, _ = posterior(self.kernel, *asked, self.collection(), leaders=1)
            found[members] = fold.places[:, 0, 0, 0] // (H * W)
            square = (-2 * fold.logits[:, 0, 0, 0]).clamp(min=0)
            distance[members] = torch.sqrt(square / (C * H * W))
        return found, distance

    @uncompiled
    def log_density(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """log p(y) of the mixture (1/S) sum_s N(s, (sigma^2 + h^2) I) of all S sources s.

        In nats, float64, shape (B,). Differentiable by y twice, and by sigma (`ideal`, with a
        constant bandwidth) once.
        """
        if isinstance(self.corpus, Mixture):
            raise ValueError("a mixture's density is not computed here: use the images")
        pictures, levels = self.check(y, sigma)
        h = self.bandwidths(levels)
        c, groups, parts = self.collection(), self.by_label(label, len(pictures)), []
        for members, index in groups:
            y, s = pictures[members], torch.sqrt(levels[members] ** 2 + h[members] ** 2)
            fold, D = posterior(self.kernel, self.corpus.images, index, y, s, c)
            value = fold.log_partition[:, 0, 0] - math.log(len(index) * c.sources_per_image)
            value = with_slope(value, (D - y) / s[:, None, None, None] ** 2, y)
            value = with_sigma_slope(value, Scan(self.kernel, self.corpus.images, index, c), y, s)
            parts.append(value + gaussian_constant(math.prod(self.corpus.shape), s**2))
        return regrouped([members for members, _ in groups], parts)


class EquivariantScore(IdealScore):
    """The ideal machine of the images under all circular translations.

    Kamb & Ganguli 2412.20292 (the equivariant score machine). All translations of an image are
    compared at once, by Fourier transform.
    """

    name = "es"
    accepts_mixtures = False
    source = "rolled"

    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        if self.view is None:
            return super().mean(y, sigma, index, level)
        if tracked(y):
            raise ValueError("es has no derivative under a forward process: use another machine")
        # a process that knows frequencies knows where a picture begins: every translation by itself
        view, images = self.view, self.corpus.images[index]
        whole, rows = Collection.of_images(self.corpus.shape[1:]), np.arange(len(index))
        logs, means = [], []
        _, H, W = self.corpus.shape
        with bar("Translating", total=H * W) as progress:
            for dy in range(H):
                for dx in range(W):
                    moved = np.roll(images, (dy, dx), (2, 3))
                    seen = view.process.seen(moved, view.t)
                    fold, D = posterior(self.kernel, seen, rows, y, sigma, whole, values=moved)
                    logs.append(fold.log_partition[:, 0, 0])
                    means.append(D)
                    progress.advance()
        w = torch.softmax(torch.stack(logs), 0)
        return (w[..., None, None, None] * torch.stack(means)).sum(0)
