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
    Settings,
    Size,
    Split,
    Strict,
    WindowName,
    corpus_of,
    interruptible,
    machine_of,
    parts_of,
    settings_of,
)
from scoremachine.runtime.parsing import number


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
        typer.Option(help="The folder for what is written; of a run, its own unless given."),
    ] = None,
    machine: MachineName = "ls",
    sigma: Annotated[
        float, typer.Option(help="Of pictures: the noise level at which they are explained.")
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
    """Show which training pixels every pixel comes from: a page, sheets, mosaics, trace.npz."""
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
