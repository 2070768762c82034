"""The commands about networks. Heavy imports wait until a command needs them."""

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
        str | None, typer.Option(help="How long to train, as 90s, 10m or 1h; 10m unless --steps.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="How many steps: the same number is the same network.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 64,
    rate: Annotated[float, typer.Option(help="The learning rate of Adam.")] = 1e-3,
    held_out: Annotated[
        int | None,
        typer.Option(help="Images left out for compare: 256 unless given; at most a tenth."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Settings of the network: width, depth, padding, normalised (resnet), levels, "
            "blocks, attention (unet), patch, heads (dit), latent (vae). Can be given again.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's checkpoint.")
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
        with interruptible(lambda: "the same command with --resume goes on after the last step"):
            train_network(corpus, network, out, how, resume, settings)


def compare(
    network: NetworkName,
    data: Data,
    out: Out,
    machine: Machines = "gaussian,ls,els,pspc,pca",
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 32,
    count: Annotated[int, typer.Option(help="How many samples are drawn.")] = 16,
    steps: Annotated[int, typer.Option(help="How many noise levels a sample visits.")] = 20,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: Annotated[
        str | None,
        typer.Option(help="As for generate (vp, cosine, ...); the network's unless given."),
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
        str | None, typer.Option(help="Machines by commas, as for compare; none unless given.")
    ] = None,
    sigmas: Annotated[
        str, typer.Option(help="Noise levels, by commas.")
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
    """Draw what denoisers look at, from their gradients: maps and their widths in --out."""
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
            help="Networks by commas, trained on the same images: see compare.",
        ),
    ],
    data: Data,
    out: Out,
    machine: Machines = "gaussian,ls,els,pspc,pca",
    sigmas: Annotated[str, typer.Option(help="Noise levels, by commas.")] = "20,5,2,1,0.5,0.2",
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
    """Measure how networks and machines differ from the ideal denoiser, and how alike they do."""
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
            "--networks", "--network", help="Networks by commas, VAEs too: see compare and train."
        ),
    ] = None,
    machine: Machines = "ls,els,pspc,smoothed",
    count: Annotated[int, typer.Option(help="How many pictures of each.")] = 64,
    steps: Annotated[int, typer.Option(help="How many noise levels to visit.")] = 20,
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
    """Judge samples of machines, networks and VAEs: how good, how new, how varied."""
    from scoremachine.app.runs.networks import judge_samples
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        where = data, size, grayscale, limit, strict, split, array
        every, corpus = networks_and_corpus(parts_of(networks), *where)
        names = parts_of(machine)
        if not names and not every:
            raise ValueError("there is nobody to judge: name a machine or a network")
        judge_samples(
            every, names, corpus, out, count=count, steps=steps, seed=seed,
            max_images_els=max_images_els,
        )  # fmt: skip


def study(
    data: Data,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="The folder to write to; the same one goes on.")
    ],
    machine: Machines = "els,ls",
    steps: Annotated[int, typer.Option(help="How long a network is trained.")] = 2000,
    count: Annotated[int, typer.Option(help="How many samples are drawn of each.")] = 16,
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
    """Measure when the theory holds: by images, training time and kind of network. Hours."""
    from scoremachine.app.runs.networks import study_networks
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        with interruptible(lambda: GOES_ON):
            study_networks(
                corpus, out, parts_of(machine), steps=steps, count=count, pictures=pictures,
                max_images_els=max_images_els, seed=seed,
            )  # fmt: skip
