"""Generation of pictures from noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from azula.denoise import Denoiser
from torch import Tensor

from scoremachine.core.noise import PictureNoise
from scoremachine.core.processes import Pyramid, process_of
from scoremachine.core.schedules import BandwidthSchedule
from scoremachine.machines.machine import Label, Machine
from scoremachine.provenance.explain import Step, Trace, explain
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer
from scoremachine.sampling.process_denoiser import ProcessDenoiser
from scoremachine.sampling.schedules import times_of
from scoremachine.sampling.trajectory import Sampling, trajectory

Path = list[tuple[Tensor, Tensor, float]]


def generate(
    denoiser: Denoiser,
    count: int = 16,
    steps: int = 20,
    seed: int = 0,
    sampler: str = "ddim",
    label: Label = None,
    bandwidth: float | BandwidthSchedule | str = 0.0,
    **options: Any,
) -> Any:
    """Generates new pictures from noise, in `steps` noise levels of the denoiser's schedule.

    The same seed gives the same result, bit for bit on a given computer, whatever the batch size
    and the number of threads.

    Arguments:
        denoiser: A machine, or any azula denoiser.
        count: How many pictures.
        steps, seed, sampler, label, bandwidth: See `Sampling`.
        options: The other settings of `Sampling`: batch, shape, start, process; and explain: True,
            or how many sources to name in each pixel.

    Returns:
        Pictures, approximately in [-1, 1], float32, shape (count, C, H, W); with explain, these
        and the `Trace` of where they come from.

    Raises:
        ValueError: For an argument out of its range or an unknown name.
    """
    check_integer("count", count)
    named = options.pop("explain", False)
    known = {"batch", "shape", "start", "process"}
    if unknown := options.keys() - known:
        raise TypeError(
            f"generate has no argument {', '.join(sorted(unknown))}; besides those of its "
            f"signature it takes explain, {', '.join(sorted(known))}"
        )
    sampling = Sampling(steps, seed, sampler, label, bandwidth, **options)
    if named is not False:
        k = 8 if named is True else check_integer("explain", named)
        return generate_explained(denoiser, range(count), sampling, k)
    batches = generate_batches(denoiser, range(count), sampling)
    return torch.cat([path[-1][1] for _, path in batches])


def generate_batches(
    denoiser: Denoiser, pictures: range, sampling: Sampling
) -> Iterator[tuple[range, Path]]:
    """As `generate`, for any range of pictures: yields each finished batch, with its path.

    A path is the list of (x_t, D, t); the last D is the result.

    Raises:
        ValueError: For settings that the denoiser does not support.
    """
    denoiser, sampling = _prepared(denoiser, sampling)
    with bar("Generating", total=len(pictures) * sampling.steps) as progress:
        for first in range(pictures.start, pictures.stop, sampling.batch):
            some = range(first, min(first + sampling.batch, pictures.stop))
            path = []
            for x, D, t in trajectory(denoiser, some, sampling):
                if isinstance(denoiser, ProcessDenoiser):
                    x, D = (denoiser.schedule.picture(z).float() for z in (x, D))
                path.append((x, D, t))
                progress.advance(len(some))
            yield some, path


def generate_explained(
    denoiser: Denoiser, pictures: range, sampling: Sampling, k: int = 8
) -> tuple[Tensor, Trace]:
    """Pictures as `generate` makes them, and the trace of the last step.

    The trace's `steps` say for every noise level which image leads each pixel.

    Arguments:
        denoiser: A machine that has sources.
        pictures: The numbers of the pictures.
        sampling: What is asked for.
        k: How many sources to name in each pixel.

    Raises:
        ValueError: For a denoiser that is no machine or has no sources.
    """
    if not isinstance(denoiser, Machine):
        raise ValueError(
            f"explain is of machines, and this is {type(denoiser).__name__}: attribute its "
            "pictures instead"
        )
    if not denoiser.has_sources:
        raise ValueError(
            f"{denoiser.name} has no sources to explain its pictures with: use another machine"
        )
    drawn, traces = [], []
    for some, path in generate_batches(denoiser, pictures, sampling):
        steps = []
        with bar("Explaining", total=len(path)) as progress:
            for x_t, _, t in path:
                trace = _explained(denoiser, x_t, t, sampling, some, k)
                progress.advance()
                if trace is not None:
                    steps.append(Step.of(trace, t))
        assert trace is not None
        traces.append(replace(trace, steps=tuple(steps)))
        drawn.append(path[-1][1])
    return torch.cat(drawn), Trace.batch(traces)


def _explained(
    machine: Machine, x_t: Tensor, t: float, sampling: Sampling, pictures: range, k: int
) -> Trace | None:
    """The trace of a step; None where a pyramid has small pictures still."""
    noise = PictureNoise(sampling.seed, pictures)
    asked = k, sampling.label, sampling.bandwidth, noise
    if sampling.process is not None:
        process = process_of(sampling.process, machine.corpus.shape[1:], machine.schedule)
        if isinstance(process, Pyramid) and process.coarse(t):
            return None
        return explain(machine, x_t, t, *asked, process)
    alpha, sigma = (v.double() for v in machine.schedule(torch.tensor(t, dtype=torch.float64)))
    return explain(machine, x_t / alpha.to(x_t), sigma / alpha, *asked)


def _prepared(denoiser: Denoiser, sampling: Sampling) -> tuple[Denoiser, Sampling]:
    """The prepared denoiser, and the settings with the shape of the pictures."""
    shape, start = sampling.shape, sampling.start
    if not isinstance(denoiser, Machine):
        if start > 0:
            raise ValueError(
                "start needs training images, which this denoiser does not have; use 0"
            )
        if sampling.process is not None:
            raise ValueError(
                "only machines support a forward process, and this denoiser is not one: leave "
                "process out"
            )
        shape = shape or getattr(denoiser, "shape", None)  # a `Network` has one
        if shape is None:
            raise ValueError("the shape of the pictures is unknown; give shape=(C, H, W)")
        return denoiser, replace(sampling, shape=shape)
    if shape is None:
        shape = denoiser.corpus.shape
    if start > 0 and not denoiser.source.has_images:
        raise ValueError("start begins with training images, and a mixture has none: use start 0")
    denoiser.check_shape(shape)
    if start > 0 and shape != denoiser.corpus.shape:
        raise ValueError(
            f"start begins with training images, of shape {denoiser.corpus.shape}, and the "
            f"pictures have {shape}: use start 0, or leave shape out"
        )
    sampling = replace(sampling, shape=shape)
    if sampling.process is not None:
        process = check_process(denoiser, sampling)
        return ProcessDenoiser(denoiser.prepare(sampling.label), process.schedule), sampling
    alpha, sigma = denoiser.schedule(times_of(denoiser.schedule, sampling.steps, start))
    return denoiser.prepare(sampling.label, (sigma / alpha).tolist()), sampling


def check_process(machine: Machine, sampling: Sampling) -> ProcessDenoiser:
    """A machine under the requested forward process; ValueError if it does not support it."""
    assert sampling.process is not None
    shape = sampling.shape or machine.corpus.shape
    if sampling.start > 0 or tuple(shape) != machine.corpus.shape:
        raise ValueError(
            "under a forward process pictures begin as noise and have the images' size: leave out "
            "start and shape"
        )
    machine.check_process(sampling.bandwidth)
    return ProcessDenoiser(machine, process_of(sampling.process, shape[1:], machine.schedule))
