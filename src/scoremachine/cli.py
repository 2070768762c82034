"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoremachine import __version__
from scoremachine.names import check_name

if TYPE_CHECKING:
    from scoremachine.corpus import Corpus
    from scoremachine.networks import Network

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
MachineName = Annotated[
    str,
    typer.Option(
        "--machine",
        help="ideal, gaussian, es, ls, els, pspc, pspc-flex, pca or smoothed.",
    ),
]
MachineNames = Annotated[
    str | None, typer.Option("--machines", help="Names, by commas; all of them unless given.")
]
PatchSize = Annotated[
    str | None,
    typer.Option(
        help="ls, els, pspc: a number, a published schedule's name, or auto (held-out choice)."
    ),
]
WindowName = Annotated[
    str | None, typer.Option("--window", help="ls, els, pspc: box, gaussian or wiener.")
]
AugmentText = Annotated[
    str | None,
    typer.Option(
        "--augment", help="ls, els, pspc: flips,shifts=N,brightness=B,contrast=C, any of them."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="What else the machine has: share, heat_maps (pspc-flex), threshold (pca), delta, M, "
        "neighbours, uniform, perturbations (smoothed), search, error, bound (els). Can be given "
        "again.",
    ),
]
NetworkName = Annotated[
    str,
    typer.Option(
        "--network",
        help="A folder that scoremachine train wrote, or one of diffusers with safetensors.",
    ),
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
    patch_size: PatchSize = None,
    bandwidth: Bandwidth = "0",
    boundary: BoundaryName = None,
    window: WindowName = None,
    augment: AugmentText = None,
    others: Settings = None,
    label: ClassName = None,
    batch: Annotated[int, typer.Option(help="Pictures computed together.")] = 8,
    start: Annotated[
        float,
        typer.Option(
            help="Start at this time: 0 is noise; above, training images with noise (1 - T) / T."
        ),
    ] = 0.0,
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
        settings = _settings(patch_size, bandwidth, boundary, window, augment, others, kernel)
        built = _machine(machine, corpus, schedule, settings)
        where = sampler, schedule, label, batch, trajectory, start
        run = Run(out, built, count, steps, seed, *where)
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
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Denoise a picture: denoised.png (noisy beside denoised) and denoised.npz in --out."""
    from scoremachine import progress
    from scoremachine.run import denoise_file

    with progress.quiet(quiet):
        corpus = _corpus(data, size, grayscale, limit, strict)
        settings = _settings(patch_size, bandwidth, boundary, window, augment, others, kernel)
        built = _machine(machine, corpus, "vp", settings)
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
    network: Annotated[
        str | None,
        typer.Option(
            help="Choose what is nearest to this trained network's D instead, and print beside it "
            "what denoises best, and what either costs the other."
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
    kernel: KernelName = "auto",
    quiet: Quiet = False,
) -> None:
    """Choose locality and bandwidth per noise level by denoising held-out images."""
    from scoremachine import progress
    from scoremachine.machines import kind_of
    from scoremachine.run import calibrate_corpus
    from scoremachine.schedules import LOCALITIES

    with progress.quiet(quiet):
        other = None
        if beside is not None:
            other = LOCALITIES[kind_of(machine).locality or "patch_size"].named(beside)
        settings = _settings(None, None, boundary, window, augment, others, kernel)
        where = data, size, grayscale, limit, strict
        teacher, corpus = (None, _corpus(*where)) if network is None else _network(network, *where)
        calibrate_corpus(corpus, machine, held_out, steps, seed, other, out, settings, teacher)


@app.command()
def index(
    data: Data,
    patch_size: Annotated[
        str, typer.Option("--patch-size", help="Sizes, as 3,7,11, or a published schedule's name.")
    ],
    boundary: BoundaryName = None,
    label: ClassName = None,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Build the indexes of patches that els searches, which it would build when it needs them."""
    from scoremachine import progress

    with progress.quiet(quiet):
        corpus = _corpus(data, size, grayscale, limit, strict)
        images = corpus.indices(label)
        settings = {"search": "bounded"} | ({} if boundary is None else {"boundary": boundary})
        for part in patch_size.split(","):
            P = _number(part.strip(), int, part.strip())
            machine = _machine("els", corpus, "vp", {"patch_size": P} | settings)
            machine.local_at(1.0)
            for each in sorted({int(value) for value in machine.patch_size.values}):
                folders = machine.index(each, images)
                files = [file.stat().st_size for folder in folders for file in folder.iterdir()]
                print(f"{each} x {each}: {sum(files) / 1e6:,.1f} MB in {folders[0].parent}")


@app.command()
def zoo(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    machines: MachineNames = None,
    count: Annotated[int, typer.Option(help="How many pictures each.")] = 8,
    steps: Annotated[int, typer.Option(help="How many noise levels to visit.")] = 18,
    seed: Seed = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: Annotated[str, typer.Option(help="vp, cosine, edm or rectified.")] = "edm",
    label: ClassName = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after what is already finished.")
    ] = False,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Draw every machine's samples from the same noise, with the nearest training images."""
    from scoremachine import progress
    from scoremachine.run import zoo as draw

    with progress.quiet(quiet):
        names = _names(machines)
        _known_schedule(schedule)
        corpus = _corpus(data, size, grayscale, limit, strict)
        settings = count, steps, seed, sampler, schedule, label, resume
        try:
            seconds = draw(corpus, out, names, *settings)
        except KeyboardInterrupt:
            print(
                "interrupted: the same command with --resume goes on after the pictures that are "
                "finished",
                file=sys.stderr,
            )
            raise SystemExit(130) from None
    print(f"{len(names)} machines in {seconds:.0f} s: {out / 'zoo.png'}")


@app.command()
def denoising_error(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(
        "runs/denoising-error"
    ),
    machines: MachineNames = None,
    steps: Annotated[int, typer.Option(help="How many EDM noise levels.")] = 18,
    choosing: Annotated[int, typer.Option(help="Held-out images that calibrate.")] = 16,
    reporting: Annotated[int, typer.Option(help="Other held-out images, that report.")] = 32,
    published: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MACHINE=SCHEDULE",
            help="Measure also as published, as pspc=pspc-cifar10. Can be given again.",
        ),
    ] = None,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Measure every machine's held-out denoising error per noise level: table, CSV and plot."""
    from scoremachine import progress
    from scoremachine.run import measure_errors

    with progress.quiet(quiet):
        names = _names(machines)
        also = [(name, _any_number(value)) for name, value in _pairs(published)]
        corpus = _corpus(data, size, grayscale, limit, strict)
        measure_errors(corpus, out, names, steps, choosing, reporting, seed, also)


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
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
        typer.Option(help="Images left out for compare; 256, at most a tenth, unless given."),
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
    quiet: Quiet = False,
) -> None:
    """Train a small reference network: weights, their card and the loss curve in --out."""
    from scoremachine import progress
    from scoremachine.networks import Training
    from scoremachine.run import train_network

    with progress.quiet(quiet):
        seconds = _seconds(budget) if budget is not None else None if steps else 600.0
        how = Training(steps, seconds, batch, rate, seed, held_out, precision, device)
        settings = {name: _any_value(value) for name, value in _pairs(others)}
        corpus = _corpus(data, size, grayscale, limit, strict)
        try:
            train_network(corpus, network, out, how, resume, settings)
        except KeyboardInterrupt:
            print(
                "interrupted: the same command with --resume goes on after the last step",
                file=sys.stderr,
            )
            raise SystemExit(130) from None


@app.command()
def compare(
    network: NetworkName,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    machine: Annotated[
        str,
        typer.Option(
            help="Machines, by commas: NAME, NAME:SIZE or NAME:SCHEDULE, as ls, els:7 or "
            "pspc:pspc-cifar10; +h for a calibrated bandwidth, as ls+h.",
        ),
    ] = "gaussian,ls,els,pspc,pca",
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 32,
    count: Annotated[int, typer.Option(help="How many samples are drawn.")] = 16,
    steps: Annotated[int, typer.Option(help="How many noise levels a sample visits.")] = 20,
    sampler: Annotated[str, typer.Option(help="ddim, ddpm, euler or heun.")] = "ddim",
    schedule: Annotated[
        str | None, typer.Option(help="vp, cosine, edm or rectified; the network's unless given.")
    ] = None,
    everywhere: Annotated[
        int,
        typer.Option(help="Images, at most, of machines that look at every position (els, es)."),
    ] = 2000,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html, one page with everything.")
    ] = False,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Measure how well machines predict a trained network: tables, curves and pictures in --out."""
    from scoremachine import progress
    from scoremachine.run import compare_network
    from scoremachine.sample import SCHEDULES

    with progress.quiet(quiet):
        if schedule is not None:
            _known_schedule(schedule)
        loaded, corpus = _network(network, data, size, grayscale, limit, strict)
        try:
            compare_network(
                loaded, machine.split(","), corpus, out, report, pictures=pictures, count=count,
                steps=steps, seed=seed, sampler=sampler, everywhere=everywhere,
                schedule=None if schedule is None else SCHEDULES[schedule](),
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: the same command goes on after what is finished", file=sys.stderr)
            raise SystemExit(130) from None


@app.command()
def quality(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    networks: Annotated[
        str | None, typer.Option(help="Networks by commas, VAEs too: see compare and train.")
    ] = None,
    machine: Annotated[
        str, typer.Option(help="Machines by commas, as for compare.")
    ] = "ls,els,pspc,smoothed",
    count: Annotated[int, typer.Option(help="How many pictures of each.")] = 64,
    steps: Annotated[int, typer.Option(help="How many noise levels to visit.")] = 20,
    everywhere: Annotated[
        int,
        typer.Option(help="Images, at most, of machines that look at every position (els, es)."),
    ] = 1000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Judge samples of machines, networks and VAEs: how good, how new, how varied."""
    from scoremachine import progress
    from scoremachine.networks import Network
    from scoremachine.run import judge_samples

    with progress.quiet(quiet):
        where = data, size, grayscale, limit, strict
        if networks is None:
            every, corpus = [], _corpus(*where)
        else:
            first, *others = networks.split(",")
            loaded, corpus = _network(first, *where)
            every = [loaded, *map(Network.load, others)]
        names = machine.split(",") if machine else []
        settings = {"count": count, "steps": steps, "seed": seed, "everywhere": everywhere}
        judge_samples(every, names, corpus, out, **settings)


@app.command()
def study(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to; the same one goes on.")],
    machine: Annotated[str, typer.Option(help="Machines by commas, as for compare.")] = "els,ls",
    steps: Annotated[int, typer.Option(help="How long a network is trained.")] = 2000,
    count: Annotated[int, typer.Option(help="How many samples are drawn of each.")] = 16,
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 16,
    everywhere: Annotated[
        int,
        typer.Option(help="Images, at most, of machines that look at every position (els, es)."),
    ] = 1000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Measure when the theory holds: by images, training time and kind of network. Hours."""
    from scoremachine import progress
    from scoremachine.run import study_networks

    with progress.quiet(quiet):
        corpus = _corpus(data, size, grayscale, limit, strict)
        try:
            study_networks(
                corpus, out, machine.split(","), steps=steps, count=count, pictures=pictures,
                everywhere=everywhere, seed=seed,
            )  # fmt: skip
        except KeyboardInterrupt:
            print("interrupted: the same command goes on after what is finished", file=sys.stderr)
            raise SystemExit(130) from None


@app.command()
def bias(
    networks: Annotated[
        str, typer.Option(help="Networks by commas, trained on the same images: see compare.")
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    machine: Annotated[
        str, typer.Option(help="Machines by commas, as for compare.")
    ] = "gaussian,ls,els,pspc,pca",
    sigmas: Annotated[str, typer.Option(help="Noise levels, by commas.")] = "20,5,2,1,0.5,0.2",
    pictures: Annotated[int, typer.Option(help="How many held-out images are denoised.")] = 16,
    everywhere: Annotated[
        int,
        typer.Option(help="Images, at most, of machines that look at every position (els, es)."),
    ] = 2000,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Measure how networks and machines differ from the ideal denoiser, and how alike they do."""
    from scoremachine import progress
    from scoremachine.networks import Network
    from scoremachine.run import measure_bias

    levels = _levels(sigmas)
    with progress.quiet(quiet):
        first, *others = networks.split(",")
        loaded, corpus = _network(first, data, size, grayscale, limit, strict)
        every = [loaded, *map(Network.load, others)]
        names = machine.split(",") if machine else []
        measure_bias(every, names, corpus, out, levels, pictures, seed, everywhere)


@app.command(name="sensitivity")
def look(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    network: Annotated[str | None, typer.Option(help="A network, as for compare.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="Machines by commas, as for compare; none unless given.")
    ] = None,
    sigmas: Annotated[
        str, typer.Option(help="Noise levels, by commas.")
    ] = "20,8,4,2,1,0.5,0.2,0.1",
    count: Annotated[int, typer.Option(help="How many images.")] = 4,
    pixels: Annotated[int, typer.Option(help="How many output values of each.")] = 32,
    everywhere: Annotated[
        int,
        typer.Option(help="Images, at most, of machines that look at every position (els, es)."),
    ] = 500,
    seed: Seed = 0,
    size: Size = None,
    grayscale: Grayscale = False,
    limit: Limit = None,
    strict: Strict = False,
    quiet: Quiet = False,
) -> None:
    """Draw what denoisers look at, from their gradients: maps and their widths in --out."""
    from scoremachine import progress
    from scoremachine.run import measure_sensitivity

    levels = _levels(sigmas)
    with progress.quiet(quiet):
        where = data, size, grayscale, limit, strict
        loaded, corpus = (None, _corpus(*where)) if network is None else _network(network, *where)
        names = [] if machine is None else machine.split(",")
        settings = levels, count, pixels, seed, everywhere
        measure_sensitivity(loaded, names, corpus, out, *settings)


def _network(
    name: str, data: str, size: int | None, grayscale: bool, limit: int | None, strict: bool
) -> tuple[Network, Corpus]:
    """A network, and a corpus of pictures of its shape."""
    from scoremachine.networks import Network

    network = Network.load(name)
    corpus = _corpus(data, size, grayscale, limit, strict)
    C, H, W = network.shape
    if size is None and corpus.shape != network.shape:
        from scoremachine.corpus import Corpus

        gray = grayscale or C == 1
        corpus = Corpus.open(data, size=(H, W), grayscale=gray, limit=limit, strict=strict)
    return network, corpus


def _levels(text: str) -> list[float]:
    """Noise levels, by commas."""
    levels = [_number(part, float, None) for part in text.split(",")]
    if not levels or any(s is None or not s > 0 for s in levels):
        raise ValueError(f"sigmas are {text!r}; expected noise levels above 0, as 4,1,0.2")
    return levels


def _seconds(text: str) -> float:
    """A duration, as 90s, 10m or 1h."""
    number, unit = text[:-1], text[-1:]
    found = _number(number, float, None)
    if unit not in ("s", "m", "h") or found is None or not found > 0:
        raise ValueError(f"budget is {text!r}; expected a number and s, m or h, as 90s, 10m, 1h")
    return found * {"s": 1, "m": 60, "h": 3600}[unit]


def _any_value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), _any_number(text))


def _corpus(
    data: str, size: int | None, grayscale: bool, limit: int | None, strict: bool
) -> Corpus:
    from scoremachine.corpus import Corpus

    return Corpus.open(data, size=size, grayscale=grayscale, limit=limit, strict=strict)


def _machine(name: str, corpus: Corpus, schedule: str, settings: dict[str, Any]) -> Any:
    from scoremachine.machines import build
    from scoremachine.sample import SCHEDULES

    _known_schedule(schedule)
    return build(name, corpus, schedule=SCHEDULES[schedule](), **settings)


def _known_schedule(name: str) -> None:
    from scoremachine.sample import SCHEDULES

    check_name("schedule", name, SCHEDULES)


def _names(machines: str | None) -> list[str]:
    from scoremachine.machines import MACHINES, kind_of

    if machines is None:
        return list(MACHINES)
    return [kind_of(name.strip()).name for name in machines.split(",")]


def _settings(
    patch_size: str | None,
    bandwidth: str | None,
    boundary: str | None,
    window: str | None,
    augment: str | None,
    others: list[str] | None,
    kernel: str,
) -> dict[str, Any]:
    """What was said of a machine, by the names of its arguments."""
    said = {"boundary": boundary, "window": window, "augment": augment}
    if patch_size is not None:
        said["patch_size"] = _number(patch_size, int, patch_size)
    if bandwidth is not None:
        said["bandwidth"] = _number(bandwidth, float, bandwidth)
    for name, value in _pairs(others):
        if name in (*said, "patch_size", "bandwidth", "kernel", "schedule"):
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{name} has an option of its own, {option}: use that instead of --set"
            )
        said[name] = _any_number(value)
    return {"kernel": kernel} | {name: value for name, value in said.items() if value is not None}


def _pairs(texts: list[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} names no value; expected NAME=VALUE")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _number(text: str, kind: type, otherwise: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        return otherwise


def _any_number(text: str) -> Any:
    return _number(text, int, _number(text, float, text))


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
