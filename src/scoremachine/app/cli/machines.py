"""The commands for machines. Heavy imports are deferred until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scoremachine.app.cli.words import (
    GOES_ON,
    ArrayName,
    AugmentText,
    Bandwidth,
    BoundaryName,
    ClassName,
    Data,
    Grayscale,
    KernelName,
    Limit,
    MachineName,
    MachineNames,
    Out,
    PatchSize,
    Quiet,
    ScheduleName,
    Seed,
    Settings,
    Size,
    Sizes,
    Split,
    Strict,
    WindowName,
    corpus_of,
    interruptible,
    levels_of,
    machine_of,
    names_of,
    networks_and_corpus,
    pairs,
    parts_of,
    resized,
    settings_of,
    sizes_of,
)
from scoremachine.runtime.parsing import any_number, number


def generate(
    data: Data,
    out: Out,
    machine: MachineName = "els",
    count: Annotated[int, typer.Option(help="How many pictures.")] = 16,
    steps: Annotated[int, typer.Option(help="The number of noise levels.")] = 20,
    seed: Seed = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: ScheduleName = "vp",
    patch_size: PatchSize = None,
    bandwidth: Bandwidth = "0",
    boundary: BoundaryName = None,
    window: WindowName = None,
    augment: AugmentText = None,
    others: Settings = None,
    label: ClassName = None,
    batch: Annotated[int, typer.Option(help="Pictures computed together.")] = 8,
    process: Annotated[
        str | None,
        typer.Option(
            help="Another forward process: heat (pictures blur as they become noisy) or pyramid "
            "(finer details are noise sooner; begins with small pictures)."
        ),
    ] = None,
    start: Annotated[
        float,
        typer.Option(
            help="Start at time T: 0 is noise; above 0, training images with noise (1 - T) / T."
        ),
    ] = 0.0,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also write a GIF of x_t and D.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue after the finished pictures.")
    ] = False,
    size: Sizes = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Generate new pictures: samples.png, samples.npz and run.json in --out."""
    from scoremachine.app.runs.generation import Run, RunOptions
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        side, canvas = sizes_of(size)
        corpus = corpus_of(data, side, grayscale, limit, strict, split, array)
        settings = settings_of(patch_size, bandwidth, boundary, window, augment, others, kernel)
        built = machine_of(machine, corpus, schedule, settings)
        options = RunOptions(
            count, steps, seed, sampler, schedule, label, batch, trajectory, start, canvas, process
        )
        run = Run(out, built, options)
        with interruptible(
            lambda: (
                f"{run.finished()} of {count} pictures are finished; the same command with "
                "--resume continues after them"
            )
        ):
            seconds = run.go(resume)
    print(f"{count} picture{'s' * (count > 1)} in {seconds:.1f} s: {out / 'samples.png'}")


def denoise(
    file: Annotated[
        str,
        typer.Argument(
            help="A picture, a built-in one (photo/chelsea), or a float .npy in [-1, 1]."
        ),
    ],
    sigma: Annotated[float, typer.Option(help="The noise level, in units of [-1, 1].")],
    data: Data,
    out: Out = Path("runs/denoise"),
    machine: MachineName = "ls",
    noisy: Annotated[
        bool, typer.Option("--noisy", help="The picture is noisy already: add no noise.")
    ] = False,
    seed: Seed = 0,
    patch_size: PatchSize = None,
    bandwidth: Bandwidth = "0",
    boundary: BoundaryName = None,
    window: WindowName = None,
    augment: AugmentText = None,
    others: Settings = None,
    label: ClassName = None,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Denoise a picture: denoised.png (noisy next to denoised) and denoised.npz in --out."""
    from scoremachine.app.runs.machines import denoise_file
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        settings = settings_of(patch_size, bandwidth, boundary, window, augment, others, kernel)
        built = machine_of(machine, corpus, "vp", settings)
        denoise_file(file, built, sigma, out, noisy=noisy, seed=seed, label=label)
    print(f"{out / 'denoised.png'}")


def calibrate(
    data: Data,
    machine: MachineName = "ls",
    held_out: Annotated[int, typer.Option(help="Validation images; as many test images.")] = 16,
    steps: Annotated[int, typer.Option(help="How many EDM noise levels.")] = 18,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A schedule to print next to the chosen one: a name, or a calibration.json."
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Choose by agreement with this trained network's D instead, and also print the "
            "choice that denoises best, and the cost of using one for the other's purpose."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for calibration.png and calibration.json.")
    ] = Path("runs/calibration"),
    boundary: BoundaryName = None,
    window: WindowName = None,
    augment: AugmentText = None,
    others: Settings = None,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose locality and bandwidth per noise level by denoising held-out images."""
    from scoremachine.app.runs.machines import CalibrationOptions, calibrate_corpus
    from scoremachine.core.schedules import LOCALITIES
    from scoremachine.machines import kind_of
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        other = None
        if reference is not None:
            other = LOCALITIES[kind_of(machine).locality or "patch_size"].of(reference)
        settings = settings_of(None, None, boundary, window, augment, others, kernel)
        where = data, size, grayscale, limit, strict, split, array
        teachers, corpus = networks_and_corpus([network] if network else [], *where)
        options = CalibrationOptions(held_out, steps, seed, other, *teachers)
        calibrate_corpus(corpus, machine, out, settings, options)


def index(
    data: Data,
    patch_size: Annotated[
        str,
        typer.Option(
            "--patch-size", help="Sizes, as 3,7,11, a published schedule's name, or auto."
        ),
    ],
    boundary: BoundaryName = None,
    label: ClassName = None,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Build the indexes of patches that els searches (otherwise built when they are needed)."""
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        images = corpus.indices(label)
        settings = {"search": "bounded"} | ({} if boundary is None else {"boundary": boundary})
        sizes = [any_number(part) for part in parts_of(patch_size) or [""]]
        for machine in [
            machine_of("els", corpus, "vp", {"patch_size": P} | settings) for P in sizes
        ]:
            machine.local_at(1.0)
            for each in sorted({int(value) for value in machine.patch_size.values}):
                folders = machine.index(each, images)
                if not folders:
                    print(f"{each} x {each}: no index, as every patch is compared directly")
                    continue
                files = [file.stat().st_size for folder in folders for file in folder.iterdir()]
                print(f"{each} x {each}: {sum(files) / 1e6:,.1f} MB in {folders[0].parent}")


def zoo(
    data: Data,
    out: Out,
    machines: MachineNames = None,
    count: Annotated[int, typer.Option(help="How many pictures each.")] = 8,
    steps: Annotated[int, typer.Option(help="How many noise levels to visit.")] = 18,
    seed: Seed = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: ScheduleName = "edm",
    label: ClassName = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue after the finished pictures.")
    ] = False,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Generate samples of every machine from the same noise, with the nearest training images."""
    from scoremachine.app.runs.generation import RunOptions
    from scoremachine.app.runs.generation import zoo as draw
    from scoremachine.runtime import progress
    from scoremachine.sampling.schedules import schedule_of

    with progress.quiet(quiet):
        names = names_of(machines)
        schedule_of(schedule)  # raises for an invalid one before images are read
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        options = RunOptions(count, steps, seed, sampler, schedule, label)
        with interruptible(
            lambda: "the same command with --resume continues after the finished pictures"
        ):
            seconds = draw(corpus, out, names, options, resume)
    print(f"{len(names)} machines in {seconds:.0f} s: {out / 'zoo.png'}")


def denoising_error(
    data: Data,
    out: Out = Path("runs/denoising-error"),
    machines: MachineNames = None,
    steps: Annotated[int, typer.Option(help="How many EDM noise levels.")] = 18,
    validation: Annotated[int, typer.Option(help="Held-out images for calibration.")] = 16,
    test: Annotated[int, typer.Option(help="Other held-out images, for the errors.")] = 32,
    published: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MACHINE=SCHEDULE",
            help="Also measure a published schedule, as pspc=pspc-cifar10. Can be repeated.",
        ),
    ] = None,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure every machine's held-out denoising error per noise level: table, CSV and plot."""
    from scoremachine.app.runs.machines import measure_errors
    from scoremachine.core.schedules import edm_sigmas
    from scoremachine.runtime import progress
    from scoremachine.runtime.validation import check_integer

    with progress.quiet(quiet):
        names = names_of(machines)
        also = [(name, any_number(value)) for name, value in pairs(published)]
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        sigmas = edm_sigmas(check_integer("steps", steps))
        measure_errors(
            corpus, out, names, sigmas=sigmas, validation=validation, test=test, seed=seed,
            published=also,
        )  # fmt: skip


def compress(
    data: Data,
    out: Out = Path("runs/compress"),
    machine: Annotated[str, typer.Option(help="ideal, ls or els.")] = "ls",
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated sizes: a share of the images' bytes (1%), bytes (500kB, 10MB), "
            "or a number of clusters (100). Default: from 30% down to 0.01%."
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Also write mixture.safetensors of this size, for --data."),
    ] = None,
    steps: Annotated[int, typer.Option(help="How many EDM noise levels.")] = 18,
    held_out: Annotated[int, typer.Option(help="Held-out test images.")] = 32,
    patch_size: PatchSize = None,
    boundary: BoundaryName = None,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Measure how small a machine can be: denoising error with images as ever fewer Gaussians."""
    from scoremachine.app.runs.machines import CompressionOptions, compress_corpus
    from scoremachine.lab.sizes import SIZES
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        settings = settings_of(patch_size, None, boundary, None, None, None, "auto")
        asked = [number(word, int, word) for word in parts_of(sizes)] or list(SIZES)
        kept = None if keep is None else number(keep, int, keep)
        with interruptible(lambda: "the same command continues after the finished sizes"):
            options = CompressionOptions(asked, kept, steps, held_out, seed)
            compress_corpus(corpus, out, machine, settings, options)


def ablation(
    data: Annotated[
        list[str],
        typer.Option(help="Images, as for generate; can be repeated. One picture: its crops."),
    ],
    out: Out = Path("runs/ablation"),
    sides: Annotated[
        str | None, typer.Option(help="Comma-separated sides to resize to, as 28,32,64.")
    ] = None,
    machine: Annotated[
        str, typer.Option(help="Comma-separated box-window machines, as for compare.")
    ] = "ls,ls+gaussian,pspc,pspc+gaussian",
    sigmas: Annotated[str, typer.Option(help="Comma-separated noise levels.")] = "5,2,1,0.5,0.2",
    held_out: Annotated[int, typer.Option(help="Held-out test images.")] = 16,
    seed: Seed = 0,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Compare patch sizes and ways to combine patches, by kind of picture and resolution."""
    from scoremachine.app.runs.machines import ablate
    from scoremachine.runtime import progress

    levels = levels_of(sigmas)
    every: list[int | None] = [number(part, int, None) for part in parts_of(sides)] or [None]
    if sides is not None and (None in every or min(side or 0 for side in every) < 1):
        raise ValueError(f"sides are {sides!r}; expected whole numbers of pixels, as 28,32,64")
    with progress.quiet(quiet):
        how = grayscale, limit, strict, split, array
        corpora = [resized(name, side, *how) for name in data for side in every]
        with interruptible(lambda: GOES_ON):
            ablate(corpora, parts_of(machine), levels, held_out, seed, out)
