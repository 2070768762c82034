"""The smoothed score machine: the ideal one, averaged over perturbed queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import mapped, outside_transforms, values, with_slope
from scoremachine.core.posterior import units_of_x
from scoremachine.core.schedules import SmoothingSchedule
from scoremachine.core.shares import Shares, mixed, of_images
from scoremachine.data.corpus import Corpus
from scoremachine.machines.machine import Batch, LocalMachine
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.validation import check_integer
from scoremachine.sources.source import Evidence, FoldRequest

PERTURBATIONS, UNIFORM = 1, 2  # streams of a picture's noise


class SmoothedScore(LocalMachine):
    r"""The mean of the ideal machine's D at M perturbed queries (sigma-CFDM).

    D(y, sigma) = 1/M sum_m D_ideal(y + delta (1 + sigma) eps_m, sigma)

    Scarvelis et al. 2310.12395. In the paper's time t, where z = t x + (1 - t) eps, that is
    k_t(z + delta eps_m) / t: sigma = (1 - t) / t, and 1 / t = 1 + sigma. At the end of the flow its
    samples are means of M images.

    Arguments:
        delta: Standard deviation of the perturbations, a `SmoothingSchedule`, or "auto" (default):
            an eighth of the median distance between nearest neighbours, so that the perturbed
            queries select different images whose mean is still near them.
        M: The number of perturbed queries.
        neighbours: Compare each query with its K nearest images and `uniform` others only (None:
            with all images, exactly). The nearest are found by scikit-learn.
        uniform: The number L of images that are sampled uniformly from the rest, each of which
            represents (N - K) / L images.
        perturbations: "fixed": in `generate` every picture keeps its own eps_1 ... eps_M along its
            trajectory; in other calls they depend on the machine's seed only, so that D is a
            function of y and sigma. "fresh": sampled anew at every step.
        seed: Of the machine's own perturbations, and of the uniform sampling.
        corpus, settings: See `Machine`.
    """

    name = "smoothed"
    locality = "delta"
    delta: SmoothingSchedule | str

    def __init__(
        self,
        corpus: Corpus,
        delta: float | SmoothingSchedule | str = "auto",
        M: int = 4,
        neighbours: int | None = None,
        uniform: int = 0,
        perturbations: str = "fixed",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(corpus, delta, **settings)
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
        self._neighbours: LRUCache[Any] = LRUCache(1)

    def choose(self) -> SmoothingSchedule:
        return SmoothingSchedule.constant(self._scale)

    def candidates(self) -> list[float]:
        return [0.0, *(self._scale * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0))]

    @property
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

    def mean(self, batch: Batch) -> Tensor:
        repeated = self._queries(batch)
        D = self._all(repeated) if self.neighbours is None else self._near(repeated)
        return D.reshape(len(batch.y), self.M, *batch.y.shape[1:]).mean(1)

    def shares(self, batch: Batch, k: int) -> Shares:
        repeated = self._queries(batch)
        leaders = self.M * k  # what leads for one query may be further down for another
        if self.neighbours is None:
            found = self._folded(repeated, repeated.index, leaders)
            each = of_images(found.mean, found.fold, self.corpus.shape[1:])
        else:
            each = self._near_shares(repeated, leaders)
        parts = [each.at(torch.arange(m, len(repeated.y), self.M)) for m in range(self.M)]
        w = torch.full((len(batch.y), self.M), 1 / self.M, dtype=torch.float64)
        return mixed(batch.y, w, parts, k)

    def _queries(self, batch: Batch) -> Batch:
        """M perturbed queries of every picture, those of one after the other's."""
        delta = torch.tensor([self.local_at(float(s)) for s in batch.level], dtype=torch.float64)
        # under a process, x_t is larger by the factor `scale`
        reach = (delta * (1 + batch.level) * self.source.scale)[:, None, None, None, None]
        queries = (batch.y[:, None] + reach * self._perturbations(batch)).flatten(0, 1)
        return replace(batch, y=queries, sigma=batch.sigma.repeat_interleave(self.M))

    def _stream(self, level: Tensor, kind: int) -> list[int]:
        """The stream of a picture's noise that this machine uses for one purpose."""
        if self.perturbations == "fixed":
            return [kind]
        return [kind, int(level[:1].contiguous().view(torch.int64))]  # one for each noise level

    def _perturbations(self, batch: Batch) -> Tensor:
        """eps, shape (B, M, C, H, W) or (1, M, C, H, W)."""
        shape = self.M, *batch.y.shape[1:]
        if batch.noise is not None:
            return batch.noise.normal(shape, *self._stream(batch.level, PERTURBATIONS))
        if self.perturbations == "fresh":
            return torch.randn(len(batch.y), *shape, dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        with outside_transforms():  # so that it is the same for all pictures under vmap
            return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    def _priorities(self, batch: Batch) -> Tensor:
        """A random number for each query and image, (B M, n): the smallest are sampled."""
        n, B = len(batch.index), len(batch.y) // self.M
        if self.perturbations == "fixed":
            generator = torch.Generator().manual_seed(self.seed)
            with outside_transforms():
                return torch.randn(self.M, n, generator=generator).repeat(B, 1)
        if batch.noise is None:
            return torch.randn(B * self.M, n)
        return batch.noise.normal((self.M, n), *self._stream(batch.level, UNIFORM)).flatten(0, 1)

    def _all(self, batch: Batch) -> Tensor:
        return self._folded(batch, batch.index).mean

    def _folded(self, batch: Batch, index: np.ndarray, k: int = 0) -> Evidence:
        return self.source.fold(FoldRequest(batch.y, batch.sigma, self._collection, index, k))

    @property
    def _collection(self) -> Collection:
        return Collection.of_images(self.corpus.shape[1:])

    def _near(self, batch: Batch) -> Tensor:
        return torch.cat([self._weighted(*one) for one in self._subsets(batch)])

    def _near_shares(self, batch: Batch, k: int) -> Shares:
        found, image = [], self.corpus.shape[1:]
        for query, near, drawn, rest in self._subsets(batch):
            first, a = self._folded(query, near, k), torch.ones(1, dtype=torch.float64)
            parts = [of_images(first.mean, first.fold, image)]
            if len(drawn):
                other = self._folded(query, drawn, k)
                parts.append(of_images(other.mean, other.fold, image))
                a = self._share_of_near(query, first, other, math.log(rest / len(drawn)))[0, 0, 0]
            w = torch.stack([a, 1 - a], 1)[:, : len(parts)]
            found.append(mixed(query.y, w, parts, k))
        return Shares.batch(torch.arange(len(found)).split(1), found)

    def _subsets(self, batch: Batch) -> Iterator[tuple[Batch, np.ndarray, np.ndarray, int]]:
        """Of every query: its K nearest images, others drawn uniformly, and how many others."""
        index = batch.index
        K = min(self.neighbours or 1, len(index))
        L = min(self.uniform, len(index) - K)
        if mapped(batch.y):
            raise ValueError(
                "smoothed looks up the neighbours of every picture, which torch.func.vmap does not "
                "support: give a batch of pictures, or compare with all images (neighbours=None)"
            )
        with outside_transforms():
            queries = values(batch.y).flatten(1).float().numpy()
            priorities = self._priorities(batch).numpy() if L else None
        found = self._index(index).kneighbors(queries, n_neighbors=K, return_distance=False)
        for p, near in enumerate(found):
            query = replace(batch, y=batch.y[p : p + 1], sigma=batch.sigma[p : p + 1])
            rest = np.delete(np.arange(len(index)), near)
            drawn = rest[:0] if priorities is None else rest[np.argsort(priorities[p][rest])[:L]]
            yield query, np.sort(index[near]), np.sort(index[drawn]), len(rest)

    def _weighted(self, batch: Batch, near: np.ndarray, drawn: np.ndarray, rest: int) -> Tensor:
        """The mean over `near`, and over `drawn`, each of which represents rest / L images."""
        first = self._folded(batch, near)
        if len(drawn) == 0:
            return first.mean
        other = self._folded(batch, drawn)
        a = self._share_of_near(batch, first, other, math.log(rest / len(drawn)))
        return a * first.mean + (1 - a) * other.mean

    def _share_of_near(
        self, batch: Batch, first: Evidence, other: Evidence, log_count: float
    ) -> Tensor:
        """The posterior share of the nearest images, (1, 1, 1, 1)."""
        assert first.fold is not None
        assert other.fold is not None
        # log of the ratio of the two sums, whose gradient is (D - y) / sigma^2
        # - (D_other - y) / sigma^2, where D and D_other are means of the keys
        ratio = first.fold.log_partition - other.fold.log_partition - log_count
        difference = self.source.seen(first.mean - other.mean)
        a = torch.sigmoid(with_slope(ratio[:, 0, 0], difference / batch.sigma**2, batch.y))
        return a[:, None, None, None]

    def _index(self, index: np.ndarray) -> Any:
        """scikit-learn's index of the images at `index`, made once."""
        from sklearn.neighbors import NearestNeighbors

        def fitted() -> Any:
            x = units_of_x(self.source.keys[index]).flatten(1).float().numpy()
            return NearestNeighbors(algorithm="brute").fit(x)

        return self._neighbours.get(index.tobytes(), fitted)
