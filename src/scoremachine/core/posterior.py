"""The posterior mean of every machine and its derivatives, as folds over a source.

A softmax mean is a fold of a commutative monoid. For one site, logits l_s and values v_s enter by

    m = max l_s    Z = sum e^(l_s - m)    Z2 = sum e^(2 (l_s - m))    S = sum e^(l_s - m) v_s

and two such summaries merge by rescaling both to the larger m. Results of tiles of the corpus,
threads, displacements and devices are all combined by this merge. One pass gives the mean S / Z,
the log-density (m + log Z), the effective number of sources (Z^2 / Z2) and the leading sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import refused, stacked, tracked
from scoremachine.core.fold import Fold
from scoremachine.runtime.progress import Bar, bar

SKIPPED = 1e-5  # twice the largest total weight of the skipped sources of a site
BATCH = 64  # the most pictures in one call of an engine
LEAST = 1e-4  # least sigma with responses over windows: there the nearest sources have all weight
TILE = 2**29  # logits per picture in one call of an engine: about half a second
CHUNK = 2**24  # values of a source in memory at once, for a derivative by sigma

SECOND = (
    "there is no second derivative of D: first ones are exact by y, forward and backward, and of a "
    "log-density second ones too, as torch.func.hessian or double backward take them"
)
BY_SIGMA = (
    "there is no derivative by sigma here: only machines that compare whole images with the images "
    "as they are have one"
)
ONCE_BY_SIGMA = "there is no second derivative by sigma, nor of a derivative by sigma by y"
SEEN = (
    "there is no forward-mode derivative where a source's values are not its keys and sites "
    "contribute to windows: use reverse mode, as torch.func.vjp"
)


@dataclass(frozen=True)
class ScanRequest:
    """The request to an engine: a fold request over arrays.

    Attributes:
        keys: The images that pictures are compared with, shape (N, C, H, W): uint8, or float32 in
            units of x.
        index: Positions of the images that are the source, int64, shape (n,).
        y: The pictures, float64 on the CPU, shape (B, C, H, W); continued periodically on all
            sides (`wrap`) where the boundary is circular.
        sigma: Their noise levels, float64, shape (B,).
        collection: Windows and source.
        log_cutoff: Sources more than this many nats below their site's leader may be skipped, (B,).
        u: None, or the direction of a derivative, float64: (B, C, *sites) where sites contribute to
            their own pixel, in y's shape where they contribute to their windows. A source's value
            is then the number b_is, its inner product with u over the site's response window. For
            `Engine.response_covariance` u has y's shape, and b_is is the inner product over the
            query window.
        values: The images that are averaged, uint8 (N, C, H, W), if they are not the keys: v_s
            replaces s in every mean and in b_is.
    """

    keys: np.ndarray
    index: np.ndarray
    y: Tensor
    sigma: Tensor
    collection: Collection
    log_cutoff: Tensor
    u: Tensor | None = None
    values: np.ndarray | None = None

    @property
    def averaged(self) -> np.ndarray:
        """The images that are averaged: the values, or the keys if there are none."""
        return self.keys if self.values is None else self.values


class Engine(Protocol):
    """Computes folds. Its logits omit the term -|y|^2 / (2 sigma^2), common to all sources."""

    def batch(self, collection: Collection, channels: int, leaders: int) -> int:
        """How many pictures one call may have, so that the workspace is bounded."""

    def tiles(self, n: int, collection: Collection) -> Iterator[slice]:
        """The tiles into which a source of n images is to be cut, one for each call."""

    def fold(self, request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
        """The fold over the source, with the k = `leaders` leading sources of every site.

        `known` is the fold of the preceding tiles, whose leaders may be used for skipping.
        """

    def accumulate_response(self, request: ScanRequest, known: Fold) -> Tensor:
        """sum_is q_i a_is s, with the whole fold known: y's shape.

        a_is is the posterior weight w_is, or with u given w_is (b_is - mean of b_i), where the
        means are those of `known`. Without u, v_s replaces s.
        """

    def response_covariance(self, request: ScanRequest, known: Fold) -> Tensor:
        """Cov_i(v_sp, b_is) of every site i that contributes to its own pixel p, (B, C, *sites).

        b_is is the inner product of s with u over the site's query window: the directional
        derivative of D_p along u is this covariance over sigma^2. `known` is the whole fold.
        """


def posterior(
    engine: Engine,
    keys: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    leaders: int = 0,
    values: np.ndarray | None = None,
) -> tuple[Fold, Tensor]:
    """Folds the images at `index` for every picture, and composes the sites' means.

    Arguments:
        engine: Computes the folds; one of `scoremachine.engines`.
        keys: What pictures are compared with, uint8 or (in units of x) float32, (N, C, H, W).
        index: Positions of the images that are the source, int64, shape (n,), n >= 1.
        y: The pictures, float64, shape (B, C, H, W).
        sigma: Their noise levels, float64, shape (B,).
        collection: Windows and source.
        leaders: How many leading sources to record.
        values: What is averaged, uint8 (N, C, H, W), if it is not the keys.

    Returns:
        The fold, with logits -1/2 sum_d q[d] (y - s)[d]^2 / sigma^2 over each window, and
        D = sum_i r_i mu_i / sum_i r_i, float64, shape (B, C, H, W), differentiable by y.
    """
    sigma = collected(sigma, collection)
    scan = Scan(engine, keys, index, collection, leaders, values, tracked(y) or tracked(sigma))
    D, constant, *fields = _Mean.apply(y, sigma, scan)
    fold = Fold(*fields)
    return replace(fold, m=fold.m + constant, logits=fold.logits + constant[:, None]), D


def collected(sigma: Tensor, collection: Collection) -> Tensor:
    """The noise levels at which two passes agree on logits of up to D / sigma^2."""
    return sigma.clamp(min=LEAST) if collection.passes == 2 else sigma


@dataclass(frozen=True, eq=False)
class Scan:
    """The arguments of `posterior` apart from the pictures, as its derivatives need them too.

    Attributes:
        engine, keys, index, collection, leaders, values: See `posterior`.
        differentiated: Whether a derivative may be required.
    """

    engine: Engine
    keys: np.ndarray
    index: np.ndarray
    collection: Collection
    leaders: int = 0
    values: np.ndarray | None = None
    differentiated: bool = True

    def request(self, y: Tensor, sigma: Tensor, u: Tensor | None = None) -> ScanRequest:
        """The request for some pictures, and a direction u."""
        c = self.collection
        T = torch.full_like(sigma, math.log(2 * len(self.index) * c.sources_per_image / SKIPPED))
        if self.differentiated:  # a derivative divides what is skipped by sigma^2
            T += 2 * torch.log(2 / sigma).clamp(min=0)
        query = wrap(y, c) if c.wraps else y
        return ScanRequest(self.keys, self.index, query, sigma, c, T, u, self.values)

    def bar(self, text: str) -> Any:
        """A progress bar over the source."""
        return bar(text, total=len(self.index) * self.collection.passes)

    def mean(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """D, the |y|^2 term that engines omit from logits (B, *sites), and the fold's fields."""
        request, c = self.request(y, sigma), self.collection
        with self.bar("Comparing") as progress:
            fold = folded(self.engine, request, self.leaders, progress)
            if c.passes == 1:
                D = fold.mean
            else:
                D = accumulate_response(self.engine, request, fold, progress)
                D = (unwrap(D, c) if c.wraps else D) / torch.from_numpy(c.coverage)
        # the same for all sources of a site
        constant = -c.window_sum((request.y**2).sum(1)) / (2 * sigma[:, None, None] ** 2)
        return D, constant, *vars(fold).values()

    def derivative(
        self, x: Tensor, y: Tensor, sigma: Tensor, fold: Fold, transposed: bool
    ) -> Tensor:
        """J x, or J^T x if `transposed`, with the Jacobian J = dD/dy and the fold at y."""
        c, x = self.collection, x.contiguous()
        with self.bar("Differentiating") as progress:
            if c.whole:  # where J is symmetric
                if self.values is not None and not transposed:
                    raise NotImplementedError(SEEN)
                known = replace(fold, S=(x * fold.S).sum((1, 2, 3))[:, None, None, None])
                g = accumulate_response(self.engine, self.request(y, sigma, x), known, progress)
            elif c.response == "pixel" and transposed:
                known = replace(fold, S=(x * fold.S).sum(1, keepdim=True))
                g = accumulate_response(self.engine, self.request(y, sigma, x), known, progress)
                g = unwrap(g, c) if c.wraps else g
            elif c.response == "pixel":
                u = wrap(x, c) if c.wraps else x
                g = self.engine.response_covariance(self.request(y, sigma, u), fold)
                progress.advance(len(self.index))
            else:  # a symmetric matrix, divided by the coverage of the windows
                if self.values is not None and not transposed:
                    raise NotImplementedError(SEEN)
                coverage = torch.from_numpy(c.coverage)
                u = x / coverage if transposed else x
                request = self.request(y, sigma, wrap(u, c) if c.wraps else u)
                known = folded(self.engine, request, 0, progress)
                g = accumulate_response(self.engine, request, known, progress)
                g = unwrap(g, c) if c.wraps else g
                g = g if transposed else g / coverage
        return g / sigma[:, None, None, None] ** 2

    def by_sigma(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The sigma derivatives of D (B, C, H, W) and of log sum_s e^(l_s) (B,) of whole images.

        l_s = -|y - s|^2 / (2 sigma^2), so that dl_s/dsigma = |y - s|^2 / sigma^3 and
        dD/dsigma = Cov(s, |y - s|^2) / sigma^3.
        """
        c = self.collection
        if not (c.whole and c.source == "same" and self.values is None):
            raise NotImplementedError(BY_SIGMA)
        step, flat = max(1, CHUNK // y[0].numel()), y.flatten(1)
        chunks = [self.index[k : k + step] for k in range(0, len(self.index), step)]

        def read(ids: np.ndarray) -> Tensor:
            return units_of_x(self.keys[ids]).flatten(1)

        exactly = "donot_use_mm_for_euclid_dist"
        squares = torch.cat([torch.cdist(flat, read(n), compute_mode=exactly) for n in chunks], 1)
        squares **= 2
        w = torch.softmax(-squares / (2 * sigma[:, None] ** 2), 1)
        # relative to the nearest, since a covariance would be lost in the rounding of |y - s|^2
        above = torch.where(w > 0, squares - squares.amin(1, keepdim=True), 0.0)
        a = w * (above - (w * above).sum(1, keepdim=True)) / sigma[:, None] ** 3
        slope = torch.zeros_like(flat)
        for ids, some in zip(chunks, a.split(step, 1), strict=True):
            slope += some @ read(ids)
        return slope.reshape(y.shape), (w * squares).sum(1) / sigma**3


def _batches(
    scan: Scan, f: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """f of (B, ...) tensors, with as many pictures at a time as the engine's workspace allows."""
    step = scan.engine.batch(scan.collection, scan.keys.shape[1], scan.leaders)
    parts = [f(*part) for part in zip(*(x.split(step) for x in tensors), strict=True)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _mapped(
    function: Any, info: Any, dims: tuple[int | None, ...], tensors: Any, *rest: Any
) -> tuple[Any, Any]:
    """A `Function` of batches under `vmap`: its value on one larger batch."""
    N = info.batch_size
    found = function.apply(*stacked(N, dims[: len(tensors)], tensors), *rest)
    if isinstance(found, Tensor):
        return found.unflatten(0, (N, len(found) // N)), 0
    return tuple(x.unflatten(0, (N, len(x) // N)) for x in found), (0,) * len(found)


class _Mean(torch.autograd.Function):
    """D as a function of y and sigma; the other results of `Scan.mean` have no derivative.

    D is a softmax mean, so its derivative is a posterior covariance:

    dD_p / dy_d = q_p[d] Cov_p(s_p, s_d) / sigma^2 for a site p that contributes to its own pixel;
    in general u^T dD/dy = sum_is q_i w_is (b_is - mean of b_i) s / sigma^2, one more pass over the
    source (two, where the means of b are not known from the first).
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(y: Tensor, sigma: Tensor, scan: Scan) -> tuple[Tensor, ...]:
        return _batches(scan, scan.mean, y, sigma)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Scan], output: tuple[Tensor, ...]
    ) -> None:
        y, sigma, ctx.scan = inputs
        _, constant, m, Z, Z2, S, *rest = output
        ctx.mark_non_differentiable(constant, m, Z, Z2, S, *rest)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, sigma, m, Z, S)
        ctx.save_for_forward(y, sigma, m, Z, S)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if u is None:
            return None, None, None
        y, sigma, *known = ctx.saved_tensors
        by_y = by_sigma = None
        if ctx.needs_input_grad[0]:
            at = refused(y, SECOND), refused(sigma, SECOND)
            by_y = _Derivative.apply(u, *at, *known, ctx.scan, True)
        if ctx.needs_input_grad[1]:
            by_sigma = (u * _BySigma.apply(y, sigma, ctx.scan)[0]).flatten(1).sum(1)
        return by_y, by_sigma, None

    @staticmethod
    def jvp(
        ctx: Any, v: Tensor | None, dsigma: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        y, sigma, *known = ctx.saved_tensors
        along: list[Tensor] = []
        if v is not None:
            at = refused(y, SECOND), refused(sigma, SECOND)
            along.append(_Derivative.apply(v, *at, *known, ctx.scan, False))
        if dsigma is not None:
            slope = _BySigma.apply(y, sigma, ctx.scan)[0]
            along.append(dsigma[:, None, None, None] * slope)
        return (sum(along[1:], along[0]), *[None] * 8)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], y: Tensor, sigma: Tensor, scan: Scan
    ) -> tuple[Any, Any]:
        return _mapped(_Mean, info, dims, (y, sigma), scan)


class _Derivative(torch.autograd.Function):
    """J x, or J^T x if `transposed`: linear in x, and each is the other's backward pass."""

    generate_vmap_rule = False

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, sigma: Tensor, m: Tensor, Z: Tensor, S: Tensor, scan: Scan,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        def some(x: Tensor, y: Tensor, sigma: Tensor, *known: Tensor) -> tuple[Tensor]:
            m, Z, S = known
            fold = Fold(m, Z, Z, S, m[:, None][:, :0], m[:, None][:, :0].long())
            return (scan.derivative(x, y, sigma, fold, transposed),)

        return _batches(scan, some, x, y, sigma, m, Z, S)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, *at, ctx.scan, ctx.transposed = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*at)
        ctx.save_for_forward(*at)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        x = _Derivative.apply(g, *ctx.saved_tensors, ctx.scan, not ctx.transposed)
        return x, *[None] * 7  # the derivative by y is `refused`

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        return _Derivative.apply(x, *ctx.saved_tensors, ctx.scan, ctx.transposed)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        *tensors, scan, transposed = inputs
        return _mapped(_Derivative, info, dims, tensors, scan, transposed)


class _BySigma(torch.autograd.Function):
    """`Scan.by_sigma`, which itself has no derivative."""

    generate_vmap_rule = False

    @staticmethod
    def forward(y: Tensor, sigma: Tensor, scan: Scan) -> tuple[Tensor, ...]:
        return _batches(scan, scan.by_sigma, y, sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE_BY_SIGMA)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(ONCE_BY_SIGMA)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], y: Tensor, sigma: Tensor, scan: Scan
    ) -> tuple[Any, Any]:
        return _mapped(_BySigma, info, dims, (y, sigma), scan)


class _LogPartition(torch.autograd.Function):
    """A log-partition of whole images, with its derivative by sigma, computed if required."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, y: Tensor, sigma: Tensor, scan: Scan) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, y, sigma, ctx.scan = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, sigma)
        ctx.save_for_forward(y, sigma)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None or not ctx.needs_input_grad[2]:
            return g, None, None, None
        return g, None, g * _BySigma.apply(*ctx.saved_tensors, ctx.scan)[1], None

    @staticmethod
    def jvp(
        ctx: Any, value: Tensor | None, y: Tensor | None, dsigma: Tensor | None, _: None
    ) -> Tensor:
        at, _ = ctx.saved_tensors
        along = at.new_zeros(len(at)) if value is None else value
        if dsigma is None:
            return along
        return along + dsigma * _BySigma.apply(*ctx.saved_tensors, ctx.scan)[1]


def with_sigma_slope(value: Tensor, scan: Scan, y: Tensor, sigma: Tensor) -> Tensor:
    """`value` (B,), log sum_s e^(l_s) of whole images, made differentiable by sigma too."""
    return _LogPartition.apply(value, y, sigma, scan)


def units_of_x(images: np.ndarray | Tensor) -> Tensor:
    """Images in units of x, float64: uint8 is mapped to [-1, 1], floats are unchanged."""
    given = torch.as_tensor(images)
    x = given.double()
    return x / 127.5 - 1 if given.dtype == torch.uint8 else x


def folded(
    engine: Engine, request: ScanRequest, leaders: int, progress: Bar, known: Fold | None = None
) -> Fold:
    """The fold over the whole source, tile by tile, merged with an earlier fold `known`."""
    fold = known
    for rows in engine.tiles(len(request.index), request.collection):
        part = engine.fold(replace(request, index=request.index[rows]), leaders, fold)
        fold = part if fold is None else fold.merge(part)
        progress.advance(rows.stop - rows.start)
    assert fold is not None
    return fold


def accumulate_response(engine: Engine, request: ScanRequest, known: Fold, progress: Bar) -> Tensor:
    """`Engine.accumulate_response` over the whole source, tile by tile."""
    total = torch.zeros_like(request.y)
    for rows in engine.tiles(len(request.index), request.collection):
        total += engine.accumulate_response(replace(request, index=request.index[rows]), known)
        progress.advance(rows.stop - rows.start)
    return total


def batch(collection: Collection, channels: int, leaders: int) -> int:
    """`BATCH` pictures, whatever their size; see `Engine`."""
    return BATCH


def tiles(n: int, collection: Collection) -> Iterator[slice]:
    """`pieces` that take a CPU about half a second each."""
    return pieces(n, collection, TILE)


def pieces(n: int, collection: Collection, logits: int) -> Iterator[slice]:
    """Cuts n images into pieces of about `logits` logits per picture, after a small first one.

    The first piece finds leaders, so that the others can skip low logits. The pieces depend only on
    n and the collection, not on the batch, the threads or the device.
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
    """The adjoint of `wrap`: for every pixel the sum over its copies."""
    rows, columns = _periodic(collection)
    H, W = collection.frame
    total = g.new_zeros(*g.shape[:2], H, g.shape[3]).index_add_(2, rows, g)
    return g.new_zeros(*g.shape[:2], H, W).index_add_(3, columns, total)


def _periodic(collection: Collection) -> list[Tensor]:
    """For both axes: the original pixel at each position of the continued query."""
    return [
        torch.arange(-(p // 2), n + p - 1 - p // 2) % n
        for n, p in zip(collection.frame, collection.window.shape, strict=True)
    ]
