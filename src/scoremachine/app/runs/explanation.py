"""What `explain` does on disk: where the pixels of generated or other pictures come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.app import figures as drawing
from scoremachine.app.explain_page import page
from scoremachine.app.runs.generation import plain_label
from scoremachine.app.runs.machines import read_pictures
from scoremachine.data.corpus import Corpus
from scoremachine.data.pixels import to_uint8
from scoremachine.machines import Machine
from scoremachine.machines.build import recorded
from scoremachine.provenance.explain import Trace, explain
from scoremachine.provenance.pictures import tiled
from scoremachine.runtime.files import check_folder, read_json, write_text
from scoremachine.runtime.progress import say
from scoremachine.sampling.generate import generate_batches, generate_explained
from scoremachine.sampling.schedules import schedule_of
from scoremachine.sampling.trajectory import Sampling

SHEETS = 16  # pictures that have a sheet each
HALF = 0.5  # of what is named in a picture: what its main sources gave


@dataclass(frozen=True)
class ExplainOptions:
    """What is asked of an explanation.

    Attributes:
        k: How many sources to name in each pixel.
        count: How many pictures of a run; None: all.
        without: None, "auto" (the main sources), or positions of training images: also draw the
            pictures as they would have been without them.
    """

    k: int = 8
    count: int | None = None
    without: str | Sequence[int] | None = None


def explain_run(run: Path, corpus: Corpus, out: Path, options: ExplainOptions) -> Trace:
    """Explains the pictures of a folder that `generate` wrote, along their trajectories.

    Raises:
        ValueError: For a folder of no run, or of one from other images.
    """
    check_folder(out)
    record = read_json(run / "run.json", "expected the run.json of a folder that generate wrote")
    settings = record.get("settings", {})
    if "sampler" not in settings:
        raise ValueError(f"{run} holds no run of generate; expected the folder given to its --out")
    if settings.get("corpus_key") != corpus.key:
        raise ValueError(
            f"{run} was generated from {settings.get('corpus')!r}, and --data has other images or "
            "reads them in another way: give the same --data, --size, --limit and --grayscale"
        )
    machine = recorded(settings, corpus, schedule=schedule_of(settings["schedule"]))
    sampling = _sampling(settings, machine)
    count = min(options.count or settings["count"], settings["count"])
    x, trace = generate_explained(machine, range(count), sampling, options.k)
    with np.load(run / "samples.npz", allow_pickle=False) as file:
        apart = float(np.abs(file["x"][:count] - x.numpy()).max())
    if apart > 1e-3:
        say(f"these pictures differ from those in {run} by up to {apart:.2g}: another version?")
    write(trace, out, f"Where the pixels of {run.name} come from")
    if options.without is not None:
        gone = _gone(trace, options.without)
        again = machine.clone_with(corpus.subset(np.setdiff1d(corpus.indices(), gone)))
        batches = generate_batches(again, range(count), sampling)
        other = torch.cat([path[-1][1] for _, path in batches])
        _compare(x, other, gone, out)
    return trace


def explain_pictures(
    pictures: str, machine: Machine, sigma: float, out: Path, options: ExplainOptions, label: Any
) -> Trace:
    """Explains pictures by what a machine would make of them at a small noise level."""
    check_folder(out)
    y = read_pictures(pictures, machine.corpus.shape)[: options.count]
    trace = explain(machine, y, sigma, options.k, plain_label(label))
    write(trace, out, f"Where the pixels of {Path(pictures).name} come from, by {machine.name}")
    if options.without is not None:
        gone = _gone(trace, options.without)
        _compare(trace.D, trace.without(gone), gone, out)
    return trace


def write(trace: Trace, out: Path, title: str) -> None:
    """The files of a trace: trace.npz, explain.html, sheets, mosaics, and a film of steps."""
    trace.save(out / "trace.npz")
    some = range(min(len(trace.y), SHEETS))
    if trace.machine.source.has_images:
        for p in some:
            drawing.save_png(trace.sheet(p), out / f"sheet-{p:03d}.png")
        mosaics = [np.asarray(trace.mosaic(p)) for p in some]
        drawing.save_png(tiled([(m, "") for m in mosaics], 4), out / "mosaic.png")
        if trace.steps:
            films = zip(*(trace.film(p) for p in some), strict=True)
            frames = [tiled([(np.asarray(f), "") for f in frame], 2) for frame in films]
            drawing.save_gif(frames, out / "trajectory-mosaic.gif", 250, 2500)
        write_text(out / "explain.html", page(trace, title))


def _sampling(settings: dict[str, Any], machine: Machine) -> Sampling:
    size = settings.get("size")
    shape = machine.corpus.shape if size is None else (machine.corpus.shape[0], *size)
    return Sampling(
        steps=settings["steps"],
        seed=settings["seed"],
        sampler=settings["sampler"],
        label=settings["class"],
        bandwidth=machine.bandwidth,
        shape=shape,
        start=settings["start"],
        process=settings.get("process"),
    )


def _gone(trace: Trace, without: str | Sequence[int]) -> list[int]:
    """The images that are left out: those asked for, or the main sources of each picture."""
    if not isinstance(without, str):
        return list(without)
    gone: dict[int, None] = {}
    for p in range(len(trace.y)):
        leading = trace.leading_images(p)
        total, named = 0.0, sum(share for _, share in leading)
        for n, share in leading:
            if total >= HALF * named:
                break
            gone[n] = None
            total += share
    return list(gone)


def _compare(x: Tensor, other: Tensor, gone: list[int], out: Path) -> None:
    """Pictures above what they are without some images."""
    rows = torch.stack([x, other.to(x)], 1).flatten(0, 1).clamp(-1, 1)
    some = to_uint8(rows[: 2 * SHEETS].numpy())
    drawing.save_png(drawing.grid(some, columns=8), out / "without.png")
    say(
        f"{out / 'without.png'}: each picture, and beside it what it is without {len(gone)} "
        f"image{'s' * (len(gone) != 1)} ({', '.join(map(str, gone[:8]))}"
        f"{', ...' if len(gone) > 8 else ''})"
    )
