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
from typing import Any

import numpy as np
import torch

from scoremachine.corpus import Corpus
from scoremachine.files import written
from scoremachine.machines import BoxMachine, EquivariantLocalScore, Machine, build
from scoremachine.machines.machine import plain
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


def calibrate(
    corpus: Corpus,
    machine: str = "ls",
    sigmas: Sequence[float] | None = None,
    held_out: int = 16,
    sizes: Sequence[int] | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
    **settings: Any,
) -> Calibration:
    """Chooses patch size and bandwidth per noise level by held-out denoising.

    Some images are left out of the source; half of those choose, the other half report the error
    of what was chosen. A corpus of a few pictures is cut into crops first, and held-out crops lie
    at least a window away from the source's. The result is kept beside the corpus.

    Arguments:
        corpus: The images; those not held out are the source.
        machine: The machine's name.
        sigmas: Noise levels; None: the 18 of EDM.
        held_out: How many images choose; as many others report.
        sizes: Patch sizes to try; None: odd ones from 3 to the image's side. (A box of one pixel
            often has the smallest error where the noise is small, but its pixels know nothing of
            each other, and samples get specks.)
        bandwidths: Bandwidths to try; 0 is always among them.
        seed: Of the choice of images and of their noise.
        settings: Further settings of the machine, such as `boundary`.

    Raises:
        ValueError: Where the corpus has too few images, or an argument is out of range.
    """
    check_integer("held_out", held_out)
    levels = np.sort(np.asarray(edm_sigmas() if sigmas is None else sigmas, dtype=float))[::-1]
    if levels.size == 0 or not (np.isfinite(levels).all() and (levels > 0).all()):
        raise ValueError(f"noise levels are {levels.tolist()}; expected positive numbers")
    hs = sorted({0.0, *map(float, bandwidths)})
    candidates = None if sizes is None else sorted({check_integer("a size", P) for P in sizes})
    asked = [LAYOUT, machine, levels.tolist(), held_out, candidates, hs, seed, settings]
    digest = hashlib.sha256(json.dumps(asked, default=plain).encode()).hexdigest()[:16]
    path = corpus.cache_path / f"calibration-{machine}-{digest}.json"
    if path.exists():
        try:
            return Calibration(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            path.unlink()
    found = _measure(corpus, machine, levels, held_out, candidates, hs, seed, settings)
    with written(path) as temporary:
        temporary.write_text(json.dumps(asdict(found)))
    return found


def _measure(
    corpus: Corpus,
    name: str,
    sigmas: np.ndarray,
    held_out: int,
    sizes: list[int] | None,
    bandwidths: list[float],
    seed: int,
    settings: dict[str, Any],
) -> Calibration:
    corpus, source, choosing, reporting = split(corpus, held_out, seed, equivariant=name == "els")
    probe = build(name, corpus, **settings)
    boxes = isinstance(probe, BoxMachine) and "patch_size" not in settings
    tried: list[int] = []
    if boxes:
        side = max(corpus.shape[1:])
        tried = sizes or [P for P in range(3, side + 1, 2) if _fits(probe, P)] or [1]
    generator = torch.Generator().manual_seed(seed)

    def pictures(index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        u = torch.from_numpy(np.array(corpus.images[index]))
        x = u.double() / 127.5 - 1
        return x, torch.randn(x.shape, dtype=torch.float64, generator=generator)

    chooser, reporter = pictures(choosing), pictures(reporting)

    def errors(P: int | None, h: float, sigma: float, xs: Any) -> np.ndarray:
        x, eps = xs
        chosen = {**settings, "bandwidth": h} | ({} if P is None else {"patch_size": P})
        machine = build(name, corpus, **chosen)
        levels = torch.full((len(x),), sigma, dtype=torch.float64)
        D = machine.denoise_from(x + sigma * eps, levels, source)
        return ((D - x) ** 2).mean((1, 2, 3)).numpy()

    size_errors, bandwidth_errors, reported, plain = [], [], [], []
    chosen_sizes: list[int] = []
    chosen_bandwidths = []
    rounds = len(sigmas) * (len(tried) + len(bandwidths) + 2)
    with bar(f"Calibrating {name}", total=rounds) as progress:

        def mean_error(P: int | None, h: float, sigma: float) -> float:
            progress.advance()
            return float(errors(P, h, sigma, chooser).mean())

        for sigma in map(float, sigmas):
            P: int | None = None
            if boxes:
                row = [mean_error(size, 0.0, sigma) for size in tried]
                P = tried[int(np.argmin(row))]
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
        name,
        sigmas.tolist(),
        tried,
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


def _fits(machine: BoxMachine, P: int) -> bool:
    try:
        machine.check_size(P)
    except ValueError:
        return False
    return True


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


def automatic_patch_size(machine: BoxMachine) -> PatchSchedule:
    """The sizes that patch_size="auto" stands for."""
    N, (_, H, W) = len(machine.corpus), machine.corpus.shape
    if N < 3 and (machine.name != "els" or min(H, W // 3) < 3):
        # nothing can be held out, and the machine of one image gives it back at any size
        return PatchSchedule.constant(max(P for P in (1, 3) if max(H, W) >= P))
    return _automatic(machine, "patch sizes", (0.0,), {}).patch_size


def automatic_bandwidth(machine: Machine) -> BandwidthSchedule:
    """The bandwidths that bandwidth="auto" stands for, at the machine's own patch sizes."""
    settings = {}
    if isinstance(machine, BoxMachine):
        machine.patch_size_at(1.0)
        settings["patch_size"] = machine.patch_size
    return _automatic(machine, "bandwidths", BANDWIDTHS, settings).bandwidth


def _automatic(
    machine: Machine, what: str, bandwidths: Sequence[float], settings: dict[str, Any]
) -> Calibration:
    """A calibration at ten levels, on a subset of the corpus that keeps it under a minute.

    The subset depends on nothing but shapes, so that one seed stays one result.
    """
    corpus = machine.corpus
    N, (_, H, W) = len(corpus), corpus.shape
    equivariant = isinstance(machine, EquivariantLocalScore)
    if isinstance(machine, EquivariantLocalScore):
        settings["boundary"] = machine.boundary
    held_out = 4 if equivariant else 8
    side = min(_crop_side(H, W), H, W) if N < 3 else max(H, W)
    sizes = None
    if isinstance(machine, BoxMachine) and "patch_size" not in settings:
        sizes = [P for P in _spread_sizes(side) if N < 3 or _fits(machine, P)]
    rounds = len(AUTO_SIGMAS) * (len(sizes or []) + len(bandwidths)) * held_out
    logits = (side**4 if N < 3 else (H * W) ** 2) if equivariant else H * W
    n = max(48, round((4 * BUDGET if equivariant else BUDGET) / (logits * rounds)))
    subset = corpus
    if n < N:
        subset = corpus.subset(np.linspace(0, N - 1, n).astype(np.int64))
    say(
        f"'auto': choosing {what} for {machine.name!r} by denoising {held_out} held-out pictures "
        f"with {len(subset):,} of {N:,} images (kept for the next time)"
    )
    return calibrate(subset, machine.name, AUTO_SIGMAS, held_out, sizes, bandwidths, 0, **settings)


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
