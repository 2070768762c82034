"""The commands about where pictures come from. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scoremachine.app.cli.words import (
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
    PatchSize,
    Quiet,
    Seed,
    Settings,
    Size,
    Split,
    Strict,
    WindowName,
    corpus_of,
    interruptible,
    levels_of,
    machine_of,
    parts_of,
    settings_of,
)
from scoremachine.runtime.parsing import number

Pictures = Annotated[
    str, typer.Option(help="The pictures: a folder, a .zip, an array file, one picture.")
]


def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="A folder that generate wrote; or pictures: a file, a folder, a built-in name."
        ),
    ],
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder for what is written; default: explain/ in the folder that generate "
            "wrote, or runs/explain."
        ),
    ] = None,
    machine: MachineName = "ls",
    sigma: Annotated[
        float,
        typer.Option(
            help="Of pictures: the noise level at which they are explained, in units of "
            "pixels from -1 to 1: 0.1 asks for details, 1 for the layout."
        ),
    ] = 0.2,
    k: Annotated[int, typer.Option("--sources", help="Sources to name in each pixel.")] = 8,
    count: Annotated[int | None, typer.Option(help="Explain only so many pictures.")] = None,
    without: Annotated[
        str | None,
        typer.Option(
            help="Also draw the pictures as they would be without some training images: their "
            "positions by commas, or auto, the main sources."
        ),
    ] = None,
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
    """Show which training pixels every pixel comes from: explain.html, sheets, mosaics, trace.npz.

    Examples:

      scoremachine explain runs/digits --data digits

      scoremachine explain picture.png --data training/ --machine pspc --sigma 0.2
    """
    from scoremachine.app.runs.explanation import ExplainOptions, explain_pictures, explain_run
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        gone = without if without in (None, "auto") else [
            number(word, int, -1) for word in parts_of(without)
        ]  # fmt: skip
        options = ExplainOptions(k, count, gone)
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        with interruptible(lambda: "nothing is kept of an explanation that is not finished"):
            if (Path(target) / "run.json").exists():
                out = out or Path(target) / "explain"
                explain_run(Path(target), corpus, out, options)
            else:
                out = out or Path("runs/explain")
                settings = settings_of(
                    patch_size, bandwidth, boundary, window, augment, others, kernel
                )
                built = machine_of(machine, corpus, "vp", settings)
                explain_pictures(target, built, sigma, out, options, label)
    print(f"{out / 'explain.html'}")


def audit(
    images: Pictures,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for what is written.")] = Path("runs/audit"),
    reference: Annotated[
        str | None,
        typer.Option(
            help="A folder of real images that are not in --data. The p-value of a picture is "
            "the share of them that look at least as much like a copy as it does. "
            "Unless given, images of --data are used, each compared with all the others."
        ),
    ] = None,
    references: Annotated[
        int,
        typer.Option(
            help="How many of these images to audit, at most. The smallest p-value is about 1 / "
            "this number; each takes as long as a picture."
        ),
    ] = 1000,
    fail_below: Annotated[
        float | None,
        typer.Option(
            help="Exit with code 3 if the p-value of a picture is below this, for instance 0.005."
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
    """Find pictures that are copies of training images, in whole or in part: audit.html, .csv.

    Each picture takes about half a second, as does each held-out image, the first time.

    Examples:

      scoremachine audit --images generated/ --data training/

      scoremachine audit --images generated/ --data training/ --fail-below 0.005
    """
    from scoremachine.app.runs.auditing import AuditOptions, audit_folder, tell
    from scoremachine.runtime import progress

    if fail_below is not None and not 0 < fail_below <= 1:
        raise ValueError(f"--fail-below is {fail_below}; expected a p-value, above 0 and at most 1")
    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        with interruptible(lambda: "the same command goes on after the pictures that are finished"):
            options = AuditOptions(reference, references, seed)
            report = audit_folder(images, corpus, out, options)
    tell(report, out)
    if fail_below is not None and bool((report.p_value < fail_below).any()):
        raise SystemExit(3)


def attribute(
    images: Pictures,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for what is written.")] = Path(
        "runs/attribute"
    ),
    machine: Annotated[
        str, typer.Option(help="Machines by commas, as for compare: ls:7, els:5, pspc:7, ideal.")
    ] = "ls:7",
    sigma: Annotated[str, typer.Option(help="Noise levels by commas.")] = "0.1,0.2,0.4",
    scales: Annotated[
        str, typer.Option(help="Factors by which pictures are reduced, by commas, as 1,2.")
    ] = "1",
    top: Annotated[int, typer.Option(help="Training images of each picture.")] = 10,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Rank training images by how much they explain of each picture: attribute.csv and .png."""
    from scoremachine.app.runs.attribution import attribute_pictures
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        levels = levels_of(sigma)
        factors = [number(word, int, 0) for word in parts_of(scales)]
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        attribute_pictures(images, corpus, out, parts_of(machine), levels, factors, top)
    print(f"{out / 'attribute.png'}")


def risk(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for what is written.")] = Path("runs/risk"),
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    split: Split = None,
    array: ArrayName = None,
    quiet: Quiet = False,
) -> None:
    """Find copies within a data set, and isolated images: risk.csv, copies.csv and copies.png."""
    from scoremachine.app.runs.attribution import risk_of
    from scoremachine.runtime import progress

    with progress.quiet(quiet):
        corpus = corpus_of(data, size, grayscale, limit, strict, split, array)
        found = risk_of(corpus, out)
    groups = found.groups()
    copies = sum(map(len, groups))
    print(
        f"{len(groups):,} groups of copies with {copies:,} of {len(corpus):,} images: "
        f"{out / 'copies.png'}"
    )
