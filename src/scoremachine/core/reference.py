"""The reference engine: the definition, in float64, by brute force. Fast engines are tested on it.

Every site and every source window is processed separately, windows are lists of pixels with their
weights, and only the type of the result is shared with the fast kernels. Only for small corpora.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.fold import Fold
from scoremachine.core.posterior import ScanRequest, units_of_x
from scoremachine.core.posterior import batch as batch
from scoremachine.core.posterior import tiles as tiles
from scoremachine.core.windows import Masks

Pixels = np.ndarray  # positions in a flattened H x W picture


@dataclass
class Site:
    """One site: its row and column, its window's pixels and weights, its own pixel, its sources.

    A source is a list of pixels, in the same order as those of the window, and its middle.
    """

    i: int
    j: int
    query: Pixels
    weights: np.ndarray
    pixel: int
    sources: list[tuple[Pixels, int]]


def sites(c: Collection) -> Iterator[Site]:
    """Every site, with every window it is compared with."""
    (H, W), (P, Q) = c.frame, c.window.shape
    Hs, Ws = c.grid
    for i in range(Hs):
        for j in range(Ws):
            if isinstance(c.window, Masks):
                yield _mask(c, i, j)
                continue
            if c.sites == "boxes":
                i0, j0, rows, columns = i + P // 2, j + Q // 2, range(P), range(Q)
            else:
                i0, j0 = i, j
                rows, columns = range(P), range(Q)
                if not c.wraps:
                    rows = range(max(0, P // 2 - i), min(P, H + P // 2 - i))
                    columns = range(max(0, Q // 2 - j), min(Q, W + Q // 2 - j))
            top, left = i0 - P // 2, j0 - Q // 2
            query = _pixels([(top + a) % H for a in rows], [(left + b) % W for b in columns], W)
            weights = c.window.weights[rows.start : rows.stop, columns.start : columns.stop]
            sources = []
            (Hi, Wi) = c.image
            for a in _middles(c, 0, i0, rows):
                for b in _middles(c, 1, j0, columns):
                    down = [(top + r + a - i0) % Hi for r in rows]
                    across = [(left + r + b - j0) % Wi for r in columns]
                    sources.append((_pixels(down, across, Wi), a % Hi * Wi + b % Wi))
            yield Site(i, j, query, weights.ravel(), i0 * W + j0, sources)


def _middles(c: Collection, axis: int, at: int, seen: range) -> list[int]:
    """Positions of a source's middle along an axis, for a window with only `seen` inside."""
    n, p = c.image[axis], c.window.shape[axis]
    if c.source == "rolled":
        return [at + shift for shift in range(n)]
    fits = range(p // 2, n - p + 1 + p // 2)
    if c.wraps:
        return list(fits)
    if len(seen) < p:  # at the same distance from the same border
        return [at if seen.start > 0 else at + n - c.frame[axis]]
    return [a for a in fits if c.source == "every" or abs(a - at) <= c.reach]


def _mask(c: Collection, i: int, j: int) -> Site:
    W = c.image[1]
    assert isinstance(c.window, Masks)
    weights = c.window.row(i * W + j).ravel()
    query = np.flatnonzero(weights)
    return Site(i, j, query, weights[query], i * W + j, [(query, i * W + j)])


def _pixels(rows, columns, W) -> Pixels:  # type: ignore[no-untyped-def]
    return np.array([r * W + c for r in rows for c in columns])


def _read(request: ScanRequest) -> tuple[np.ndarray, np.ndarray]:
    """The keys and the values of the source, one variant after the other: float64 (V n, C, H W)."""
    keys, values = (units_of_x(x[request.index]) for x in (request.keys, request.averaged))
    s, v = (
        torch.cat([variant.of(x) for variant in request.collection.variants]).flatten(2).numpy()
        for x in (keys, values)
    )
    return s, v


def _ids(request: ScanRequest) -> np.ndarray:
    N = len(request.keys)
    V = len(request.collection.variants)
    return np.concatenate([v * N + request.index for v in range(V)])


def _picture(request: ScanRequest) -> np.ndarray:
    """The query as it was before it was continued periodically, (B, C, H W)."""
    return _unwrapped(request.y, request.collection).flatten(2).numpy()


def _direction(request: ScanRequest) -> Tensor | None:
    """u, as it was before it was continued periodically if sites contribute to windows."""
    c, u = request.collection, request.u
    return u if u is None or c.response == "pixel" else _unwrapped(u, c)


def _unwrapped(x: Tensor, c: Collection) -> Tensor:
    (H, W) = c.frame
    ry, rx = (p // 2 if c.wraps else 0 for p in c.window.shape)
    return x[:, :, ry : ry + H, rx : rx + W]


def _logits(s, y, sigma, site) -> np.ndarray:  # type: ignore[no-untyped-def]
    """-1/2 sum_d q[d] (y - s)[d]^2 / sigma^2, as (sources, number of windows)."""
    columns = [
        (site.weights * (s[:, :, pixels] - y[:, site.query]) ** 2).sum((1, 2))
        for pixels, _ in site.sources
    ]
    return -np.stack(columns, axis=1) / (2 * sigma**2)


def _constant(y, sigma, site) -> float:  # type: ignore[no-untyped-def]
    """The term that the fast kernels omit from a site's logits, and that `posterior` adds."""
    return (site.weights * y[:, site.query] ** 2).sum() / (2 * sigma**2)


def _inner(s, u, site, pixel: bool) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The inner products b of every source with u over the response window."""
    if pixel:
        values = s[:, :, [middle for _, middle in site.sources]]
        return np.einsum("nck,c->nk", values, u[:, site.i, site.j])
    flat = u.reshape(len(u), -1)[:, site.query]
    columns = [(site.weights * flat * s[:, :, pixels]).sum((1, 2)) for pixels, _ in site.sources]
    return np.stack(columns, axis=1)


def fold(request: ScanRequest, leaders: int, known: Fold | None) -> Fold:
    """The definition of the fold; see `scoremachine.core.posterior.Engine`."""
    c, (s, v), ids, y = request.collection, _read(request), _ids(request), _picture(request)
    (H, W), grid, (B, C, _) = c.image, c.grid, y.shape  # whole images have no canvas
    pixel, u = c.response == "pixel", _direction(request)
    values = 1 if u is not None else C if pixel else 0
    m, Z, Z2 = (np.zeros((B, *grid)) for _ in range(3))
    whole = c.whole and u is None
    S = np.zeros((B, C, H, W) if whole else (B, values, *grid))
    logits = np.full((B, leaders, *grid), -1e300)
    places = np.full((B, leaders, *grid), -1, dtype=np.int64)
    for p in range(B):
        sigma = float(request.sigma[p])
        for site in sites(c):
            i, j = site.i, site.j
            l = _logits(s, y[p], sigma, site) + _constant(y[p], sigma, site)
            m[p, i, j] = l.max()
            w = np.exp(l - l.max())
            Z[p, i, j] = w.sum()
            Z2[p, i, j] = (w**2).sum()
            if u is not None:
                S[p, 0, i, j] = (w * _inner(v, u[p].numpy(), site, pixel)).sum()
            elif c.whole:
                for column, (pixels, _) in zip(w.T, site.sources, strict=True):
                    S[p] += np.einsum("n,ncd->cd", column, v[:, :, pixels]).reshape(C, H, W)
            elif pixel:
                middles = [middle for _, middle in site.sources]
                S[p, :, i, j] = np.einsum("nk,nck->c", w, v[:, :, middles])
            order = np.argsort(-l, axis=None, kind="stable")[:leaders]
            logits[p, : len(order), i, j] = l.ravel()[order]
            n, k = np.unravel_index(order, l.shape)
            middle = np.array([middle for _, middle in site.sources])
            places[p, : len(order), i, j] = ids[n] * H * W + middle[k]
    return Fold(*map(torch.from_numpy, (m, Z, Z2, S, logits, places)))


def accumulate_response(request: ScanRequest, known: Fold) -> Tensor:
    """sum_is q_i a_is s; see `scoremachine.core.posterior.Engine`."""
    c, (s, v), y, u = request.collection, _read(request), _picture(request), _direction(request)
    D = np.zeros(y.shape)
    for p in range(len(y)):
        sigma = float(request.sigma[p])
        for site in sites(c):
            i, j = site.i, site.j
            l = _logits(s, y[p], sigma, site) + _constant(y[p], sigma, site)
            a = np.exp(l - float(known.m[p, i, j])) / float(known.Z[p, i, j])
            if u is not None:
                b = _inner(v, u[p].numpy(), site, c.response == "pixel")
                a *= b - float(known.mean[p, 0, i, j])
            for column, (pixels, _) in zip(a.T, site.sources, strict=True):
                source = v if u is None else s
                picture = np.einsum("n,ncd->cd", column, source[:, :, pixels])
                # no pixel appears twice in a window, even if the window wraps around
                D[p][:, site.query] += site.weights * picture
    # in the shape of the continued query: the result at original pixels, zeros at their copies
    total = torch.zeros_like(request.y)
    ry, rx = (p // 2 if c.wraps else 0 for p in c.window.shape)
    inside = slice(ry, ry + c.frame[0]), slice(rx, rx + c.frame[1])
    total[:, :, *inside] = torch.from_numpy(D.reshape(*y.shape[:2], *c.frame))
    return total


def response_covariance(request: ScanRequest, known: Fold) -> Tensor:
    """Cov_i(v_sp, b_is) at every pixel; see `scoremachine.core.posterior.Engine`."""
    c, (s, v), y = request.collection, _read(request), _picture(request)
    assert request.u is not None
    u = _unwrapped(request.u, c).flatten(2).numpy()
    found = np.zeros((*y.shape[:2], *c.grid))
    for p in range(len(y)):
        sigma = float(request.sigma[p])
        for site in sites(c):
            l = _logits(s, y[p], sigma, site)
            w = np.exp(l - l.max())
            w /= w.sum()
            flat = site.weights * u[p][:, site.query]
            b = np.stack([(flat * s[:, :, pixels]).sum((1, 2)) for pixels, _ in site.sources], 1)
            value = v[:, :, [middle for _, middle in site.sources]]
            mean = np.einsum("nk,nck->c", w, value)
            apart = value - mean[:, None]
            found[p, :, site.i, site.j] = np.einsum("nk,nck->c", w * (b - (w * b).sum()), apart)
    return torch.from_numpy(found)
