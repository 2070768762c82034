"""Held-out calibration: the size and the bandwidth that denoise unseen images best.

A network generalizes because it was trained to denoise; the locality it ends up with is the one
that denoises best. So no network is needed to find it: leave images out of the source, add noise,
and take at each noise level the patch size whose D is nearest to the clean image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from scoremachine.corpus import Corpus
from scoremachine.files import written
from scoremachine.progress import bar, say
from scoremachine.windows import BandwidthSchedule, PatchSchedule, check_integer, edm_sigmas

BANDWIDTHS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2)
AUTO_SIGMAS = tuple(float(s) for s in np.geomspace(0.02, 20.0, 10))
BUDGET = 1e10  # logits of an automatic calibration: half a minute; a quarter as dear each in ELS
CROPS = 96  # at most, of one picture
LAYOUT = 1  # of the files beside the corpus


@dataclass
class Calibration:
    """What was found, per noise level. Errors are mean squared, in units of x in [-1, 1].

    Attributes:
        machine: The machine's name.
        sigmas: The K noise levels, falling.
        sizes: The S patch sizes tried; empty for a machine without patches.
        bandwidths: The M bandwidths tried.
        size_errors: (K, S): error of each size with h = 0, on the images for choosing.
        bandwidth_errors: (K, M): error of each bandwidth at the chosen size, on the same images.
        chosen_sizes: (K,): the best size at each level.
        chosen_bandwidths: (K,): the best bandwidth at that size.
        errors: (K, R): error with chosen size and bandwidth on R other images, one by one.
        plain_errors: (K, R): the same with h = 0.
        source: How many images the machine was made of.
        held_out: How many images chose.
    """

    machine: str
    sigmas: list[float]
    sizes: list[int]
    bandwidths: list[float]
    size_errors: list[list[float]]
    bandwidth_errors: list[list[float]]
    chosen_sizes: list[int]
    chosen_bandwidths: list[float]
    errors: list[list[float]]
    plain_errors: list[list[float]]
    source: int
    held_out: int

    @property
    def patch_size(self) -> PatchSchedule:
        """The chosen sizes as a schedule."""
        if not self.chosen_sizes:
            raise ValueError(f"machine {self.machine!r} has no patches to choose a size for")
        return PatchSchedule(self.sigmas, self.chosen_sizes, name="held-out")

    @property
    def bandwidth(self) -> BandwidthSchedule:
        """The chosen bandwidths as a schedule."""
        return BandwidthSchedule(self.sigmas, self.chosen_bandwidths)


class Calibrated(Protocol):
    """What calibration asks of a machine."""

    name: str
    equivariant: bool  # whether its source is every position, so that crops make a corpus
    corpus: Corpus

    def remade(self, corpus: Corpus, **changes: Any) -> Calibrated:
        """The same kind of machine with other images, patch size or bandwidth."""

    def denoise_from(self, y: torch.Tensor, sigma: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        """D of float64 pictures, the images at `index` being the source."""

    def takes_size(self, size: int) -> bool:
        """Whether there is such a machine with boxes of this size."""

    def settings(self) -> dict[str, object]:
        """What distinguishes the machine, as JSON can hold it."""


def calibrate(
    machine: Calibrated,
    sigmas: Sequence[float] | np.ndarray | None = None,
    held_out: int = 16,
    sizes: Sequence[int] | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
) -> Calibration:
    """Chooses patch size (or not, if `sizes` is empty) and bandwidth per noise level.

    `scoremachine.calibrate` is this by a machine's name, and says what the arguments are.
    """
    check_integer("held_out", held_out)
    levels = np.sort(np.asarray(edm_sigmas() if sigmas is None else sigmas, dtype=float))[::-1]
    if levels.size == 0 or not (np.isfinite(levels).all() and (levels > 0).all()):
        raise ValueError(f"noise levels are {levels.tolist()}; expected positive numbers")
    hs = sorted({0.0, *map(float, bandwidths)})
    candidates = None if sizes is None else sorted({check_integer("a size", P) for P in sizes})
    asked = [LAYOUT, machine.settings(), levels.tolist(), held_out, candidates, hs, seed]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path = machine.corpus.cache_path / f"calibration-{machine.name}-{digest}.json"
    if path.exists():
        try:
            return Calibration(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            path.unlink()
    found = _measure(machine, levels, held_out, candidates, hs, seed)
    with written(path) as temporary:
        temporary.write_text(json.dumps(asdict(found)))
    return found


def _measure(
    machine: Calibrated,
    sigmas: np.ndarray,
    held_out: int,
    sizes: list[int] | None,
    bandwidths: list[float],
    seed: int,
) -> Calibration:
    corpus, source, choosing, reporting = split(machine.corpus, held_out, seed, machine.equivariant)
    machine = machine.remade(corpus)
    if sizes is None:
        sides = range(3, max(corpus.shape[1:]) + 1, 2)
        sizes = [P for P in sides if machine.takes_size(P)]
        sizes = sizes or [P for P in (1,) if machine.takes_size(P)]
    generator = torch.Generator().manual_seed(seed)

    def pictures(index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(np.array(corpus.images[index])).double() / 127.5 - 1
        return x, torch.randn(x.shape, dtype=torch.float64, generator=generator)

    chooser, reporter = pictures(choosing), pictures(reporting)

    def errors(P: int | None, h: float, sigma: float, xs: Any) -> np.ndarray:
        x, eps = xs
        size = {} if P is None else {"patch_size": P}
        levels = torch.full((len(x),), sigma, dtype=torch.float64)
        tried = machine.remade(corpus, bandwidth=h, **size)
        D = tried.denoise_from(x + sigma * eps, levels, source)
        return ((D - x) ** 2).mean((1, 2, 3)).numpy()

    size_errors, bandwidth_errors, reported, plain = [], [], [], []
    chosen_sizes: list[int] = []
    chosen_bandwidths = []
    rounds = len(sigmas) * (len(sizes) + len(bandwidths) + 2)
    with bar(f"Calibrating {machine.name}", total=rounds) as progress:

        def mean_error(P: int | None, h: float, sigma: float) -> float:
            progress.advance()
            return float(errors(P, h, sigma, chooser).mean())

        for sigma in map(float, sigmas):
            P: int | None = None
            if sizes:
                row = [mean_error(size, 0.0, sigma) for size in sizes]
                P = sizes[int(np.argmin(row))]
                size_errors.append(row)
                chosen_sizes.append(P)
            row = [mean_error(P, h, sigma) for h in bandwidths]
            h = bandwidths[int(np.argmin(row))]
            bandwidth_errors.append(row)
            chosen_bandwidths.append(h)
            reported.append(errors(P, h, sigma, reporter).tolist())
            plain.append(errors(P, 0.0, sigma, reporter).tolist())
            progress.advance(2)
    return Calibration(
        machine.name,
        sigmas.tolist(),
        sizes,
        bandwidths,
        size_errors,
        bandwidth_errors,
        chosen_sizes,
        chosen_bandwidths,
        reported,
        plain,
        len(source),
        len(choosing),
    )


def split(
    corpus: Corpus, held_out: int, seed: int, equivariant: bool = False
) -> tuple[Corpus, np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint images: the corpus, and positions of the source, of choosers and of reporters.

    A few large pictures become crops when the machine is equivariant, held-out crops at least a
    crop's width away from the source's.
    """
    N = len(corpus)
    if N < 3 and equivariant:
        return _crops(corpus, held_out, seed)
    if N < 3:
        raise ValueError(
            f"calibration needs at least 3 images, one each to make the machine, to choose and to "
            f"report; the corpus {corpus.name!r} has {N}: give patch_size a number"
        )
    held = min(held_out, max(1, N // 4))
    order = np.random.default_rng(seed).permutation(N)
    return (
        corpus,
        np.sort(order[2 * held :]),
        np.sort(order[:held]),
        np.sort(order[held : 2 * held]),
    )


def _crop_side(H: int, W: int) -> int:
    return min(32, H, W // 3)


def _crops(
    corpus: Corpus, held_out: int, seed: int
) -> tuple[Corpus, np.ndarray, np.ndarray, np.ndarray]:
    _, H, W = corpus.shape
    side = _crop_side(H, W)
    if side < 3:
        raise ValueError(
            f"the {H} x {W} picture is too small to hold a region out; give patch_size a number"
        )
    tops = range(0, H - side + 1, side)
    near = [(a, b) for a in tops for b in range(0, W - 3 * side + 1, side)]
    near = [near[k] for k in np.unique(np.linspace(0, len(near) - 1, CROPS).astype(int))]
    far = [(a, W - side) for a in range(0, H - side + 1, max(1, side // 4))]

    def cut(places: list[tuple[int, int]]) -> list[np.ndarray]:
        return [u[:, a : a + side, b : b + side] for u in corpus.images for a, b in places]

    order = np.random.default_rng(seed).permutation(len(far) * len(corpus))
    held = min(held_out, max(1, len(order) // 2))
    source, others = cut(near), cut(far)
    choosing, reporting = order[:held], order[held : 2 * held]
    if len(reporting) == 0:
        reporting = choosing
    crops = Corpus(np.stack(source + others), name=f"crops of {corpus.name}")
    n = len(source)
    return crops, np.arange(n), n + choosing, n + reporting


def automatic_patch_size(machine: Calibrated) -> PatchSchedule:
    """The sizes that patch_size="auto" stands for."""
    N, (_, H, W) = len(machine.corpus), machine.corpus.shape
    if N < 3 and not (machine.equivariant and _crop_side(H, W) >= 3):
        # nothing can be held out, and the machine of one image gives it back at any size
        return PatchSchedule.constant(3 if machine.takes_size(3) else 1)
    side = _crop_side(H, W) if N < 3 else max(H, W)
    sizes = [P for P in _spread_sizes(side) if machine.takes_size(P)] or [1]
    return _automatic(machine, "patch sizes", sizes, (0.0,)).patch_size


def automatic_bandwidth(machine: Calibrated) -> BandwidthSchedule:
    """The bandwidths that bandwidth="auto" stands for, at the machine's own patch sizes."""
    return _automatic(machine, "bandwidths", [], BANDWIDTHS).bandwidth


def _automatic(
    machine: Calibrated, what: str, sizes: list[int], bandwidths: Sequence[float]
) -> Calibration:
    """A calibration at ten levels, on a subset of the corpus that keeps it under a minute.

    The subset depends on nothing but shapes, so that one seed stays one result.
    """
    corpus = machine.corpus
    N, (_, H, W) = len(corpus), corpus.shape
    held_out = 4 if machine.equivariant else 8
    rounds = len(AUTO_SIGMAS) * (len(sizes) + len(bandwidths)) * held_out
    logits, budget = ((H * W) ** 2, 4 * BUDGET) if machine.equivariant else (H * W, BUDGET)
    n = max(48, round(budget / (logits * rounds)))
    subset = corpus
    if n < N:
        subset = corpus.subset(np.linspace(0, N - 1, n).astype(np.int64))
    say(
        f"'auto': choosing {what} for {machine.name!r} by denoising {held_out} held-out pictures "
        f"with {len(subset):,} of {N:,} images (kept for the next time)"
    )
    return calibrate(machine.remade(subset), AUTO_SIGMAS, held_out, sizes, bandwidths)


def _spread_sizes(side: int) -> list[int]:
    """Odd sizes up to `side`, ever further apart: 3 5 7 9 11 13 17 21 27 ..."""
    sizes = [min(3, side - (side % 2 == 0))]
    while True:
        step = max(2, 2 * round(sizes[-1] / 8))
        if sizes[-1] + step > side:
            break
        sizes.append(sizes[-1] + step)
    largest = side - (side % 2 == 0)
    return sizes if sizes[-1] == largest else [*sizes, largest]
