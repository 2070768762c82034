"""The definition, in float64, by brute force: what everything fast is tested against.

Every site and every source window is visited by itself, windows are lists of pixels, and nothing
is shared with the fast kernels but the result's type. Only for small corpora.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scoremachine.posterior import Fold
from scoremachine.windows import Collection

Pixels = np.ndarray  # positions in a flattened H x W picture


def sites(c: Collection) -> Iterator[tuple[int, int, Pixels, list[tuple[Pixels, int]]]]:
    """Every site's row and column, the query pixels, and its sources' (pixels, middle pixel)."""
    (H, W), (P, Q) = c.image, c.window
    Hs, Ws = c.grid
    for i in range(Hs):
        for j in range(Ws):
            if c.sites == "boxes":
                middle = (i + P // 2) * W + j + Q // 2
                query = _pixels(range(i, i + P), range(j, j + Q), W)
                yield i, j, query, [(query, middle)]
                continue
            ry, rx = P // 2, Q // 2
            rows = list(range(i - ry, i + ry + 1))
            columns = list(range(j - rx, j + rx + 1))
            if c.wraps:
                query = _pixels([r % H for r in rows], [q % W for q in columns], W)
                middles = [(a, b) for a in range(ry, H - ry) for b in range(rx, W - rx)]
                sources = [
                    (_pixels(range(a - ry, a + ry + 1), range(b - rx, b + rx + 1), W), a * W + b)
                    for a, b in middles
                ]
                yield i, j, query, sources
                continue
            rows = [r for r in rows if 0 <= r < H]
            columns = [q for q in columns if 0 <= q < W]
            query = _pixels(rows, columns, W)
            ups, rights = [0], [0]
            if c.source == "every" and len(rows) == P:
                ups = [a - i for a in range(ry, H - ry)]
            if c.source == "every" and len(columns) == Q:
                rights = [b - j for b in range(rx, W - rx)]
            yield (
                i,
                j,
                query,
                [
                    (
                        _pixels([r + dy for r in rows], [q + dx for q in columns], W),
                        (i + dy) * W + j + dx,
                    )
                    for dy in ups
                    for dx in rights
                ],
            )


def _pixels(rows, columns, W) -> Pixels:  # type: ignore[no-untyped-def]
    return np.array([r * W + c for r in rows for c in columns])


def _logits(s, y, sigma, query, sources) -> np.ndarray:  # type: ignore[no-untyped-def]
    """-|y - s|^2 / (2 sigma^2) over the window, as (n, number of windows)."""
    columns = [((s[:, :, pixels] - y[:, query]) ** 2).sum((1, 2)) for pixels, _ in sources]
    return -np.stack(columns, axis=1) / (2 * sigma**2)


def fold(
    images: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    T: float,
    leaders: int,
    known: Fold | None,
) -> Fold:
    """The definition of the fold; see `scoremachine.posterior.Kernel`."""
    c = collection
    (H, W), grid = c.image, c.grid
    (ry, rx) = (n // 2 if c.wraps else 0 for n in c.window)
    picture = y[:, :, ry : ry + H, rx : rx + W].numpy()
    B, C = picture.shape[:2]
    s = images[index].astype(np.float64).reshape(len(index), C, H * W) / 127.5 - 1
    m, Z, Z2 = (np.zeros((B, *grid)) for _ in range(3))
    S = np.zeros((B, C, H, W) if c.whole else (B, C if c.response == "pixel" else 0, *grid))
    logits = np.full((B, leaders, *grid), -1e300)
    places = np.full((B, leaders, *grid), -1, dtype=np.int64)
    for p in range(B):
        flat = picture[p].reshape(C, H * W)
        for i, j, query, sources in sites(c):
            l = _logits(s, flat, float(sigma[p]), query, sources)
            m[p, i, j] = l.max()
            w = np.exp(l - l.max())
            Z[p, i, j] = w.sum()
            Z2[p, i, j] = (w**2).sum()
            if c.whole:
                S[p] = np.einsum("n,ncd->cd", w[:, 0], s).reshape(C, H, W)
            elif c.response == "pixel":
                middles = [middle for _, middle in sources]
                S[p, :, i, j] = np.einsum("nk,nck->c", w, s[:, :, middles])
            order = np.argsort(-l, axis=None, kind="stable")[:leaders]
            logits[p, : len(order), i, j] = l.ravel()[order]
            n, k = np.unravel_index(order, l.shape)
            middle = np.array([middle for _, middle in sources])
            places[p, : len(order), i, j] = index[n] * H * W + middle[k]
        # the other kernels leave this term to `posterior`, so it has to be taken off again
        for i, j, query, _ in sites(c):
            constant = (flat[:, query] ** 2).sum() / (2 * float(sigma[p]) ** 2)
            m[p, i, j] += constant
            logits[p, :, i, j] += constant
    return Fold(*map(torch.from_numpy, (m, Z, Z2, S, logits, places)))


def compose(
    images: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    T: float,
    known: Fold,
) -> Tensor:
    """sum_i r_i mu_i for box responses; see `scoremachine.posterior.Kernel`."""
    c = collection
    (H, W), C = c.image, y.shape[1]
    s = images[index].astype(np.float64).reshape(len(index), C, H * W) / 127.5 - 1
    D = np.zeros((len(y), C, H * W))
    for p in range(len(y)):
        flat = y[p].numpy().reshape(C, H * W)
        for i, j, query, sources in sites(c):
            l = _logits(s, flat, float(sigma[p]), query, sources)[:, 0]
            constant = (flat[:, query] ** 2).sum() / (2 * float(sigma[p]) ** 2)
            w = np.exp(l + constant - float(known.m[p, i, j])) / float(known.Z[p, i, j])
            D[p][:, query] += np.einsum("n,ncd->cd", w, s[:, :, query])
    return torch.from_numpy(D.reshape(y.shape))
