"""A variational autoencoder, whose samples are compared with those of machines."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from azula.denoise import Denoiser, Posterior
from azula.noise import CosineSchedule
from torch import Tensor, nn

SMALLEST = 4  # pixels of a side at which pictures are no longer halved


class VAE(nn.Module):
    """Convolutions down to about 4 x 4, a Gaussian latent, and convolutions back to full size.

    Kingma & Welling 1312.6114; the decoder has its optimal variance, so that the two terms of the
    loss need no relative weight (Rybkin et al. 2006.13202).

    Arguments:
        shape: (C, H, W) of the pictures.
        width: Channels at full size; 16 more at every halving.
        latent: Dimension of the latent.
    """

    def __init__(self, shape: tuple[int, int, int], width: int = 24, latent: int = 32) -> None:
        super().__init__()
        C, H, W = shape
        sizes, wide = [(H, W)], [width]
        while min(sizes[-1]) > SMALLEST:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
            wide.append(wide[-1] + 16)
        self.sizes, self.latent = sizes, latent
        flat = wide[-1] * sizes[-1][0] * sizes[-1][1]
        self.down = nn.ModuleList([nn.Conv2d(C, wide[0], 3, padding=1)])
        self.down += [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(wide)]
        self.moments, self.start = nn.Linear(flat, 2 * latent), nn.Linear(latent, flat)
        back = wide[::-1]
        self.up = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(back, [*back[1:], width], strict=True)]
        )
        self.last = nn.Conv2d(width, C, 3, padding=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z given x, (B, latent) each."""
        for layer in self.down:
            x = nn.functional.silu(layer(x))
        mean, log_variance = self.moments(x.flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of x given z, in [-1, 1]."""
        h = self.start(z).unflatten(1, (-1, *self.sizes[-1]))
        for layer, size in zip(self.up, [*self.sizes[-2::-1], self.sizes[0]], strict=True):
            h = nn.functional.interpolate(nn.functional.silu(layer(h)), size)
        return torch.tanh(self.last(h))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decoded z, sampled given x, and its KL divergence from a standard normal, (B,)."""
        mean, log_variance = self.encode(x)
        z = mean + torch.exp(log_variance / 2) * torch.randn_like(mean)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return self.decode(z), divergence


class Autoencoder(Denoiser):
    """A `VAE` with the training interface of a denoiser; it generates pictures but has no D."""

    def __init__(self, backbone: VAE) -> None:
        super().__init__()
        self.backbone, self.schedule = backbone, CosineSchedule()

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Posterior:
        raise ValueError("a VAE generates pictures and does not denoise: it has no D")

    def loss(self, x: Tensor, t: Tensor) -> Tensor:
        """The negative ELBO in nats per pixel value, with the optimal variance; t is ignored."""
        D, divergence = self.backbone(x)
        square = (D.float() - x).square().mean()
        return torch.log(square) / 2 + divergence.float().mean() / x[0].numel()

    def draw(self, count: int, seed: int) -> Tensor:
        """New pictures, (count, C, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            z = torch.randn(count, self.backbone.latent, generator=generator)
            weights = next(self.backbone.parameters())
            return self.backbone.decode(z.to(weights.device)).float().cpu()
