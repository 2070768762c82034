"""Judges attribution by the linear datamodeling score (Park et al. 2303.14186), of machines.

    python benchmarks/attribution.py [--data ZIP] [--images 2000] [--subsets 64] [--pictures 16]

The model of a subset of the images is the machine with that subset as its source. What it says of a
picture x is how well it denoises it, f_S(x) = -mean |D_S(x + sigma eps) - x|^2 over a few eps. An
attribution predicts it by the sum of its scores over the subset; its score is the rank correlation
of the two over random halves of the images, averaged over pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import scoremachine as sm
import setting
from scoremachine.runtime.progress import bar

MODELS = {"ls:7": 0.5, "pspc:7": 0.5, "els:5": 0.3}
NOISES = 4  # eps of each picture
RESAMPLES = 1000  # of pictures, for an interval


def outputs(machine: sm.Machine, x: torch.Tensor, sigma: float, halves: np.ndarray) -> np.ndarray:
    """f_S of every picture and subset, float64 (pictures, subsets)."""
    eps = torch.randn(NOISES, *x.shape, generator=torch.Generator().manual_seed(0)).double()
    y = (x + sigma * eps).flatten(0, 1)
    levels = torch.full((len(y),), sigma, dtype=torch.float64)
    found = np.empty((len(x), len(halves)))
    with bar(f"Subsets of {machine.name}", total=len(halves)) as progress:
        for k, index in enumerate(halves):
            D = machine.denoise_from(y, levels, np.sort(index))
            error = ((D.unflatten(0, (NOISES, -1)) - x) ** 2).mean((0, 2, 3, 4))
            found[:, k] = -error.numpy()
            progress.advance()
    return found


def lds(scores: np.ndarray, said: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """The score of every picture: scores (pictures, N), said (pictures, subsets)."""
    predicted = np.stack([scores[:, index].sum(1) for index in halves], 1)
    return np.array([spearmanr(a, b).statistic for a, b in zip(predicted, said, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=setting.CIFAR10)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=16)
    given = parser.parse_args()
    everything = sm.Corpus.open(setting.corpus_file(given.data))
    order = np.random.default_rng(0).permutation(len(everything))
    corpus = everything.subset(np.sort(order[: given.images]))
    held = everything.images[np.sort(order[given.images : given.images + given.pictures])]
    x = torch.from_numpy(np.array(held)).double() / 127.5 - 1
    rng = np.random.default_rng(1)
    halves = np.stack([
        rng.permutation(given.images)[: given.images // 2] for _ in range(given.subsets)
    ])  # fmt: skip
    flat = torch.from_numpy(np.array(corpus.images)).double().flatten(1) / 127.5 - 1
    distance = torch.cdist(x.flatten(1), flat).numpy()
    scores = {"nearest images (- distance)": -distance}
    for name, sigma in MODELS.items():
        levels = (sigma, sigma / 2)
        found = sm.attribute(held, corpus, name, levels, k=64)
        scores[f"shares of {name}"] = found.shares.toarray()
    both = sm.attribute(held, corpus, ["ls:7", "ls:11"], (0.5, 0.25), (1, 2), k=64)
    scores["shares of ls:7 and ls:11, both scales"] = both.shares.toarray()
    table = Table(
        title=f"Linear datamodeling score, {given.subsets} halves of {given.images:,} images"
    )
    for head in ("attribution", *MODELS):
        table.add_column(head)
    said = {
        name: outputs(
            sm.build(name.split(":")[0], corpus, patch_size=int(name.split(":")[1])),
            x,
            sigma,
            halves,
        )
        for name, sigma in MODELS.items()
    }
    resample = np.random.default_rng(2).integers(0, len(x), (RESAMPLES, len(x)))
    for how, values in scores.items():
        row = [how]
        for name in MODELS:
            each = lds(values, said[name], halves)
            low, high = np.quantile(np.nanmean(each[resample], 1), [0.025, 0.975])
            row.append(f"{np.nanmean(each):.2f} ({low:.2f} to {high:.2f})")
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
