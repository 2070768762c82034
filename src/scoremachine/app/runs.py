"""What the commands do on disk: runs that can be interrupted, records that can be repeated."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine._version import __version__
from scoremachine.app import figures as drawing
from scoremachine.app import report, tables
from scoremachine.calibration import heldout as calibration
from scoremachine.calibration.heldout import Calibration, Exchange, parts_for
from scoremachine.calibration.stacking import Stacking, stack, with_calibrated
from scoremachine.core.noise import PictureNoise, draw
from scoremachine.core.schedules import LOCALITIES, LevelSchedule, edm_sigmas
from scoremachine.data.corpus import Corpus
from scoremachine.lab.ablation import Trial, ablation
from scoremachine.lab.comparison import (
    Bias,
    Comparison,
    Quality,
    Row,
    compare,
    qualities,
    shared_bias,
    study,
)
from scoremachine.lab.comparison.parts import apart, entered
from scoremachine.lab.denoising_error import Errors, denoising_errors, fewer
from scoremachine.lab.networks import Network, Training, train
from scoremachine.lab.networks.architectures import check_settings
from scoremachine.lab.sensitivity import Sensitivity, sensitivity
from scoremachine.lab.sizes import Sizes, sides_of, sizes
from scoremachine.machines import BoxMachine, Composite, IdealScore, Machine, build
from scoremachine.machines.machine import Label
from scoremachine.runtime.files import make_folder, write_text, written
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.validation import check_integer
from scoremachine.sampling.generate import check_process, generate_batches
from scoremachine.sampling.schedules import schedule_of
from scoremachine.sampling.trajectory import Sampling
from scoremachine.sources.compression import compress


def versions() -> dict[str, str]:
    """The versions that decide a result."""
    packages = ("torch", "numpy", "numba", "azula")
    return {"scoremachine": __version__} | {name: version(name) for name in packages}


class Run:
    """Generation into a folder: samples.png, samples.npz, run.json, and a film if asked.

    Each picture is kept in OUT/.unfinished as soon as it is done, so an interrupted run can go on;
    the final files appear whole, run.json last.
    """

    def __init__(
        self,
        out: Path,
        machine: Machine,
        count: int,
        steps: int,
        seed: int,
        sampler: str,
        schedule: str,
        label: str | None,
        batch: int,
        trajectory: bool,
        start: float = 0.0,
        size: tuple[int, int] | None = None,
        process: str | None = None,
    ) -> None:
        check_integer("count", count)
        machine.corpus.indices(label)
        self.start = start
        self.shape = machine.corpus.shape[:1] + (size or machine.corpus.shape[1:])
        machine.check_shape(self.shape)
        self.process = process
        self.sampling = Sampling(
            steps, seed, sampler, label, machine.bandwidth, batch, self.shape, start, process
        )
        if process is not None:
            check_process(machine, self.sampling)
        self.out, self.machine = Path(out), machine
        self.count, self.steps, self.seed, self.batch = count, steps, seed, batch
        self.sampler, self.schedule, self.label = sampler, schedule, label
        self.trajectory = trajectory
        self.unfinished = self.out / ".unfinished"
        # before "auto" is replaced by what it stands for
        self.asked = json.loads(json.dumps(self.settings()))

    def settings(self, machine: Machine | None = None) -> dict[str, Any]:
        """Every setting that decides the pictures."""
        return {
            **(machine or self.machine).settings(),
            "class": self.label,
            "count": self.count,
            "steps": self.steps,
            "seed": self.seed,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "trajectory": self.trajectory,
            "start": self.start,
        } | self._unusual()

    def _unusual(self) -> dict[str, Any]:
        """Settings that most runs do without."""
        size = None if self.shape == self.machine.corpus.shape else list(self.shape[1:])
        said = {"size": size, "process": self.process}
        return {name: value for name, value in said.items() if value is not None}

    def finished(self) -> int:
        """How many pictures are kept."""
        return self.count - len(self._missing())

    def go(self, resume: bool) -> float:
        """Generates what is missing and writes the files; returns the seconds it took."""
        start = time.perf_counter()
        if self._begin(resume):
            say(f"{self.out} holds this run already, complete")
            return 0.0
        missing = self._missing()
        if len(missing) < self.count:
            say(f"going on after {self.count - len(missing)} finished pictures")
        generating = self._generate(missing)
        x, film = self._collect()
        self._write(x, film, time.perf_counter() - start, generating)
        return time.perf_counter() - start

    def _begin(self, resume: bool) -> bool:
        """Makes the folder ready; True if `resume` finds the run complete."""
        make_folder(self.out)
        asked = self.asked
        record = self.out / "run.json"
        notes = self.unfinished / "settings.json"
        if resume:
            for path in (notes, record):
                if not path.exists():
                    continue
                known = json.loads(path.read_text(encoding="utf-8"))
                known = known.get("asked", known.get("settings", known))
                differing = [k for k in asked if asked[k] != known.get(k)]
                if differing:
                    raise ValueError(
                        f"{self.out} holds a run with another "
                        f"{', '.join(differing)}; resume needs the same settings: repeat the "
                        "command that was interrupted, or choose another --out"
                    )
                return path == record
        shutil.rmtree(self.unfinished, ignore_errors=True)
        write_text(notes, json.dumps(asked))
        return False

    def _kept(self, i: int) -> Path:
        return self.unfinished / f"{i:06d}.npz"

    def _missing(self) -> list[int]:
        return [i for i in range(self.count) if not self._kept(i).exists()]

    def _generate(self, missing: list[int]) -> float:
        start = time.perf_counter()
        for first, last in _stretches(missing):
            batches = generate_batches(self.machine, range(first, last), self.sampling)
            for pictures, path in batches:
                for k, i in enumerate(pictures):
                    fields = {"x": path[-1][1][k].numpy()}
                    if self.trajectory:
                        fields["film"] = np.stack([self._frame(*m, k) for m in path])
                    with written(self._kept(i)) as temporary:
                        np.savez(temporary, **fields)  # type: ignore[arg-type]
        return time.perf_counter() - start

    def _frame(self, x_t: Tensor, D: Tensor, t: float, k: int) -> np.ndarray:
        """x_t, scaled to the variance of noise, beside D: uint8 (C, H, 2 W)."""
        alpha, sigma = self.machine.schedule(torch.tensor(t, dtype=torch.float64))
        scaled = x_t[k] / torch.sqrt(alpha**2 + sigma**2)
        return drawing.to_uint8(torch.cat([scaled, D[k]], dim=-1).numpy())

    def _collect(self) -> tuple[np.ndarray, np.ndarray | None]:
        fields = ["x", "film"] if self.trajectory else ["x"]
        kept: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        for i in range(self.count):
            with np.load(self._kept(i), allow_pickle=False) as file:
                for name in fields:
                    kept[name].append(file[name])
        x = np.stack(kept["x"]).astype(np.float32)
        return x, np.stack(kept["film"], axis=1) if self.trajectory else None

    def _write(
        self, x: np.ndarray, film: np.ndarray | None, seconds: float, generating: float
    ) -> None:
        images = drawing.to_uint8(x)
        with written(self.out / "samples.npz") as temporary:
            np.savez_compressed(temporary, images=images, x=x)
        drawing.save_png(drawing.grid(images), self.out / "samples.png")
        if film is not None:
            drawing.save_film(film, self.out / "trajectory.gif")
        record = {
            "settings": self.settings(self.machine.resolved()),
            "asked": self.asked,
            "images": len(self.machine.corpus),
            "batch": self.batch,
            "seconds": round(seconds, 3),
            "seconds_generating": round(generating, 3),
            "versions": versions(),
        }
        write_text(self.out / "run.json", json.dumps(record, indent=2) + "\n")
        shutil.rmtree(self.unfinished, ignore_errors=True)


def _stretches(places: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, last + 1)."""
    found: list[tuple[int, int]] = []
    for i in places:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


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
    Writes denoised.png (what was denoised beside the result) and denoised.npz (`y`, `D`) to
    `out`; returns D, shape (B, C, H, W).
    """
    C, H, W = machine.corpus.shape
    if Path(file).suffix == ".npy":
        y = _float_pictures(Path(file))
    else:
        picture = Corpus.open(file, size=(H, W), grayscale=C == 1)
        images = picture.images
        if images.shape[1] == 1:
            images = np.repeat(images, C, axis=1)
        if images.shape[1] == 3 and C == 4:
            images = np.concatenate([images, np.full_like(images[:, :1], 255)], axis=1)
        y = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)
        if not noisy:
            machine.check(y, sigma)
            y = y + sigma * draw(
                PictureNoise(seed, range(len(y))).generators(), y.shape[1:], y.dtype
            )
    D = machine.denoise(y, sigma, label)
    strip = np.stack([y.numpy(), D.numpy()], axis=1).reshape(-1, *D.shape[1:])
    out = Path(out)
    with written(out / "denoised.npz") as temporary:
        np.savez_compressed(temporary, y=y.numpy(), D=D.numpy())
    drawing.save_png(drawing.grid(drawing.to_uint8(strip), columns=2), out / "denoised.png")
    return D


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


def calibrate_corpus(
    corpus: Corpus,
    machine: str,
    held_out: int,
    steps: int,
    seed: int,
    beside: LevelSchedule | None,
    out: Path | None,
    settings: dict[str, Any],
    network: Network | None = None,
) -> Calibration | Stacking:
    """Calibrates, prints the table, and writes calibration.png and calibration.json to `out`.

    With a network, towards it: and beside that, on the same images, what denoises best. Of a
    composite, the weights are chosen, after the localities of its machines.
    """
    sigmas = edm_sigmas(check_integer("steps", steps))
    prototype = build(machine, corpus, **settings)
    if network is not None:
        sigmas = sigmas[(sigmas >= network.levels()[0]) & (sigmas <= network.levels()[1])]
    if isinstance(prototype, Composite):
        return _weigh(prototype, sigmas, held_out, seed, out, network)
    found = calibration.calibrate(prototype, sigmas, held_out, seed=seed, network=network)
    target, exchange = tables.TRUTH, None
    if network is not None:
        target = f"the network {network.name}"
        if found.chosen:
            parts = parts_for(prototype, held_out, seed, network)
            truth = calibration.calibrate(prototype, sigmas, held_out, seed=seed, parts=parts)
            exchange = Exchange.of(truth, found)
            if beside is None and truth.setting is not None:
                kind = LOCALITIES[truth.setting]
                beside = kind(truth.sigmas, truth.chosen, name=f"nearest to {tables.TRUTH}")
    tables.print_calibration(found, beside, target)
    if exchange is not None:
        tables.print_exchange(exchange)
    if out is not None:
        record = asdict(found) | ({"exchange": asdict(exchange)} if exchange else {})
        write_text(Path(out) / "calibration.json", json.dumps(record, indent=1) + "\n")
        drawing.save_calibration(found, Path(out) / "calibration.png", beside, target)
        print(f"curves: {Path(out) / 'calibration.png'}")
    return found


def _weigh(
    composite: Composite,
    sigmas: np.ndarray,
    held_out: int,
    seed: int,
    out: Path | None,
    network: Network | None,
) -> Stacking:
    """`calibrate_corpus` of a composite."""
    target = tables.TRUTH if network is None else f"the network {network.name}"
    parts = parts_for(composite, check_integer("held_out", held_out), seed, network)
    ready = with_calibrated(composite, sigmas, held_out, seed, parts)
    found = stack(ready, sigmas, parts, seed, network)
    tables.print_stacking(found, target)
    if out is not None:
        write_text(Path(out) / "calibration.json", json.dumps(asdict(found), indent=1) + "\n")
        drawing.save_stacking(found, Path(out) / "calibration.png", target)
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
    trials = ablation(corpora, machines, None, sigmas, held_out, seed)
    record = [asdict(t) | {"errors": t.errors.tolist()} for t in trials]
    drawing.save_ablation(trials, Path(out) / "ablation.png")
    _report(Path(out), "ablation", tables.ablation_markdown(trials), record)
    return trials


def _report(out: Path, name: str, text: str, record: Any) -> None:
    """Writes NAME.md and NAME.json beside NAME.png, and prints the text."""
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.json", json.dumps(record) + "\n")
    print(text)
    print(f"curves: {out / f'{name}.png'}")


def compress_corpus(
    corpus: Corpus,
    out: Path,
    machine: str,
    asked: Sequence[str | int],
    keep: str | int | None,
    steps: int,
    held_out: int,
    seed: int,
    settings: dict[str, Any],
) -> Sizes:
    """Measures sizes, prints the table, writes sizes.md, sizes.json and sizes.png to `out`.

    With `keep`, also the mixture of all images at that size, as mixture.safetensors.
    """
    if keep is not None:
        exact = build(machine, corpus, **settings)
        exact = exact.prepare()
        mixture = compress(corpus, keep, sides_of(exact), seed=seed)
        mixture.save(Path(out) / "mixture.safetensors")
        print(f"{mixture.nbytes:,} bytes: {Path(out) / 'mixture.safetensors'}")
    sigmas = edm_sigmas(check_integer("steps", steps))
    found = sizes(corpus, machine, asked, sigmas, held_out, seed, **settings)
    record = asdict(found) | {"errors": found.errors.tolist()}
    drawing.save_sizes(found, Path(out) / "sizes.png")
    _report(Path(out), "sizes", tables.sizes_markdown(found), record)
    return found


def zoo(
    corpus: Corpus,
    out: Path,
    machines: Sequence[str],
    count: int,
    steps: int,
    seed: int,
    sampler: str,
    schedule: str,
    label: str | None,
    resume: bool,
) -> float:
    """Every machine's samples from the same noise: a run in OUT/NAME each, and OUT/zoo.png.

    Returns the seconds it took.
    """
    start = time.perf_counter()
    everything = corpus.indices(label)
    builts = []
    for name in machines:
        some = fewer(name, everything)
        part = corpus.subset(some) if len(some) < len(everything) else corpus
        builts.append(build(name, part, schedule=schedule_of(schedule)))
    ideal = build("ideal", corpus)
    assert isinstance(ideal, IdealScore)
    rows = []
    with bar("Generating with every machine", total=len(builts)) as progress:
        for name, machine in zip(machines, builts, strict=True):
            folder = Path(out) / name
            settings = machine, count, steps, seed, sampler, schedule, label
            Run(folder, *settings, batch=8, trajectory=False).go(resume)
            with np.load(folder / "samples.npz", allow_pickle=False) as file:
                x, images = torch.from_numpy(file["x"]), file["images"]
            places, distances = ideal.nearest(x, label)
            nearest = np.asarray(corpus.images[places.numpy()])
            fewest = (
                f"\n{len(machine.corpus):,} images" if len(machine.corpus) < len(corpus) else ""
            )
            rows.append((f"{name}{fewest}\nto nearest {distances.mean():.2f}", images, nearest))
            progress.advance()
    drawing.save_zoo(rows, Path(out) / "zoo.png")
    return time.perf_counter() - start


def train_network(
    corpus: Corpus,
    architecture: str,
    out: Path,
    how: Training,
    resume: bool,
    settings: dict[str, Any],
) -> Network:
    """Trains a network into `out`, and says for how long."""
    check_settings(architecture, settings)
    network = train(corpus, architecture, out, how, resume, **settings)
    trained = network.card["training"]
    print(
        f"{trained['steps']:,} steps of {how.batch} pictures in {trained['seconds']:.0f} s, "
        f"{network.parameters_count:,} parameters: {out}"
    )
    return network


def compare_network(
    network: Network,
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    page: bool,
    **settings: Any,
) -> Comparison:
    """Compares, prints the tables, and writes what `comparison.report.write` says to `out`.

    What is finished is kept in OUT/.unfinished, so that the same command goes on after Ctrl-C.
    """
    kept = Path(out) / ".unfinished"
    found = compare(network, machines, corpus, kept=kept, **settings)
    files = report.write(found, Path(out), page)
    shutil.rmtree(kept, ignore_errors=True)
    report.print_tables(found)
    print(f"{files[-1]}")
    return found


def study_networks(
    corpus: Corpus, out: Path, machines: Sequence[str], **settings: Any
) -> list[Row]:
    """Trains the study's networks, and writes what `report.write_study` says to `out`."""
    rows = study(corpus, Path(out), machines, **settings)
    files = report.write_study(rows, Path(out))
    print(files[0].read_text(encoding="utf-8"))
    print(f"{files[-1]}")
    return rows


def judge_samples(
    networks: Sequence[Network], machines: Sequence[str], corpus: Corpus, out: Path, **settings: Any
) -> list[Quality]:
    """Draws and judges pictures, and writes what `report.write_quality` says to `out`."""
    found = qualities(networks, machines, corpus, **settings)
    files = report.write_quality(found, Path(out))
    print(files[0].read_text(encoding="utf-8"))
    print(f"{files[-1]}")
    return found


def measure_bias(
    networks: Sequence[Network],
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    sigmas: Sequence[float],
    pictures: int,
    seed: int,
    everywhere: int,
) -> Bias:
    """Measures the shared bias, prints it, and writes what `report.write_bias` says to `out`."""
    kept = Path(out) / ".unfinished"
    found = shared_bias(networks, machines, corpus, sigmas, pictures, seed, everywhere, kept)
    files = report.write_bias(found, Path(out))
    shutil.rmtree(kept, ignore_errors=True)
    report.print_bias(found)
    print(f"{files[0]}")
    return found


def measure_sensitivity(
    networks: Sequence[Network],
    machines: Sequence[str],
    corpus: Corpus,
    out: Path,
    sigmas: Sequence[float],
    count: int,
    pixels: int,
    seed: int,
    everywhere: int,
) -> list[Sensitivity]:
    """Measures what denoisers look at, prints widths, writes sensitivity.csv, .npz and .png."""
    for network in networks:
        network.check_corpus(corpus)
    held, source = apart(networks, corpus, check_integer("count", count), seed)
    denoisers: dict[str, Network | Machine] = {network.name: network for network in networks}
    denoisers |= entered(machines, source, everywhere)
    if not denoisers:
        raise ValueError("there is neither a network nor a machine to look at; give one")
    found, sizes, unseen = [], {}, corpus.subset(held)
    with bar("Differentiating", total=len(denoisers)) as progress:
        for label, denoiser in denoisers.items():
            found.append(sensitivity(denoiser, unseen, sigmas, label, count, pixels, seed))
            if isinstance(denoiser, BoxMachine):
                sizes[label] = [denoiser.local_at(sigma) for sigma in sigmas]
            progress.advance()
    write_text(Path(out) / "sensitivity.csv", tables.sensitivities_csv(found, sizes))
    with written(Path(out) / "sensitivity.npz") as temporary, temporary.open("wb") as file:
        maps: dict[str, Any] = {s.label: s.maps for s in found}
        np.savez_compressed(file, sigmas=np.asarray(sigmas), **maps)
    drawing.save_sensitivities(found, Path(out) / "sensitivity.png")
    tables.print_sensitivities(found, sizes)
    print(f"maps: {Path(out) / 'sensitivity.png'}")
    return found


def measure_errors(
    corpus: Corpus,
    out: Path,
    machines: Sequence[str],
    steps: int,
    choosing: int,
    reporting: int,
    seed: int,
    published: Sequence[tuple[str, str]],
) -> list[Errors]:
    """Measures, prints the table, and writes denoising-error.csv, .md and .png to `out`."""
    sigmas = edm_sigmas(check_integer("steps", steps))
    found = denoising_errors(corpus, machines, sigmas, choosing, reporting, seed, published)
    write_text(Path(out) / "denoising-error.csv", tables.errors_csv(found))
    write_text(Path(out) / "denoising-error.md", tables.errors_markdown(found))
    drawing.save_errors(found, Path(out) / "denoising-error.png")
    tables.print_errors(found)
    print(f"curves: {Path(out) / 'denoising-error.png'}")
    return found
