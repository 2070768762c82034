"""The fold in plain PyTorch, on any device: CUDA where found, else the CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from scoremachine.posterior import Fold, box_sum
from scoremachine.windows import Collection


def where() -> torch.device:
    """The device that this kernel computes on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """The fold over images[index]; see `scoremachine.posterior.Kernel`."""
    device = where()
    y, sigma = y.to(device), sigma.to(device)
    compare = _same if collection.source == "same" else _every
    folds = []
    for picture, level in zip(y, sigma, strict=True):
        parts = (
            compare(s, ids, picture, level, collection, leaders)
            for s, ids in _read(images, index, collection, device)
        )
        folds.append(functools.reduce(Fold.merge, parts))
    fields = zip(*(vars(f).values() for f in folds), strict=True)
    return Fold(*(torch.cat(field).cpu() for field in fields))


def compose(
    images: np.ndarray,
    index: np.ndarray,
    y: Tensor,
    sigma: Tensor,
    collection: Collection,
    T: float,
    known: Fold,
) -> Tensor:
    """sum_i r_i mu_i over images[index]; see `scoremachine.posterior.Kernel`."""
    device = where()
    P, Q = collection.window
    D = torch.zeros_like(y, device=device)
    for p in range(len(y)):
        picture, level = y[p].to(device), sigma[p].to(device)
        for s, _ in _read(images, index, collection, device):
            l = box_sum((s * (picture - s / 2)).sum(1), collection) / level**2
            w = torch.exp(l - known.m[p].to(device)) / known.Z[p].to(device)
            # every pixel gathers the weights of the boxes that hold it
            w = pad(w, (Q - 1, Q - 1, P - 1, P - 1))
            for axis, size in ((1, P), (2, Q)):
                w = w.unfold(axis, size, 1).sum(-1)
            D[p] += (w[:, None] * s).sum(0)
    return D.cpu()


def _room(device: torch.device) -> int:
    """How many float64 numbers a piece of work may take."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 128
    return 2**25


def _read(images, index, collection, device):  # type: ignore[no-untyped-def]
    """The source in pieces (s, ids): s = u / 127.5 - 1, float64, on the device."""
    _, C, H, W = images.shape
    P, Q = collection.window
    window = P * Q + 1 if collection.source == "every" else 2
    step = max(1, _room(device) // (C * window * H * W))
    for start in range(0, len(index), step):
        ids = index[start : start + step]
        s = torch.from_numpy(images[ids]).to(device).double() / 127.5 - 1
        yield s, torch.from_numpy(ids).to(device)


def _summary(l: Tensor, s: Tensor, places: Tensor, leaders: int, grid: tuple[int, int]) -> Fold:
    """The fold of logits l (sources, sites) with values s (sources, C) or (sources, C, sites)."""
    m = l.max(0).values
    w = torch.exp(l - m)
    S = torch.einsum("ni,nci->ci", w, s) if s.ndim == 3 else s.T @ w
    k = min(leaders, len(l))
    best = torch.topk(l, k, dim=0)
    logits = torch.full((leaders, l.shape[1]), -1e300, dtype=l.dtype, device=l.device)
    ids = torch.full((leaders, l.shape[1]), -1, device=l.device)
    logits[:k] = best.values
    ids[:k] = places.expand(l.shape).gather(0, best.indices)
    fields = m, w.sum(0), (w**2).sum(0), S, logits, ids
    return Fold(*(x.reshape(1, *x.shape[:-1], *grid) for x in fields))


def _same(s, ids, y, sigma, c, leaders):  # type: ignore[no-untyped-def]
    """Folds of images at the same position: box sums, no patches gathered."""
    n, C, H, W = s.shape
    l = box_sum((s * (y - s / 2)).sum(1), c) / sigma**2
    i, j = (torch.arange(k, device=s.device) for k in c.grid)
    if c.sites == "boxes":
        i, j = i + c.window[0] // 2, j + c.window[1] // 2
    places = ids[:, None] * H * W + (i[:, None] * W + j).reshape(1, -1)
    l = l.reshape(n, -1)
    if c.whole:
        m = l.max(0).values
        w = torch.exp(l - m)
        f = _summary(l, s.new_zeros(n, 0, 1), places, leaders, c.grid)
        f.S = torch.einsum("n,nchw->chw", w[:, 0], s)[None]
        return f
    values = s.reshape(n, C, H * W) if c.response == "pixel" else s.new_zeros(n, 0, l.shape[1])
    return _summary(l, values, places, leaders, c.grid)


def _every(s, ids, y, sigma, c, leaders):  # type: ignore[no-untyped-def]
    """Folds of all patches: one matrix product per class of windows cut off alike."""
    n, C, H, W = s.shape
    P, Q = c.window
    ry, rx = P // 2, Q // 2
    # zeros beyond the border add nothing to s (y - s / 2), so padding cuts windows off
    edge = (rx, rx, ry, ry)
    query = unfold(y[None] if c.wraps else pad(y, edge)[None], (P, Q))[0]
    patches = unfold(pad(s, edge), (P, Q)).reshape(n, -1, H, W)
    half = (patches**2).sum(1) / 2
    query = query.reshape(-1, H, W)
    total: Fold | None = None
    for sites_y, from_y in _classes(H, ry, c.wraps, s.device):
        for sites_x, from_x in _classes(W, rx, c.wraps, s.device):
            q = query[:, sites_y][..., sites_x].flatten(1)
            a = patches[:, :, from_y][..., from_x].permute(0, 2, 3, 1).reshape(-1, len(q))
            b = half[:, from_y][..., from_x].reshape(-1, 1)
            v = s[:, :, from_y][..., from_x].permute(0, 2, 3, 1).reshape(-1, C)
            pixel = (from_y[:, None] * W + from_x).reshape(1, -1)
            places = (ids[:, None] * H * W + pixel).reshape(-1, 1)
            pieces = [
                _summary((a @ some - b) / sigma**2, v, places, leaders, (1, some.shape[1]))
                for some in q.split(max(1, _room(s.device) // len(a)), dim=1)
            ]
            if total is None:
                empty = (f.new_zeros(*f.shape[:-2], H, W) for f in vars(pieces[0]).values())
                total = Fold(*empty)
            for name, field in vars(total).items():
                part = torch.cat([getattr(piece, name) for piece in pieces], dim=-1)
                part = part.reshape(*part.shape[:-2], len(sites_y), len(sites_x))
                field[..., sites_y[:, None], sites_x] = part
    return total


def _classes(n, r, wraps, device):  # type: ignore[no-untyped-def]
    """Along one axis: groups of sites, each with the source positions it may be compared with."""
    fits = torch.arange(r, max(r, n - r), device=device)
    if wraps:
        return [(torch.arange(n, device=device), fits)]
    cut = [i for i in range(n) if i < r or i >= n - r]
    groups = [(torch.tensor([i], device=device),) * 2 for i in cut]
    return groups + ([(fits, fits)] if len(fits) else [])
