"""A map of patches to few numbers that never makes a distance longer.

The leading principal components of a patch are an orthogonal projection, which shortens distances.
So does the norm of any other group of components: | |a| - |b| | <= |a - b|. Components and norms of
disjoint groups together are e(s), and

    |e(q) - e(s)| <= |q - s|

whatever q and s are: no assumption about noise. What the groups lose is the angle between the
parts of q and s that lie in them, so there are several, of components with about equal variance.

Components are rounded to two bytes, so that those of patches, which are bytes themselves, are exact
sums of integers. Rounded ones are not quite orthogonal; they are made shorter until |V| <= 1. Then
|V's|^2 + |(1 - V V')^(1/2) s|^2 = |s|^2, and what they leave of |s|^2 is the norm of a projection
of its own: what is said above holds of them as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from scoremachine.engines.chunks import fill
from scoremachine.engines.search.components import Columns, Sizes, embedded, numbers, products
from scoremachine.engines.search.floats import LANES, WHOLE, by_fours, halves
from scoremachine.engines.search.patches import Windows

SAMPLE, LEAST, ONE_OF = 30_000, 5_000, 60  # patches that the components are computed from
LEADING, MORE = 16, 28  # components that with all the norms bound a distance by themselves
WIDE = 60  # kept components from which on these are more, and fewer others have norms of their own
FEW = 2_000  # patches for which a library's threads are too much: they look for work long after
ROUNDING = 1e-6  # what rounding may do to e(s), relative to |s - mean|
PARTS = 127  # of a step of a pixel: what the mean is told in


def sampled(n: int) -> int:
    """From how many of n patches components are computed."""
    return min(n, SAMPLE, max(LEAST, n // ONE_OF))


def computed(D: int, kept: int) -> int:
    """K: how many components are computed, for the norms of some that are not kept."""
    return min(D, 3 * kept if kept < WIDE else kept + 32)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The map e of patches of D numbers to m.

    The `first` numbers bound a distance by themselves: leading components, norms of the groups of
    trailing ones, and, last, the norm of the remaining kept components. These follow, and stand in
    the place of their norm where the bound is to be better. Both are filled up with zeros to
    multiples of four, before the last of the first ones, and at the end.

    Attributes:
        mean: About that of the patches, float64 (D).
        V: Columns, leading components first, |V| <= 1, float64 (D, K), K <= D.
        kept: How many components are numbers of e.
    """

    mean: np.ndarray
    V: np.ndarray
    kept: int

    @classmethod
    def of(cls, patches: np.ndarray, kept: int) -> Embedding:
        """From a sample of patches, float64 (n, D)."""
        D = patches.shape[1]
        mean = np.rint(PARTS * 127.5 * (patches.mean(0) + 1)) / (PARTS * 127.5) - 1
        s = torch.from_numpy(patches - mean)
        _, V = torch.linalg.eigh(s.T @ s)
        kept = min(kept, D)
        V = torch.flip(V, (1,))[:, : computed(D, kept)].contiguous().numpy()
        V = _whole(V) * _units(V)
        return cls(mean, V / max(1.0, np.linalg.norm(V, 2) * (1 + 1e-12)), kept)

    @property
    def leading(self) -> int:
        """How many components are among the `first`."""
        return min(LEADING if self.kept < WIDE else MORE, self.kept)

    @cached_property
    def edges(self) -> np.ndarray:
        """Where the groups of trailing components begin and end; the last ends at D."""
        D, K = self.V.shape
        return np.unique([min(n * self.kept, K) for n in (1, 2)] + [K, D])

    @property
    def first(self) -> int:
        """How many numbers bound a distance by themselves."""
        return by_fours(self.leading + len(self.edges) - 1 + (self.kept > self.leading))

    @property
    def m(self) -> int:
        """How many numbers e has."""
        return self.first + by_fours(self.kept - self.leading)

    @property
    def sizes(self) -> Sizes:
        """What the numbers are, for compiled code."""
        K = self.V.shape[1]
        return Sizes(K, self.kept, self.leading, self.first, self.edges.astype(np.int64))

    def columns(self, size: tuple[int, int]) -> Columns:
        """V and the mean for compiled code, of windows of `size`."""
        h, (D, K) = size[0], self.V.shape
        row, tiles = D // h, -(-(K + 1) // (2 * LANES))
        n, units, offsets = np.zeros((D, tiles * 2 * LANES)), *np.zeros((2, tiles * 2 * LANES))
        n[:, :K], units[:K], offsets[:K] = _whole(self.V), _units(self.V) / 127.5, self.V.sum(0)
        offsets[:K] += self.mean @ self.V
        mean = np.rint(PARTS * 127.5 * (self.mean + 1))
        n[:, K], units[K] = mean, 1 / PARTS
        words = np.zeros((h, by_fours(row), tiles * 2 * LANES))
        words[:, :row] = n.reshape(h, row, -1)
        words = words.reshape(h, -1, 4, tiles, 2, LANES).transpose(3, 0, 1, 4, 5, 2)
        bytes_ = np.concatenate(halves(words), 3).reshape(-1)
        return Columns(bytes_, units, offsets, float(((mean / PARTS) ** 2).sum()))

    def __call__(self, centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e of windows less the mean, float64 (n, D), as float32 (n, m); and their |s|^2, (n,)."""
        if len(centred) > FEW:
            z = centred @ self.V
        else:
            z = np.zeros((len(centred), self.V.shape[1]))
            fill(products, (centred, self.V, z))
        E, squares = np.zeros((len(centred), self.m), np.float32), (centred**2).sum(1)
        fill(numbers, (z.reshape(-1), squares, self.sizes, E))
        return E, squares

    def of_patches(
        self, w: Windows, places: np.ndarray, columns: Columns
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same of the patches at some places of images; `columns` for their size."""
        E, squares = np.zeros((len(places), self.m), np.float32), np.empty(len(places))
        fill(embedded, (w, places, columns, self.sizes, E, squares))
        return E, squares


def _units(V: np.ndarray) -> np.ndarray:
    """What 1 is where a column is told in whole numbers of two bytes."""
    return np.abs(V).max(0) / WHOLE


def _whole(V: np.ndarray) -> np.ndarray:
    """Columns in these units."""
    return np.rint(V / _units(V))
