"""The Gaussian machine: the Wiener filter of the data's mean and covariance."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoremachine.files import written
from scoremachine.machines.machine import Label, Machine
from scoremachine.progress import bar

LARGEST = 8192  # the eigenproblem's side: 2 GB and minutes
TILE = 2048  # images read at a time
KEPT = 1024  # eigenproblems from this side on are kept on disk


@dataclass
class Moments:
    """Mean (D,), and the covariance's eigenvectors (D, r) with eigenvalues (r,) > 0, float64."""

    mean: Tensor
    V: Tensor
    eigenvalues: Tensor


class GaussianScore(Machine):
    r"""E[x | y] when x is Gaussian with the images' mean and covariance C (divided by N).

    D(y, sigma) = mean + C (C + sigma^2 I)^-1 (y - mean)

    The covariance is decomposed once, on the smaller side (pixels or images), and kept beside the
    corpus when that is slow. Niedoba et al. 2411.19339; Lukoianov et al. 2509.09672.

    Raises:
        ValueError: From `denoise`, where both pixels and images are more than 8,192.
    """

    name = "gaussian"

    def prepare(self, label: Label = None) -> None:
        super().prepare(label)
        for _, index in self._by_label(label, 1):
            self.moments(index)

    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray) -> Tensor:
        g = self.moments(index)
        variance = sigma[:, None] ** 2
        projected = (y.flatten(1) - g.mean) @ g.V
        D = g.mean + (projected * (g.eigenvalues / (g.eigenvalues + variance))) @ g.V.T
        return D.reshape(y.shape)

    def log_density(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Tensor:
        """log p(y) of N(mean, C + (sigma^2 + h^2) I), in nats, float64, shape (B,)."""
        pictures, levels = self.check(y, sigma)
        h = torch.tensor([self.bandwidth_at(float(s)) for s in levels], dtype=torch.float64)
        variance = (levels**2 + h**2)[:, None]
        log_p = torch.empty(len(pictures), dtype=torch.float64)
        for members, index in self._by_label(label, len(pictures)):
            g = self.moments(index)
            v = variance[members]
            offset = pictures[members].flatten(1) - g.mean
            projected = offset @ g.V
            outside = (offset**2).sum(1) - (projected**2).sum(1)
            spread = g.eigenvalues + v
            D, r = g.V.shape
            log_p[members] = -0.5 * (
                (projected**2 / spread).sum(1)
                + outside.clamp(min=0) / v[:, 0]
                + torch.log(spread).sum(1)
                + (D - r) * torch.log(v[:, 0])
                + D * math.log(2 * math.pi)
            )
        return log_p

    def moments(self, index: np.ndarray) -> Moments:
        """The moments of the images at `index`, from memory, from disk, or computed."""
        key = hashlib.sha256(index.tobytes()).hexdigest()[:16]
        known: dict[str, Moments] = self.__dict__.setdefault("_moments", {})
        if key not in known:
            known[key] = self._kept(index, key)
        return known[key]

    def _kept(self, index: np.ndarray, key: str) -> Moments:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        side = min(len(index), math.prod(self.corpus.shape))
        if side > LARGEST:
            raise ValueError(
                f"the Gaussian of {len(index):,} images of {math.prod(self.corpus.shape):,} values "
                f"each needs an eigenproblem of side {side:,}; expected at most {LARGEST:,}: "
                "open the corpus with a smaller size= or limit="
            )
        path = self.corpus.cache_path / f"gaussian-{key}.safetensors"
        if path.exists():
            try:
                return Moments(**load_file(path))
            except (SafetensorError, TypeError):
                path.unlink()
        moments = moments_of(self.corpus.images, index)
        if side >= KEPT:
            with written(path) as temporary:
                save_file({k: v.contiguous() for k, v in vars(moments).items()}, temporary)
        return moments


def moments_of(images: np.ndarray, index: np.ndarray) -> Moments:
    """Mean and covariance (divided by N) of images[index], x in [-1, 1], read in tiles."""
    N, D = len(index), math.prod(images.shape[1:])

    def tile(start: int) -> Tensor:
        u = torch.from_numpy(images[index[start : start + TILE]])
        return u.reshape(-1, D).double() / 127.5 - 1

    starts = range(0, N, TILE)
    mean = torch.zeros(D, dtype=torch.float64)
    for start in starts:
        mean += tile(start).sum(0)
    mean /= N
    with bar("Measuring the covariance", total=len(starts) + 1) as progress:
        if N <= D:
            x = torch.cat([tile(start) for start in starts]) - mean
            values, vectors = torch.linalg.eigh(x @ x.T / N)
        else:
            C = torch.zeros(D, D, dtype=torch.float64)
            for start in starts:
                x = tile(start) - mean
                C.addmm_(x.T, x)
                progress.advance()
            values, vectors = torch.linalg.eigh(C / N)
        # rounding leaves eigenvalues of about 1e-16 of the largest where there is no variance
        positive = values > max(N, D) * 1e-15 * values[-1].clamp(min=1e-30)
        values, vectors = values[positive], vectors[:, positive]
        if N <= D:
            vectors = (x.T @ vectors) / torch.sqrt(N * values)
        progress.advance()
    return Moments(mean, vectors, values)
