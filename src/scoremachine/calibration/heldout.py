"""Held-out calibration: the locality and the bandwidth that denoise unseen images best.

A network generalizes because it was trained to denoise unseen images, so the locality that denoises
them best is a first guess of the network's. It can be found without a network: leave images out of
the source, add noise, and take at each noise level the patch size (or other locality) whose D is
nearest to the clean image.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from scoremachine.calibration.copies import single, tell, without_copies
from scoremachine.core.schedules import (
    LOCALITIES,
    BandwidthSchedule,
    LevelSchedule,
    PatchSchedule,
    edm_sigmas,
)
from scoremachine.data.corpus import Corpus
from scoremachine.data.store import Record
from scoremachine.runtime.progress import Bar, bar, say
from scoremachine.runtime.validation import check_integer

BANDWIDTHS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2)
AUTO_SIGMAS = tuple(float(s) for s in np.geomspace(0.02, 20.0, 10))
TOWARDS_SIGMAS = tuple(float(s) for s in np.geomspace(0.05, 20.0, 16))
BUDGET = 1e10  # logits of an automatic calibration: half a minute; in ELS a logit costs a quarter
TOWARDS = 4  # factor of the budget for a choice by agreement with a network
CROPS = 96  # the most crops of one picture
LAYOUT = 3  # version of the cached files


class NothingDiffersError(ValueError):
    """Raised if all images are copies of each other, so that none can be held out."""


# a corpus, and the positions in it of the source, of the validation images, and of the test images
Parts = tuple[Corpus, np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Calibration:
    """The result of a calibration. Errors are mean squared, in units of x in [-1, 1].

    Attributes:
        machine: The machine's name.
        setting: The setting that was chosen, as "patch_size"; None for a machine without any.
        sigmas: The K noise levels, in descending order.
        values: The S values of it that were tried; empty without a setting.
        bandwidths: The M bandwidths tried.
        value_errors: (K, S): error of each value with h = 0, on the validation images.
        bandwidth_errors: (K, M): error of each bandwidth at the chosen value, on the same images.
        chosen: (K,): the best value at each level.
        chosen_bandwidths: (K,): the best bandwidth at that value.
        errors: (K, R): error with chosen value and bandwidth on each of the R test images.
        plain_errors: (K, R): the same with h = 0.
        source: The number of images in the source.
        held_out: The number of validation images.
    """

    machine: str
    setting: str | None
    sigmas: list[float]
    values: list[Any]
    bandwidths: list[float]
    value_errors: list[list[float]]
    bandwidth_errors: list[list[float]]
    chosen: list[Any]
    chosen_bandwidths: list[float]
    errors: list[list[float]]
    plain_errors: list[list[float]]
    source: int
    held_out: int

    @property
    def locality(self) -> LevelSchedule:
        """The chosen values as a schedule."""
        if self.setting is None or not self.chosen:
            raise ValueError(f"machine {self.machine!r} has no locality to choose")
        return LOCALITIES[self.setting](self.sigmas, self.chosen, name="held-out")

    @property
    def bandwidth(self) -> BandwidthSchedule:
        """The chosen bandwidths as a schedule."""
        return BandwidthSchedule(self.sigmas, self.chosen_bandwidths)


class Calibrated(Protocol):
    """The interface of machines that calibration needs."""

    name: str
    equivariant: bool  # whether its source is every position, so that crops can be a corpus
    locality: str | None  # the name of the setting for its locality
    relative_cost: float  # cost of a logit, relative to one of a plain box
    corpus: Corpus

    def clone_with(self, corpus: Corpus, **changes: Any) -> Calibrated:
        """The same kind of machine with other images, locality or bandwidth."""

    def denoise_from(self, y: torch.Tensor, sigma: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        """D of float64 pictures, with the images at `index` as the source."""

    def prepare(self) -> None:
        """Chooses the settings that are "auto"."""

    def candidates(self) -> list[Any]:
        """The values of its locality to try."""

    def supports(self, value: Any) -> bool:
        """Whether the machine can have this value of its locality."""

    def settings(self) -> dict[str, object]:
        """All settings that identify the machine, as JSON values."""


class Teacher(Protocol):
    """The interface of trained networks that calibration needs."""

    key: str  # identifies it
    name: str

    def levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level that it was trained for."""

    def denoise(self, y: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Its D."""

    def unseen(self, corpus: Corpus) -> np.ndarray | None:
        """Positions of images that it has not been trained on; None if unknown."""


def calibrate(
    machine: Calibrated,
    sigmas: Sequence[float] | np.ndarray | None = None,
    held_out: int = 16,
    values: Sequence[float] | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    seed: int = 0,
    parts: Parts | None = None,
    network: Teacher | None = None,
) -> Calibration:
    """Chooses the locality (unless `values` is empty) and the bandwidth per noise level.

    `scoremachine.calibrate` takes a machine by its name, and documents the arguments. `parts` are
    the images to use; None: the machine's corpus, divided by `parts_for`. With a `network`, errors
    are measured to its D instead of the clean picture. Levels that an interrupted calibration has
    finished are not measured again.
    """
    check_integer("held_out", held_out)
    levels = np.sort(np.asarray(edm_sigmas() if sigmas is None else sigmas, dtype=float))[::-1]
    if levels.size == 0 or not (np.isfinite(levels).all() and (levels > 0).all()):
        raise ValueError(f"noise levels are {levels.tolist()}; expected positive numbers")
    hs = sorted({0.0, *map(float, bandwidths)})
    candidates = None
    if values is not None:
        if len(values) and machine.locality is None:
            raise ValueError(f"{machine.name} has no locality to choose: leave values out")
        check = LOCALITIES[machine.locality].check if machine.locality else float
        candidates = sorted({check(value) for value in values})
    check_images(machine.corpus, instead_of(machine))
    what = machine.settings()
    if candidates is None or candidates:  # the machine's own locality is replaced
        what.pop(str(machine.locality), None)
    asked = [LAYOUT, what, levels.tolist(), held_out, candidates, hs, seed]
    if parts is not None:
        asked.append(parts[0].key)
        asked.append([hashlib.sha256(p.tobytes()).hexdigest() for p in parts[1:]])
    if network is not None:
        asked.append(network.key)
    record = machine.corpus.record(f"calibration-{machine.name}", asked)
    kept = record.read(lambda found: Calibration(**found))
    if kept is not None:
        return kept
    if parts is None:
        parts = parts_for(machine, held_out, seed, network)
    found = _measure(machine, levels, parts, candidates, hs, seed, record.unfinished, network)
    record.write(asdict(found))
    record.unfinished.remove()
    return found


Pictures = tuple[torch.Tensor, torch.Tensor]  # clean, and standard noise, float64


def held_out_pictures(parts: Parts, seed: int) -> tuple[Pictures, Pictures]:
    """The validation and the test pictures, each with its noise."""
    corpus, _, validation, test = parts
    generator = torch.Generator().manual_seed(seed)

    def pictures(index: np.ndarray) -> Pictures:
        x = torch.from_numpy(np.array(corpus.images[index])).double() / 127.5 - 1
        return x, torch.randn(x.shape, dtype=torch.float64, generator=generator)

    return pictures(validation), pictures(test)


def denoising_error(
    machine: Calibrated,
    source: np.ndarray,
    pictures: Pictures,
    sigma: float,
    target: torch.Tensor | None = None,
) -> np.ndarray:
    """Mean squared error of D(x + sigma eps, sigma) of every picture, (R,), to x or a `target`."""
    x, eps = pictures
    levels = torch.full((len(x),), sigma, dtype=torch.float64)
    D = machine.denoise_from(x + sigma * eps, levels, source)
    return ((D - (x if target is None else target)) ** 2).mean((1, 2, 3)).numpy()


def _measure(
    machine: Calibrated,
    sigmas: np.ndarray,
    parts: Parts,
    values: list[Any] | None,
    bandwidths: list[float],
    seed: int,
    unfinished: Record,
    network: Teacher | None,
) -> Calibration:
    """Measures level by level; finished levels are kept in the record `unfinished`."""
    corpus, source, validation, _ = parts
    machine = machine.clone_with(corpus)
    values = machine.candidates() if values is None else values
    validating, testing = held_out_pictures(parts, seed)

    def errors(value: Any, h: float, sigma: float, pictures: Pictures) -> np.ndarray:
        local = {} if value is None else {str(machine.locality): value}
        tried = machine.clone_with(corpus, bandwidth=h, **local)
        return denoising_error(tried, source, pictures, sigma, target(pictures, sigma))

    @functools.lru_cache(2)
    def target(pictures: Pictures, sigma: float) -> torch.Tensor | None:
        """The network's D, or None if the target is the clean picture."""
        x, eps = pictures
        if network is None:
            return None
        with torch.no_grad():
            return network.denoise(x + sigma * eps, sigma)

    rounds = len(values) + len(bandwidths) + (1 if values else 2)  # h = 0 is measured once
    with bar(f"Calibrating {machine.name}", total=len(sigmas) * rounds) as progress:

        def mean_error(value: Any, h: float, sigma: float) -> float:
            progress.advance()
            return float(errors(value, h, sigma, validating).mean())

        def level(sigma: float) -> dict[str, Any]:
            value: Any = None
            found: dict[str, Any] = {}
            if values:
                found["value_errors"] = [mean_error(tried, 0.0, sigma) for tried in values]
                found["chosen"] = value = values[int(np.argmin(found["value_errors"]))]
            known = {0.0: min(found["value_errors"])} if values else {}
            found["bandwidth_errors"] = [
                known[h] if h in known else mean_error(value, h, sigma) for h in bandwidths
            ]
            h = bandwidths[int(np.argmin(found["bandwidth_errors"]))]
            found["chosen_bandwidths"] = h
            found["plain_errors"] = plain = errors(value, 0.0, sigma, testing).tolist()
            found["errors"] = errors(value, h, sigma, testing).tolist() if h else plain
            progress.advance(2)
            return found

        levels = kept_by_level(unfinished, sigmas, level, "plain_errors", progress, rounds)
    columns = ("value_errors", "bandwidth_errors", "chosen", "chosen_bandwidths")
    found = {
        column: [level[column] for level in levels if column in level]
        for column in (*columns, "errors", "plain_errors")
    }
    return Calibration(
        machine=machine.name,
        setting=machine.locality,
        sigmas=sigmas.tolist(),
        values=values,
        bandwidths=bandwidths,
        source=len(source),
        held_out=len(validation),
        **found,
    )


@dataclass
class Exchange:
    """The cost of using the locality of one calibration for the purpose of the other.

    Attributes:
        sigmas: The K noise levels.
        by_truth, by_network: The locality that denoises best, and the one that agrees best with
            the network, (K,).
        to_network: The error to the network at `by_truth`, divided by that at `by_network`, (K,).
        to_truth: The error to the clean picture at `by_network`, divided by that at `by_truth`,
            (K,).
    """

    sigmas: list[float]
    by_truth: list[Any]
    by_network: list[Any]
    to_network: list[float]
    to_truth: list[float]

    @classmethod
    def of(cls, truth: Calibration, network: Calibration) -> Exchange:
        """From the calibrations of a machine on the same images, without and with a network."""

        def cost(own: Calibration, other: Calibration) -> list[float]:
            return [
                errors[own.values.index(value)] / min(errors)
                for errors, value in zip(own.value_errors, other.chosen, strict=True)
            ]

        return cls(
            truth.sigmas, truth.chosen, network.chosen, cost(network, truth), cost(truth, network)
        )


def kept_by_level(
    unfinished: Record,
    sigmas: np.ndarray,
    measure: Callable[[float], dict[str, Any]],
    last: str,
    progress: Bar,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measures at each noise level, and resumes from the record `unfinished` after an interruption.

    `last` is a key that the result of every finished level has; each of these counts as `rounds`
    steps of the progress.
    """
    levels: list[dict[str, Any]]
    levels = unfinished.read(list) or []
    levels = levels if all(last in level for level in levels) else []
    progress.advance(len(levels) * rounds)
    for sigma in map(float, sigmas[len(levels) :]):
        levels.append(measure(sigma))
        unfinished.write(levels)
    return levels


def parts_for(
    machine: Calibrated, held_out: int, seed: int, network: Teacher | None = None
) -> Parts:
    """Divides a machine's corpus for calibration.

    If it is known which images the network has not seen, these are held out, and all of them are
    left out of the source.
    """
    corpus = machine.corpus
    unseen = None if network is None else network.unseen(corpus)
    if unseen is not None:
        alone = single(corpus, unseen, min(2 * held_out, len(unseen)))
        held = min(held_out, len(alone) // 2)
        if held:
            source = np.setdiff1d(np.arange(len(corpus)), unseen)
            return corpus, source, alone[:held], alone[held : 2 * held]
    return split(corpus, held_out, seed, machine.equivariant, instead=instead_of(machine))


def instead_of(machine: Calibrated) -> str:
    """The advice of error messages if no image can be held out for a machine."""
    setting = machine.locality
    if setting is None:
        return f"build {machine.name!r} with a number as bandwidth"
    return f"give {setting} a number or a schedule"


def split(
    corpus: Corpus,
    held_out: int,
    seed: int,
    equivariant: bool = False,
    test: int | None = None,
    instead: str = "use more images",
) -> Parts:
    """Divides a corpus into source, validation and test images.

    There are as many test as validation images, unless `test` is given. No image is an exact or
    near copy (`copies`) of one in another part.

    If the machine is equivariant, one or two large pictures are cut into crops, with held-out crops
    at least a crop's width away from those of the source.

    Raises:
        ValueError: If there are too few images, or too few that differ; the message ends with the
            advice `instead`.
    """
    check_images(corpus, instead)
    N = len(corpus)
    if N < 3 and equivariant:
        return _crops(corpus, held_out, seed, instead)
    if N < 3:
        raise ValueError(
            f"calibration needs at least 3 images, one each for source, validation and test; "
            f"the corpus {corpus.name!r} has {N}: {instead}"
        )
    most = max(1, N // 4)
    order = np.random.default_rng(seed).permutation(N)
    held = min(held_out, most)
    validation, rest = order[:held], without_copies(corpus, order[:held], order[held:])
    last = min(test or held, most)
    source = without_copies(corpus, rest[:last], rest[last:])
    if len(source) == 0:
        raise NothingDiffersError(
            f"calibration needs at least 3 images that differ, and those of the corpus "
            f"{corpus.name!r} are copies of each other: {instead}"
        )
    parts = corpus, np.sort(source), np.sort(validation), np.sort(rest[:last])
    tell(corpus, N - sum(map(len, parts[1:])))
    return parts


def check_images(corpus: Corpus, instead: str) -> None:
    """ValueError for a mixture: its clusters contain the images that would have to be held out."""
    if not corpus.has_images:
        raise ValueError(
            f"{corpus.name!r} is a mixture, whose clusters contain what would have to be held out: "
            f"{instead}, such as that of a machine of the images"
        )


def _crop_side(H: int, W: int) -> int:
    return min(32, H, W // 3)


def _crops(corpus: Corpus, held_out: int, seed: int, instead: str) -> Parts:
    _, H, W = corpus.shape
    side = _crop_side(H, W)
    if side < 3:
        raise ValueError(f"the {H} x {W} picture is too small to hold a region out: {instead}")
    tops = range(0, H - side + 1, side)
    near = [(a, b) for a in tops for b in range(0, W - 3 * side + 1, side)]
    near = [near[k] for k in np.unique(np.linspace(0, len(near) - 1, CROPS).astype(int))]
    far = [(a, W - side) for a in range(0, H - side + 1, max(1, side // 4))]

    def cut(places: list[tuple[int, int]]) -> list[np.ndarray]:
        return [u[:, a : a + side, b : b + side] for u in corpus.images for a, b in places]

    order = np.random.default_rng(seed).permutation(len(far) * len(corpus))
    held = min(held_out, max(1, len(order) // 2))
    source, others = cut(near), cut(far)
    validation, test = order[:held], order[held : 2 * held]
    if len(test) == 0:
        test = validation
    crops = Corpus(np.stack(source + others), name=f"crops of {corpus.name}")
    n = len(source)
    held_crops = n + np.unique(np.concatenate([validation, test]))
    different = without_copies(crops, held_crops, np.arange(n))
    if len(different) == 0:
        raise NothingDiffersError(
            f"every region of the {H} x {W} picture is a copy of one that would be held out: "
            f"{instead}"
        )
    tell(crops, n - len(different))
    return crops, different, n + validation, n + test


def automatic_locality(machine: Calibrated) -> LevelSchedule:
    """The patch sizes (shares, thresholds) that "auto" resolves to."""
    N, (_, H, W) = len(machine.corpus), machine.corpus.shape
    setting = str(machine.locality)
    if N < 3 and not (machine.equivariant and _crop_side(H, W) >= 3):
        # nothing can be held out, and with one image D is that image for any patch size
        smallest = [value for value in (machine.candidates() or [1]) if machine.supports(value)]
        return LOCALITIES[setting].constant(smallest[0])
    values = spread_candidates(machine, _crop_side(H, W) if N < 3 else None)
    try:
        return _automatic(machine, setting.replace("_", " ") + "s", values, (0.0,)).locality
    except NothingDiffersError:  # as for one image
        return LOCALITIES[setting].constant(values[0])


def spread_candidates(machine: Calibrated, side: int | None = None) -> list[Any]:
    """`machine.candidates()`; of patch sizes only some, ever further apart, up to `side`."""
    if machine.locality != PatchSchedule.setting:
        return machine.candidates()
    sizes = _spread_sizes(side or max(machine.corpus.shape[1:]))
    return [P for P in sizes if machine.supports(P)] or [1]


def automatic_bandwidth(machine: Calibrated) -> BandwidthSchedule:
    """The bandwidths that bandwidth="auto" resolves to, at the machine's own patch sizes.

    Raises:
        ValueError: If no images can be held out, as for a mixture.
    """
    check_images(machine.corpus, "give bandwidth a number")
    return _automatic(machine, "bandwidths", [], BANDWIDTHS).bandwidth


def towards(
    network: Teacher, machine: Calibrated, corpus: Corpus, bandwidth: bool = False
) -> tuple[LevelSchedule, BandwidthSchedule]:
    """The locality and bandwidth (0 unless requested) that agree best with a network.

    They are chosen as in Kamb & Ganguli (2412.20292), on the last of the images of `corpus` that
    the network has not seen, so that the first remain for evaluation; if it is not known which
    those are, on images of the machine. From one noise level to the next lower one, the locality
    falls by at most two candidates, or rises by at most one.
    """
    low, high = network.levels()
    sigmas = sorted((s for s in TOWARDS_SIGMAS if low <= s <= high), reverse=True)
    held_out = 4 if machine.equivariant else 8
    setting, values = str(machine.locality), machine.candidates()
    if setting == PatchSchedule.setting:
        sizes = {*_spread_sizes(max(corpus.shape[1:])), 15, 19}
        values = [P for P in values if P in sizes]
    hs = BANDWIDTHS if bandwidth else (0.0,)
    subset = affordable(machine, len(sigmas) * (4 + len(hs)) * held_out, TOWARDS)
    say(
        f"choosing {setting.replace('_', ' ')}s for {machine.name!r} by agreement with "
        f"{network.name} on {held_out} held-out pictures, with {len(subset):,} of "
        f"{len(machine.corpus):,} images (kept for the next time)"
    )
    parts = unseen_parts(network, subset, corpus, held_out)
    machine = machine.clone_with(subset, bandwidth=0.0)
    chosen, chosen_bandwidths, near = [], [], values
    with bar(f"Choosing towards {network.name}", total=len(sigmas)) as progress:
        for sigma in sigmas:
            found = calibrate(machine, [sigma], held_out, near, hs, parts=parts, network=network)
            chosen += found.chosen
            chosen_bandwidths += found.chosen_bandwidths
            place = values.index(found.chosen[0])
            near = values[max(0, place - 2) : place + 2]
            progress.advance()
    locality = LOCALITIES[setting](sigmas, chosen, name="network")
    return locality, BandwidthSchedule(sigmas, chosen_bandwidths)


def unseen_parts(network: Teacher, source: Corpus, corpus: Corpus, held_out: int) -> Parts | None:
    """A source, and the last images of `corpus` that the network has not seen; None if unknown.

    These are divided into validation and test images.
    """
    unseen = network.unseen(corpus)
    if unseen is None or len(unseen) < 2:
        return None
    last = single(corpus, unseen[::-1], min(2 * held_out, len(unseen)))[::-1]
    held, n = len(last) // 2, len(source)
    if held == 0:
        return None
    others = corpus.images[last[len(last) - 2 * held :]]
    joined = Corpus(np.concatenate([source.images, others]), name=corpus.name)
    different = without_copies(joined, n + np.arange(2 * held), np.arange(n))
    tell(joined, n - len(different))
    return joined, different, n + np.arange(held), n + held + np.arange(held)


def _automatic(
    machine: Calibrated, what: str, values: list[Any], bandwidths: Sequence[float]
) -> Calibration:
    """A calibration at ten levels, on a subset of the corpus for which it takes under a minute."""
    held_out = 4 if machine.equivariant else 8
    rounds = len(AUTO_SIGMAS) * (len(values) + len(bandwidths)) * held_out
    subset = affordable(machine, rounds)
    say(
        f"'auto': choosing {what} for {machine.name!r} by denoising {held_out} held-out pictures "
        f"with {len(subset):,} of {len(machine.corpus):,} images (kept for the next time)"
    )
    return calibrate(machine.clone_with(subset), AUTO_SIGMAS, held_out, values, bandwidths)


def affordable(machine: Calibrated, rounds: int, times: int = 1) -> Corpus:
    """A subset of a machine's images with which denoising `rounds` pictures costs `times` `BUDGET`.

    It depends only on shapes, so that a seed always gives the same result.
    """
    corpus = machine.corpus
    N, (_, H, W) = len(corpus), corpus.shape
    logits, budget = ((H * W) ** 2, 4 * BUDGET) if machine.equivariant else (H * W, BUDGET)
    n = max(48, round(times * budget / (logits * rounds * machine.relative_cost)))
    return corpus.subset(np.linspace(0, N - 1, n).astype(np.int64)) if n < N else corpus


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
