"""Generation: from noise to pictures along azula's schedules, with azula's samplers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from azula.denoise import Denoiser
from torch import Tensor

from scoremachine.core.processes import Process, process_of
from scoremachine.core.schedules import BandwidthSchedule, check_bandwidth
from scoremachine.machines.machine import Label, Machine
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer, check_name, check_seed
from scoremachine.sampling.process_denoiser import Through
from scoremachine.sampling.samplers import SAMPLERS
from scoremachine.sampling.schedules import times_of
from scoremachine.sampling.trajectory import trajectory


def generate_batches(
    denoiser: Denoiser,
    pictures: range,
    steps: int = 20,
    seed: int = 0,
    sampler: str = "ddim",
    label: Label = None,
    bandwidth: float | BandwidthSchedule | str = 0.0,
    batch: int = 8,
    shape: tuple[int, int, int] | None = None,
    start: float = 0.0,
    process: Process | str | None = None,
) -> Iterator[tuple[range, list[tuple[Tensor, Tensor, float]]]]:
    """As `generate`, for any range of pictures: yields each batch when it is done, with its walk.

    A walk is the list of (x_t, D, t); the last D is the result.
    """
    check_integer("steps", steps)
    check_integer("batch", batch)
    check_seed(seed)
    check_name("sampler", sampler, SAMPLERS)
    check_start(start)
    if not (label is None or isinstance(label, int | str)):
        raise ValueError(
            f"label is {label!r}; generation takes one class for all pictures, or None"
        )
    if start > 0 and not isinstance(denoiser, Machine):
        raise ValueError("start needs training images, which this denoiser does not have; use 0")
    if shape is None:
        if not isinstance(denoiser, Machine):
            raise ValueError("the shape of the pictures is unknown; give shape=(C, H, W)")
        shape = denoiser.corpus.shape
    elif isinstance(denoiser, Machine):
        denoiser.check_shape(shape)
        if start > 0 and shape != denoiser.corpus.shape:
            raise ValueError(
                f"start begins with training images, of shape {denoiser.corpus.shape}, and the "
                f"pictures have {shape}: use start 0, or leave shape out"
            )
    through = None if process is None else check_through(denoiser, process, shape, start)
    with _bandwidth(denoiser, bandwidth):
        if through is not None:
            denoiser.prepare(label)
        elif isinstance(denoiser, Machine):
            alpha, sigma = denoiser.schedule(times_of(denoiser.schedule, steps, start))
            denoiser.prepare(label, (sigma / alpha).tolist())
        with bar("Generating", total=len(pictures) * steps) as progress:
            for first in range(pictures.start, pictures.stop, batch):
                some = range(first, min(first + batch, pictures.stop))
                path = []
                walker = through or denoiser
                for x, D, t in trajectory(walker, some, shape, steps, seed, sampler, label, start):
                    if through is not None:
                        x, D = (through.schedule.picture(z).float() for z in (x, D))
                    path.append((x, D, t))
                    progress.advance(len(some))
                yield some, path


def check_through(
    denoiser: Denoiser, process: Process | str, shape: tuple[int, int, int], start: float
) -> Through:
    """A machine under a forward process; ValueError for what does not go with one."""
    if not isinstance(denoiser, Machine):
        raise ValueError("a forward process is of machines, and this is none: leave process out")
    if start > 0 or tuple(shape) != denoiser.corpus.shape:
        raise ValueError(
            "under a forward process pictures begin as noise and have the images' size: leave out "
            "start and shape"
        )
    return Through(denoiser, process_of(process, shape[1:], denoiser.schedule))


def check_start(start: float) -> None:
    """ValueError unless `start` is a time in [0, 1)."""
    if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1:
        raise ValueError(f"start is {start!r}; expected a time from 0 (noise) to below 1")


def generate(
    denoiser: Denoiser,
    count: int = 16,
    steps: int = 20,
    seed: int = 0,
    sampler: str = "ddim",
    label: Label = None,
    bandwidth: float | BandwidthSchedule | str = 0.0,
    batch: int = 8,
    shape: tuple[int, int, int] | None = None,
    start: float = 0.0,
    process: Process | str | None = None,
) -> Tensor:
    """New pictures: `steps` noise levels of the denoiser's schedule, from noise to D.

    One seed is one result, bit for bit on a given machine, whatever the batch size and the number
    of threads.

    Arguments:
        denoiser: A machine, or any azula denoiser.
        count: How many pictures.
        steps: How many noise levels are visited (Heun looks twice at all but the last).
        seed: Picture i draws all its noise from a generator made of (seed, i).
        sampler: "ddim", "ddpm", "euler" or "heun", azula's.
        label: The class whose images alone are the source; None: all.
        bandwidth: The bandwidth h while generating, whatever the machine's own: with h > 0
            samples keep white grain of standard deviation h.
        batch: How many pictures go together; costs memory, changes no result.
        shape: (C, H, W), where the denoiser is no machine, or an `els` that draws pictures of
            another size than its images.
        start: When to start, in [0, 1), in the time of Scarvelis et al. 2310.12395, where 0 is
            noise and sigma = (1 - start) / start. Above 0 the walk begins with training images
            that have this much noise: fewer steps, and the start already decides much.
        process: Another forward process than x_t = alpha_t x + sigma_t eps: "heat", "pyramid" or a
            `Process`; alpha_t and sigma_t are those of the machine's schedule.

    Returns:
        Pictures in about [-1, 1], float32, shape (count, C, H, W).

    Raises:
        ValueError: For an argument out of its range or an unknown name.
    """
    check_integer("count", count)
    batches = generate_batches(
        denoiser, range(count), steps, seed, sampler, label, bandwidth, batch, shape, start, process
    )
    return torch.cat([path[-1][1] for _, path in batches])


@contextmanager
def _bandwidth(denoiser: Denoiser, bandwidth: float | BandwidthSchedule | str) -> Iterator[None]:
    """Gives a machine another bandwidth for a while."""
    if not isinstance(denoiser, Machine):
        yield
        return
    own = denoiser.bandwidth
    denoiser.bandwidth = check_bandwidth(bandwidth)
    try:
        yield
    finally:
        denoiser.bandwidth = own
