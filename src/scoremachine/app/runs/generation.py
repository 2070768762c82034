"""Generation with results on disk: resumable runs, and records to reproduce them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.app import figures as drawing
from scoremachine.data.corpus import Corpus
from scoremachine.data.pixels import to_uint8
from scoremachine.lab.denoising_error import fewer
from scoremachine.machines import IdealScore, Machine, build
from scoremachine.provenance.novelty import explained, left_out, originals_of
from scoremachine.runtime.files import make_folder, read_json, write_text, written
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.records import differing, other_versions, versions
from scoremachine.runtime.validation import check_integer
from scoremachine.sampling.generate import check_process, generate_batches
from scoremachine.sampling.schedules import schedule_of
from scoremachine.sampling.trajectory import Sampling


def plain_label(label: Any) -> Any:
    """A class as a name or a Python integer."""
    return int(label) if isinstance(label, np.integer) else label


@dataclass(frozen=True)
class RunOptions:
    """The settings of a run, apart from the machine.

    Attributes:
        count, steps, seed, sampler, label, start, process: Of `scoremachine.generate`.
        schedule: The name of the machine's schedule.
        batch: Pictures in a batch; does not affect the results.
        trajectory: Whether an animation is written too.
        size: (H, W) of the pictures; None: the images'.
    """

    count: int = 16
    steps: int = 20
    seed: int = 0
    sampler: str = "ddim"
    schedule: str = "vp"
    label: str | int | None = None
    batch: int = 8
    trajectory: bool = False
    start: float = 0.0
    size: tuple[int, int] | None = None
    process: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch"):
            check_integer(name, getattr(self, name))
        object.__setattr__(self, "label", plain_label(self.label))


class Run:
    """Generation into a folder: samples.png, samples.npz, run.json, and optionally an animation.

    Each finished picture is kept in OUT/.unfinished, so that an interrupted run can be resumed; the
    final files appear only when they are complete, run.json last.
    """

    def __init__(self, out: Path, machine: Machine, options: RunOptions) -> None:
        machine.corpus.indices(options.label)
        self.shape = machine.corpus.shape[:1] + (options.size or machine.corpus.shape[1:])
        machine.check_shape(self.shape)
        self.sampling = Sampling(
            options.steps, options.seed, options.sampler, options.label, machine.bandwidth,
            options.batch, self.shape, options.start, options.process,
        )  # fmt: skip
        if options.process is not None:
            check_process(machine, self.sampling)
        self.out, self.machine, self.options = Path(out), machine, options
        self.unfinished = self.out / ".unfinished"
        # before "auto" is resolved
        self.asked = json.loads(json.dumps(self.settings()))

    def settings(self, machine: Machine | None = None) -> dict[str, Any]:
        """All settings that determine the pictures, with those of a machine (None: its own)."""
        o = self.options
        return {
            **(machine or self.machine).settings(),
            "class": o.label,
            "count": o.count,
            "steps": o.steps,
            "seed": o.seed,
            "sampler": o.sampler,
            "schedule": o.schedule,
            "trajectory": o.trajectory,
            "start": o.start,
        } | self._unusual()

    def _unusual(self) -> dict[str, Any]:
        """Settings that are recorded only if they are not the default."""
        size = None if self.shape == self.machine.corpus.shape else list(self.shape[1:])
        unusual = {"size": size, "process": self.options.process}
        return {name: value for name, value in unusual.items() if value is not None}

    def finished(self) -> int:
        """The number of finished pictures."""
        return self.options.count - len(self._missing())

    def go(self, resume: bool) -> float:
        """Generates the missing pictures and writes the files; returns the seconds it took."""
        start = time.perf_counter()
        if self._begin(resume):
            say(f"{self.out} holds this run already, complete")
            return 0.0
        missing = self._missing()
        if len(missing) < self.options.count:
            say(f"continuing after {self.options.count - len(missing)} finished pictures")
        generating = self._generate(missing)
        x, film = self._collect()
        self._write(x, film, time.perf_counter() - start, generating)
        return time.perf_counter() - start

    def _begin(self, resume: bool) -> bool:
        """Prepares the folder; returns True if `resume` finds the run complete."""
        make_folder(self.out)
        record, notes = self.out / "run.json", self.unfinished / "settings.json"
        if resume and notes.exists():
            known = read_json(notes, "expected the settings of an interrupted run")
            self._check_same(known.get("asked", known))
            if others := other_versions(known.get("versions")):
                raise ValueError(
                    f"{self.out} holds a run that was begun with {others}, and pictures of both "
                    "would be mixed: resume with that, or begin again without --resume"
                )
            return False
        if resume and record.exists():
            known = read_json(record, "expected the record of a run")
            self._check_same(known.get("asked", known.get("settings", known)))
            if others := other_versions(known.get("versions")):
                say(f"{self.out} was made with {others}: without --resume it is made again")
            return True
        shutil.rmtree(self.unfinished, ignore_errors=True)
        write_text(notes, json.dumps({"asked": self.asked, "versions": versions()}))
        return False

    def _check_same(self, known: dict[str, Any]) -> None:
        """ValueError unless a record has exactly the same settings."""
        if others := differing(self.asked, known):
            raise ValueError(
                f"{self.out} holds a run with another {', '.join(others)}; resume needs the same "
                "settings: repeat the command that was interrupted, or choose another --out"
            )

    def _kept(self, i: int) -> Path:
        return self.unfinished / f"{i:06d}.npz"

    def _missing(self) -> list[int]:
        return [i for i in range(self.options.count) if not self._kept(i).exists()]

    def _generate(self, missing: list[int]) -> float:
        start = time.perf_counter()
        for first, last in _stretches(missing):
            batches = generate_batches(self.machine, range(first, last), self.sampling)
            for pictures, path in batches:
                for k, i in enumerate(pictures):
                    fields = {"x": path[-1][1][k].numpy()}
                    if self.options.trajectory:
                        fields["film"] = np.stack([self._frame(*m, k) for m in path])
                    with written(self._kept(i)) as temporary:
                        np.savez(temporary, **fields)  # type: ignore[arg-type]
        return time.perf_counter() - start

    def _frame(self, x_t: Tensor, D: Tensor, t: float, k: int) -> np.ndarray:
        """x_t, divided by sqrt(alpha^2 + sigma^2), next to D: uint8 (C, H, 2 W)."""
        alpha, sigma = self.machine.schedule(torch.tensor(t, dtype=torch.float64))
        scaled = x_t[k] / torch.sqrt(alpha**2 + sigma**2)
        return to_uint8(torch.cat([scaled, D[k]], dim=-1).numpy())

    def _collect(self) -> tuple[np.ndarray, np.ndarray | None]:
        fields = ["x", "film"] if self.options.trajectory else ["x"]
        kept: dict[str, list[np.ndarray]] = {name: [] for name in fields}
        for i in range(self.options.count):
            with np.load(self._kept(i), allow_pickle=False) as file:
                for name in fields:
                    kept[name].append(file[name])
        x = np.stack(kept["x"]).astype(np.float32)
        return x, np.stack(kept["film"], axis=1) if self.options.trajectory else None

    def _write(
        self, x: np.ndarray, film: np.ndarray | None, seconds: float, generating: float
    ) -> None:
        images = to_uint8(x)
        with written(self.out / "samples.npz") as temporary:
            np.savez_compressed(temporary, images=images, x=x)
        drawing.save_png(drawing.grid(images), self.out / "samples.png")
        if film is not None:
            drawing.save_film(film, self.out / "trajectory.gif")
        record = {
            "settings": self.settings(self.machine.resolved()),
            "asked": self.asked,
            "images": len(self.machine.corpus),
            "batch": self.options.batch,
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


def zoo(
    corpus: Corpus, out: Path, machines: Sequence[str], options: RunOptions, resume: bool
) -> float:
    """Samples of every machine from the same noise: runs in OUT/NAME, and OUT/zoo.png.

    Returns the seconds it took.
    """
    start = time.perf_counter()
    everything = corpus.indices(options.label)
    builts = []
    for name in machines:
        some = fewer(name, everything)
        part = corpus.subset(some) if len(some) < len(everything) else corpus
        builts.append(build(name, part, schedule=schedule_of(options.schedule)))
    ideal = build("ideal", corpus)
    assert isinstance(ideal, IdealScore)
    rows, sets = [], []
    with bar("Generating with every machine", total=len(builts)) as progress:
        for name, machine in zip(machines, builts, strict=True):
            folder = Path(out) / name
            Run(folder, machine, options).go(resume)
            with np.load(folder / "samples.npz", allow_pickle=False) as file:
                x, images = torch.from_numpy(file["x"]), file["images"]
            places, distances = ideal.nearest(x, options.label)
            nearest = np.asarray(corpus.images[places.numpy()])
            fewest = (
                f"\n{len(machine.corpus):,} images" if len(machine.corpus) < len(corpus) else ""
            )
            rows.append((f"{name}{fewest}\nto nearest {distances.mean():.2f}", images, nearest))
            sets.append((images, None))
            progress.advance()
    own = corpus.subset(everything) if len(everything) < len(corpus) else corpus  # of the label
    real = left_out(own, options.count)
    originals = originals_of([*sets, real], own)
    if beside := originals[-1]:
        far = np.mean([each.distance for each in beside])
        nearest = np.asarray(own.images[[each.nearest for each in beside]])
        rows.append((f"held-out images\nto nearest {far:.2f}", real[0], nearest))
        rows = [
            (f"{label}\none explains {explained(found).mean():.0%}", images, nearest)
            for (label, images, nearest), found in zip(rows, originals, strict=True)
        ]
    drawing.save_zoo(rows, Path(out) / "zoo.png")
    return time.perf_counter() - start
