"""The ideal score machine: the exact denoiser of a finite training set, which memorizes it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import regrouped, uncompiled
from scoremachine.core.shares import Shares
from scoremachine.machines.machine import Batch, Label, Machine, gaussian_constant
from scoremachine.sources.source import FoldRequest


class IdealScore(Machine):
    r"""E[x | y] when x is one of the images: whole images are compared and averaged.

    D(y, sigma) = sum_n softmax_n(-|y - x_n|^2 / (2 sigma^2)) x_n

    Karras et al. 2022 (2206.00364, eq. 57); Scarvelis et al. 2023 (2310.12395).
    """

    name = "ideal"
    accepts_mixtures = True
    positions: Literal["same", "rolled"] = "same"

    @property
    def smooth_in_sigma(self) -> bool:  # type: ignore[override]
        return self.positions == "same" and self.source.has_images

    def collection(self) -> Collection:
        """The machine's row of the table."""
        return Collection.of_images(self.corpus.shape[1:], self.positions)

    def mean(self, batch: Batch) -> Tensor:
        request = FoldRequest(batch.y, batch.sigma, self.collection(), batch.index)
        return self.source.fold(request).mean

    @property
    def removal_is_exact(self) -> bool:
        return True

    def shares(self, batch: Batch, k: int) -> Shares:
        asked = batch.y, batch.sigma, self.collection(), batch.index
        return self.source.shares(FoldRequest(*asked, leaders=k))

    def nearest(self, y: Tensor, label: Label = None) -> tuple[Tensor, Tensor]:
        """The training image nearest to each picture, and its distance.

        Returns:
            Positions in the corpus, int64 (B,), and root mean square differences, float64 (B,).
        """
        pictures, levels = self.check(y, 1.0)
        pictures = pictures.detach()
        found = torch.empty(len(pictures), dtype=torch.int64)
        distance = torch.empty(len(pictures), dtype=torch.float64)
        C, H, W = self.corpus.shape
        for members, index in self.by_label(label, len(pictures)):
            asked = pictures[members], levels[members], self.collection(), index
            fold = self.source.fold(FoldRequest(*asked, leaders=1)).fold
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
        if not self.source.has_images:
            raise ValueError("a mixture's density is not implemented: use the images")
        pictures, levels = self.check(y, sigma)
        s, c = torch.sqrt(levels**2 + self.bandwidths(levels) ** 2), self.collection()
        groups, parts = self.by_label(label, len(pictures)), []
        for members, index in groups:
            request = FoldRequest(pictures[members], s[members], c, index)
            value = self.source.log_partition(request)
            value = value - math.log(len(index) * c.sources_per_image)
            D = math.prod(self.corpus.shape)
            parts.append(value + gaussian_constant(D, s[members] ** 2))
        return regrouped([members for members, _ in groups], parts)


class EquivariantScore(IdealScore):
    """The ideal machine of the images under all circular translations.

    Kamb & Ganguli 2412.20292 (the equivariant score machine). All translations of an image are
    compared at once, by Fourier transform.
    """

    name = "es"
    accepts_mixtures = False
    positions = "rolled"
