"""Training images that a picture may be a copy of, or may have copied a part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from scoremachine.data.corpus import Corpus
from scoremachine.provenance.alignment import Placement, mean_and_spread, resized
from scoremachine.provenance.windows import WindowIndex, descriptors, tiles

WHOLE, MIRRORED, PARTS = 10, 6, 12  # candidates: by the whole, mirrored, by windows
SCALES = (0.8, 1.0, 1.25)  # by which pictures are resized before their windows are looked up
OF_ONE = 3  # placements of one image
NEAR = 12  # places looked at for each placement: those next to a better one are left out
SPAN, OFFSET = 4096, 2048  # places along an axis, and the number of the one that is not moved
AROUND = tuple(a * SPAN + b for a in (-1, 0, 1) for b in (-1, 0, 1))
DISTINCT = 0.5  # of the largest weight: the least of a window that a region is made of


@dataclass(frozen=True, eq=False)
class WholeIndex:
    """Whole images by what they look like at half their size, whatever brightness and contrast.

    Attributes:
        vectors: float32 (N, D), of length 1.
    """

    vectors: Tensor

    @classmethod
    def of(cls, corpus: Corpus) -> WholeIndex:
        """That of a corpus."""
        return cls(torch.cat([whole(x) for x in tiles(corpus)]))

    def nearest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and positions of the nearest images of pictures x (n, C, H, W), (n, k)."""
        k = min(k, len(self.vectors))
        return torch.topk(whole(x) @ self.vectors.T, k, dim=1)


def whole(x: Tensor) -> Tensor:
    """Pictures (n, C, H, W) at half their size, without mean, of length 1, float32 (n, D)."""
    H, W = x.shape[2:]
    small = adaptive_avg_pool2d(x, (max(1, H // 2), max(1, W // 2))) if min(H, W) >= 16 else x
    centred = (small - mean_and_spread(small)[0]).flatten(1)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-6)


@dataclass(frozen=True, eq=False)
class Parts:
    """Placements of images whose windows agree with those of a picture.

    Attributes:
        placements: The placements.
        votes: For each, how many windows, weighted by how distinct the agreement is.
    """

    placements: list[Placement]
    votes: list[float]


def parts(
    x: Tensor, index: WindowIndex, leave_out: np.ndarray | None = None, most: int = PARTS
) -> list[Parts]:
    """For each picture (n, C, H, W), placements by windows, most votes first.

    A window votes for the two images whose nearest windows are d_1 <= d_2 away, with the weight
    (1 - d_j / d_5)^2, d_5 being the distance of the fifth nearest image: how much nearer it is than
    what windows of this kind are near to. The votes for one place are those of all windows for it
    and for the places next to it.

    Arguments:
        x: Pictures in [0, 1].
        index: The images' windows.
        leave_out: For each picture an image that is not looked at, or -1.
        most: How many placements.
    """
    reduced, owners, rows = [], [], []
    unit = _unit(index)
    for mirrored in (False, True):
        seen = x.flip(-1) if mirrored else x
        for scale in SCALES:
            scaled = resized(seen, scale)
            if min(scaled.shape[2:]) < index.side:
                continue
            d, n, at = descriptors(scaled, index.side, unit if scale == 1 else 2 * unit)
            reduced.append(d)
            owners.append(n.numpy())
            kind = np.tile(np.array([[mirrored, scale]]), (len(d), 1))
            rows.append(np.concatenate([kind, at.numpy()], 1))
    picture, row = np.concatenate(owners), np.concatenate(rows)
    distance, found = index.search(torch.cat(reduced))
    image = np.where(found >= 0, index.owners[found], -1)
    place = index.places[found].astype(np.int64)
    if leave_out is not None:
        mine = image == leave_out[picture][:, None]
        distance = np.where(mine, np.inf, distance)
        order = np.argsort(distance, axis=1, kind="stable")
        distance = np.take_along_axis(distance, order, 1)
        image = np.take_along_axis(np.where(mine, -1, image), order, 1)
        place = np.take_along_axis(place, order[:, :, None], 1)
    finite = np.isfinite(distance)
    last = np.where(finite, distance, 0).max(1, keepdims=True)
    nearer = np.where(finite & (image >= 0), 1 - distance / np.maximum(last, 1e-6), 0.0)
    weight = nearer[:, :2] ** 2
    matches = _Matches(picture, row, weight, image[:, :2], place[:, :2])
    return [_of_picture(p, matches, index, tuple(x.shape[2:]), most) for p in range(len(x))]


class _Matches(NamedTuple):
    """Windows of pictures, and windows of images that they are alike.

    Attributes:
        picture: The picture of each, int64 (m,).
        row: Whether it is mirrored, the scale, and the window's first row and column, (m, 4).
        weight: How distinct the likeness to each of two images is, (m, 2).
        image: The images, int64 (m, 2).
        place: First rows and columns of their windows, int64 (m, 2, 2).
    """

    picture: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    image: np.ndarray
    place: np.ndarray


def _of_picture(
    p: int, matches: _Matches, index: WindowIndex, frame: tuple[int, ...], most: int
) -> Parts:
    """The placements that the windows of picture p vote for."""
    picture, row, weight, image, place = matches
    mine = np.flatnonzero(picture == p)
    who = np.repeat(mine, 2)
    w, n, v = weight[mine].ravel(), image[mine].ravel(), place[mine].reshape(-1, 2)
    good = w > 0
    who, w, n, v = who[good], w[good], n[good], v[good]
    if len(who) == 0:
        return Parts([], [])
    mirrored, q, u = row[who, 0].astype(np.int64), row[who, 1], row[who, 2:]
    shift = (u - v) / q[:, None]  # where the image's first pixel lies in the picture
    cell = np.round(shift / _unit(index)).astype(np.int64) + OFFSET
    kind = (n * 2 + mirrored) * len(SCALES) + np.searchsorted(SCALES, q)
    key = (kind * SPAN + cell[:, 0]) * SPAN + cell[:, 1]
    found, which = np.unique(key, return_inverse=True)
    total = _with_neighbours(found, np.bincount(which, w, len(found)))
    placements: list[Placement] = []
    votes: list[float] = []
    taken: set[int] = set()
    for k in np.argsort(-total, kind="stable")[: NEAR * most].tolist():
        around = {int(found[k]) + step for step in AROUND}
        of = np.isin(key, list(around))
        first = int(np.flatnonzero(of)[0])
        image_, flipped = int(n[first]), bool(mirrored[first])
        if int(found[k]) in taken or sum(p.image == image_ for p in placements) == OF_ONE:
            continue
        taken |= around
        some = of & (w >= DISTINCT * w[of].max())
        row_, column = (np.average(shift[some], axis=0, weights=w[some])).tolist()
        top, left = (u[some] / q[some][:, None]).min(0)
        bottom, right = ((u[some] + index.side) / q[some][:, None]).max(0)
        H, W = frame
        # windows at the edge of what agrees reach beyond it
        inset = min(index.step // 2, int(min(bottom - top, right - left)) // 4)
        region = (
            max(0, int(np.ceil(top)) + inset), max(0, int(np.ceil(left)) + inset),
            min(H, int(bottom) - inset), min(W, int(right) - inset),
        )  # fmt: skip
        scale = 1 / float(q[first])
        placements.append(Placement(image_, flipped, scale, row_, column, region))
        votes.append(float(total[k]))
        if len(placements) == most:
            break
    return Parts(placements, votes)


def _unit(index: WindowIndex) -> int:
    """The distance of the windows of a picture that are looked up, in pixels."""
    return max(1, index.step // 3)


def _with_neighbours(keys: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """The votes of places, keys rising, with those of the places next to them."""
    total = np.zeros(len(keys))
    for step in AROUND:
        at = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
        total += np.where(keys[at] == keys + step, votes[at], 0.0)
    return total
