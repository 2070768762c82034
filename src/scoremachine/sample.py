"""Generation: from noise to pictures along azula's schedules, with azula's samplers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from azula.denoise import Denoiser, Posterior
from azula.noise import CosineSchedule, RectifiedSchedule, Schedule, VPSchedule
from azula.sample import DDIMSampler, DDPMSampler, EulerSampler, HeunSampler, Sampler
from scipy.optimize import brentq
from torch import Tensor
from torch.overrides import TorchFunctionMode

from scoremachine.machines.machine import Label, Machine
from scoremachine.machines.through import Through
from scoremachine.names import check_name
from scoremachine.processes import Process, process_of
from scoremachine.progress import bar
from scoremachine.schedules import BandwidthSchedule, check_bandwidth, check_integer, check_seed


class EDMSchedule(Schedule):
    r"""The noise levels of Karras et al. 2022 (2206.00364, eq. 5) as an azula schedule.

    alpha_t = 1, sigma_t = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
            raise ValueError(
                f"an EDM schedule goes from sigma_max = {sigma_max:g} to sigma_min = {sigma_min:g} "
                f"with rho = {rho:g}; expected sigma_max > sigma_min > 0 and rho > 0"
            )
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho


SCHEDULES: dict[str, type[Schedule]] = {
    "vp": VPSchedule,
    "cosine": CosineSchedule,
    "edm": EDMSchedule,
    "rectified": RectifiedSchedule,
}
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIMSampler,
    "ddpm": DDPMSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
}


class PictureNoise(TorchFunctionMode):
    """Inside it `torch.randn_like` draws picture i's noise from a generator made of (seed, i).

    So a sampler's noise depends neither on the batch a picture is in nor on what ran before.
    """

    def __init__(self, seed: int, pictures: range) -> None:
        super().__init__()
        self.generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0])
            )
            for i in pictures
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.randn_like:
            return func(*args, **(kwargs or {}))
        x, dtype = args[0], (kwargs or {}).get("dtype") or args[0].dtype
        return torch.stack(
            [torch.randn(x.shape[1:], generator=g, dtype=dtype) for g in self.generators]
        ).to(x.device)


class Watched(Denoiser):
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


def walk(
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
    watched = Watched(denoiser)
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


def schedule_of(text: str) -> Schedule:
    """A schedule by its name in `SCHEDULES`; "edm:8,0.03" is EDM's from noise level 8 to 0.03.

    Raises:
        ValueError: For an unknown name, or noise levels that are none.
    """
    name, colon, levels = text.partition(":")
    check_name("schedule", name, SCHEDULES)
    if not colon:
        return SCHEDULES[name]()
    try:
        high, low = map(float, levels.split(","))
    except ValueError:
        high = low = 0.0
    if name != "edm" or not high > low > 0:
        raise ValueError(
            f"schedule is {text!r}; expected {', '.join(SCHEDULES)}, or edm:HIGH,LOW with noise "
            "levels HIGH > LOW > 0, as edm:8,0.03"
        )
    return EDMSchedule(low, high)


def times_of(schedule: Schedule, steps: int, start: float = 0.0) -> Tensor:
    """The times at which a walk looks, falling, float64 (steps,)."""
    first = 1.0 if start == 0 else time_of(schedule, (1 - start) / start)
    return torch.linspace(first, 0, steps, dtype=torch.float64)


def time_of(schedule: Schedule, sigma: float) -> float:
    """The time t in [0, 1] at which sigma_t / alpha_t is `sigma`, or the nearer end."""

    def excess(t: float) -> float:
        alpha_t, sigma_t = schedule(torch.tensor(t, dtype=torch.float64))
        return math.log(max(float(sigma_t / alpha_t), 1e-300)) - math.log(sigma)

    if excess(1.0) <= 0:
        return 1.0
    return 0.0 if excess(0.0) >= 0 else float(brentq(excess, 0.0, 1.0, xtol=1e-12))


def _training_images(denoiser: Denoiser, noise: PictureNoise, label: Label) -> Tensor:
    """An image of the corpus for each picture, drawn by the picture's own generator."""
    assert isinstance(denoiser, Machine)
    corpus, generators = denoiser.corpus, noise.generators
    picks = np.empty(len(generators), dtype=np.int64)
    for members, index in denoiser.by_label(label, len(generators)):
        for p in members.tolist():
            picks[p] = index[int(torch.randint(len(index), (1,), generator=generators[p]))]
    return torch.from_numpy(np.array(corpus.images[picks])).double() / 127.5 - 1


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
                for x, D, t in walk(walker, some, shape, steps, seed, sampler, label, start):
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
