"""An embedding of patches in few dimensions that never makes a distance longer.

The leading principal components of a patch are an orthogonal projection, which lengthens no
distance. Neither does the norm of any other group of components: | |a| - |b| | <= |a - b|. The
embedding e(s) consists of leading components and norms of disjoint groups of others, so

    |e(q) - e(s)| <= |q - s|

for all q and s, without any assumption about noise. A norm discards the angle between the parts of
q and s in its group, so there are several groups, each of components with about equal variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from scoremachine.engines.chunks import fill, side_by_side
from scoremachine.engines.search.floats import by_fours
from scoremachine.engines.search.patches import Windows, extract

SAMPLE, LEAST, ONE_OF = 30_000, 5_000, 60  # size of the sample that components are computed from
LEADING, MORE = 16, 28  # components in the first bound, in addition to all norms
WIDE = 60  # kept components from which on MORE are used, and fewer components are in norms
ROUNDING = 1e-6  # the largest rounding error of e(s), relative to |s - mean|
CHUNK = 2**23  # values of patches that are embedded together


def sampled(n: int) -> int:
    """The number of patches, of n, from which components are computed."""
    return min(n, SAMPLE, max(LEAST, n // ONE_OF))


def computed(D: int, kept: int) -> int:
    """K: how many components are computed; those that are not kept are used for norms."""
    return min(D, 3 * kept if kept < WIDE else kept + 32)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The map e of patches of D values to m coordinates.

    The `first` coordinates alone bound a distance: leading components, norms of the groups of
    trailing ones, and, last, the norm of the remaining kept components. These components follow,
    and replace their norm in the second, tighter bound. Both parts are padded with zeros to
    multiples of four, before the last of the first ones, and at the end.

    Attributes:
        mean: The mean of the patches, float64 (D).
        V: The components as columns, leading ones first, |V| <= 1, float64 (D, K), K <= D.
        kept: The number of components that are coordinates of e.
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
        V = torch.flip(V, (1,))[:, : computed(D, kept)].contiguous().numpy()
        return cls(mean, V / max(1.0, np.linalg.norm(V, 2) * (1 + 1e-12)), kept)

    @property
    def leading(self) -> int:
        """The number of components among the `first` coordinates."""
        return min(LEADING if self.kept < WIDE else MORE, self.kept)

    @cached_property
    def edges(self) -> np.ndarray:
        """The boundaries of the groups of trailing components; the last is D."""
        D, K = self.V.shape
        return np.unique([min(n * self.kept, K) for n in (1, 2)] + [K, D])

    @property
    def first(self) -> int:
        """The number of coordinates of the first bound."""
        return by_fours(self.leading + len(self.edges) - 1 + (self.kept > self.leading))

    @property
    def m(self) -> int:
        """The number of coordinates of e."""
        return self.first + by_fours(self.kept - self.leading)

    def __call__(self, centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e of windows minus the mean, float64 (n, D), as float32 (n, m); and their |s|^2, (n,)."""
        z, squares, at = centred @ self.V, (centred**2).sum(1), self.leading
        E = np.zeros((len(z), self.m), np.float32)
        E[:, :at] = z[:, :at]
        for lo, hi in pairwise(self.edges):
            if hi <= z.shape[1]:
                within = (z[:, lo:hi] ** 2).sum(1)
            else:  # the remainder, by Pythagoras
                within = squares - (z[:, :lo] ** 2).sum(1)
            E[:, at] = np.sqrt(np.maximum(within, 0))
            at += 1
        if self.kept > self.leading:
            others = z[:, self.leading : self.kept]
            E[:, self.first - 1] = np.sqrt((others**2).sum(1))
            E[:, self.first : self.first + others.shape[1]] = others
        return E, squares

    def centred(self, w: Windows, places: np.ndarray) -> np.ndarray:
        """The patches at some places minus the mean, float64 (n, D)."""
        s = np.empty((len(places), len(self.mean)))
        fill(extract, (w, places, s))
        s -= self.mean
        return s

    def of_patches(self, w: Windows, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """e of the patches at some places, and their |s - mean|^2."""
        E, squares = np.zeros((len(places), self.m), np.float32), np.empty(len(places))

        def embed(piece: slice) -> None:
            E[piece], squares[piece] = self(self.centred(w, places[piece]))

        side_by_side(embed, self.pieces(len(places)))
        return E, squares

    def pieces(self, n: int) -> list[slice]:
        """n patches in pieces of about `CHUNK` values."""
        step = max(1, CHUNK // len(self.mean))
        return [slice(k, min(k + step, n)) for k in range(0, n, step)]
