"""Alignment of pictures with training images that they may be copies of, or have copied a part of.

A placement says where an image lies in the frame of a picture: the picture mirrored or not, the
image resized by a factor, and moved by whole pixels. Brightness and contrast are fitted afterwards,
a gain and a bias for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

SCALES = (0.8, 0.87, 0.93, 1.0, 1.07, 1.15, 1.25)
NEAR_SCALES = 1.1  # ratio of scales that are tried around one that is supposed
SHIFT = 2  # pixels up to which places around the supposed one are tried
FAINT = 4 / 255  # the least spread, in units of white, by which pictures are divided
GAIN = 0.5, 2.0  # contrasts that a copy may have of its original


@dataclass(frozen=True)
class Placement:
    """Where an image is supposed to lie in a picture's frame.

    Attributes:
        image: Its position in the corpus.
        mirrored: Whether the picture is mirrored left to right.
        scale: The factor by which the image is resized.
        row, column: Where its first pixel lies in the (mirrored) picture.
        region: The part of the picture that agrees, rows and columns (top, left, bottom, right);
            None: all of it.
    """

    image: int
    mirrored: bool
    scale: float
    row: float
    column: float
    region: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Aligned:
    """Placements of images in one picture, refined.

    Attributes:
        placements: Where each lies.
        pixels: The images there, in the picture's frame and with its brightness and contrast,
            float32 (k, C, H, W).
        covered: Which pixels of the picture an image covers, bool (k, H, W).
    """

    placements: list[Placement]
    pixels: Tensor
    covered: Tensor

    def __len__(self) -> int:
        return len(self.placements)


def resized(images: Tensor, scale: float) -> Tensor:
    """Images (n, C, H, W) resized by a factor."""
    if scale == 1:
        return images
    H, W = images.shape[2:]
    size = max(1, round(scale * H)), max(1, round(scale * W))
    return interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def placed(image: Tensor, row: int, column: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """An image (C, h, w) at a place in a frame of H x W, 0 elsewhere; and what it covers."""
    _, h, w = image.shape
    canvas, covered = image.new_zeros(len(image), H, W), torch.zeros(H, W, dtype=torch.bool)
    top, left, bottom, right = max(0, row), max(0, column), min(H, row + h), min(W, column + w)
    if bottom > top and right > left:
        part = image[:, top - row : bottom - row, left - column : right - column]
        canvas[:, top:bottom, left:right] = part
        covered[top:bottom, left:right] = True
    return canvas, covered


def align(picture: Tensor, supposed: list[Placement], images: dict[int, Tensor]) -> Aligned:
    """The best placement near each supposed one, and the images there.

    Arguments:
        picture: float32 (C, H, W), in [0, 1].
        supposed: Where images may lie, at least one.
        images: float32 (C, H, W) in [0, 1], by position.
    """
    H, W = picture.shape[1:]
    tried: list[tuple[int, Placement]] = []
    canvases, covers = [], []
    for k, p in enumerate(supposed):
        for scale in SCALES:
            if not 1 / NEAR_SCALES < scale / p.scale < NEAR_SCALES:
                continue
            image = resized(images[p.image][None], scale)[0]
            middle = _middle(p, H, W)
            # the same pixel of the image stays in the middle of the region
            row = middle[0] - (middle[0] - p.row) * scale / p.scale
            column = middle[1] - (middle[1] - p.column) * scale / p.scale
            at = Placement(p.image, p.mirrored, scale, round(row), round(column), p.region)
            tried.append((k, at))
            canvas, cover = placed(
                image, round(row) + SHIFT, round(column) + SHIFT, H + 2 * SHIFT, W + 2 * SHIFT
            )
            canvases.append(canvas)
            covers.append(cover)
    both = torch.stack([picture, picture.flip(-1)])
    y = both[[int(at.mirrored) for _, at in tried]]
    region = torch.stack([_mask(at.region, H, W) for _, at in tried])
    wide, wide_cover = torch.stack(canvases), torch.stack(covers)
    offsets = [(a, b) for a in range(2 * SHIFT + 1) for b in range(2 * SHIFT + 1)]
    scores = _correlations(y, region, wide, wide_cover)
    best, which = scores.max(1)
    found: dict[int, tuple[float, int]] = {}
    for i, (k, _) in enumerate(tried):
        if float(best[i]) > found.get(k, (-2.0, 0))[0]:
            found[k] = float(best[i]), i
    placements, pixels, covered = [], [], []
    for _, i in found.values():
        at, (a, b) = tried[i][1], offsets[int(which[i])]
        x, c = wide[i, :, a : a + H, b : b + W], wide_cover[i, a : a + H, b : b + W]
        x = relit(x, y[i], c & region[i])
        if at.mirrored:
            x, c = x.flip(-1), c.flip(-1)
        pixels.append(x)
        covered.append(c)
        row, column = at.row + SHIFT - a, at.column + SHIFT - b
        placements.append(Placement(at.image, at.mirrored, at.scale, row, column, at.region))
    return Aligned(placements, torch.stack(pixels), torch.stack(covered))


def relit(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """x (C, H, W) with the gain and bias of each channel that bring it nearest to y somewhere."""
    w = where.float()
    n = w.sum().clamp(min=1)
    mean_x, mean_y = ((v * w).sum((1, 2)) / n for v in (x, y))
    dx, dy = (x - mean_x[:, None, None]) * w, (y - mean_y[:, None, None]) * w
    # a channel with little contrast takes the gain of all together
    joint = (dx * dy).sum() / (dx**2).sum().clamp(min=1e-6)
    variance = (dx**2).sum((1, 2)) / n
    gain = ((dx * dy).sum((1, 2)) / n + 1e-4 * joint) / (variance + 1e-4)
    gain = gain.clamp(*GAIN)
    return (x - mean_x[:, None, None]) * gain[:, None, None] + mean_y[:, None, None]


def _middle(p: Placement, H: int, W: int) -> tuple[float, float]:
    if p.region is None:
        return H / 2, W / 2
    top, left, bottom, right = p.region
    return (top + bottom) / 2, (left + right) / 2


def _mask(region: tuple[int, int, int, int] | None, H: int, W: int) -> Tensor:
    mask = torch.zeros(H, W, dtype=torch.bool)
    top, left, bottom, right = region or (0, 0, H, W)
    mask[top:bottom, left:right] = True
    return mask


def _correlations(y: Tensor, region: Tensor, wide: Tensor, cover: Tensor) -> Tensor:
    """The correlation of pictures with images at every shift, with a mean for each channel.

    Arguments:
        y: The pictures, (n, C, H, W).
        region: Where they are compared, bool (n, H, W).
        wide: The images, in a frame that is wider by `SHIFT` on all sides.
        cover: What they cover, bool.

    Returns:
        (n, shifts), those of one row after the other's.
    """
    H, W = y.shape[2:]
    m, c = region[:, None].float(), cover[:, None].float()

    def at_shifts(x: Tensor, w: Tensor) -> Tensor:
        """sum_p x[p + shift] w[p], (n, C, shifts)."""
        views = x.unfold(2, H, 1).unfold(3, W, 1)
        return torch.einsum("ncabhw,nchw->ncab", views, w).flatten(2)

    n = at_shifts(c, m).clamp(min=1)
    y_m = y * m
    sum_y, sum_yy = (at_shifts(c.expand(wide.shape), v) for v in (y_m, y * y_m))
    masks = m.expand(y.shape)
    sum_x, sum_xx = at_shifts(wide, masks), at_shifts(wide**2, masks)
    sum_xy = at_shifts(wide, y_m)
    covariance = (sum_xy - sum_x * sum_y / n).sum(1)
    a = (sum_xx - sum_x**2 / n).sum(1).clamp(min=1e-9)
    b = (sum_yy - sum_y**2 / n).sum(1).clamp(min=1e-9)
    share = n[:, 0] / region[0].numel()
    return covariance / (a * b).sqrt().clamp(min=1e-6) * share.clamp(max=0.5).pow(0.1)


def mean_and_spread(images: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    """Of images in [0, 1], (n, C, H, W): means of channels (n, C, 1, 1); spread (n, 1, 1, 1)."""
    x = torch.as_tensor(images)
    mean = x.mean((2, 3), keepdim=True)
    spread = (x - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
    return mean, spread
