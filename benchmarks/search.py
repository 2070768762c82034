"""Measures the search of els against its own exact scan, what was asked of it, and growth with N.

    python benchmarks/search.py [--quick] [--data ZIP] [--only indexes,steps,growth,level]

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
from scoremachine.progress import quiet
from scoremachine.sample import EDMSchedule, walk
from scoremachine.search.bounded import Bounded

HELD_OUT = 100  # images that are denoised and are no source
STEPS = [(3, 0.05), (3, 0.1), (7, 0.2), (11, 0.4), (15, 0.7), (23, 1.5)]
GROWTH = [(3, 0.05), (7, 0.2), (11, 0.4), (15, 0.7)]
ASKED = 2.0  # seconds of a step
PICTURES = 5  # noised pictures that a step is timed on


class Bench:
    """The images, and machines that search a part of them."""

    def __init__(self, archive: Path, quick: bool) -> None:
        self.corpus = sm.Corpus.open(setting.corpus_file(archive))
        self.largest = 3_000 if quick else len(self.corpus) - HELD_OUT
        self.quick = quick
        self.held_out = torch.from_numpy(self.corpus.images[-HELD_OUT:] / 127.5 - 1)

    def machine(self, P: int, N: int, **settings: object) -> sm.EquivariantLocalScore:
        return sm.EquivariantLocalScore(self.source(N), patch_size=P, **settings)

    def source(self, N: int) -> sm.Corpus:
        return self.corpus.subset(np.arange(N))

    def noised(self, sigma: float, count: int, first: int = 0) -> Tensor:
        noise = torch.Generator().manual_seed(first)
        x = self.held_out[first : first + count]
        return x + sigma * torch.randn(x.shape, generator=noise, dtype=x.dtype)

    def on_the_way(self, P: int, sigma: float) -> Tensor:
        """A picture on the reverse trajectory of ls, at the noise level sigma."""
        machine = sm.LocalScore(
            self.source(self.largest), patch_size=P, schedule=EDMSchedule(sigma_min=sigma)
        )
        *_, (x, _, _) = walk(machine, range(1), self.corpus.shape, 12, 0, "ddim", None)
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
    """A row for every patch size: asked are 3 GB, 180 s and 6 GB of memory."""
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


def steps(bench: Bench) -> Iterator[list[str]]:
    """Rows of a step: on noised pictures that are no source, and on a reverse trajectory."""
    for P, sigma in STEPS:
        machine = bench.machine(P, bench.largest, search="bounded")
        exact = machine.remade(machine.corpus, search="exact")
        machine.denoise(bench.noised(sigma, 1, HELD_OUT - 1), sigma)  # opens the indexes
        pictures = [bench.noised(sigma, 1, k) for k in range(PICTURES)]
        for where, some in (("noised", pictures), ("on the way", [bench.on_the_way(P, sigma)])):
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
                "yes" if statistics.median(seconds) <= ASKED else "NO",
                f"{whole:.1f}", f"{whole / seconds[0]:.0f}",
                f"{off.max():.1e}", f"{off.square().mean().sqrt():.1e}",
                f"{answer.error.max():.1e}", answer.kind,
                f"{int((off > answer.error + 1e-9).sum())} of {off.numel()}",
            ]  # fmt: skip


def growth(bench: Bench, archive: Path) -> Iterator[list[str]]:
    """Seconds of a step against N, and the exponent of the growth between first and last."""
    sizes = [N for N in (1_000, 3_000, 10_000, 25_000) if bench.largest > N] + [bench.largest]
    for P, sigma in GROWTH:
        seconds = []
        for N in sizes:
            built(archive, P, N)
            machine = bench.machine(P, N, search="bounded")
            machine.__dict__["_bounded"] = Bounded(machine.corpus, machine.kernel, patience=100)
            machine.denoise(bench.noised(sigma, 1, HELD_OUT - 1), sigma)
            some = [timed(machine, bench.noised(sigma, 1, k), sigma)[0] for k in range(PICTURES)]
            seconds.append(statistics.median(some))
        slope = np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0]
        yield [f"{P}", f"{sigma:g}", *(f"{s:.2f}" for s in seconds), f"{slope:.2f}"]


def level(bench: Bench) -> Iterator[list[str]]:
    """How often an error is larger than the bound: over many pixels, with few images."""
    N, count = (300, 4) if bench.quick else (1_000, HELD_OUT)
    for P, sigma in STEPS:
        for bound in ("deterministic", "statistical"):
            if bound == "deterministic" and P > 7:
                continue
            machine = bench.machine(P, N, search="bounded", bound=bound)
            machine.__dict__["_bounded"] = Bounded(
                machine.corpus, machine.kernel, bound=bound, patience=100
            )
            y = bench.noised(sigma, count)
            answer = machine.denoise_bounded(y, sigma)
            off = (
                answer.D - machine.remade(machine.corpus, search="exact").denoise(y, sigma)
            ).abs()
            off = off.amax(1)
            above = int((off > answer.error + 1e-9).sum())
            yield [
                f"{P}", f"{sigma:g}", bound, f"{off.numel():,}", f"{above}",
                f"{above / off.numel():.2%}", f"{off.max():.1e}",
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
    parser.add_argument("--only", default="indexes,steps,growth,level")
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
                "P | GB | seconds | peak GB | as asked",
                indexes(bench, given.data),
            )
        if "steps" in parts:
            show(
                f"One picture, one step, {bench.largest:,} images",
                "P | sigma | picture | seconds | most | as asked | exact | ratio | largest error"
                " | RMS | largest bound | kind | above it",
                steps(bench),
            )
        if "growth" in parts:
            sizes = [N for N in (1_000, 3_000, 10_000, 25_000) if bench.largest > N]
            names = " | ".join(f"{N:,}" for N in [*sizes, bench.largest])
            show(
                "Seconds of a step against the number of images",
                f"P | sigma | {names} | exponent",
                growth(bench, given.data),
            )
        if "level" in parts:
            show(
                "How often a pixel's error is above its bound",
                "P | sigma | bound | pixels | above | share | largest error | RMS",
                level(bench),
            )


if __name__ == "__main__":
    main()
