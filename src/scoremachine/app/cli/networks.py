"""The commands for networks. Heavy imports are deferred until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scoremachine.app.cli.words import (
    GOES_ON,
    ArrayName,
    Data,
    Grayscale,
    Limit,
    Machines,
    MaxImagesEls,
    NetworkName,
    Out,
    Quiet,
    Seed,
    Size,
    Split,
    Strict,
    any_value,
    corpus_of,
    interruptible,
    levels_of,
    networks_and_corpus,
    pairs,
    parts_of,
    seconds_of,
)


def train(
    data: Data,
    out: Out,
    network: Annotated[
        str, typer.Option(help="resnet, unet, unet-attention, dit, mlp or vae.")
    ] = "resnet",
    budget: Annotated[
        str | None,
        typer.Option(help="Training time, as 90s, 10m, 1h; default 10m without --steps."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps: the same number gives the same network.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 64,
    rate: Annotated[float, typer.Option(help="The learning rate of Adam.")] = 1e-3,
    held_out: Annotated[
        int | None,
        typer.Option(help="Images held out for compare; default 256, at most a tenth."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Settings of the network: width, depth, padding, normalised (resnet), levels, "
            "blocks, attention (unet), patch, heads (dit), latent (vae). Can be repeated.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the folder's checkpoint.")
    ] = False,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Train a small reference network: weights, their card and the loss curve in --out."""
    from scoremachine.app.runs.networks import train_network
    from scoremachine.lab.networks import Training
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        seconds = seconds_of(budget) if budget is not None else None if steps else 600.0
        how = Training(steps, seconds, batch, rate, seed, held_out, precision, device)
        settings = {name: any_value(value) for name, value in pairs(others)}
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        with interruptible(lambda: "the same command with --resume continues after the last step"):
            train_network(corpus, network, out, how, resume, settings)


def compare(
    network: NetworkName,
    data: Data,
    out: Out,
    machine: Machines = "gaussian,ls,els,pspc,pca",
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 32,
    count: Annotated[int, typer.Option(help="The number of samples.")] = 16,
    steps: Annotated[int, typer.Option(help="The number of noise levels of a sample.")] = 20,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: Annotated[
        str | None,
        typer.Option(help="As for generate (vp, cosine, ...); default: the network's."),
    ] = None,
    max_images_els: MaxImagesEls = 2000,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html, one page with everything.")
    ] = False,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure how well machines predict a trained network: tables, curves and pictures in --out."""
    from scoremachine.app.runs.networks import compare_network
    from scoremachine.runtime import progress
    from scoremachine.sampling.schedules import schedule_of

    with progress.quiet(quiet):
        other = None if schedule is None else schedule_of(schedule)
        (loaded,), corpus = networks_and_corpus(
            [network], data, size, grayscale, limit, strict, split, array
        )
        with interruptible(lambda: GOES_ON):
            compare_network(
                loaded, parts_of(machine), corpus, out, report, pictures=pictures, count=count,
                steps=steps, seed=seed, sampler=sampler, schedule=other,
                max_images_els=max_images_els,
            )  # fmt: skip


def sensitivity(
    data: Data,
    out: Out,
    network: Annotated[str | None, typer.Option(help="A network, as for compare.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="Comma-separated machines, as for compare; default: none.")
    ] = None,
    sigmas: Annotated[
        str, typer.Option(help="Comma-separated noise levels.")
    ] = "20,8,4,2,1,0.5,0.2,0.1",
    count: Annotated[int, typer.Option(help="How many images.")] = 4,
    pixels: Annotated[int, typer.Option(help="How many output values of each.")] = 32,
    max_images_els: MaxImagesEls = 500,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure on which pixels of y denoisers depend: gradient maps and their widths in --out."""
    from scoremachine.app.runs.networks import SensitivityOptions, measure_sensitivity
    from scoremachine.runtime import progress

    levels = levels_of(sigmas)
    with progress.quiet(quiet):
        where = data, size, grayscale, limit, strict, split, array
        loaded, corpus = networks_and_corpus([network] if network else [], *where)
        names = parts_of(machine)
        options = SensitivityOptions(levels, count, pixels, seed, max_images_els)
        measure_sensitivity(loaded, names, corpus, out, options)


def bias(
    networks: Annotated[
        str,
        typer.Option(
            "--networks",
            "--network",
            help="Comma-separated networks, trained on the same images: see compare.",
        ),
    ],
    data: Data,
    out: Out,
    machine: Machines = "gaussian,ls,els,pspc,pca",
    sigmas: Annotated[str, typer.Option(help="Comma-separated noise levels.")] = "20,5,2,1,0.5,0.2",
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 16,
    max_images_els: MaxImagesEls = 2000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure how networks and machines differ from the ideal denoiser, and how similarly."""
    from scoremachine.app.runs.networks import measure_bias
    from scoremachine.runtime import progress

    levels = levels_of(sigmas)
    with progress.quiet(quiet):
        every, corpus = networks_and_corpus(
            parts_of(networks), data, size, grayscale, limit, strict, split, array
        )
        names = parts_of(machine)
        with interruptible(lambda: GOES_ON):
            measure_bias(
                every, names, corpus, out, sigmas=levels, pictures=pictures, seed=seed,
                max_images_els=max_images_els,
            )  # fmt: skip


def quality(
    data: Data,
    out: Out,
    networks: Annotated[
        str | None,
        typer.Option(
            "--networks", "--network", help="Comma-separated networks or VAEs: see compare, train."
        ),
    ] = None,
    machine: Machines = "ls,els,pspc,smoothed",
    count: Annotated[int, typer.Option(help="The number of pictures of each.")] = 64,
    steps: Annotated[int, typer.Option(help="The number of noise levels.")] = 20,
    max_images_els: MaxImagesEls = 1000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate samples of machines, networks and VAEs: quality, novelty and variety."""
    from scoremachine.app.runs.networks import judge_samples
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        where = data, size, grayscale, limit, strict, split, array
        every, corpus = networks_and_corpus(parts_of(networks), *where)
        names = parts_of(machine)
        if not names and not every:
            raise ValueError("there is nothing to evaluate: name a machine or a network")
        judge_samples(
            every, names, corpus, out, count=count, steps=steps, seed=seed,
            max_images_els=max_images_els,
        )  # fmt: skip


def study(
    data: Data,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="The folder to write to, or to resume in.")
    ],
    machine: Machines = "els,ls",
    steps: Annotated[int, typer.Option(help="Training steps of a network.")] = 2000,
    count: Annotated[int, typer.Option(help="The number of samples of each.")] = 16,
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 16,
    max_images_els: MaxImagesEls = 1000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure when the theory holds, by images, training time and network. Takes hours."""
    from scoremachine.app.runs.networks import study_networks
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        with interruptible(lambda: GOES_ON):
            study_networks(
                corpus, out, parts_of(machine), steps=steps, count=count, pictures=pictures,
                max_images_els=max_images_els, seed=seed,
            )  # fmt: skip
