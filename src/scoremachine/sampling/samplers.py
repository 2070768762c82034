"""Samplers by name: those of azula, and an ancestral sampler with explicit noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from azula.denoise import Denoiser
from azula.sample import EulerSampler, HeunSampler, Sampler
from torch import Tensor

Draw = Callable[[Tensor], Tensor]  # standard normal noise, of the shape of a tensor


class AncestralSampler(Sampler):
    r"""DDIM, and DDPM at eta = 1, like azula's sampler, but with noise from a given function.

    x_s = alpha_s D + sigma_s sqrt(1 - eta tau) (x_t - alpha_t D) / sigma_t + sigma_s sqrt(eta tau)
    eps, with tau = 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2

    Ho et al. 2020 (2006.11239); Song et al. 2021 (2010.02502).

    Arguments:
        denoiser: An azula denoiser.
        draw: Returns eps.
        eta: The stochasticity of the steps, from 0 to 1.
    """

    def __init__(self, denoiser: Denoiser, draw: Draw, eta: float = 0.0) -> None:
        super().__init__(silent=True)
        self.denoiser, self.draw, self.eta = denoiser, draw, eta

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, **kwargs: Any) -> Tensor:
        alpha_s, sigma_s = self.denoiser.schedule(s)
        alpha_t, sigma_t = self.denoiser.schedule(t)
        tau = 1 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2
        tau = torch.clip(self.eta * tau, min=0, max=1)
        D = self.denoiser(x_t, t, **kwargs).mean
        x_s = alpha_s * D
        x_s = x_s + sigma_s * torch.sqrt(1 - tau) / sigma_t * (x_t - alpha_t * D)
        if self.eta > 0:
            x_s = x_s + sigma_s * torch.sqrt(tau) * self.draw(x_t)
        return x_s


def _deterministic(kind: type[Sampler], denoiser: Denoiser, draw: Draw) -> Sampler:
    return kind(denoiser, silent=True)


SAMPLERS: Mapping[str, Callable[[Denoiser, Draw], Sampler]] = {
    "ddim": AncestralSampler,
    "ddpm": partial(AncestralSampler, eta=1.0),
    "euler": partial(_deterministic, EulerSampler),
    "heun": partial(_deterministic, HeunSampler),
}
