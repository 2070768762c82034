"""The reverse process, from noise to pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser, Posterior
from torch import Tensor

from scoremachine.core.noise import PictureNoise, draw
from scoremachine.core.processes import Process
from scoremachine.core.schedules import BandwidthSchedule, check_bandwidth
from scoremachine.machines.machine import Label, Machine
from scoremachine.runtime.validation import check_integer, check_name, check_seed
from scoremachine.sampling.process_denoiser import ProcessDenoiser
from scoremachine.sampling.samplers import SAMPLERS
from scoremachine.sampling.schedules import times_of


@dataclass(frozen=True)
class Sampling:
    """The settings of `generate`, apart from the denoiser and the number of pictures.

    Attributes:
        steps: The number of noise levels (Heun evaluates the denoiser twice at all but the last).
        seed: Picture i takes all its noise from generators seeded with (seed, i).
        sampler: "ddim", "ddpm", "euler" or "heun", as in azula.
        label: The class to which the source is restricted; None: all images.
        bandwidth: The bandwidth h during generation, which replaces the machine's own: with h > 0
            samples keep white grain of standard deviation h.
        batch: The number of pictures in a batch, which affects memory but not the results.
        shape: (C, H, W), for a denoiser that is not a machine, or for an `els` whose pictures
            differ in size from its images; None: that of the images.
        start: The start time in [0, 1), in the time of Scarvelis et al. 2310.12395, where 0 is
            noise and sigma = (1 - start) / start. Above 0 a trajectory begins with training images
            plus noise of this level: fewer steps, but the start already determines much.
        process: A forward process other than x_t = alpha_t x + sigma_t eps: "heat", "pyramid" or a
            `Process`; alpha_t and sigma_t are those of the machine's schedule.

    Raises:
        ValueError: For a value out of its range or an unknown name.
    """

    steps: int = 20
    seed: int = 0
    sampler: str = "ddim"
    label: Label = None
    bandwidth: float | BandwidthSchedule | str = 0.0
    batch: int = 8
    shape: tuple[int, int, int] | None = None
    start: float = 0.0
    process: Process | str | None = None

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)
        check_integer("batch", self.batch)
        check_seed(self.seed)
        check_name("sampler", self.sampler, SAMPLERS)
        check_bandwidth(self.bandwidth)
        check_start(self.start)
        if not (self.label is None or isinstance(self.label, int | np.integer | str)):
            raise ValueError(
                f"label is {self.label!r}; generation takes one class for all pictures, or None"
            )

    def for_shape(self, shape: tuple[int, int, int]) -> Sampling:
        """The same settings for pictures of a given shape."""
        return replace(self, shape=shape)


def check_start(start: float) -> None:
    """ValueError unless `start` is a time in [0, 1)."""
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1:
        raise ValueError(f"start is {start!r}; expected a time from 0 (noise) to below 1")


class RecordingDenoiser(Denoiser):
    """A denoiser that records its results; a sampler may call it several times per step."""

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
    denoiser: Denoiser, pictures: range, sampling: Sampling
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The reverse process of some pictures: yields (x_t, D, t) at each noise level.

    The times descend evenly from the first to 0. The trajectory ends at the last, where D is the
    result: no step goes to sigma = 0.

    Arguments:
        denoiser: A machine, a machine under a process, or any azula denoiser.
        pictures: The numbers of the pictures, which determine their noise.
        sampling: The settings; `shape` must be given, and `batch` is not used.
    """
    noise = PictureNoise(sampling.seed, pictures)
    generators = noise.generators()
    recording = RecordingDenoiser(denoiser)
    stepper = SAMPLERS[sampling.sampler](
        recording, lambda x: draw(generators, x.shape[1:], x.dtype).to(x.device)
    )
    given: dict[str, Any] = {} if sampling.label is None else {"label": sampling.label}
    if isinstance(denoiser, Machine | ProcessDenoiser):
        given |= {"bandwidth": sampling.bandwidth, "noise": noise}
    assert sampling.shape is not None
    with torch.no_grad():
        times = times_of(denoiser.schedule, sampling.steps, sampling.start)
        alpha, sigma = denoiser.schedule(times[0])
        x = sigma * draw(generators, sampling.shape, torch.get_default_dtype())
        if sampling.start > 0:
            assert isinstance(denoiser, Machine)
            x = x + alpha * _training_images(denoiser, generators, sampling.label).to(x)
        for t, s in itertools.pairwise(times):
            recording.answers.clear()
            x_s = stepper.step(x, t, s, **given)
            yield x, recording.answers[0], float(t)
            x = x_s
        yield x, recording(x, times[-1], **given).mean, float(times[-1])


def _training_images(machine: Machine, generators: list[torch.Generator], label: Label) -> Tensor:
    """A random image of the corpus for each picture, chosen by the picture's own generator."""
    corpus = machine.corpus
    picks = np.empty(len(generators), dtype=np.int64)
    for members, index in machine.by_label(label, len(generators)):
        for p in members.tolist():
            picks[p] = index[int(torch.randint(len(index), (1,), generator=generators[p]))]
    return torch.from_numpy(np.array(corpus.images[picks])).double() / 127.5 - 1
