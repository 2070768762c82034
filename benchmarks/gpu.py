"""Measures els on a GPU: every patch of every image, exactly, against plain PyTorch.

    python benchmarks/gpu.py [--data ZIP] [--launches]

See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import setting
from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest
from scoremachine.core.windows import Box
from scoremachine.engines import pytorch as plain
from scoremachine.engines import triton as fused
from scoremachine.engines.triton import Launch

STEPS = [(3, 0.05), (7, 0.2), (11, 0.4), (15, 0.7), (23, 1.5)]
HELD_OUT = 64  # images that are denoised and are no source
TOGETHER = 8  # pictures in the second column
FEW = 1_000  # images that plain PyTorch is timed on
LAUNCHES = [
    Launch(64, 64, 32, 4), Launch(64, 64, 64, 4), Launch(64, 64, 128, 4, 2), Launch(64, 32, 64, 4),
    Launch(64, 64, 64, 8), Launch(64, 128, 64, 8), Launch(128, 64, 64, 8), Launch(128, 128, 64, 8),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=setting.CIFAR10)
    parser.add_argument("--launches", action="store_true", help="also how to fill the GPU")
    options = parser.parse_args()
    if not fused.available():
        sys.exit("there is no GPU with Triton here; this measures nothing else")
    images = np.load(setting.corpus_file(options.data))
    table = Table("P, sigma", "one", f"of {TOGETHER}", "4 leaders", "plain PyTorch", "ratio",
                  "int8 Top/s", "differs", title=torch.cuda.get_device_name())  # fmt: skip
    for P, sigma in STEPS:
        one = asked(images, P, sigma)
        seconds = timed(lambda one=one: folded(one))
        many = timed(lambda P=P, s=sigma: folded(asked(images, P, s, TOGETHER))) / TOGETHER
        leading = timed(lambda one=one: folded(one, leaders=4))
        few = asked(images, P, sigma, N=FEW)
        slow, answer = timed(lambda few=few: everywhere(few)), everywhere(few)
        scaled = slow * len(one.index) / FEW
        differs = float((folded(few).mean - answer.mean).abs().max())
        table.add_row(
            f"{P}, {sigma:g}", f"{seconds:.3f} s", f"{many:.3f} s", f"{leading:.3f} s",
            f"{scaled:.0f} s ({FEW:,})", f"{scaled / seconds:.0f}",
            f"{operations(one) / seconds / 1e12:.0f}", f"{differs:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)
    if options.launches:
        table = Table("launch", *(f"{P}, {sigma:g}" for P, sigma in STEPS))
        for launch in LAUNCHES:
            row = []
            for P, sigma in STEPS:
                one = asked(images, P, sigma)
                row.append(timed(lambda one=one, launch=launch: folded(one, launch=launch)))
            table.add_row(str(launch), *(f"{s:.3f} s" for s in row))
        Console(width=120).print(table)


def asked(
    images: np.ndarray, P: int, sigma: float, B: int = 1, N: int | None = None
) -> ScanRequest:
    """Held-out images with noise, against all others or N of them."""
    c = Collection(images.shape[2:], Box((P, P)), "pixels", "pixel", "every")
    x = torch.from_numpy(images[-B:] / 127.5 - 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.full((B,), sigma, dtype=torch.float64)
    source = np.arange(len(images) - HELD_OUT)[:N]
    return ScanRequest(images, source, x + sigma * noise, levels, c, torch.full_like(levels, 60.0))


def folded(request: ScanRequest, leaders: int = 0, launch: Launch = fused.LAUNCH) -> Fold:
    """By the GPU's own program."""
    return fused.fold(request, leaders, torch.device("cuda"), launch)


def everywhere(request: ScanRequest) -> Fold:
    """By PyTorch alone: sums over windows for every displacement."""
    pieces = plain._read(request, torch.device("cuda"))
    parts = (plain._summary(request, 0, *piece, 0) for piece in pieces)
    return functools.reduce(Fold.merge, parts).cpu()


def operations(request: ScanRequest) -> float:
    """Products and sums of bytes: three for each number of each pair of patches."""
    c = request.collection
    plan = fused._plan(c, request.y.shape[1], c.frame, fused.LAUNCH.depth, torch.device("cuda"))
    numbers = plan.classes[:, 0].cpu().numpy().astype(float)
    return float((6 * numbers * plan.counts * plan.work).sum() * len(request.index))


def timed(run: Callable[[], object]) -> float:
    """Median seconds of three calls, after one for warming up."""
    run()
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
