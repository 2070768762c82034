"""The Gaussian machine: the Wiener filter of the data's mean and covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from scoremachine.core.derivatives import regrouped, uncompiled
from scoremachine.core.shares import Shares
from scoremachine.data.moments import moments
from scoremachine.machines.machine import Batch, Label, Machine


class GaussianScore(Machine):
    r"""E[x | y] when x is Gaussian with the images' mean and covariance C (divided by N).

    D(y, sigma) = mean + C (C + sigma^2 I)^-1 (y - mean)

    The covariance is decomposed once, in the smaller of its two forms (pixels or images), and kept
    in the cache if that is slow. Niedoba et al. 2411.19339; Lukoianov et al. 2509.09672.

    Raises:
        ValueError: From `denoise`, if there are more than 8,192 pixels and more than 8,192 images.
    """

    name = "gaussian"
    smooth_in_sigma = True
    has_sources = False

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> Self:
        for _, index in self.by_label(label, 1):
            moments(self.corpus, index)
        return super().prepare(label, levels)

    def shares(self, batch: Batch, k: int) -> Shares:
        return Shares.of_no_source(self.mean(batch))

    def mean(self, batch: Batch) -> Tensor:
        # under a process, y = A x + sigma eps: mean + C A (A C A + sigma^2 I)^-1 (y - A mean)
        g, seen = moments(self.corpus, batch.index), self.source.moments(batch.index)
        scale = self.source.scale
        c = seen.filtered(batch.y.flatten(1) / scale - seen.mean, batch.sigma / scale)
        return (g.mean + c @ g.V.T).reshape(batch.y.shape)

    @uncompiled
    def log_density(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """log p(y) of N(mean, C + (sigma^2 + h^2) I), in nats, float64, shape (B,)."""
        pictures, levels = self.check(y, sigma)
        variance = (levels**2 + self.bandwidths(levels) ** 2)[:, None]
        groups, parts = self.by_label(label, len(pictures)), []
        for members, index in groups:
            g = moments(self.corpus, index)
            v = variance[members]
            offset = pictures[members].flatten(1) - g.mean
            projected = offset @ g.V
            outside = ((offset - projected @ g.V.T) ** 2).sum(1)
            spread = g.eigenvalues + v
            D, r = g.V.shape
            log_p = -0.5 * (
                (projected**2 / spread).sum(1)
                + outside / v[:, 0]
                + torch.log(spread).sum(1)
                + (D - r) * torch.log(v[:, 0])
                + D * math.log(2 * math.pi)
            )
            parts.append(log_p)
        return regrouped([members for members, _ in groups], parts)
