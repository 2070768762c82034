"""The fold: every machine is a softmax mean over a source, and a softmax mean is a monoid.

For one site the sources' logits l_s and values v_s enter through

    m = max l_s    Z = sum e^(l_s - m)    Z2 = sum e^(2 (l_s - m))    S = sum e^(l_s - m) v_s

and two such summaries merge by rescaling both to the larger m. Tiles of the corpus, threads,
displacements and devices are all the same merge. One pass gives the mean S / Z, the log-density
(m + log Z), the effective number of sources (Z^2 / Z2) and the leading sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scoremachine.progress import bar
from scoremachine.windows import Collection

SKIPPED = 1e-5  # twice the weight that the skipped sources of a site may have together
TILE = 2**29  # logits per picture in one call of a kernel: about half a second


@dataclass
class Fold:
    """What the sources seen so far say at every site. All float64 but `places`.

    Attributes:
        m: The largest logit, shape (B, *sites).
        Z: Sum of e^(l - m), shape (B, *sites).
        Z2: Sum of e^(2 (l - m)), shape (B, *sites).
        S: Sum of e^(l - m) v, shape (B, C, *sites); (B, C, H, W) for the one site of a machine
            that looks at whole images; (B, 0, *sites) where a second pass makes the mean.
        logits: The k largest logits, falling, shape (B, k, *sites).
        places: Where they come from, int64, shape (B, k, *sites): (n H + row) W + column, with n
            the position in the corpus and (row, column) the source pixel under the site.
    """

    m: Tensor
    Z: Tensor
    Z2: Tensor
    S: Tensor
    logits: Tensor
    places: Tensor

    def merge(self, other: Fold) -> Fold:
        """The fold of both sets of sources."""
        m = torch.maximum(self.m, other.m)
        a, b = _exp(self.m - m), _exp(other.m - m)
        logits = torch.cat([self.logits, other.logits], dim=1)
        places = torch.cat([self.places, other.places], dim=1)
        k = self.logits.shape[1]
        order = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :k]
        return Fold(
            m,
            a * self.Z + b * other.Z,
            a**2 * self.Z2 + b**2 * other.Z2,
            a[:, None] * self.S + b[:, None] * other.S,
            logits.gather(1, order),
            places.gather(1, order),
        )

    @property
    def mean(self) -> Tensor:
        """S / Z, the softmax mean."""
        return self.S / self.Z[:, None]

    @property
    def log_partition(self) -> Tensor:
        """log sum e^l, shape (B, *sites)."""
        return self.m + torch.log(self.Z)

    @property
    def effective_sources(self) -> Tensor:
        """Z^2 / Z2: how many equally weighted sources would be as concentrated, >= 1."""
        return self.Z**2 / self.Z2

    @property
    def leader_weights(self) -> Tensor:
        """The posterior weights of the k leading sources, shape (B, k, *sites)."""
        return torch.exp(self.logits - self.m[:, None]) / self.Z[:, None]


class Kernel(Protocol):
    """What a kernel answers. Logits lack the term -|y|^2 / (2 sigma^2), common to all sources."""

    def fold(
        self,
        images: np.ndarray,
        index: np.ndarray,
        y: Tensor,
        sigma: Tensor,
        collection: Collection,
        T: float,
        leaders: int,
        known: Fold | None,
    ) -> Fold:
        """Folds images[index].

        `y` is float64 on the CPU, wrapped already where the boundary is circular. Sources more
        than T nats below their site's leader may be left out; `known` is the fold of the tiles
        before, whose leaders may be relied on.
        """

    def compose(
        self,
        images: np.ndarray,
        index: np.ndarray,
        y: Tensor,
        sigma: Tensor,
        collection: Collection,
        T: float,
        known: Fold,
    ) -> Tensor:
        """sum_i r_i mu_i of the sources images[index], with the whole fold known: (B, C, H, W)."""


def _exp(x: Tensor) -> Tensor:
    """exp whose bits do not depend on where in the tensor an element lies, as torch's may."""
    return torch.exp(x) if x.is_cuda else torch.from_numpy(np.exp(x.numpy()))


def posterior(
    kernel: Kernel,
    images: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    leaders: int = 0,
) -> tuple[Fold, Tensor]:
    """Folds the images at `index` for every picture, and composes the sites' means.

    Arguments:
        kernel: The way to compute it, from `scoremachine.kernels`.
        images: The corpus, uint8, shape (N, C, H, W).
        index: Which images are the source, int64, shape (n,), n >= 1.
        y: The pictures, float64, shape (B, C, H, W).
        sigma: Their noise levels, float64, shape (B,).
        collection: Windows and source.
        leaders: How many leading sources to keep.

    Returns:
        The fold, with logits -|y - s|^2 / (2 sigma^2) over each window, and
        D = sum_i r_i mu_i / sum_i r_i, float64, shape (B, C, H, W).
    """
    query = wrap(y, collection) if collection.wraps else y
    T = math.log(2 * len(index) * len(collection.shifts) / SKIPPED)
    fold: Fold | None = None
    with bar("Comparing", total=len(index)) as progress:
        for rows in tiles(len(index), collection):
            part = kernel.fold(images, index[rows], query, sigma, collection, T, leaders, fold)
            fold = part if fold is None else fold.merge(part)
            progress.advance(rows.stop - rows.start)
    assert fold is not None
    if collection.whole or collection.response == "pixel":
        D = fold.mean
    else:
        D = torch.zeros_like(y)
        for rows in tiles(len(index), collection):
            D += kernel.compose(images, index[rows], query, sigma, collection, T, fold)
        D /= torch.from_numpy(collection.coverage)
    # the kernels leave out |y|^2, which is the same for all sources of a site
    constant = -box_sum((query**2).sum(1), collection) / (2 * sigma[:, None, None] ** 2)
    fold.m = fold.m + constant
    fold.logits = fold.logits + constant[:, None]
    return fold, D


def tiles(n: int, collection: Collection) -> Iterator[slice]:
    """Cuts n images into pieces of about `TILE` logits per picture, after a small first one.

    The first piece finds leaders, below which the others may skip. The pieces depend on nothing
    but n and the collection: neither batch, threads nor device.
    """
    per_image = math.prod(collection.grid) * len(collection.shifts)
    step = max(8, TILE // per_image // 8 * 8)
    start, stop = 0, max(8, min(step, n) // 16 // 8 * 8)
    while start < n:
        yield slice(start, min(stop, n))
        start, stop = stop, stop + step


def wrap(y: Tensor, collection: Collection) -> Tensor:
    """The query continued periodically by half a window on each side."""
    P, Q = collection.window
    H, W = collection.image
    rows = torch.arange(-(P // 2), H + P - 1 - P // 2) % H
    columns = torch.arange(-(Q // 2), W + Q - 1 - Q // 2) % W
    return y[:, :, rows][..., columns]


def box_sum(v: Tensor, collection: Collection) -> Tensor:
    """Sums v (B, Hq, Wq) over every site's box, shape (B, *sites)."""
    P, Q = collection.window
    if collection.cut:
        v = torch.nn.functional.pad(v, (Q // 2, Q // 2, P // 2, P // 2))
    for axis, p in ((1, P), (2, Q)):
        total = torch.cumsum(v, axis)
        total = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total], dim=axis)
        n = total.shape[axis] - p
        v = total.narrow(axis, p, n) - total.narrow(axis, 0, n)
    return v
