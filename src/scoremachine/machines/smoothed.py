"""The smoothed score machine: the ideal one, averaged over perturbed queries."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from azula.noise import Schedule
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import mapped, outside_transforms, values, with_slope
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import posterior, units_of_x
from scoremachine.core.processes import Process
from scoremachine.core.schedules import BandwidthSchedule, SmoothingSchedule
from scoremachine.data.corpus import Corpus
from scoremachine.machines.machine import LocalMachine
from scoremachine.runtime.validation import check_integer


class SmoothedScore(LocalMachine):
    r"""The mean of the ideal machine's answers to M perturbed queries (sigma-CFDM).

    D(y, sigma) = 1/M sum_m D_ideal(y + delta (1 + sigma) eps_m, sigma)

    Scarvelis et al. 2310.12395. In the paper's time t, where z = t x + (1 - t) eps, that is
    k_t(z + delta eps_m) / t: sigma = (1 - t) / t, and 1 / t = 1 + sigma. Near the end of the flow
    it arrives at means of M images.

    Arguments:
        delta: Standard deviation of the perturbations, a `SmoothingSchedule`, or "auto" (default):
            an eighth of the median distance between neighbouring images, with which perturbed
            queries meet different images and their mean stays near them.
        M: How many perturbed queries.
        neighbours: Compare each with its K nearest images only, and `uniform` others (None: with
            all of them, exactly). The index is scikit-learn's.
        uniform: How many images L are drawn uniformly from the rest, each for (N - K) / L.
        perturbations: "fixed": every picture that `generate` makes has its own eps_1 ... eps_M all
            the way; elsewhere they belong to the machine and depend on its seed alone, so that D
            is a function. "fresh": drawn anew at every step.
        seed: Of the machine's own perturbations, and of the uniform draws.
        corpus, bandwidth, kernel, schedule: See `Machine`.
    """

    name = "smoothed"
    locality = "delta"

    def __init__(
        self,
        corpus: Corpus,
        delta: float | SmoothingSchedule | str = "auto",
        bandwidth: float | BandwidthSchedule | str = 0.0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
        M: int = 4,
        neighbours: int | None = None,
        uniform: int = 0,
        perturbations: str = "fixed",
        seed: int = 0,
    ) -> None:
        super().__init__(corpus, delta, bandwidth, kernel, schedule)
        M = check_integer("M", M)
        if neighbours is not None:
            neighbours = check_integer("neighbours", neighbours)
        if uniform != 0:
            uniform = check_integer("uniform", uniform)
            if neighbours is None:
                raise ValueError(f"uniform is {uniform} without neighbours; give neighbours=K too")
        if perturbations not in ("fixed", "fresh"):
            raise ValueError(f"perturbations is {perturbations!r}; expected 'fixed' or 'fresh'")
        if seed != 0:
            seed = check_integer("seed", seed)
        self.M, self.neighbours, self.uniform = M, neighbours, uniform
        self.perturbations, self.seed = perturbations, seed
        self._indexes: dict[bytes, Any] = {}
        self._trajectory: Tensor | None = None

    @property
    def delta(self) -> SmoothingSchedule | str:
        """The perturbations' standard deviation at each noise level, or "auto"."""
        return self.local

    def choose(self) -> SmoothingSchedule:
        return SmoothingSchedule.constant(self._scale)

    def candidates(self) -> list[float]:
        return [0.0, *(self._scale * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0))]

    @cached_property
    def _scale(self) -> float:
        """An eighth of the median distance to the nearest other image, among up to 512 of them."""
        N = len(self.corpus)
        some = np.unique(np.linspace(0, N - 1, 512).astype(np.int64))
        x = torch.from_numpy(np.array(self.corpus.images[some])).flatten(1).double() / 127.5 - 1
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        distances[distances == 0] = math.inf
        nearest = distances.min(1).values
        nearest = nearest[torch.isfinite(nearest)]
        return round(float(nearest.median()) / 8, 3) if len(nearest) else 0.0

    def through(self, process: Process, t: float) -> Self:
        other = super().through(process, t)
        other._indexes = {} if other._indexes is self._indexes else other._indexes
        other._trajectory = self._trajectory
        return other

    def begin(self, x: Tensor | None) -> None:
        self._trajectory = None
        if x is not None and self.perturbations == "fixed":
            noise = [torch.randn_like(x, dtype=torch.float64) for _ in range(self.M)]
            self._trajectory = torch.stack(noise, dim=1)

    def mean(self, y: Tensor, sigma: Tensor, index: np.ndarray, level: Tensor) -> Tensor:
        delta = torch.tensor([self.local_at(float(s)) for s in level], dtype=torch.float64)
        reach = (delta * (1 + level))[:, None, None, None, None]
        if self.view is not None:  # x_t is in other units
            reach = reach * self.view.scale
        queries = (y[:, None] + reach * self._perturbations(y)).flatten(0, 1)
        levels = sigma.repeat_interleave(self.M)
        answer = self._all if self.neighbours is None else self._near
        return answer(queries, levels, index).reshape(len(y), self.M, *y.shape[1:]).mean(1)

    def _perturbations(self, y: Tensor) -> Tensor:
        """eps, shape (B, M, C, H, W) or (1, M, C, H, W)."""
        if self.perturbations == "fresh":  # a sampler's noise has its own generators
            return torch.stack([torch.randn_like(y) for _ in range(self.M)], dim=1)
        if self._trajectory is not None and len(self._trajectory) == len(y):
            return self._trajectory
        generator = torch.Generator().manual_seed(self.seed)
        shape = 1, self.M, *y.shape[1:]
        with outside_transforms():  # the same for every picture that vmap maps over
            return torch.randn(shape, generator=generator, dtype=torch.float64)

    def _keys(self, B: int, n: int) -> Tensor:
        """A random number for each image and query, (B, M, n): the least are drawn."""
        like = torch.empty(B, self.M, n)
        if self.perturbations == "fresh":
            return torch.randn_like(like)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(like.shape[1:], generator=generator).expand_as(like)

    def _all(self, y: Tensor, sigma: Tensor, index: np.ndarray) -> Tensor:
        asked = self.kernel, self.compared, index, y, sigma, self._collection
        return posterior(*asked, values=self.answers)[1]

    @property
    def _collection(self) -> Collection:
        return Collection.of_images(self.corpus.shape[1:])

    def _near(self, y: Tensor, sigma: Tensor, index: np.ndarray) -> Tensor:
        K = min(self.neighbours or 1, len(index))
        L = min(self.uniform, len(index) - K)
        if mapped(y):
            raise ValueError(
                "smoothed looks the neighbours of every picture up, which torch.func.vmap does not "
                "map over: give a batch of pictures, or compare with all images (neighbours=None)"
            )
        with outside_transforms():
            keys = self._keys(len(y) // self.M, len(index)).flatten(0, 1).numpy() if L else None
            queries = values(y).flatten(1).float().numpy()
        found = self._index(index).kneighbors(queries, n_neighbors=K, return_distance=False)
        D = []
        for p, near in enumerate(found):
            query, level = y[p : p + 1], sigma[p : p + 1]
            rest = np.delete(np.arange(len(index)), near)
            drawn = rest[:0] if keys is None else rest[np.argsort(keys[p][rest])[:L]]
            D.append(self._weighted(query, level, index[near], index[drawn], len(rest)))
        return torch.cat(D)

    def _weighted(
        self, y: Tensor, sigma: Tensor, near: np.ndarray, drawn: np.ndarray, rest: int
    ) -> Tensor:
        """The mean over `near`, and over `drawn` with each standing for rest / L images."""

        def asked(index: np.ndarray) -> tuple[Fold, Tensor]:
            where = np.sort(index), y, sigma, self._collection
            return posterior(self.kernel, self.compared, *where, values=self.answers)

        first, D = asked(near)
        if len(drawn) == 0:
            return D
        other, D_other = asked(drawn)
        # log of the two sums' ratio, whose gradient is (D - y) / sigma^2 - (D_other - y) / sigma^2,
        # with means of what is compared for D
        ratio = first.log_partition - other.log_partition - math.log(rest / len(drawn))
        apart = D - D_other
        if self.view is not None:
            apart = self.view.process.apply(apart, self.view.t)
        a = torch.sigmoid(with_slope(ratio[:, 0, 0], apart / sigma**2, y))
        a = a[:, None, None, None]
        return a * D + (1 - a) * D_other

    def _index(self, index: np.ndarray) -> Any:
        """scikit-learn's index of the images at `index`, made once."""
        from sklearn.neighbors import NearestNeighbors

        key = index.tobytes()
        if key not in self._indexes:
            x = units_of_x(self.compared[index]).flatten(1).float().numpy()
            self._indexes = {key: NearestNeighbors(algorithm="brute").fit(x)}
        return self._indexes[key]

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), **self._own()}

    def settings(self) -> dict[str, object]:
        return {**super().settings(), **self._own()}

    def _own(self) -> dict[str, Any]:
        return {
            "M": self.M,
            "neighbours": self.neighbours,
            "uniform": self.uniform,
            "perturbations": self.perturbations,
            "seed": self.seed,
        }
