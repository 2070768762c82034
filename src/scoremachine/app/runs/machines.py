"""The work of the commands for machines: they write files, then print results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.app import figures as drawing
from scoremachine.app import tables
from scoremachine.app.runs.generation import plain_label
from scoremachine.calibration import heldout as calibration
from scoremachine.calibration.heldout import Calibration, Exchange, parts_for
from scoremachine.calibration.stacking import Stacking, stack, with_calibrated
from scoremachine.core.noise import PictureNoise, draw
from scoremachine.core.schedules import LOCALITIES, LevelSchedule, edm_sigmas
from scoremachine.data.corpus import Corpus
from scoremachine.data.pixels import to_uint8, with_channels
from scoremachine.lab.ablation import Trial, ablation
from scoremachine.lab.denoising_error import Errors, denoising_errors
from scoremachine.lab.networks import Network
from scoremachine.lab.sizes import Sizes, sides_of, sizes
from scoremachine.machines import Composite, Machine, build
from scoremachine.machines.machine import Label
from scoremachine.runtime.files import check_folder, write_text, written
from scoremachine.runtime.validation import check_integer
from scoremachine.sources.compression import compress


def denoise_file(
    file: str | Path,
    machine: Machine,
    sigma: float,
    out: Path,
    noisy: bool = False,
    seed: int = 0,
    label: Label = None,
) -> Tensor:
    """Denoises a picture: a float .npy as it is, an image with noise added unless `noisy`.

    `file` may be a text that names a built-in picture; a Path is always a path.
    Writes denoised.png (what was denoised next to the result) and denoised.npz (`y`, `D`) to
    `out`; returns D, shape (B, C, H, W).
    """
    check_folder(out)
    if Path(file).suffix == ".npy":
        y = _float_pictures(Path(file))
    else:
        y = read_pictures(file, machine.corpus.shape)
        if not noisy:
            machine.check(y, sigma)
            generators = PictureNoise(seed, range(len(y))).generators()
            y = y + sigma * draw(generators, y.shape[1:], y.dtype)
    D = machine.denoise(y, sigma, plain_label(label))
    strip = np.stack([y.numpy(), D.numpy()], axis=1).reshape(-1, *D.shape[1:])
    out = Path(out)
    with written(out / "denoised.npz") as temporary:
        np.savez_compressed(temporary, y=y.numpy(), D=D.numpy())
    drawing.save_png(drawing.grid(to_uint8(strip), columns=2), out / "denoised.png")
    return D


def read_pictures(file: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """Pictures of a file, folder or built-in name as x in the shape (C, H, W) of some images."""
    C, H, W = shape
    opened = Corpus.open(file, size=(H, W), grayscale=C == 1)
    images = with_channels(np.asarray(opened.images), C)
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1)


def _float_pictures(file: Path) -> Tensor:
    try:
        array = np.load(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"{file} holds no plain array ({error}); save one with numpy.save"
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim not in (3, 4):
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(
            f"{file} holds {kind} of shape {getattr(array, 'shape', '?')}; expected floats in "
            "[-1, 1] of shape (C, H, W) or (B, C, H, W)"
        )
    return torch.from_numpy(array if array.ndim == 4 else array[None]).float()


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of `calibrate_corpus`.

    Attributes:
        held_out: The number of validation images, and of test images.
        steps: The number of EDM noise levels.
        seed: Of the choice of images and of their noise.
        reference: A schedule to show next to the chosen one.
        network: A network whose D is the target, instead of the clean picture.
    """

    held_out: int = 16
    steps: int = 18
    seed: int = 0
    reference: LevelSchedule | None = None
    network: Network | None = None

    def __post_init__(self) -> None:
        check_integer("held_out", self.held_out)
        check_integer("steps", self.steps)

    def sigmas(self) -> np.ndarray:
        """The noise levels, within the range of the network."""
        sigmas = edm_sigmas(self.steps)
        if self.network is None:
            return sigmas
        low, high = self.network.levels()
        known = sigmas[(sigmas >= low) & (sigmas <= high)]
        if len(known) == 0:
            raise ValueError(
                f"none of the {self.steps} noise levels is in the range of {self.network.name}, "
                f"{low:.3g} to {high:.3g}: use more steps"
            )
        return known

    def target(self) -> str:
        """The target of the errors, in words."""
        return tables.TRUTH if self.network is None else f"the network {self.network.name}"


def calibrate_corpus(
    corpus: Corpus,
    machine: str,
    out: Path | None,
    settings: dict[str, Any],
    options: CalibrationOptions,
) -> Calibration | Stacking:
    """Calibrates, writes calibration.png and calibration.json to `out`, and prints the table.

    With a network, its D is the target, and the locality that denoises best on the same images is
    shown too. For a composite, the weights are chosen, after the localities of its machines.
    """
    if out is not None:
        check_folder(out)
    prototype, sigmas = build(machine, corpus, **settings), options.sigmas()
    if isinstance(prototype, Composite):
        return _weigh(prototype, sigmas, out, options)
    network, reference = options.network, options.reference
    held_out, seed = options.held_out, options.seed
    found = calibration.calibrate(prototype, sigmas, held_out, seed=seed, network=network)
    exchange = None
    if network is not None and found.chosen:
        parts = parts_for(prototype, held_out, seed, network)
        truth = calibration.calibrate(prototype, sigmas, held_out, seed=seed, parts=parts)
        exchange = Exchange.of(truth, found)
        if reference is None and truth.setting is not None:
            kind = LOCALITIES[truth.setting]
            reference = kind(truth.sigmas, truth.chosen, name=f"nearest to {tables.TRUTH}")
    if out is not None:
        record = asdict(found) | ({"exchange": asdict(exchange)} if exchange else {})
        write_text(Path(out) / "calibration.json", json.dumps(record, indent=1) + "\n")
        path = Path(out) / "calibration.png"
        drawing.save_calibration(found, path, reference, options.target())
    tables.print_calibration(found, reference, options.target())
    if exchange is not None:
        tables.print_exchange(exchange)
    if out is not None:
        print(f"curves: {Path(out) / 'calibration.png'}")
    return found


def _weigh(
    composite: Composite, sigmas: np.ndarray, out: Path | None, options: CalibrationOptions
) -> Stacking:
    """`calibrate_corpus` for a composite."""
    held_out, seed, network = options.held_out, options.seed, options.network
    parts = parts_for(composite, held_out, seed, network)
    ready = with_calibrated(composite, sigmas, held_out, seed, parts)
    found = stack(ready, sigmas, parts, seed, network)
    if out is not None:
        write_text(Path(out) / "calibration.json", json.dumps(asdict(found), indent=1) + "\n")
        drawing.save_stacking(found, Path(out) / "calibration.png", options.target())
    tables.print_stacking(found, options.target())
    if out is not None:
        print(f"curves: {Path(out) / 'calibration.png'}")
    return found


def ablate(
    corpora: Sequence[Corpus],
    machines: Sequence[str],
    sigmas: Sequence[float],
    held_out: int,
    seed: int,
    out: Path,
) -> list[Trial]:
    """Measures an ablation, and writes ablation.md, ablation.json and ablation.png to `out`."""
    check_folder(out)
    trials = ablation(corpora, machines, None, sigmas, held_out, seed)
    record = [asdict(t) | {"errors": t.errors.tolist()} for t in trials]
    drawing.save_ablation(trials, Path(out) / "ablation.png")
    _report(Path(out), "ablation", tables.ablation_markdown(trials), record)
    return trials


def _report(out: Path, name: str, text: str, record: Any) -> None:
    """Writes NAME.md and NAME.json next to NAME.png, and prints the text."""
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.json", json.dumps(record) + "\n")
    print(text)
    print(f"curves: {out / f'{name}.png'}")


@dataclass(frozen=True)
class CompressionOptions:
    """The options of `compress_corpus`.

    Attributes:
        asked: Sizes to measure, as in `compress`.
        keep: The size of the mixture to write; None: none is written.
        steps: The number of EDM noise levels.
        held_out: The number of test images.
        seed: Of the choice of images, their noise, and the clusters.
    """

    asked: Sequence[str | int]
    keep: str | int | None = None
    steps: int = 18
    held_out: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("held_out", self.held_out)
        check_integer("steps", self.steps)


def compress_corpus(
    corpus: Corpus, out: Path, machine: str, settings: dict[str, Any], options: CompressionOptions
) -> Sizes:
    """Measures sizes, writes sizes.md, sizes.json and sizes.png to `out`, and prints the table.

    With `keep`, also the mixture of all images at that size, as mixture.safetensors.
    """
    check_folder(out)
    if options.keep is not None:
        exact = build(machine, corpus, **settings)
        exact = exact.prepare()
        mixture = compress(corpus, options.keep, sides_of(exact), seed=options.seed)
        mixture.save(Path(out) / "mixture.safetensors")
        print(f"{mixture.nbytes:,} bytes: {Path(out) / 'mixture.safetensors'}")
    sigmas, seed = edm_sigmas(options.steps), options.seed
    found = sizes(corpus, machine, options.asked, sigmas, options.held_out, seed, **settings)
    record = asdict(found) | {"errors": found.errors.tolist()}
    drawing.save_sizes(found, Path(out) / "sizes.png")
    _report(Path(out), "sizes", tables.sizes_markdown(found), record)
    return found


def measure_errors(
    corpus: Corpus, out: Path, machines: Sequence[str], **options: Any
) -> list[Errors]:
    """Measures, writes denoising-error.csv, .md and .png to `out`, and prints the table.

    `options` are those of `denoising_errors`.
    """
    check_folder(out)
    found = denoising_errors(corpus, machines, **options)
    write_text(Path(out) / "denoising-error.csv", tables.errors_csv(found))
    write_text(Path(out) / "denoising-error.md", tables.errors_markdown(found))
    drawing.save_errors(found, Path(out) / "denoising-error.png")
    tables.print_errors(found)
    print(f"curves: {Path(out) / 'denoising-error.png'}")
    return found
