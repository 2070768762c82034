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
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.runtime.progress import Bar, bar

SKIPPED = 1e-5  # twice the weight that the skipped sources of a site may have together
BATCH = 64  # pictures in one call of a kernel
LEAST = 1e-4  # below, a response over windows is that of the nearest sources
TILE = 2**29  # logits per picture in one call of a kernel: about half a second


@dataclass(frozen=True)
class ScanRequest:
    """What is asked of a kernel.

    Attributes:
        images: The corpus as windows see it, shape (N, C, H, W): uint8, or float32 in units of x.
        index: Which of them are the source, int64, shape (n,).
        y: The pictures, float64 on the CPU, shape (B, C, H, W); continued periodically on all
            sides (`wrap`) where the boundary is circular.
        sigma: Their noise levels, float64, shape (B,).
        collection: Windows and source.
        T: Sources more than T nats below their site's leader may be left out, shape (B,).
        u: None, or the direction of a derivative, float64: (B, C, *sites) where sites answer for
            a pixel, (B, C, H, W) where they answer for their windows. A source's value is then
            the number b_is, its inner product with u over the site's response window.
        values: What a source answers with, uint8 (N, C, H, W), where that is not what is seen
            of it: v_s in place of s in every mean and in b_is.
    """

    images: np.ndarray
    index: np.ndarray
    y: Tensor
    sigma: Tensor
    collection: Collection
    T: Tensor
    u: Tensor | None = None
    values: np.ndarray | None = None

    @property
    def answers(self) -> np.ndarray:
        """What sources answer with."""
        return self.images if self.values is None else self.values


class Engine(Protocol):
    """What a kernel answers. Logits lack the term -|y|^2 / (2 sigma^2), common to all sources."""

    def tiles(self, n: int, collection: Collection) -> Iterator[slice]:
        """The pieces in which it wants a source of n images."""

    def fold(self, request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
        """The fold over the source, with the k = `leaders` leading sources of every site.

        `known` is the fold of the tiles before, whose leaders may be relied on.
        """

    def accumulate_response(self, request: ScanRequest, known: Fold) -> Tensor:
        """sum_is q_i a_is s, with the whole fold known: y's shape.

        a_is is the posterior weight w_is, or with u given w_is (b_is - mean of b_i), where the
        means are those of `known`. Without u, v_s stands where s does.
        """


def posterior(
    kernel: Engine,
    images: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    leaders: int = 0,
    values: np.ndarray | None = None,
) -> tuple[Fold, Tensor]:
    """Folds the images at `index` for every picture, and composes the sites' means.

    Arguments:
        kernel: The way to compute it, from `scoremachine.kernels`.
        images: The corpus, uint8 or (in units of x) float32, shape (N, C, H, W).
        index: Which images are the source, int64, shape (n,), n >= 1.
        y: The pictures, float64, shape (B, C, H, W).
        sigma: Their noise levels, float64, shape (B,).
        collection: Windows and source.
        leaders: How many leading sources to keep.
        values: What they answer with, where that is not what is compared, uint8 (N, C, H, W).

    Returns:
        The fold, with logits -1/2 sum_d q[d] (y - s)[d]^2 / sigma^2 over each window, and
        D = sum_i r_i mu_i / sum_i r_i, float64, shape (B, C, H, W), differentiable by y.
    """
    if len(y) > BATCH:  # a kernel keeps some numbers for every picture, site and part of its work
        parts = [
            posterior(kernel, images, index, *part, collection, leaders, values)
            for part in zip(y.split(BATCH), sigma.split(BATCH), strict=True)
        ]
        return Fold.batch(fold for fold, _ in parts), torch.cat([D for _, D in parts])
    if collection.passes == 2:  # which have to agree on logits of up to D / sigma^2
        sigma = sigma.clamp(min=LEAST)
    T = torch.full_like(sigma, math.log(2 * len(index) * collection.sources_per_image / SKIPPED))
    if y.requires_grad:  # what is left out is divided by sigma^2 in a derivative
        T += 2 * torch.log(2 / sigma).clamp(min=0)
    query = wrap(y.detach(), collection) if collection.wraps else y.detach()
    request = ScanRequest(images, index, query, sigma, collection, T, values=values)
    with bar("Comparing", total=len(index) * collection.passes) as progress:
        found: list[Fold] = []
        D = _Mean.apply(y, kernel, request, leaders, found, progress)
    fold = found[0]
    # the kernels leave out |y|^2, which is the same for all sources of a site
    constant = -collection.window_sum((query**2).sum(1)) / (2 * sigma[:, None, None] ** 2)
    fold = replace(fold, m=fold.m + constant, logits=fold.logits + constant[:, None])
    return fold, D


class _Mean(torch.autograd.Function):
    """D as a function of y. D is a softmax mean, so its derivative is a posterior covariance:

    dD_p / dy_d = q_p[d] Cov_p(s_p, s_d) / sigma^2 for a site p that answers for its pixel; in
    general u^T dD/dy = sum_is q_i w_is (b_is - mean of b_i) s / sigma^2, one more pass over the
    source (two, where the means of b are not known from the first).
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        kernel: Engine,
        request: ScanRequest,
        leaders: int,
        found: list[Fold],
        progress: Bar,
    ) -> Tensor:
        fold = folded(kernel, request, leaders, progress)
        found.append(fold)
        ctx.asked = kernel, request, fold
        c = request.collection
        if c.passes == 1:
            return fold.mean
        return accumulate_response(kernel, request, fold, progress) / torch.from_numpy(c.coverage)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        kernel, request, fold = ctx.asked
        c, u = request.collection, u.contiguous()
        with bar("Differentiating", total=len(request.index) * c.passes) as progress:
            if c.whole:
                known = replace(fold, S=(u * fold.S).sum((1, 2, 3))[:, None, None, None])
            elif c.response == "pixel":
                known = replace(fold, S=(u * fold.S).sum(1, keepdim=True))
            else:
                u = u / torch.from_numpy(c.coverage)
                known = folded(kernel, replace(request, u=u), 0, progress)
            g = accumulate_response(kernel, replace(request, u=u), known, progress)
        g /= request.sigma[:, None, None, None] ** 2
        return unwrap(g, c) if c.wraps else g, None, None, None, None, None


def units_of_x(images: np.ndarray | Tensor) -> Tensor:
    """Images as x, float64: uint8 from 0 to 255 become [-1, 1], floats stay what they are."""
    given = torch.as_tensor(images)
    x = given.double()
    return x / 127.5 - 1 if given.dtype == torch.uint8 else x


def with_slope(value: Tensor, slope: Tensor, y: Tensor) -> Tensor:
    """`value` (B,), with the gradient `slope` by y, both (B, C, H, W)."""
    return value.detach() + (slope.detach() * (y - y.detach())).flatten(1).sum(1)


def folded(
    kernel: Engine, request: ScanRequest, leaders: int, progress: Bar, known: Fold | None = None
) -> Fold:
    """The fold over the whole source, tile by tile, merged into what is `known` before."""
    fold = known
    for rows in kernel.tiles(len(request.index), request.collection):
        part = kernel.fold(replace(request, index=request.index[rows]), leaders, fold)
        fold = part if fold is None else fold.merge(part)
        progress.advance(rows.stop - rows.start)
    assert fold is not None
    return fold


def accumulate_response(kernel: Engine, request: ScanRequest, known: Fold, progress: Bar) -> Tensor:
    """`Engine.accumulate_response` over the whole source, tile by tile."""
    total = torch.zeros_like(request.y)
    for rows in kernel.tiles(len(request.index), request.collection):
        total += kernel.accumulate_response(replace(request, index=request.index[rows]), known)
        progress.advance(rows.stop - rows.start)
    return total


def tiles(n: int, collection: Collection) -> Iterator[slice]:
    """`pieces` of about half a second of a CPU."""
    return pieces(n, collection, TILE)


def pieces(n: int, collection: Collection, logits: int) -> Iterator[slice]:
    """Cuts n images into pieces of about that many logits per picture, after a small first one.

    The first piece finds leaders, below which the others may skip. The pieces depend on nothing
    but n and the collection: neither batch, threads nor device.
    """
    per_image = math.prod(collection.grid) * collection.sources_per_image
    step = max(8, logits // per_image // 8 * 8)
    start, stop = 0, max(8, min(step, n) // 16 // 8 * 8)
    while start < n:
        yield slice(start, min(stop, n))
        start, stop = stop, stop + step


def wrap(y: Tensor, collection: Collection) -> Tensor:
    """The query continued periodically by half a window on each side."""
    rows, columns = _periodic(collection)
    return y[:, :, rows][..., columns]


def unwrap(g: Tensor, collection: Collection) -> Tensor:
    """`wrap`'s adjoint: every pixel takes the sum over its copies."""
    rows, columns = _periodic(collection)
    H, W = collection.frame
    total = g.new_zeros(*g.shape[:2], H, g.shape[3]).index_add_(2, rows, g)
    return g.new_zeros(*g.shape[:2], H, W).index_add_(3, columns, total)


def _periodic(collection: Collection) -> list[Tensor]:
    """For both axes: the pixel at each place of the continued query."""
    return [
        torch.arange(-(p // 2), n + p - 1 - p // 2) % n
        for n, p in zip(collection.frame, collection.window.shape, strict=True)
    ]
