"""Ablation of patch size and composition, by resolution and kind of picture.

A box contributes to its middle pixel only (`ls`), or to all of its pixels, with overlapping boxes
averaged (`pspc`); its weights are constant or tapered (`+gaussian`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scoremachine.calibration.heldout import (
    held_out_pictures,
    kept_by_level,
    split,
    spread_candidates,
)
from scoremachine.data.corpus import Corpus
from scoremachine.machines import BoxMachine, build, kind_of, spelled
from scoremachine.machines.machine import Batch
from scoremachine.runtime.progress import Bar, bar
from scoremachine.runtime.validation import check_integer

LAYOUT = 2  # version of the cached files
VARIANTS = ("ls", "ls+gaussian", "pspc", "pspc+gaussian")
LEVELS = (5.0, 2.0, 1.0, 0.5, 0.2)


@dataclass
class Trial:
    """The result of one machine with one patch size at one noise level.

    Attributes:
        corpus, shape: The images' name, and (C, H, W).
        images: The number of images in the source.
        machine: As it was specified: "pspc+gaussian".
        patch_size, sigma: P, and the noise level.
        errors: Mean squared errors on R held-out images, (R,).
        effective: Effective number of sources, the median over sites and pictures.
    """

    corpus: str
    shape: tuple[int, int, int]
    images: int
    machine: str
    patch_size: int
    sigma: float
    errors: np.ndarray
    effective: float

    @property
    def error(self) -> float:
        """The mean error."""
        return float(self.errors.mean())


def ablation(
    corpora: Sequence[Corpus],
    machines: Sequence[str] = VARIANTS,
    patch_sizes: Sequence[int] | None = None,
    sigmas: Sequence[float] = LEVELS,
    held_out: int = 16,
    seed: int = 0,
) -> list[Trial]:
    """Measures box-window machines at every patch size, on several sets of images.

    Finished measurements are kept in the cache.

    Arguments:
        corpora: The sets.
        machines: Names of box-window machines, in the syntax of `machines.spelled`.
        patch_sizes: P; None: from 3 to the side, ever further apart. Sizes that do not fit a set
            are left out for it.
        sigmas: Noise levels.
        held_out: The number of test images of each set; the others are the source.
        seed: Of the choice of images and of their noise.

    Raises:
        ValueError: For a machine without boxes, or a set of fewer than 3 images.
    """
    check_integer("held_out", held_out)
    specs = [(text, *spelled(text)) for text in machines]
    for text, name, _ in specs:
        if not issubclass(kind_of(name), BoxMachine):
            raise ValueError(f"{text} has no boxes to change the size of; use ls, els or pspc")
    trials = []
    with bar("Ablating", total=len(corpora) * len(machines) * len(sigmas)) as progress:
        for corpus in corpora:
            for text, name, settings in specs:
                machine = build(name, corpus, **settings)
                assert isinstance(machine, BoxMachine)
                values = [
                    P for P in patch_sizes or spread_candidates(machine) if machine.supports(P)
                ]
                trials += _trials(machine, text, values, sigmas, held_out, seed, progress)
    return trials


def _trials(
    machine: BoxMachine,
    text: str,
    patch_sizes: Sequence[int],
    sigmas: Sequence[float],
    held_out: int,
    seed: int,
    progress: Bar,
) -> list[Trial]:
    """The trials of a machine, at all noise levels and patch sizes."""
    corpus = machine.corpus
    _, index, _, test = split(corpus, 1, seed, test=held_out)
    (x, eps), _ = held_out_pictures((corpus, index, test, test[:0]), seed)

    def measured(sigma: float) -> dict[str, Any]:
        levels = torch.full((len(x),), sigma, dtype=torch.float64)
        errors, effective = [], []
        for P in patch_sizes:
            tried = machine.clone_with(corpus, patch_size=P)
            batch = Batch(x + sigma * eps, levels, levels, index)
            found = tried.evidence(batch, tried.windows(sigma, index))
            assert found.fold is not None
            errors.append(((found.mean - x) ** 2).mean((1, 2, 3)).tolist())
            effective.append(float(found.fold.effective_sources.median()))
        return {"errors": errors, "effective": effective}

    what = [LAYOUT, machine.settings(), list(patch_sizes), list(sigmas), held_out, seed]
    record = corpus.record("ablation", what)
    rows = kept_by_level(record, np.asarray(sigmas), measured, "effective", progress, 1)
    return [
        Trial(
            corpus.name,
            corpus.shape,
            len(index),
            text,
            P,
            float(sigma),
            np.array(errors),
            effective,
        )
        for sigma, row in zip(sigmas, rows, strict=True)
        for P, errors, effective in zip(patch_sizes, row["errors"], row["effective"], strict=True)
    ]
