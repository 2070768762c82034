"""The certified search of one class of windows: passes over the tree until the error is certain.

A pass skips patches further away than some radius, and sums an upper bound of their mass: the
omitted mass. If that is more than the error allows, a second pass has a radius that is provably
sufficient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Class
from scoremachine.core.fold import Fold
from scoremachine.engines.chunks import PARTS, fill
from scoremachine.engines.compiled import NOTHING
from scoremachine.engines.search.distances import Queries
from scoremachine.engines.search.embedding import ROUNDING
from scoremachine.engines.search.floats import LANES
from scoremachine.engines.search.index import Index
from scoremachine.engines.search.initial_guess import initial_guess, propagate
from scoremachine.engines.search.patches import Windows
from scoremachine.engines.search.range_search import COSTS, range_search

BOXES, PATCHES = 23.0, 19.0  # nats below the nearest known patch at which the first pass skips
PROPAGATIONS = 2  # rounds of propagation of the initial guess to overlapping windows
PER_CHUNK = 0.125  # the largest share of a query's budget in each of the first chunks
SURVEYED = 2  # chunks of the index that are searched first, to extrapolate the total cost
PER_NUMBER = 0.35  # ns of one core for a value of a patch that is compared

Chunks = tuple[np.ndarray, ...]


@dataclass
class Budget:
    """The cost budget of a picture's search, in seconds of one core; below 0 if overspent."""

    seconds: float


@dataclass
class Search:
    """The search for the queries of a class of windows.

    Attributes:
        index, windows: The index, and its patches in the images.
        queries: The queries.
        best: |q - s|^2 of the nearest patch known, float64 (Q,).
        log_mass: An estimate of log Z, relative to that patch, mostly too small, (Q,).
        found: The fold of the queries, filled in by `certify`.
    """

    index: Index
    windows: Windows
    queries: Queries
    best: np.ndarray
    log_mass: np.ndarray
    found: Fold

    @classmethod
    def begin(cls, index: Index, w: Windows, q: Queries, of: Class, leaders: int) -> Search:
        """Starts with an initial guess from some nodes, propagated to overlapping windows."""
        Q = len(q.half)
        best, known, places = np.zeros(Q), np.zeros(Q), np.zeros(Q, np.int64)
        fill(initial_guess, (index.tree, w, q, best, known, places))
        for _ in range(PROPAGATIONS):
            nearer, there = best.copy(), places.copy()
            fill(propagate, (w, q, of.shape[1], best, places, nearer, there))
            mass = 1 + known * np.exp(
                (nearer - best) * q.half
            )  # a new nearest one, and those known
            known = np.where(nearer < best, mass, known)
            best, places = nearer, there
        return cls(index, w, q, best, np.log(known), blank(Q, w.shape[2], leaders, ()))

    @property
    def chunks(self) -> int:
        """The number of chunks in which the index is searched."""
        return min(PARTS, -(-len(self.index.tree.widest) // LANES))

    @property
    def prices(self) -> np.ndarray:
        """Nanoseconds for a node, a leaf, a second bound and a comparison."""
        return COSTS + np.array([0, 0, 0, PER_NUMBER * len(self.index.embedding.mean)])

    def certify(
        self, at: np.ndarray, error: float, budget: Budget, per_query: float = math.inf
    ) -> np.ndarray:
        """Searches for the queries `at` until the omitted mass is within the error.

        Arguments:
            at: Which queries.
            error: The largest error of a pixel.
            budget: The budget of all queries, from which the cost is subtracted.
            per_query: The budget of each query, in seconds; queries above it are left out.

        Returns:
            Those of `at` that are certified.
        """
        q, found = self.queries, self.found
        Z, omitted = found.Z.numpy(), found.omitted.numpy()
        allowed = error / 2  # the largest omitted mass
        log_cutoff = math.log(self.index.total / allowed) + 0.1  # always sufficient
        boxes, radius = (
            np.maximum(min(log_cutoff, nats) - self.log_mass, 1) for nats in (BOXES, PATCHES)
        )
        at = self._pass(at, boxes, radius, budget, per_query)
        again = at[(~(omitted <= allowed * Z) & (Z > 0))[at]]
        radius[again] = log_cutoff - np.log(Z[again])
        across = (q.fuzz / ROUNDING) ** 2 * q.half  # nats: no patch is further away
        while len(again):
            done = self._pass(again, radius, radius, budget, per_query)
            at = np.setdiff1d(at, np.setdiff1d(again, done))
            again = at[(~self._complete(radius) & (radius <= across))[at]]
            radius[again] *= 4
        complete = self._complete(radius) | (radius > across)
        return at[(complete & (omitted <= allowed * Z))[at]]

    def _complete(self, radius: np.ndarray) -> np.ndarray:
        """Whether the nearest patch known was found, and all leaders are within the radius."""
        m = self.found.m.numpy()
        complete = m >= -self.best * self.queries.half * (1 + 1e-12)
        if self.found.logits.shape[1]:
            complete &= self.found.logits.numpy()[:, -1] >= m - radius
        return complete

    def _pass(
        self,
        at: np.ndarray,
        boxes: np.ndarray,
        patches: np.ndarray,
        budget: Budget,
        per_query: float,
    ) -> np.ndarray:
        """One pass with radii in nats: fills `found` for some of the queries, and returns these.

        Queries that cost more than `per_query` are left out, and all if the budget is exceeded.
        """
        if not len(at) or budget.seconds <= 0:
            return at[:0]
        count, most, limit = self.chunks, 1e9 * per_query, 3e9 * budget.seconds / self.chunks
        chunks = self._blank(self.found.logits.shape[1])
        reach = boxes / self.queries.half, patches / self.queries.half  # squared distances
        cost, some = chunks[-2], min(SURVEYED, count)

        def search(which: slice, at: np.ndarray, most: float) -> bool:
            filled = tuple(a[which] for a in chunks)
            arguments = self.queries, at.astype(np.uint32), *reach, self.prices, limit, most
            fill(
                range_search,
                (which.start, count, self.index.tree, self.windows, *arguments),
                filled,
            )
            budget.seconds -= 1e-9 * float(filled[-2].sum())
            return bool(filled[-1].all())

        whole = search(slice(0, some), at, most * PER_CHUNK)
        survey = cost[:, at]
        at = at[(survey.sum(0) * (count / some) <= most) & (survey <= most * PER_CHUNK).all(0)]
        if not whole or 1e-9 * cost[:, at].sum() * (count / some - 1) > budget.seconds:
            budget.seconds = min(budget.seconds, 0.0)
            return at[:0]
        if some < count and not search(slice(some, count), at, most):
            budget.seconds = min(budget.seconds, 0.0)
            return at[:0]
        at = at[(cost[:, at] <= most).all(0)]
        self.best[at] = self._merge(chunks, at, self.found)
        return at

    def enumerate(self, at: np.ndarray, nats: np.ndarray, budget: Budget) -> Fold | None:
        """The fold of the patches that weigh at least e^-nats as much as the nearest one known.

        Arguments:
            at: Which queries.
            nats: float64 (Q,).
            budget: The budget, from which the cost is subtracted.

        Returns:
            The fold of all queries, empty for those not in `at`; None if the budget is exceeded.
        """
        chunks, reach, limit = self._blank(0), nats / self.queries.half, 1e9 * budget.seconds
        arguments = (
            self.queries._replace(fixed=True),
            at.astype(np.uint32),
            reach,
            reach,
            self.prices,
        )
        work = 0, self.chunks, self.index.tree, self.windows, *arguments, 3 * limit / self.chunks
        fill(range_search, (*work, math.inf), chunks)
        spent = float(chunks[-2].sum())
        budget.seconds -= 1e-9 * spent
        if spent > limit or not chunks[-1].all():
            return None
        found = blank(len(self.best), self.windows.shape[2], 0, ())
        self._merge(chunks, at, found)
        return found

    def _blank(self, leaders: int) -> Chunks:
        """The output arrays of the chunks of a search; see `range_search`."""
        n, Q = self.chunks, len(self.best)
        best = np.repeat(self.best[None], n, 0)
        return (
            best,
            best.copy(),
            np.zeros((n, Q * LANES), np.float32),
            np.full((n, Q), NOTHING),
            np.zeros((n, Q)),
            np.zeros((n, Q)),
            np.zeros((n, Q, self.windows.shape[2])),
            np.full((n, leaders, Q, 1), NOTHING),
            np.full((n, leaders, Q, 1), -1),
            np.zeros((n, Q)),
            np.zeros((n, 1), np.int64),
        )

    def _merge(self, chunks: Chunks, at: np.ndarray, into: Fold) -> np.ndarray:
        """Merges the chunks' folds of the queries `at`; returns |q - s|^2 of the nearest."""
        n, half = len(chunks[0]), self.queries.half[at]
        near, ref, omitted, *totals = (
            a[:, at] for a in (*chunks[:2], chunks[2].reshape(n, -1, LANES), *chunks[3:7])
        )
        logits, places = (np.moveaxis(a[..., 0], 1, 2)[:, at] for a in chunks[7:9])
        fold = Fold.of_parts(*totals, logits, places)
        for have, new in zip(vars(into).values(), vars(fold).values(), strict=True):
            have[at] = new
        with np.errstate(over="ignore"):
            scale = np.exp(-ref * half - fold.m.numpy())
        # a thousandth more than the sums of skipped weights, which are computed in float32
        mass = 1.001 * (omitted.astype(np.float64).sum(2) * scale).sum(0)
        into.omitted[at] = torch.from_numpy(mass)
        return near.min(0)


def blank(B: int, C: int, leaders: int, sites: tuple[int, ...]) -> Fold:
    """An empty fold, to be filled in or merged into."""

    def full(value: float, *k: int) -> Tensor:
        return torch.full((B, *k, *sites), value, dtype=torch.float64)

    m, zero, places = full(NOTHING), full(0.0), full(-1.0, leaders).long()
    return Fold(m, zero, zero.clone(), full(0.0, C), full(NOTHING, leaders), places, zero.clone())
