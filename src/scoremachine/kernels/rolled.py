"""The fold over whole images under all circular translations: correlations, by Fourier transform.

All H W logits of an image are one circular correlation, and the mean is one more, with the
weights. In float64 the rounding of both is below 1e-6 nats at sigma = 0.002, so nothing has to be
summed again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2

from scoremachine.posterior import Fold, Question


def fold(question: Question, leaders: int, device: torch.device, room: int) -> Fold:
    """The fold over the source; see `scoremachine.posterior.Kernel`."""
    folds: list[Fold] = []  # merged at once: small things left between large ones eat the memory
    for s, F, ids in _read(question, device, room):
        parts = [_summary(question, p, s, F, ids, leaders) for p in range(len(question.y))]
        folds = [*map(Fold.merge, folds, parts)] if folds else parts
    fields = zip(*(vars(f).values() for f in folds), strict=True)
    return Fold(*(torch.cat(field).cpu() for field in fields))


def spread(question: Question, known: Fold, device: torch.device, room: int) -> Tensor:
    """sum_is a_is s; see `scoremachine.posterior.Kernel`."""
    D = torch.zeros_like(question.y, device=device)
    for s, F, _ in _read(question, device, room):
        for p in range(len(D)):
            l = _logits(question, p, s, F)
            a = torch.exp(l - known.m[p].to(device)) / known.Z[p].to(device)
            if question.u is not None:
                u = question.u[p].to(device)
                a *= _correlation(u, F, s.shape[-2:]) - known.mean[p].to(device)
            D[p] += _mean(a, F, s.shape[-2:])
    return D.cpu()


def _read(
    question: Question, device: torch.device, room: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The source in pieces: (s, its transform, ids)."""
    _, C, H, W = question.images.shape
    step = max(1, room // (4 * C * H * W))
    for start in range(0, len(question.index), step):
        ids = question.index[start : start + step]
        s = torch.from_numpy(question.images[ids]).to(device).double() / 127.5 - 1
        yield s, rfft2(s), torch.from_numpy(ids).to(device)


def _correlation(y: Tensor, F: Tensor, image: torch.Size) -> Tensor:
    """sum_rc y[r, c] s[r + dy, c + dx] for every displacement, (n, H, W)."""
    Y = rfft2(y).conj().resolve_conj()
    total = F[:, 0] * Y[0]
    for c in range(1, len(Y)):
        total.addcmul_(F[:, c], Y[c])
    return irfft2(total, s=image)


def _logits(question: Question, p: int, s: Tensor, F: Tensor) -> Tensor:
    half = torch.linalg.vector_norm(s.flatten(1), dim=1) ** 2 / 2
    y = question.y[p].to(s.device)
    correlation = _correlation(y, F, s.shape[-2:])
    return (correlation - half[:, None, None]) / question.sigma[p].item() ** 2


def _mean(w: Tensor, F: Tensor, image: torch.Size) -> Tensor:
    """sum w[n, dy, dx] s[n, :, r + dy, c + dx], (C, H, W); images without weight are left out."""
    some = w.abs().amax((1, 2)) > 0
    if not some.any():  # no transform takes an empty batch
        return F.new_zeros(F.shape[1], *image, dtype=w.dtype)
    if not some.all():
        w, F = w[some], F[some]
    return irfft2(torch.einsum("nhw,nchw->chw", rfft2(w).conj(), F), s=image)


def _summary(question: Question, p: int, s: Tensor, F: Tensor, ids: Tensor, leaders: int) -> Fold:
    """The fold of one piece for one picture; sources beyond T nats are left out."""
    H, W = s.shape[-2:]
    l = _logits(question, p, s, F)
    m = l.max()
    w = torch.exp(l - m).masked_fill(l < m - question.T[p].item(), 0.0)
    if question.u is not None:
        b = _correlation(question.u[p].to(s.device), F, s.shape[-2:])
        S = (w * b).sum().reshape(1, 1, 1)
    else:
        S = _mean(w, F, s.shape[-2:])
    k = min(leaders, l.numel())
    best = torch.topk(l.flatten(), k)
    logits = torch.full((leaders,), -1e300, dtype=l.dtype, device=l.device)
    places = torch.full((leaders,), -1, device=l.device)
    n, shift = best.indices // (H * W), best.indices % (H * W)
    row, column = (H // 2 + shift // W) % H, (W // 2 + shift % W) % W
    logits[:k], places[:k] = best.values, ids[n] * H * W + row * W + column
    m, Z, Z2 = (x.reshape(1, 1, 1) for x in (m, w.sum(), (w**2).sum()))
    return Fold(m, Z, Z2, S[None], logits.reshape(1, -1, 1, 1), places.reshape(1, -1, 1, 1))
