"""Importance sampling of patches, for posteriors that are too flat for enumeration.

Every node of the index has a surrogate: a Gaussian in the leading components of its patches, whose
weight under a query has a closed form. Similar queries form a group and share one proposal,
the mean of their normalized surrogate weights. A sample is drawn in two stages, both systematic in
the order of the tree (Madow 1949), so that similar patches are sampled evenly:

    leaves     with a probability in proportion to the proposal of their node
    patches    of a sampled leaf, in proportion to the mean of their weights under the group's
               queries by the codes of their embedding

Sampled patches are compared from the bytes of the images. The sums over all patches are estimated
with inverse inclusion probabilities (Horvitz and Thompson 1952); patches whose probability would
exceed 1 are always included. The rest of the sample is divided into `REPLICATES` replicates, whose
spread gives the standard error of S / Z.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from scoremachine.core.fold import Fold
from scoremachine.engines.chunks import fill
from scoremachine.engines.search.distances import FAR, LOG2E, Queries
from scoremachine.engines.search.floats import LANES
from scoremachine.engines.search.index import Index
from scoremachine.engines.search.patches import Windows
from scoremachine.engines.search.sampled import REPLICATES, Surrogate, moments, sample

GROUP = 32  # queries that share their samples
WIDEST = 3.0  # the largest log of a relative variance that a proposal allows for
PILOT = np.array([4_000.0, 8_000.0])  # leaves and patches of a first sample
GROWTH = 32.0  # the largest size of a sample, as a multiple of the pilot
STANDARD_ERRORS = 3.0  # in the estimated error: about 99% of a t distribution, for three channels
ROUNDS, START = 3, (0.3, 0.7, 0.1)  # the most samples of a query, and their systematic starts
CAUTION = 1.2  # factor by which the target error of the next sample is smaller
EFFECTIVE = 200.0  # the least effective sample size that is trusted
LIGHT = 0.05  # the largest mass of a patch outside the stratum, as a share of the largest error
FLAT = 8.0  # effective number of sources above which a sample alone is trusted
ROUNDED = 1e-6  # relative rounding error of the weight of the nearest patch known
COSTS = np.array([7e-7, 4e-7])  # seconds of one core for a leaf and a patch of a group
PER_NUMBER = 2e-9  # seconds of one core for a value of a sampled patch and a group


class Moments(NamedTuple):
    """Means and variances of the first coordinates of the patches of every node.

    Attributes:
        mean, variance: float32 (supers, first, 16).
        counts: The number of patches of a node, copies counted, float32 (supers, 16).
        leading: How many of these coordinates are components.
    """

    mean: np.ndarray
    variance: np.ndarray
    counts: np.ndarray
    leading: int

    @classmethod
    def of(cls, index: Index) -> Moments:
        """The moments of the nodes of an index."""
        t = index.tree
        mean, variance = np.zeros((2, len(t.widest), t.first, LANES), np.float32)
        fill(moments, (t, mean, variance))
        return cls(mean, variance, t.node_counts.reshape(-1, LANES), index.embedding.leading)

    def surrogate(self, noise: float) -> Surrogate:
        """The surrogates at a noise level with variance `noise`."""
        n, some = np.float32(noise), slice(None, self.leading)
        variance = n + self.variance[:, some]
        with np.errstate(divide="ignore"):
            offset = np.log2(self.counts) - np.log2(variance / n).sum(1) / 2
        rest = self.mean[:, self.leading :] ** 2 + self.variance[:, self.leading :]
        widening = np.exp(np.minimum(rest.sum(1) / n, WIDEST) / 2)
        arrays = self.mean[:, some], LOG2E / 2 / variance, np.maximum(offset, -FAR), widening
        return Surrogate(self.leading, *(a.astype(np.float32).reshape(-1) for a in arrays))


class Stratum(NamedTuple):
    """The exactly enumerated stratum of some queries: all patches up to some distance.

    Attributes:
        reach: The largest |q - s|^2, float64 (Q).
        Z, Z2, S: Their sums, relative to the weight of the nearest patch known, float64 (Q), (Q)
            and (Q, C).
    """

    reach: np.ndarray
    Z: np.ndarray
    Z2: np.ndarray
    S: np.ndarray

    @classmethod
    def of(cls, fold: Fold, best: np.ndarray, half: np.ndarray, nats: np.ndarray) -> Stratum:
        """From the fold of the patches with at least e^-nats of the weight of the nearest known."""
        m, Z, Z2, S = (a.numpy() for a in (fold.m, fold.Z, fold.Z2, fold.S))
        with np.errstate(over="ignore", invalid="ignore"):  # then there is no estimate
            scale = np.exp(m + best * half)
            scale[scale < 1 - ROUNDED] = np.nan  # nor if the nearest known was missed
            return cls(best + nats / half, Z * scale, Z2 * scale**2, S * scale[:, None])

    def at(self, some: np.ndarray) -> Stratum:
        """The stratum of some of the queries."""
        return Stratum(*(a[some] for a in self))


class Targets(NamedTuple):
    """The queries whose sums are estimated.

    Attributes:
        index, windows: The index, and its patches in the images.
        surrogate: Its surrogates at the noise level.
        queries: All queries of a class.
        centred: Their windows minus the mean, float64 (Q, D).
        best: |q - s|^2 of the nearest patch known, float64 (Q).
    """

    index: Index  # type: ignore[assignment]  # which hides tuple.index
    windows: Windows
    surrogate: Surrogate
    queries: Queries
    centred: np.ndarray
    best: np.ndarray


class Estimate(NamedTuple):
    """Estimated sums of some queries, relative to the weight of the nearest patch known.

    Attributes:
        Z, Z2, S: As in a fold, (Q), (Q) and (Q, C).
        error: `STANDARD_ERRORS` standard errors of S / Z, in the channel where they are largest.
        effective: Kish's effective sample size of the randomly sampled patches.
    """

    Z: np.ndarray
    Z2: np.ndarray
    S: np.ndarray
    error: np.ndarray
    effective: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray, stratum: Stratum | None) -> Estimate:
        """From sums over the patches outside the stratum, float64 (REPLICATES + 1, 3 + C, Q)."""
        Z, Z2, _, *S = sums.sum(0)
        S, sampled = np.stack(S), sums[:REPLICATES]
        if stratum is not None:
            Z, Z2, S = Z + stratum.Z, Z2 + stratum.Z2, S + stratum.S.T
        with np.errstate(all="ignore"):  # if no patch was found, the error is not finite
            S = np.clip(S, -Z, Z)  # values are in [-1, 1]
            off = (sampled[:, 3:] - sampled[:, :1] * (S / Z)) / Z
            variance = np.square(off - off.mean(0)).sum(0).max(0)
            error = STANDARD_ERRORS * np.sqrt(variance * REPLICATES / (REPLICATES - 1))
            effective = Z**2 / sampled[:, 2].sum(0)
        return cls(Z, Z2, S.T, np.where(np.isfinite(error), error, np.inf), effective)


def grouped(E: np.ndarray) -> np.ndarray:
    """Groups of similar queries by their components (Q, leading): int64 (groups, `GROUP`).

    They are halved along the component of most variance; the last group is padded.
    """
    order, pieces = np.arange(len(E)), [slice(0, len(E))]
    while pieces:
        piece = pieces.pop()
        n = piece.stop - piece.start
        if n > GROUP:
            some = order[piece]
            order[piece] = some[np.argsort(E[some, E[some].var(0).argmax()], kind="stable")]
            middle = piece.start + -(-n // GROUP) // 2 * GROUP
            pieces += [slice(piece.start, middle), slice(middle, piece.stop)]
    return np.pad(order, (0, -len(E) % GROUP), mode="edge").reshape(-1, GROUP)


def estimate(
    x: Targets,
    members: np.ndarray,
    size: np.ndarray,
    start: float,
    stratum: Stratum | None,
) -> tuple[Estimate, np.ndarray]:
    """Estimates the sums of groups of queries from one sample for each.

    Arguments:
        x: The queries.
        members: Which of them form the groups, int64 (groups, `GROUP`).
        size: How many leaves and patches to sample, float64 (groups, 2).
        start: The start of the systematic samples, in [0, 1).
        stratum: The enumerated stratum of all queries.

    Returns:
        The estimate for `members`, flat, and the numbers of sampled leaves and patches,
        (groups, 2).
    """
    t, s, C, n = x.index.tree, x.surrogate, x.windows.shape[2], len(members)
    unit, at = LOG2E * float(x.queries.half[0]), members.reshape(-1)
    E = x.queries.E.reshape(len(x.best), -1)[at]
    kept = np.delete(E, np.s_[s.leading : t.first], 1)  # the others are norms
    y = x.centred[at]
    D = -(-y.shape[1] // LANES) * LANES
    constant = (x.best[at] - (y**2).sum(1)) * unit
    total = constant + (E[:, : s.leading].astype(np.float64) ** 2).sum(1) * unit
    cut = np.full(len(at), FAR) if stratum is None else (x.best - stratum.reach)[at] * unit
    y = np.pad(2 * unit * y, ((0, 0), (0, D - y.shape[1])))
    arrays = (
        a.astype(np.float32).reshape(n, -1) for a in (2 * unit * kept, y, constant, total, cut)
    )
    mean = np.zeros(D + LANES, np.float32)
    mean[: x.centred.shape[1]] = x.index.embedding.mean + 1
    starts = (start + np.arange(n)[:, None] * (math.sqrt(5) - 1) / 2) % 1
    spent = np.zeros((n, 2), np.int64)
    sums = np.zeros((n, (REPLICATES + 1) * (3 + C) * GROUP), np.float32)
    fill(
        sample,
        (t, x.windows, x.queries, s, np.float32(unit), mean),
        (members, *arrays, size, starts, spent, sums),
    )
    by = sums.reshape(n, REPLICATES + 1, 3 + C, GROUP).astype(np.float64).transpose(1, 2, 0, 3)
    some = None if stratum is None else stratum.at(at)
    return Estimate.of(by.reshape(REPLICATES + 1, 3 + C, -1), some), spent


def sampled(
    x: Targets, at: np.ndarray, error: float, seconds: float, stratum: Stratum | None = None
) -> tuple[Estimate, float]:
    """Estimates the sums of the queries `at`, with errors of at most `error` if possible.

    A pilot sample determines the size of the next one, and so on for up to `ROUNDS` samples. An
    estimate that is not trusted gets an infinite error: its effective sample size or its effective
    number of sources is small; or the sample has missed the nearest patch known, and no others are
    as heavy; or a patch outside the stratum may have too much weight.

    Arguments:
        x: All queries of a class.
        at: Some of them.
        error: The largest error of a pixel.
        seconds: The budget, in seconds of one core.
        stratum: The enumerated stratum of all queries.

    Returns:
        The estimate, and the seconds of one core that it cost.
    """
    E = x.queries.E.reshape(len(x.best), -1)[:, : x.surrogate.leading]
    prices = COSTS + np.array([0, PER_NUMBER * x.centred.shape[1]])
    shapes = (), (), (x.windows.shape[2],), (), ()
    result = Estimate(*(np.full((len(x.best), *shape), np.inf) for shape in shapes))
    scale, cost, pending = np.ones(len(x.best)), 0.0, at
    for step in range(ROUNDS):
        levels = np.ceil(np.log2(scale[pending]) / 2)  # queries with samples of similar size
        alike = [pending[levels == level] for level in np.unique(levels)]
        groups = np.concatenate([some[grouped(E[some])] for some in alike])
        size = scale[groups].max(1)
        price = size * (PILOT @ prices)
        cheapest = np.argsort(price, kind="stable")
        groups = groups[np.sort(cheapest[np.cumsum(price[cheapest]) + cost <= seconds])]
        if not len(groups):
            break
        members, size = groups.reshape(-1), scale[groups].max(1)[:, None] * PILOT
        new, spent = estimate(x, groups, size, START[step], stratum)
        cost += float((spent @ prices).sum())
        trusted = new.effective >= EFFECTIVE
        if stratum is None:  # the nearest patch known was found, or many are as heavy
            trusted &= new.Z2 >= 1 - ROUNDED
            # if a few patches dominate a posterior, a sample may have missed others
            trusted &= (new.Z > FLAT) & (new.Z**2 > FLAT * new.Z2)
        else:
            nats = (stratum.reach - x.best)[members] * x.queries.half[0]
            trusted &= np.exp(-nats) <= 2 * LIGHT * error * new.Z
        scale[members] = np.repeat(size[:, 0] / PILOT[0], GROUP)
        scale[members] *= np.maximum((CAUTION * new.error / error) ** 2, 1.5)
        for whole, part in zip(result, new, strict=True):
            whole[members] = part
        result.error[members[~trusted]] = np.inf
        pending = pending[(result.error[pending] > error) & (scale[pending] <= GROWTH)]
        if not len(pending):
            break
    return Estimate(*(a[at] for a in result)), cost
