"""The Gaussian machine: the Wiener filter of the data's mean and covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.derivatives import regrouped, uncompiled
from scoremachine.data.moments import Moments, moments
from scoremachine.machines.machine import Label, Machine


class GaussianScore(Machine):
    r"""E[x | y] when x is Gaussian with the images' mean and covariance C (divided by N).

    D(y, sigma) = mean + C (C + sigma^2 I)^-1 (y - mean)

    The covariance is decomposed once, on the smaller side (pixels or images), and kept beside the
    corpus when that is slow. Niedoba et al. 2411.19339; Lukoianov et al. 2509.09672.

    Raises:
        ValueError: From `denoise`, where both pixels and images are more than 8,192.
    """

    name = "gaussian"

    @property
    def smooth_in_sigma(self) -> bool:  # type: ignore[override]
        return isinstance(self.bandwidth, float)

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> None:
        super().prepare(label, levels)
        for _, index in self.by_label(label, 1):
            moments(self.corpus, index)

    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        g = moments(self.corpus, index)
        if self.view is not None:
            return self._seen(g, y, index, level)
        projected = (y.flatten(1) - g.mean) @ g.V
        shrunk = projected * (g.eigenvalues / (g.eigenvalues + sigma[:, None] ** 2))
        return (g.mean + shrunk @ g.V.T).reshape(y.shape)

    def _seen(self, g: Moments, y: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        """mean + C A (A C A + sigma^2 I)^-1 (x_t - A mean), for one noise level."""
        assert self.view is not None
        seen = self.moments(index)  # A mean and A V, in units of the scale
        offset = y.flatten(1) / self.view.scale - seen.mean
        c = offset @ seen.V @ seen.inverse(float(level[0]))
        return (g.mean + c @ g.V.T).reshape(y.shape)

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
