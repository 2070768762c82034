"""Patch size and composition by resolution and kind of picture: error, and how many sources speak.

A box answers for its middle pixel (`ls`) or for all of itself, and then overlapping boxes are
averaged (`pspc`); it ends sharply or fades out (`+gaussian`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scoremachine.calibration import held_out_pictures, split, spread_candidates
from scoremachine.corpus import Corpus
from scoremachine.machines import BoxMachine, build, spelled
from scoremachine.progress import bar
from scoremachine.schedules import check_integer

VARIANTS = ("ls", "ls+gaussian", "pspc", "pspc+gaussian")
LEVELS = (5.0, 2.0, 1.0, 0.5, 0.2)


@dataclass
class Trial:
    """One machine of one patch size at one noise level.

    Attributes:
        corpus, shape: The images' name, and (C, H, W).
        images: How many the machine was made of.
        machine: As it was asked for: "pspc+gaussian".
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
        """The mean."""
        return float(self.errors.mean())


def ablation(
    corpora: Sequence[Corpus],
    machines: Sequence[str] = VARIANTS,
    patch_sizes: Sequence[int] | None = None,
    sigmas: Sequence[float] = LEVELS,
    held_out: int = 16,
    seed: int = 0,
) -> list[Trial]:
    """Measures machines of boxes at every patch size, on several sets of images.

    Arguments:
        corpora: The sets.
        machines: Names, as `machines.spelled` takes them, of machines of boxes.
        patch_sizes: P; None: from 3 to the side, ever further apart. Those that do not fit a set
            are left out of it.
        sigmas: Noise levels.
        held_out: How many images of each set report; the others are the source.
        seed: Of the choice of images and of their noise.

    Raises:
        ValueError: For a machine without boxes, or a set of fewer than 3 images.
    """
    check_integer("held_out", held_out)
    trials = []
    steps = len(corpora) * len(machines) * len(sigmas)
    with bar("Ablating", total=steps) as progress:
        for corpus in corpora:
            _, index, _, reporting = split(corpus, 1, seed, reporting=held_out)
            (x, eps), _ = held_out_pictures((corpus, index, reporting, reporting[:0]), seed)
            for text in machines:
                name, settings = spelled(text)
                machine = build(name, corpus, **settings)
                if not isinstance(machine, BoxMachine):
                    raise ValueError(
                        f"{text} has no boxes to change the size of; use ls, els or pspc"
                    )
                values = patch_sizes or spread_candidates(machine)
                values = [P for P in values if machine.takes(P)]
                for sigma in map(float, sigmas):
                    levels = torch.full((len(x),), sigma, dtype=torch.float64)
                    for P in values:
                        tried = machine.remade(corpus, patch_size=P)
                        assert isinstance(tried, BoxMachine)
                        row = tried.windows(sigma, index)
                        found = tried.evidence(x + sigma * eps, levels, index, row)
                        errors = ((found.mean - x) ** 2).mean((1, 2, 3)).numpy()
                        spoke = float(found.fold.effective_sources.median())
                        trials.append(
                            Trial(
                                corpus.name, corpus.shape, len(index), text, P, sigma, errors, spoke
                            )
                        )
                    progress.advance()
    return trials
