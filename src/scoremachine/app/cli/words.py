"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoremachine.runtime.files import sentence_of
from scoremachine.runtime.parsing import any_number, number
from scoremachine.runtime.progress import say

if TYPE_CHECKING:
    from scoremachine.data.corpus import Corpus
    from scoremachine.lab.networks import Network

Data = Annotated[
    str,
    typer.Option(
        help="A built-in set (digits, faces, texture/brick, photo/chelsea, ...; also "
        "built-in:NAME), a folder, a .zip, an .npy or .npz file, or hf:NAME[:SPLIT].",
        rich_help_panel="Images",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(help="Resize and centre-crop to this side.", rich_help_panel="Images"),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="A number: resize and centre-crop the images to this side. HEIGHTxWIDTH, as 128x256: "
        "generate pictures of that size (els and epc only). Or both, as 32,128x256.",
        rich_help_panel="Images",
    ),
]
Grayscale = Annotated[
    bool, typer.Option("--grayscale", help="Read as grayscale.", rich_help_panel="Images")
]
Limit = Annotated[
    int | None, typer.Option(help="Use this many of the images.", rich_help_panel="Images")
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Fail if a file cannot be read; otherwise it is skipped, which is said.",
        rich_help_panel="Images",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="The split of the images, as train or test, if there are several; default: train.",
        rich_help_panel="Images",
    ),
]
ArrayName = Annotated[
    str | None,
    typer.Option(
        "--array",
        help="Which array of an .npz (or column of hf:NAME) has the images.",
        rich_help_panel="Images",
    ),
]
Out = Annotated[Path, typer.Option(file_okay=False, help="The folder to write to.")]
MachineName = Annotated[
    str,
    typer.Option(
        "--machine",
        help="ideal, gaussian, es, ls, els, pspc, epc, pspc-flex, pca, smoothed or composite.",
    ),
]
MachineNames = Annotated[
    str | None,
    typer.Option("--machines", "--machine", help="Comma-separated names; default: all."),
]
PatchSize = Annotated[
    str | None,
    typer.Option(
        help="ls, els, pspc: a number, a published schedule's name, a calibration.json that "
        "calibrate wrote, or auto (held-out calibration)."
    ),
]
WindowName = Annotated[
    str | None, typer.Option("--window", help="ls, els, pspc: box, gaussian or wiener.")
]
AugmentText = Annotated[
    str | None,
    typer.Option("--augment", help="ls, els, pspc: any of flips,shifts=N,brightness=B,contrast=C."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Other settings of the machine: share, heat_maps (pspc-flex), threshold (pca), delta, "
        "M, neighbours, uniform, perturbations (smoothed), search, error, bound (els), "
        "of, weights (composite). Can be repeated.",
    ),
]
NetworkName = Annotated[
    str,
    typer.Option(
        "--network",
        help="A bundled one (mnist-resnet, cifar10-resnet), a folder that scoremachine "
        "train wrote, or one of diffusers with safetensors.",
    ),
]
Bandwidth = Annotated[
    str,
    typer.Option(
        help="The bandwidth h, in units of pixels from -1 to 1: each source becomes a Gaussian of "
        "this standard deviation. A number or auto (held-out calibration)."
    ),
]
BoundaryName = Annotated[
    str | None, typer.Option("--boundary", help="broken or circular (els only).")
]
KernelName = Annotated[str, typer.Option("--kernel", help="auto, numba, torch or reference.")]
ClassName = Annotated[
    str | None, typer.Option("--class", help="Use only the images of this class.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
MaxImagesEls = Annotated[
    int,
    typer.Option(
        "--max-images-els",
        help="The most images of machines that compare all positions (els, es).",
    ),
]
Machines = Annotated[
    str,
    typer.Option(
        "--machine",
        help="Comma-separated machines: NAME, NAME:SIZE or NAME:SCHEDULE, as ls, els:7 or "
        "pspc:pspc-cifar10; +h for a calibrated bandwidth, +gaussian or +wiener for a tapered "
        "window, els+circular for borders that wrap around, as ls+h or els:9+gaussian. compare and "
        "study also accept NAME:network, whose sizes (composite:network: weights) agree best with "
        "the network.",
    ),
]
ScheduleName = Annotated[
    str,
    typer.Option(
        help="vp, cosine, edm or rectified; edm:8,0.03 is edm from noise level 8 to 0.03."
    ),
]


# earlier names of options, which are still accepted
EARLIER = {
    "--beside": "--reference",
    "--choosing": "--validation",
    "--everywhere": "--max-images-els",
    "--reporting": "--test",
}
GOES_ON = "the same command continues after the finished part"


@contextmanager
def interruptible(sentence: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C, prints a sentence and exits with code 130; appends it to an OSError too.

    Not to a missing file, which is no interruption.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {sentence()}", file=sys.stderr)
        raise SystemExit(130) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"{sentence_of(error)}; {sentence()}") from error


def networks_and_corpus(
    names: Sequence[str], data: str, size: int | None, grayscale: bool, limit: int | None,
    strict: bool, split: str | None = None, array: str | None = None,
) -> tuple[list[Network], Corpus]:  # fmt: skip
    """Networks, if any, and a corpus of pictures of the first one's shape."""
    if not names:
        return [], corpus_of(data, size, grayscale, limit, strict, split, array)
    from scoremachine.lab.networks import Network

    networks = [Network.load(name) for name in names]
    C, H, W = networks[0].shape
    where = size or (H, W), grayscale or C == 1, limit, strict, split, array
    return networks, corpus_of(data, *where)


def sizes_of(text: str | None) -> tuple[int | None, tuple[int, int] | None]:
    """The images' side, and (height, width) of the pictures to generate; None if not given."""
    side, canvas = None, None
    for part in parts_of(text):
        numbers = [number(word, int, 0) for word in part.split("x")]
        if len(numbers) > 2 or min(numbers) < 1 or (side if len(numbers) == 1 else canvas):
            raise ValueError(
                f"size is {text!r}; expected the images' side, as 32, or the size of the pictures "
                "to generate, as 128x256, or both, as 32,128x256"
            )
        if len(numbers) == 1:
            side = numbers[0]
        else:
            canvas = numbers[0], numbers[1]
    return side, canvas


def parts_of(text: str | None) -> list[str]:
    """Splits comma-separated words; an empty list for None or an empty text."""
    return [word.strip() for word in text.split(",")] if text else []


def levels_of(text: str) -> list[float]:
    """Parses comma-separated noise levels."""
    levels = [number(part, float, None) for part in text.split(",")]
    if not levels or any(s is None or not s > 0 for s in levels):
        raise ValueError(f"sigmas are {text!r}; expected noise levels above 0, as 4,1,0.2")
    return levels


def seconds_of(text: str) -> float:
    """Parses a duration such as 90s, 10m or 1h."""
    amount, unit = text[:-1], text[-1:]
    found = number(amount, float, None)
    if unit not in ("s", "m", "h") or found is None or not found > 0:
        raise ValueError(f"budget is {text!r}; expected a number and s, m or h, as 90s, 10m, 1h")
    return found * {"s": 1, "m": 60, "h": 3600}[unit]


def any_value(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), any_number(text))


def corpus_of(
    data: str,
    size: int | tuple[int, int] | None,
    grayscale: bool,
    limit: int | None,
    strict: bool,
    split: str | None = None,
    array: str | None = None,
) -> Corpus:
    from scoremachine.data.corpus import Corpus

    if data.endswith(".safetensors"):
        from scoremachine.sources.mixture import Mixture

        if any(given is not None for given in (size, limit, split, array)) or grayscale:
            raise ValueError(
                f"{data} is a mixture, which is as it was compressed; expected neither size, "
                "grayscale, limit, split nor array"
            )
        return Mixture.load(data)  # type: ignore[return-value]  # machines take either
    return Corpus.open(data, size, grayscale, limit, strict=strict, split=split, array=array)


def resized(
    data: str,
    side: int | None,
    grayscale: bool,
    limit: int | None,
    strict: bool,
    split: str | None = None,
    array: str | None = None,
) -> Corpus:
    """Images with a given side, if any: crops of one or two larger pictures, else resized images.

    Upsampling is noted in the name of the corpus, and reported.
    """
    how = grayscale, limit, strict, split, array
    if side is None:
        return corpus_of(data, None, *how)
    try:
        corpus = corpus_of(data, None, *how)
    except ValueError:  # images of several sizes; the next line raises for other errors
        return corpus_of(data, side, *how)
    H, W = corpus.shape[1:]
    if len(corpus) < 3 and min(H, W) > side:
        return corpus.crops(side)
    found = corpus_of(data, side, *how)
    if min(H, W) < side:
        found.name += f", upsampled from {H} x {W}"
        say(f"{found.name} to {side} x {side}: more pixels, and no more detail")
    return found


def machine_of(name: str, corpus: Corpus, schedule: str, settings: dict[str, Any]) -> Any:
    from scoremachine.machines import build
    from scoremachine.sampling.schedules import schedule_of

    return build(name, corpus, schedule=schedule_of(schedule), **settings)


def names_of(machines: str | None) -> list[str]:
    from scoremachine.machines import MACHINES, kind_of

    if machines is None:
        return list(MACHINES)
    return [kind_of(name.strip()).name for name in machines.split(",")]


def settings_of(
    patch_size: str | None,
    bandwidth: str | None,
    boundary: str | None,
    window: str | None,
    augment: str | None,
    others: list[str] | None,
    kernel: str,
) -> dict[str, Any]:
    """The given settings of a machine, by the names of its arguments."""
    given = {"boundary": boundary, "window": window, "augment": augment}
    if patch_size is not None:
        given["patch_size"] = any_number(patch_size)
    if bandwidth is not None:
        given["bandwidth"] = number(bandwidth, float, bandwidth)
    for name, value in pairs(others):
        if name in (*given, "patch_size", "bandwidth", "kernel", "schedule"):
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{name} has an option of its own, {option}: use that instead of --set"
            )
        given[name] = any_number(value)
    return {"kernel": kernel} | {name: value for name, value in given.items() if value is not None}


def pairs(texts: list[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} names no value; expected NAME=VALUE")
        pairs.append((name.strip(), value.strip()))
    return pairs
