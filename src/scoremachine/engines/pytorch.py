"""The fold in plain PyTorch, on CUDA if available, else on the CPU.

Every displacement between query and source is one shifted copy of a piece of the corpus; the rest
is `Collection.window_sum` and its adjoint. Requests that `triton` supports are passed to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scoremachine.core import posterior
from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest, units_of_x
from scoremachine.core.posterior import batch as batch
from scoremachine.engines import fourier as rolled
from scoremachine.engines import triton as fused
from scoremachine.engines.compiled import NOTHING

GPU_TILE = 32 * posterior.TILE


def where() -> torch.device:
    """The device of this kernel."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiles(n: int, collection: Collection) -> Iterator[slice]:
    """The tiles of n images; see `scoremachine.core.posterior.Engine`."""
    if where().type == "cuda":
        return posterior.pieces(n, collection, GPU_TILE)
    return posterior.tiles(n, collection)


def fold(request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
    """The fold over the source; see `scoremachine.core.posterior.Engine`."""
    device = where()
    if fused.available() and fused.answers(request):
        return fused.fold(request, leaders, device)
    if request.collection.source == "rolled":
        return rolled.fold(request, leaders, device, _room(device))
    folds: list[Fold] = []
    for piece in _read(request, device):
        parts = [_summary(request, p, *piece, leaders) for p in range(len(request.y))]
        folds = list(map(Fold.merge, folds, parts)) if folds else parts
    return Fold.batch(folds).cpu()


def accumulate_response(request: ScanRequest, known: Fold) -> Tensor:
    """sum_is q_i a_is s; see `scoremachine.core.posterior.Engine`."""
    device, c = where(), request.collection
    if c.source == "rolled":
        return rolled.accumulate_response(request, known, device, _room(device))
    if fused.available() and fused.answers(replace(request, u=None)):
        request, known = fused.compared(request, known)
    m, Z = known.m.to(device), known.Z.to(device)
    b = None if request.u is None else known.mean[:, 0].to(device)
    D = torch.zeros_like(request.y, device=device)
    for s, v, _, shift in _read(request, device):
        for p in range(len(D)):
            a = torch.exp(_logits(request, p, s, shift) - m[p]) / Z[p]
            if b is not None:
                a *= _inner(request, p, v) - b[p]
            D[p] += (c.window_adjoint(a)[:, None] * (v if b is None else s)).sum(0)
    return D.cpu()


def response_covariance(request: ScanRequest, known: Fold) -> Tensor:
    """Cov_i(v_sp, b_is) at every pixel; see `scoremachine.core.posterior.Engine`."""
    device, c = where(), request.collection
    if fused.available() and fused.answers(replace(request, u=None)):
        request, known = fused.compared(request, known)
    assert request.u is not None
    m, Z, u, mean = (x.to(device) for x in (known.m, known.Z, request.u, known.mean))
    # sums of w, w b, w (v - mean) and w b (v - mean)
    W, Wb, Wv, Wbv = (torch.zeros_like(x) for x in (Z, Z, mean, mean))
    for s, v, _, shift in _read(request, device):
        for p in range(len(m)):
            w = torch.exp(_logits(request, p, s, shift) - m[p]) / Z[p]
            wb = w * c.window_sum((u[p] * s).sum(1))
            apart = _at_pixels(v, c) - mean[p]
            W[p] += w.sum(0)
            Wb[p] += wb.sum(0)
            Wv[p] += torch.einsum("nij,ncij->cij", w, apart)
            Wbv[p] += torch.einsum("nij,ncij->cij", wb, apart)
    # sources that the fold has skipped are included here, so its mean is corrected
    return ((Wbv - Wv * (Wb / W)[:, None]) / W[:, None]).cpu()


def source_weights(
    request: ScanRequest, known: Fold, p: int, n: Tensor, shift: tuple[int, int]
) -> Tensor:
    """The posterior weights of some sources at every site of picture p, float64 (n, *sites).

    Arguments:
        request: What was asked.
        known: The whole fold, whose logits are -1/2 sum_d q[d] (y - s)[d]^2 / sigma^2.
        p: The picture.
        n: The sources' numbers, variant N + image, int64 (n,).
        shift: Their displacement.
    """
    c, N, y = request.collection, len(request.keys), request.y[p]
    x = units_of_x(request.keys[(n % N).numpy()])
    s = torch.empty_like(x)
    for v in torch.unique(n // N).tolist():
        s[n // N == v] = c.variants[v].of(x[n // N == v])
    square = ((y - _shifted(s, *shift, c, y.shape[1:])) ** 2).sum(1)
    l = c.window_sum(square) / (-2 * request.sigma[p].item() ** 2)
    w = torch.exp(l - known.m[p]) / known.Z[p]
    return w.masked_fill(~_valid(c, *shift), 0.0) if len(c.shifts) > 1 else w


def _room(device: torch.device) -> int:
    """The largest number of float64 values in a piece of work."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 128
    return 2**22


def _read(
    request: ScanRequest, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor, tuple[int, int]]]:
    """The source in pieces (s, v, ids, shift).

    The keys s and the values v are float64 in the query's frame, and 0 outside the image.
    """
    c, images = request.collection, request.keys
    N, C, H, W = images.shape
    step = max(1, _room(device) // ((C + 8) * H * W))
    for start in range(0, len(request.index), step):
        ids = request.index[start : start + step]
        keys = _sent(images[ids], device)
        values = keys if request.values is None else _sent(request.values[ids], device)
        for k, variant in enumerate(c.variants):
            s = variant.of(keys)
            v = s if values is keys else variant.of(values)
            for dy, dx in c.shifts.tolist():
                s_moved = _shifted(s, dy, dx, c, request.y.shape[2:])
                v_moved = s_moved if v is s else _shifted(v, dy, dx, c, request.y.shape[2:])
                yield s_moved, v_moved, torch.from_numpy(ids + k * N).to(device), (dy, dx)


def _sent(images: np.ndarray, device: torch.device) -> Tensor:
    """Images in units of x, float64, on the device."""
    return units_of_x(torch.from_numpy(images).to(device))


def _shifted(s: Tensor, dy: int, dx: int, c: Collection, frame: torch.Size) -> Tensor:
    """s with its pixel (row + dy, column + dx) at (row, column) of the query."""
    if dy == dx == 0 and tuple(frame) == c.image:
        return s
    result = s.new_zeros(*s.shape[:2], *frame)
    slices = []
    for shift, n, size in zip((dy, dx), c.image, frame, strict=True):
        lo, hi = max(0, -shift), min(size, n - shift)
        slices += [slice(lo, hi), slice(lo + shift, hi + shift)]
    result[:, :, slices[0], slices[2]] = s[:, :, slices[1], slices[3]]
    return result


def _valid(c: Collection, dy: int, dx: int) -> Tensor:
    """Which sites have a source at this displacement, a boolean mask of the grid."""
    axes = []
    for shift, n, seen, sites, p in zip(
        (dy, dx), c.image, c.frame, c.grid, c.window.shape, strict=True
    ):
        i = torch.arange(sites)
        first = i - p // 2 if c.cut else i  # the first row of the window
        top, bottom = first >= 0, first + p <= seen  # whether the window is inside at either end
        fits = (first + shift >= 0) & (first + shift + p <= n)
        if not c.wraps:
            fits &= top & bottom
            if shift == 0:
                fits |= ~top & bottom & (first + p <= n)
            if seen + shift == n:
                fits |= top & ~bottom & (first + shift >= 0)
            if seen == n and shift == 0:
                fits[:] = True
        axes.append(fits)
    return axes[0][:, None] & axes[1]


def _logits(request: ScanRequest, p: int, s: Tensor, shift: tuple[int, int]) -> Tensor:
    """The logits of a piece at every site, (n, *sites)."""
    c, y = request.collection, request.y[p].to(s.device)
    l = c.window_sum((s * (y - s / 2)).sum(1)) / request.sigma[p].item() ** 2
    if len(c.shifts) > 1:
        l = l.masked_fill(~_valid(c, *shift).to(s.device), NOTHING)
    return l


def _at_pixels(s: Tensor, c: Collection) -> Tensor:
    """The values of a piece at the sites' own pixels, (n, C, *sites)."""
    ry, rx = (p // 2 if c.wraps else 0 for p in c.window.shape)
    return s[:, :, ry : ry + c.frame[0], rx : rx + c.frame[1]]


def _inner(request: ScanRequest, p: int, v: Tensor) -> Tensor:
    """The inner products b of the values with u over the response windows, (n, *sites)."""
    c = request.collection
    assert request.u is not None
    u = request.u[p].to(v.device)
    if c.response == "pixel":
        return (u * _at_pixels(v, c)).sum(1)
    return c.window_sum((u * v).sum(1))


def _summary(
    request: ScanRequest,
    p: int,
    s: Tensor,
    v: Tensor,
    ids: Tensor,
    shift: tuple[int, int],
    leaders: int,
) -> Fold:
    """The fold of one piece for one picture."""
    c, n = request.collection, len(s)
    l = _logits(request, p, s, shift)
    m = l.max(0).values
    w = torch.exp(l - m).masked_fill(l == NOTHING, 0.0)
    if request.u is not None:
        S = (w * _inner(request, p, v)).sum(0, keepdim=True)
    elif c.whole:
        S = torch.einsum("n,nchw->chw", w[:, 0, 0], v)
    elif c.response == "pixel":
        S = torch.einsum("nij,ncij->cij", w, _at_pixels(v, c))
    else:
        S = s.new_zeros(0, *c.grid)
    k = min(leaders, n)
    best = torch.topk(l, k, dim=0)
    logits = torch.full((leaders, *c.grid), NOTHING, dtype=l.dtype, device=l.device)
    places = torch.full((leaders, *c.grid), -1, device=l.device)
    logits[:k], places[:k] = best.values, _places(c, shift, s.device)[None] + 0
    places[:k] += ids[best.indices] * c.image[0] * c.image[1]
    places[logits == NOTHING] = -1
    return Fold(*(x[None] for x in (m, w.sum(0), (w**2).sum(0), S, logits, places)))


def _places(c: Collection, shift: tuple[int, int], device: torch.device) -> Tensor:
    """row W + column of the source pixel under each site's middle."""
    i, j = (
        torch.arange(sites, device=device) + by + (0 if c.cut else p // 2)
        for sites, by, p in zip(c.grid, shift, c.window.shape, strict=True)
    )
    return i[:, None] * c.image[1] + j
