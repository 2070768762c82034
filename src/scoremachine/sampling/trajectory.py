"""The reverse process, from noise to a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser, Posterior
from torch import Tensor

from scoremachine.machines.machine import Label, Machine
from scoremachine.sampling.noise import PictureNoise
from scoremachine.sampling.process_denoiser import Through
from scoremachine.sampling.samplers import SAMPLERS
from scoremachine.sampling.schedules import times_of


class RecordingDenoiser(Denoiser):
    """A denoiser that remembers its answers; a sampler may ask more than once a step."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.answers: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Posterior:
        posterior = self.denoiser(x_t, t, **kwargs)
        self.answers.append(posterior.mean)
        return posterior


def trajectory(
    denoiser: Denoiser,
    pictures: range,
    shape: tuple[int, int, int],
    steps: int,
    seed: int,
    sampler: str,
    label: Label,
    start: float = 0.0,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The reverse process of some pictures: yields (x_t, D, t) at each of the n noise levels.

    The times fall evenly from the first to 0; at the last the walk ends, and D is the result: no
    step ever goes to a vanishing sigma.
    """
    watched = RecordingDenoiser(denoiser)
    stepper = SAMPLERS[sampler](watched, silent=True)
    given = {} if label is None else {"label": label}
    with PictureNoise(seed, pictures) as noise, torch.no_grad():
        times = times_of(denoiser.schedule, steps, start)
        alpha, sigma = denoiser.schedule(times[0])
        x = sigma * torch.randn_like(torch.empty(len(pictures), *shape))
        if start > 0:
            x = x + alpha * _training_images(denoiser, noise, label).to(x)
        machine = denoiser.machine if isinstance(denoiser, Through) else denoiser
        if isinstance(machine, Machine):
            machine.begin(x)
        try:
            for t, s in itertools.pairwise(times):
                watched.answers.clear()
                x_s = stepper.step(x, t, s, **given)
                yield x, watched.answers[0], float(t)
                x = x_s
            yield x, watched(x, times[-1], **given).mean, float(times[-1])
        finally:
            if isinstance(machine, Machine):
                machine.begin(None)


def _training_images(denoiser: Denoiser, noise: PictureNoise, label: Label) -> Tensor:
    """An image of the corpus for each picture, drawn by the picture's own generator."""
    assert isinstance(denoiser, Machine)
    corpus, generators = denoiser.corpus, noise.generators
    picks = np.empty(len(generators), dtype=np.int64)
    for members, index in denoiser.by_label(label, len(generators)):
        for p in members.tolist():
            picks[p] = index[int(torch.randint(len(index), (1,), generator=generators[p]))]
    return torch.from_numpy(np.array(corpus.images[picks])).double() / 127.5 - 1
