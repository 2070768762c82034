"""A map of patches to few numbers that never makes a distance longer.

The leading principal components of a patch are an orthogonal projection, which shortens distances.
So does the norm of any other group of components: | |a| - |b| | <= |a - b|. Components and norms of
disjoint groups together are e(s), and

    |e(q) - e(s)| <= |q - s|

whatever q and s are: no assumption about noise. What the groups lose is the angle between the
parts of q and s that lie in them, so there are several, of components with about equal variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from scoremachine.kernels.parts import fill
from scoremachine.search import tree

SAMPLE, LEAST, ONE_OF = 30_000, 5_000, 60  # patches that the components are computed from
LEADING = 16  # components that with all the norms bound a distance by themselves
WIDE = 60  # kept components from which on fewer others have norms of their own
FEW = 2_000  # patches for which a library's threads are too much: they look for work long after
ROUNDING = 1e-6  # what rounding may do to e(s), relative to |s - mean|


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
        mean: Of the patches, float64 (D).
        V: Orthonormal columns, leading components first, float64 (D, K), K <= D.
        kept: How many components are numbers of e.
    """

    mean: np.ndarray
    V: np.ndarray
    kept: int

    @classmethod
    def of(cls, patches: np.ndarray, kept: int) -> Embedding:
        """From a sample of patches, float64 (n, D)."""
        D = patches.shape[1]
        mean = patches.mean(0)
        s = torch.from_numpy(patches - mean)
        _, V = torch.linalg.eigh(s.T @ s)
        kept = min(kept, D)
        V = torch.flip(V, (1,))[:, : computed(D, kept)].contiguous()
        return cls(mean, V.numpy(), kept)

    @property
    def leading(self) -> int:
        """How many components are among the `first`."""
        return min(LEADING, self.kept)

    @cached_property
    def edges(self) -> np.ndarray:
        """Where the groups of trailing components begin and end; the last ends at D."""
        D, K = self.V.shape
        return np.unique([min(n * self.kept, K) for n in (1, 2)] + [K, D])

    @property
    def first(self) -> int:
        """How many numbers bound a distance by themselves."""
        return tree.by_fours(self.leading + len(self.edges) - 1 + (self.kept > self.leading))

    @property
    def m(self) -> int:
        """How many numbers e has."""
        return self.first + tree.by_fours(self.kept - self.leading)

    def __call__(self, centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e of patches less the mean, float64 (n, D), as float32 (n, m); and their |s|^2, (n,)."""
        if len(centred) > FEW:
            z = centred @ self.V
        else:
            z = np.zeros((len(centred), self.V.shape[1]))
            fill(tree.products, (centred, self.V, z))
        E, squares = np.zeros((len(centred), self.m), np.float32), np.empty(len(centred))
        sizes = self.kept, self.leading, self.first
        fill(tree.numbers, (centred, z, sizes, self.edges, E, squares))
        return E, squares
