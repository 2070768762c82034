"""Held-out denoising error: which machine is best at which noise level, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scoremachine.calibration.copies import without_copies
from scoremachine.calibration.heldout import Parts, calibrate, split, spread_candidates
from scoremachine.calibration.stacking import stack, with_calibrated
from scoremachine.core.schedules import LOCALITIES, LevelSchedule, edm_sigmas
from scoremachine.data.corpus import Corpus
from scoremachine.machines import MACHINES, Composite, Machine, build, kind_of
from scoremachine.runtime.progress import bar, say
from scoremachine.runtime.validation import check_integer

WEIGHING = 4  # images for the weights of a composite, as a multiple of the validation images
ELS_IMAGES = 1000  # images of an exact ELS, with which a picture takes about a second per step
DRAWS = 2000  # resamples of a bootstrap


@dataclass
class Errors:
    """Denoising errors of a machine with one choice of its settings.

    Mean squared, in units of x in [-1, 1].

    Attributes:
        machine: The machine's name.
        choice: How its locality was chosen: "published: NAME", "calibrated", "calibrated, h", or ""
            if it has none.
        images: The number of images in its source.
        sigmas: The K noise levels, in descending order.
        errors: (K, R): the errors on R held-out images.
        values: (K,): its locality at each level, or empty.
        bandwidths: (K,): its bandwidth at each level.
    """

    machine: str
    choice: str
    images: int
    sigmas: list[float]
    errors: np.ndarray
    values: list[Any]
    bandwidths: list[float]

    @property
    def label(self) -> str:
        """Machine and choice, for a legend."""
        return f"{self.machine} ({self.choice})" if self.choice else self.machine

    @property
    def with_bandwidth(self) -> bool:
        """Whether its bandwidth was calibrated too."""
        return self.choice.split(", ")[-1] == "h"

    @property
    def mean(self) -> np.ndarray:
        """The mean errors, (K,)."""
        return self.errors.mean(1)

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """A 95% interval of the mean by bootstrap over the images: (K,) and (K,)."""
        means = _resampled(self.errors)
        return np.quantile(means, 0.025, axis=1), np.quantile(means, 0.975, axis=1)


def _resampled(errors: np.ndarray) -> np.ndarray:
    """Means over resampled images, which are the same in all calls: (K, DRAWS)."""
    R = errors.shape[1]
    draws = np.random.default_rng(0).integers(0, R, (DRAWS, R))
    return errors[:, draws].mean(2)


def ties(all_errors: Sequence[Errors]) -> np.ndarray:
    """(entries, K): whether an entry is the best at a level, or not distinguishable from it."""
    return best_or_tied(np.stack([e.errors for e in all_errors]))


def best_or_tied(errors: np.ndarray) -> np.ndarray:
    """(entries, K) of errors (entries, K, R): whether the mean is the lowest, or tied with it.

    Tied: not statistically distinguishable, since the 95% bootstrap interval of the paired
    difference to the best, over the R pictures, contains 0.
    """
    best = errors.mean(2).argmin(0)
    tied = np.zeros(errors.shape[:2], dtype=bool)
    for k in range(errors.shape[1]):
        differences = errors[:, k] - errors[best[k], k]
        tied[:, k] = np.quantile(_resampled(differences), 0.025, axis=1) <= 0
    return tied


def highest_or_tied(values: np.ndarray) -> np.ndarray:
    """(machines, K) of values (machines, K, R): whether a median is the highest, or tied with it.

    Tied: not statistically distinguishable, by the 95% bootstrap interval of the difference of the
    two medians, over the same R pictures. Values that are not a number are left out.
    """
    M, K, R = values.shape
    draws = np.random.default_rng(0).integers(0, R, (DRAWS, R))
    tied = np.zeros((M, K), dtype=bool)
    for k in range(K):
        at = values[:, k]
        known = at[:, np.isfinite(at).all(0)]
        if known.shape[1] == 0:
            continue
        some = draws[:, : known.shape[1]] % known.shape[1]
        best = int(np.median(known, axis=1).argmax())
        medians = np.median(known[:, some], axis=2)
        tied[:, k] = np.quantile(medians[best] - medians, 0.025, axis=1) <= 0
    return tied


def fewer(name: str, source: np.ndarray, most: int | None = None) -> np.ndarray:
    """The source, or `most` of its images (1,000) for machines that compare all positions."""
    most = most or ELS_IMAGES
    if not MACHINES[name].equivariant or len(source) <= most:
        return source
    say(f"{name} compares all positions, so it uses {most:,} of {len(source):,} images")
    return source[np.linspace(0, len(source) - 1, most).astype(np.int64)]


def denoising_errors(
    corpus: Corpus,
    machines: Sequence[str] = tuple(MACHINES),
    sigmas: Sequence[float] | np.ndarray | None = None,
    validation: int = 16,
    test: int = 32,
    seed: int = 0,
    published: Sequence[tuple[str, Any]] = (),
) -> list[Errors]:
    """Measures machines on the same held-out images with the same noise.

    Every machine is measured with its locality calibrated (on other held-out images), and again
    with its bandwidth calibrated too. Results are kept in the cache, level by level.

    Arguments:
        corpus: The images; those held out are left out of the source. `els` uses 1,000 others.
        machines: Names.
        sigmas: Noise levels; None: the 18 of EDM.
        validation: The number of validation images. The weights of a composite are fitted on four
            times as many, which include these; the additional ones are left out of its source.
        test: The number of test images.
        seed: Of the choice of images and of their noise.
        published: Additional (machine, locality) pairs, as ("pspc", "pspc-cifar10").

    Raises:
        ValueError: For an unknown name, or a corpus of fewer than 3 images.
    """
    check_integer("validation", validation)
    check_integer("test", test)
    built = [build(name, corpus) for name in machines]
    also = []
    for name, locality in ((kind_of(name).name, locality) for name, locality in published):
        if name not in {machine.name for machine in built}:
            raise ValueError(f"published has {name}, which is not among the machines")
        setting = kind_of(name).locality
        if setting is None:
            raise ValueError(f"{name} has no locality, so it has no published schedule")
        schedule = LOCALITIES[setting].of(locality)
        also.append((schedule, build(name, corpus, **{setting: schedule})))
    _, source, validating, testing = split(corpus, validation, seed, test=test)
    found: list[Errors] = []
    with bar("Measuring machines", total=len(built)) as progress:
        for machine in built:
            parts: Parts = corpus, fewer(machine.name, source), validating, testing
            if isinstance(machine, Composite):
                found.append(_mixed(machine, parts, sigmas, validation, seed))
            else:
                found += _calibrated(machine, parts, sigmas, validation, seed)
            found += [
                _published(made, parts, sigmas, schedule, validation, seed)
                for schedule, made in also
                if made.name == machine.name
            ]
            progress.advance()
    return found


def _calibrated(
    machine: Machine, parts: Parts, sigmas: Any, validation: int, seed: int
) -> list[Errors]:
    values = spread_candidates(machine)
    c = calibrate(machine, sigmas, validation, values, seed=seed, parts=parts)
    choice = "calibrated" if c.chosen else ""
    plain = Errors(
        machine.name,
        choice,
        c.source,
        c.sigmas,
        np.array(c.plain_errors),
        c.chosen,
        [0.0] * len(c.sigmas),
    )
    with_h = replace(plain, choice=f"{choice}, h".lstrip(", "), errors=np.array(c.errors))
    return [plain, replace(with_h, bandwidths=c.chosen_bandwidths)]


def _mixed(machine: Composite, parts: Parts, sigmas: Any, validation: int, seed: int) -> Errors:
    """The composite, with weights fitted on the validation images and on some of the source."""
    levels = edm_sigmas() if sigmas is None else sigmas
    corpus, source, validating, testing = parts
    ready = with_calibrated(machine, levels, validation, seed, parts)
    order = np.random.default_rng(seed).permutation(source)
    more = order[: min((WEIGHING - 1) * len(validating), len(source) // 4)]
    source = without_copies(corpus, more, np.setdiff1d(source, more))
    weighing = np.sort(np.concatenate([validating, more]))
    weights = stack(ready, levels, (corpus, source, weighing, testing[:0]), seed).schedule
    made = machine.clone_with(corpus, of=ready.members, weights=weights)
    return _as_it_is(made, (corpus, source, validating, testing), sigmas, "", validation, seed)


def _published(
    made: Machine, parts: Parts, sigmas: Any, schedule: LevelSchedule, validation: int, seed: int
) -> Errors:
    e = _as_it_is(made, parts, sigmas, f"published: {schedule.name}", validation, seed)
    return replace(e, values=[schedule(sigma) for sigma in e.sigmas])


def _as_it_is(
    made: Machine, parts: Parts, sigmas: Any, choice: str, validation: int, seed: int
) -> Errors:
    """The errors of a machine whose settings are all explicit."""
    c = calibrate(made, sigmas, validation, (), (), seed, parts)
    nothing = [0.0] * len(c.sigmas)
    return Errors(made.name, choice, c.source, c.sigmas, np.array(c.plain_errors), [], nothing)
