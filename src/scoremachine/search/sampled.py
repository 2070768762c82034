"""Flat posteriors: where a multitude of patches matters, a sample of them stands for all.

The patches of an index lie in the order of its tree, like beside like. To take one in a hundred,
evenly spread, is stratified sampling, and what such a sample says of D has a standard error that
does not depend on how many patches there are. Sixteen parts of the sample, taken in turns, tell how
large that is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from scoremachine.kernels.parts import fill
from scoremachine.search.index import Class, Index, Source
from scoremachine.search.tree import cut_out

SAMPLES = (25_000, 100_000, 400_000)  # patches: as many as it takes
TURNS = 16  # parts of the sample that are compared with each other
STANDARD_ERRORS = 4.0  # in the bound of an error
FLAT = 200.0  # patches as near as the nearest, from which on a posterior may be flat
EFFECTIVE = 2_000.0  # patches of the sample that have to matter, at least
AT_ONCE = 10_000  # patches that are looked at together
QUERIES = 256  # that are looked at together


class Asked(NamedTuple):
    """What a sample is to answer.

    Attributes:
        windows: The queries, less the mean of the patches, float64 (Q, D).
        half: 1 / (2 sigma^2).
        best: |q - s|^2 of the nearest patch known, float64 (Q,).
        source, opened, of: The images, their index, and the class of windows.
    """

    windows: np.ndarray
    half: float
    best: np.ndarray
    source: Source
    opened: Index
    of: Class


def sampled(asked: Asked, error: float) -> tuple[np.ndarray, ...] | None:
    """`sample` of as many patches as it takes; None also where no error is at most `error`."""
    largest = max(SAMPLES[0], min(SAMPLES[-1], len(asked.opened.tree.ids) // 2))
    for size in SAMPLES:
        found = sample(asked, size)
        if found is None or found[-1].max() <= error:
            return found
        if found[-1].max() * math.sqrt(size / largest) > error:  # nor would the largest do
            return None
    return None


def sample(asked: Asked, size: int) -> tuple[np.ndarray, ...] | None:
    """The fold of some queries over a sample of about `size` patches, scaled to the whole index.

    Returns:
        m, Z, Z2, S of a fold, and the error of a channel of S / Z that is exceeded with a
        probability of about 1 in 10,000 (`STANDARD_ERRORS`); None where a few patches matter so
        much that a sample says nothing.
    """
    windows, half, best, source, opened, of = asked
    step = len(opened.tree.ids) // size
    if step < 2:
        return None
    slots = np.arange(step // 2, len(opened.tree.ids), step)
    slots = slots[opened.tree.times[slots] > 0]
    times = torch.from_numpy(opened.tree.times[slots].astype(np.float32))
    places, D = opened.tree.ids[slots], windows.shape[1]
    q = torch.from_numpy(windows).float()
    logits = torch.empty(len(slots), len(q))
    v = torch.empty(len(slots), source.pixels.shape[3])
    mean = opened.embedding.mean
    w, (a, b), C = of.patches.size[1], of.middle, v.shape[1]
    middle = slice((a * w + b) * C, (a * w + b + 1) * C)
    for start in range(0, len(slots), AT_ONCE):
        some = places[start : start + AT_ONCE]
        s = np.empty((len(some), D), np.float32)
        fill(cut_out, (source.pixels, some, *of.patches[1:], of.patches.size, mean, s))
        t = torch.from_numpy(s)
        logits[start : start + len(some)] = (t @ q.T - (t**2).sum(1)[:, None] / 2) * (2 * half)
        v[start : start + len(some)] = t[:, middle]
    v += torch.from_numpy(mean[middle]).float()
    m = logits.amax(0).double()
    energy = torch.from_numpy((windows**2).sum(1)) * half
    Z, Z2, S, errors = _weighed(logits, m, times, v)
    heaviest = torch.from_numpy(-best * half) - (m - energy) - torch.log(Z * step)
    if (Z**2 / Z2).min() < EFFECTIVE or heaviest.max() > math.log(1 / EFFECTIVE):
        return None
    found = (m - energy, Z * step, Z2 * step, S * step, errors)
    return tuple(field.numpy() for field in found)


def _weighed(
    logits: torch.Tensor, m: torch.Tensor, times: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Z, Z2 and S of the sample, and the errors of S / Z."""
    parts = []
    for start in range(0, logits.shape[1], QUERIES):
        rows = slice(start, start + QUERIES)
        x = torch.exp(logits[:, rows] - m[rows].float())
        weights = x * times[:, None]
        Z = torch.stack([weights[k::TURNS].sum(0) for k in range(TURNS)]).double()
        S = torch.stack([weights[k::TURNS].T @ v[k::TURNS] for k in range(TURNS)]).double()
        total, D = Z.sum(0), S.sum(0) / Z.sum(0)[:, None]
        off = (S - Z[..., None] * D) / total[:, None]  # what each part moves D by
        error = STANDARD_ERRORS * torch.sqrt(off.square().sum(0) * TURNS / (TURNS - 1)).amax(1)
        parts.append((total, (weights * x).sum(0).double(), S.sum(0), error))
    return tuple(map(torch.cat, zip(*parts, strict=True)))
