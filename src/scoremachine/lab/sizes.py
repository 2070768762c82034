"""Held-out denoising error of a machine by the size of its compressed source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scoremachine.calibration.heldout import (
    denoising_error,
    held_out_pictures,
    kept_by_level,
    split,
)
from scoremachine.core.schedules import PatchSchedule, edm_sigmas
from scoremachine.data.corpus import Corpus
from scoremachine.lab.denoising_error import fewer
from scoremachine.machines import EquivariantLocalScore, Machine, build, kind_of
from scoremachine.machines.machine import LocalMachine
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.validation import check_integer
from scoremachine.sources.compression import budget_of, compress, least_bytes

LAYOUT = 4  # version of the cached files
SIZES = ("30%", "10%", "3%", "1%", "0.3%", "0.1%", "0.03%", "0.01%")
WITHIN = 1.05  # the largest good error, relative to that of the exact machine


@dataclass
class Sizes:
    """Denoising errors of one machine, made of all images and of ever smaller mixtures.

    Attributes:
        machine: The machine's name.
        sizes: As they were specified, with "exact" first.
        nbytes: Their bytes.
        clusters, ranks: The number of clusters and their rank; for the exact machine, the number of
            images and 0.
        sigmas: The K noise levels, in descending order.
        errors: (S, K, R): mean squared errors on R held-out images.
    """

    machine: str
    sizes: list[str]
    nbytes: list[int]
    clusters: list[int]
    ranks: list[int]
    sigmas: list[float]
    errors: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """(S, K): mean errors divided by that of the exact machine."""
        means = self.errors.mean(2)
        return means / means[0]

    @property
    def good(self) -> np.ndarray:
        """(S, K): whether the mean error is at most 1.05 times that of the exact machine."""
        return self.ratios <= WITHIN

    def smallest(self) -> list[int]:
        """The position of the smallest good size at each noise level, (K,)."""
        order = np.argsort(self.nbytes, kind="stable")
        return [int(order[self.good[order, k].argmax()]) for k in range(len(self.sigmas))]


def sides_of(machine: Machine) -> list[int] | None:
    """The patch sizes for which a mixture needs clusters: those of `els`; None for others."""
    local = machine.local if isinstance(machine, EquivariantLocalScore) else None
    return sorted(map(int, set(local.values))) if isinstance(local, PatchSchedule) else None


def sizes(
    corpus: Corpus,
    machine: str = "ls",
    asked: Sequence[str | int] = SIZES,
    sigmas: Sequence[float] | np.ndarray | None = None,
    held_out: int = 32,
    seed: int = 0,
    **settings: Any,
) -> Sizes:
    """Measures a machine on held-out images, on all other images and on mixtures of them.

    Finished measurements are kept in the cache.

    Arguments:
        corpus: The images.
        machine: "ideal", "ls" or "els"; patch sizes are those calibrated on the images.
        asked: Sizes, as in `compress`.
        sigmas: Noise levels; None: the 18 of EDM.
        held_out: The number of test images.
        seed: Of the choice of images, their noise, and the clusters.
        settings: Of the machine.

    Raises:
        ValueError: For other machines, or invalid sizes.
    """
    check_integer("held_out", held_out)
    kind = kind_of(machine)
    if not kind.accepts_mixtures:
        raise ValueError(f"a mixture is the source of ideal, ls and els, not of {kind.name}")
    levels = np.sort(np.asarray(edm_sigmas() if sigmas is None else sigmas, dtype=float))[::-1]
    _, others, _, test = split(corpus, 1, seed, test=held_out)
    source = corpus.subset(fewer(kind.name, others))
    exact = build(machine, source, **settings)
    exact = exact.prepare()
    local = {exact.locality: exact.local} if isinstance(exact, LocalMachine) else {}
    sides = sides_of(exact)
    least = least_bytes(source, sides)
    small = [s for s in asked if isinstance(s, str) and budget_of(s, source.images.nbytes) < least]
    if small:
        say(f"leaving out {', '.join(map(str, small))}: one cluster takes {least:,} bytes")
    asked = [s for s in asked if s not in small]
    if not asked:
        raise ValueError(f"no size is left to measure: one cluster takes {least:,} bytes")
    pictures, _ = held_out_pictures((corpus, source.indices(), test, test[:0]), seed)
    every = ["exact", *map(str, asked)]

    def measured(at: float) -> dict[str, Any]:
        made: Machine = exact
        nbytes, clusters, rank = source.images.nbytes, len(source), 0
        if at > 0:
            mixture = compress(source, asked[int(at) - 1], sides, seed=seed)
            made = exact.clone_with(mixture, **local)
            nbytes, clusters, rank = mixture.nbytes, len(mixture), mixture.whole.rank
        found = {"nbytes": nbytes, "clusters": clusters, "ranks": rank}
        errors = []
        for sigma in map(float, levels):
            errors.append(denoising_error(made, made.corpus.indices(), pictures, sigma).tolist())
            progress.advance()
        return found | {"errors": errors}

    what = [LAYOUT, exact.settings(), every, levels.tolist(), held_out, seed]
    record = corpus.record("sizes", what)
    with bar("Measuring sizes", total=len(every) * len(levels)) as progress:
        rows = kept_by_level(
            record, np.arange(len(every)), measured, "errors", progress, len(levels)
        )
    return Sizes(
        kind.name,
        every,
        [row["nbytes"] for row in rows],
        [row["clusters"] for row in rows],
        [row["ranks"] for row in rows],
        levels.tolist(),
        np.array([row["errors"] for row in rows]),
    )
