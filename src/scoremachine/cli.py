"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoremachine import __version__

if TYPE_CHECKING:
    from scoremachine.corpus import Corpus

app = typer.Typer(
    help="Training-free diffusion: the closed-form denoisers of a set of images, exact and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str,
    typer.Option(
        help="A built-in set (digits, faces, texture/brick, photo/chelsea, ...), a folder, a .zip, "
        "an .npy or .npz file, or hf:NAME[:SPLIT].",
        rich_help_panel="Images",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(help="Resize and centre-crop to this side.", rich_help_panel="Images"),
]
Grayscale = Annotated[
    bool, typer.Option("--grayscale", help="Read as grayscale.", rich_help_panel="Images")
]
Limit = Annotated[
    int | None, typer.Option(help="Use this many of the images.", rich_help_panel="Images")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse unreadable files.", rich_help_panel="Images"),
]
MachineName = Annotated[str, typer.Option("--machine", help="ideal, gaussian, ls, els or pspc.")]
PatchSize = Annotated[
    str, typer.Option(help="A number, a published schedule's name, or auto (held-out choice).")
]
Bandwidth = Annotated[str, typer.Option(help="The bandwidth h: a number or auto.")]
BoundaryName = Annotated[
    str | None, typer.Option("--boundary", help="broken or circular (els only).")
]
KernelName = Annotated[str, typer.Option("--kernel", help="auto, numba, torch or reference.")]
ClassName = Annotated[
    str | None, typer.Option("--class", help="Use the images of this class alone.")
]
Seed = Annotated[int, typer.Option(help="One seed is one result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Training-free diffusion: the closed-form denoisers of a set of images, exact and fast."""
    if version:
        print(f"scoremachine {__version__}")
        raise typer.Exit


@app.command()
def generate(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    machine: MachineName = "els",
    count: Annotated[int, typer.Option(help="How many pictures.")] = 16,
    steps: Annotated[int, typer.Option(help="How many noise levels to visit.")] = 20,
    seed: Seed = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: Annotated[str, typer.Option(help="vp, cosine, edm or rectified.")] = "vp",
    patch_size: PatchSize = "auto",
    bandwidth: Bandwidth = "0",
    boundary: BoundaryName = None,
    label: ClassName = None,
    batch: Annotated[int, typer.Option(help="Pictures computed together.")] = 8,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also write a GIF of x_t and D.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the pictures already finished.")
    ] = False,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Generate new pictures: samples.png, samples.npz and run.json in --out."""
    from scoremachine import progress
    from scoremachine.run import Run

    with progress.quiet(quiet):
        corpus = _corpus(data, size, grayscale, limit, strict)
        built = _machine(machine, corpus, patch_size, bandwidth, boundary, kernel, schedule)
        run = Run(out, built, count, steps, seed, sampler, schedule, label, batch, trajectory)
        try:
            seconds = run.go(resume)
        except KeyboardInterrupt:
            print(
                f"interrupted: {run.finished()} of {count} pictures are finished; the same "
                "command with --resume goes on after them",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
    print(f"{count} pictures in {seconds:.1f} s: {out / 'samples.png'}")


@app.command()
def denoise(
    file: Annotated[Path, typer.Argument(help="A picture, or a float .npy in [-1, 1].")],
    sigma: Annotated[float, typer.Option(help="The noise level, in units of [-1, 1].")],
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("runs/denoise"),
    machine: MachineName = "ls",
    noisy: Annotated[
        bool, typer.Option("--noisy", help="The picture is noisy already: add no noise.")
    ] = False,
    seed: Seed = 0,
    patch_size: PatchSize = "auto",
    bandwidth: Bandwidth = "0",
    boundary: BoundaryName = None,
    label: ClassName = None,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Denoise a picture: denoised.png (noisy beside denoised) and denoised.npz in --out."""
    from scoremachine import progress
    from scoremachine.run import denoise_file

    with progress.quiet(quiet):
        corpus = _corpus(data, size, grayscale, limit, strict)
        built = _machine(machine, corpus, patch_size, bandwidth, boundary, kernel, "vp")
        denoise_file(file, built, sigma, out, noisy=noisy, seed=seed, label=label)
    print(f"{out / 'denoised.png'}")


@app.command()
def calibrate(
    data: Data,
    machine: MachineName = "ls",
    held_out: Annotated[int, typer.Option(help="Images that choose; as many others report.")] = 16,
    steps: Annotated[int, typer.Option(help="How many EDM noise levels.")] = 18,
    beside: Annotated[
        str | None, typer.Option(help="A published schedule to print beside.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for calibration.png and calibration.json.")
    ] = Path("runs/calibration"),
    boundary: BoundaryName = None,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose patch size and bandwidth per noise level by denoising held-out images."""
    from scoremachine import progress
    from scoremachine.run import calibrate_corpus
    from scoremachine.windows import PatchSchedule

    with progress.quiet(quiet):
        other = None if beside is None else PatchSchedule.named(beside)
        corpus = _corpus(data, size, grayscale, limit, strict)
        settings: dict[str, Any] = {"kernel": kernel}
        if boundary is not None:
            settings["boundary"] = boundary
        calibrate_corpus(corpus, machine, held_out, steps, seed, other, out, settings)


def _corpus(
    data: str, size: int | None, grayscale: bool, limit: int | None, strict: bool
) -> Corpus:
    from scoremachine.corpus import Corpus

    return Corpus.open(data, size=size, grayscale=grayscale, limit=limit, strict=strict)


def _machine(
    name: str,
    corpus: Corpus,
    patch_size: str,
    bandwidth: str,
    boundary: str | None,
    kernel: str,
    schedule: str,
) -> Any:
    from scoremachine.machines import build
    from scoremachine.sample import SCHEDULES

    if schedule not in SCHEDULES:
        raise ValueError(f"no schedule is called {schedule!r}; there are {', '.join(SCHEDULES)}")
    settings: dict[str, Any] = {"kernel": kernel, "schedule": SCHEDULES[schedule]()}
    settings["patch_size"] = _number(patch_size, int, patch_size)
    settings["bandwidth"] = _number(bandwidth, float, bandwidth)
    if boundary is not None:
        settings["boundary"] = boundary
    return build(name, corpus, **settings)


def _number(text: str, kind: type, otherwise: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        return otherwise


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"scoremachine: {message}", file=sys.stderr)


def main() -> None:
    """Runs the command line: exit code 2 and a sentence for what a user can mend."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"scoremachine: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
