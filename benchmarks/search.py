"""Measures the search of els against its own exact scan, its targets, and growth with N.

    python benchmarks/search.py [--quick] [--data ZIP] [--only indexes,steps,flat,growth,level]

See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import scoremachine as sm
import setting
from scoremachine.runtime.progress import quiet
from scoremachine.sampling.schedules import EDMSchedule
from scoremachine.sampling.trajectory import Sampling, trajectory
from scoremachine.sources.searched import Search

HELD_OUT = 100  # images that are denoised and are no source
STEPS = [(3, 0.05), (3, 0.1), (7, 0.2), (11, 0.4), (15, 0.7), (23, 1.5)]
FLAT = [(3, 0.2), (7, 0.92), (11, 2.35), (15, 4.6), (15, 100.0)]
BETWEEN = [(5, 0.4), (9, 1.3)]  # where samples and searches share the pixels of a picture
ERROR = 0.01  # of both, where posteriors are flat: about the sizes published for CIFAR-10
GROWTH = [(3, 0.05, 1e-3), (7, 0.2, 1e-3), (11, 0.4, 1e-3), (15, 0.7, 1e-3), (7, 0.92, ERROR)]
SIZES = [1_000, 3_000, 10_000, 25_000]  # images; then all, and all with their mirror images
TARGET = 2.0  # seconds of a step
PICTURES = 5  # noised pictures that a step is timed on
LEVEL_PICTURES = 12  # that the level is measured on, for every step


class Bench:
    """The images, and machines that search a part of them."""

    def __init__(self, archive: Path, quick: bool) -> None:
        self.corpus = sm.Corpus.open(setting.corpus_file(archive))
        self.largest = 3_000 if quick else len(self.corpus) - HELD_OUT
        self.quick = quick
        self.sizes = [N for N in SIZES if self.largest > N] + [self.largest, 2 * self.largest]
        self.held_out = torch.from_numpy(self.corpus.images[-HELD_OUT:] / 127.5 - 1)

    def machine(self, P: int, N: int, **settings: object) -> sm.EquivariantLocalScore:
        return sm.EquivariantLocalScore(self.source(N), patch_size=P, **settings)

    def patient(self, P: int, N: int, error: float, bound: str) -> sm.EquivariantLocalScore:
        """One that hardly ever gives a search up."""
        return self.machine(P, N, search=Search("bounded", error, bound, patience=100))

    def source(self, N: int) -> sm.Corpus:
        if self.largest >= N:
            return self.corpus.subset(np.arange(N))
        images = self.corpus.images[: self.largest]
        return sm.Corpus(np.concatenate([images, images[..., ::-1]])[:N])

    def noised(self, sigma: float, count: int, first: int = 0) -> Tensor:
        noise = torch.Generator().manual_seed(first)
        x = self.held_out[first : first + count]
        return x + sigma * torch.randn(x.shape, generator=noise, dtype=x.dtype)

    def along_trajectory(self, P: int, sigma: float) -> Tensor:
        """A picture on the reverse trajectory of ls, at the noise level sigma."""
        schedule = EDMSchedule(sigma_min=sigma, sigma_max=max(80.0, 10 * sigma))
        machine = sm.LocalScore(self.source(self.largest), patch_size=P, schedule=schedule)
        *_, (x, _, _) = trajectory(machine, range(1), Sampling(12, shape=self.corpus.shape))
        return x


def timed(machine: sm.EquivariantLocalScore, y: Tensor, sigma: float) -> tuple[float, object]:
    start = time.perf_counter()
    answer = machine.denoise_bounded(y, sigma)
    return time.perf_counter() - start, answer


def built(archive: Path, P: int, N: int) -> tuple[float, float, float]:
    """Seconds, GB and peak GB of building the indexes of a patch size, in a process of its own."""
    command = [sys.executable, __file__, "--build", str(P), str(N), "--data", str(archive)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, size, peak = map(float, out.split())
    return seconds, size, peak


def build(bench: Bench, P: int, N: int) -> None:
    """What the process of `built` does."""
    machine = bench.machine(P, N, search="bounded")
    start = time.perf_counter()
    folders = machine.index(P)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds, size / 1e9, peak / 1e9)


def indexes(bench: Bench, archive: Path) -> Iterator[list[str]]:
    """A row for every patch size: targets are 3 GB, 180 s and 6 GB of memory."""
    for P in dict.fromkeys(P for P, _ in STEPS):
        seconds, size, peak = built(archive, P, bench.largest)
        met = size <= 3 and seconds <= 180 and peak <= 6
        known = " (built before)" if seconds < 1 else ""
        yield [
            f"{P}",
            f"{size:.2f}",
            f"{seconds:.0f}{known}",
            f"{peak:.1f}",
            "yes" if met else "NO",
        ]


def steps(bench: Bench, pairs: list[tuple[int, float]], error: float) -> Iterator[list[str]]:
    """Rows of a step: on noised pictures that are no source, and on a reverse trajectory."""
    for P, sigma in pairs:
        machine = bench.machine(P, bench.largest, search="bounded", error=error)
        exact = machine.clone_with(machine.corpus, search="exact")
        machine.denoise(bench.noised(sigma, 1, HELD_OUT - 1), sigma)  # opens the indexes
        pictures = [bench.noised(sigma, 1, k) for k in range(PICTURES)]
        ours = [bench.along_trajectory(P, sigma)]
        for where, some in (("noised", pictures), ("trajectory", ours)):
            measured = [timed(machine, y, sigma) for y in some]
            seconds = [s for s, _ in measured]
            answer = measured[0][1]
            start = time.perf_counter()
            D = exact.denoise(some[0], sigma)
            whole = time.perf_counter() - start
            off = (answer.D - D).abs().amax(1)
            yield [
                f"{P}", f"{sigma:g}", where,
                f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}",
                "yes" if statistics.median(seconds) <= TARGET else "NO",
                f"{whole:.1f}", f"{whole / seconds[0]:.0f}",
                f"{off.max():.1e}", f"{off.square().mean().sqrt():.1e}",
                f"{answer.error.max():.1e}", answer.kind,
                f"{int((off > answer.error + 1e-9).sum())} of {off.numel()}",
            ]  # fmt: skip


def growth(bench: Bench, archive: Path) -> Iterator[list[str]]:
    """Seconds of a step against N, and the exponent of the growth over the last three sizes."""
    for P, sigma, error in GROWTH:
        seconds = []
        for N in bench.sizes:
            built(archive, P, N)
            machine = bench.patient(P, N, error, "auto")
            machine.denoise(bench.noised(sigma, 1, HELD_OUT - 1), sigma)
            some = [timed(machine, bench.noised(sigma, 1, k), sigma)[0] for k in range(PICTURES)]
            seconds.append(statistics.median(some))
        slope = np.polyfit(np.log(bench.sizes[-3:]), np.log(seconds[-3:]), 1)[0]
        times = (f"{s:.2f}" for s in seconds)
        yield [f"{P}", f"{sigma:g}", f"{error:g}", *times, f"{slope:.2f}"]


def level(bench: Bench) -> Iterator[list[str]]:
    """How often an error is larger than its bound or estimate: many pixels, few images."""
    count = 4 if bench.quick else LEVEL_PICTURES
    few, more = (300, 300) if bench.quick else (1_000, 4_000)
    settings = [(few, 1e-3, P, sigma, "deterministic") for P, sigma in STEPS if P <= 7]
    settings += [(few, 1e-3, P, sigma, "statistical") for P, sigma in STEPS]
    settings += [(more, ERROR, P, sigma, "auto") for P, sigma in FLAT + BETWEEN]
    for N, error, P, sigma, bound in settings:
        machine = bench.patient(P, N, error, bound)
        y = bench.noised(sigma, count)
        answer = machine.denoise_bounded(y, sigma)
        exact = machine.clone_with(machine.corpus, search="exact")
        off = (answer.D - exact.denoise(y, sigma)).abs().amax(1)
        above = int((off > answer.error + 1e-6).sum())
        yield [
            f"{P}", f"{sigma:g}", f"{N:,}", f"{error:g}", answer.kind, f"{off.numel():,}",
            f"{above}", f"{above / off.numel():.2%}", f"{off.max():.1e}",
            f"{off.square().mean().sqrt():.1e}",
        ]  # fmt: skip


def show(title: str, columns: str, rows: Iterator[list[str]]) -> None:
    table = Table(title=title)
    for name in columns.split(" | "):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
        print(" | ".join(row), file=sys.stderr, flush=True)
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images: takes a minute")
    parser.add_argument("--data", type=Path, default=setting.CIFAR10)
    parser.add_argument("--only", default="indexes,steps,flat,growth,level")
    parser.add_argument("--build", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    cache = Path(tempfile.gettempdir()) / "scoremachine-benchmark-cache"
    os.environ.setdefault("SCOREMACHINE_CACHE", str(cache))
    with quiet():
        bench = Bench(given.data, given.quick)
        if given.build:
            build(bench, *given.build)
            return
        parts = given.only.split(",")
        if "indexes" in parts:
            show(
                f"Indexes of {bench.largest:,} images",
                "P | GB | seconds | peak GB | met",
                indexes(bench, given.data),
            )
        for part, pairs, error in (("steps", STEPS, 1e-3), ("flat", FLAT, ERROR)):
            if part in parts:
                show(
                    f"One picture, one step, {bench.largest:,} images, error {error:g}",
                    "P | sigma | picture | seconds | most | met | exact | ratio"
                    " | largest error | RMS | largest bound or estimate | kind | above it",
                    steps(bench, pairs, error),
                )
        if "growth" in parts:
            names = " | ".join(f"{N:,}" for N in bench.sizes)
            show(
                "Seconds of a step against the number of images",
                f"P | sigma | error | {names} | exponent",
                growth(bench, given.data),
            )
        if "level" in parts:
            show(
                "How often a pixel's error is above its bound or estimate",
                "P | sigma | images | error | kind | pixels | above | share | largest error | RMS",
                level(bench),
            )


if __name__ == "__main__":
    main()
