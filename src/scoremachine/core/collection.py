"""A machine at one noise level: its sites, their windows, and what they are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad

from scoremachine.core.windows import Box, Masks, Variant, Window

Boundary = Literal["broken", "circular"]


@dataclass(frozen=True)
class Collection:
    """A filtered posterior mean collection (Niedoba et al. 2605.24192).

    Attributes:
        image: Height and width (H, W) of the images.
        window: The query window: a box, a tapered box, or a mask for each pixel.
        sites: "pixels": one site per pixel, its window centred there and truncated at the border;
            "boxes": one site per box that fits inside the image.
        response: "pixel": a site contributes to its own pixel only; "window": to all of its
            window, in proportion to the query weights.
        source: "same": the images at the site's own position; "every": all positions at which a
            window fits; "rolled": the images under every circular translation.
        reach: With source "same": also the positions up to that many rows and columns away at
            which a window fits, truncated in the same way.
        boundary: How a box that crosses the border is compared, where `source` is "every".
            "broken": it is truncated, and compared only with boxes truncated in the same way;
            "circular": it wraps around, and is compared with every box that fits.
        variants: The forms (mirrored, brighter, ...) in which every image is a source.
        canvas: Height and width of the pictures, if they differ from those of the images. Only
            with source "every", and neither may be smaller than the window. A truncated box is
            compared with boxes truncated in the same way.
    """

    image: tuple[int, int]
    window: Window
    sites: Literal["pixels", "boxes"]
    response: Literal["pixel", "window"]
    source: Literal["same", "every", "rolled"] = "same"
    reach: int = 0
    boundary: Boundary = "broken"
    variants: tuple[Variant, ...] = (Variant(),)
    canvas: tuple[int, int] | None = None

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.canvas or self.image

    @classmethod
    def of_images(
        cls, image: tuple[int, int], source: Literal["same", "rolled"] = "same"
    ) -> Collection:
        """Whole images compared with whole images."""
        return cls(image, Box(image), "boxes", "window", source)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of sites."""
        if self.sites == "pixels":
            return self.frame
        (H, W), (P, Q) = self.frame, self.window.shape
        return H - P + 1, W - Q + 1

    @property
    def wraps(self) -> bool:
        """Whether the query is continued periodically."""
        return self.source == "every" and self.boundary == "circular"

    @property
    def cut(self) -> bool:
        """Whether boxes are truncated at the border."""
        return self.sites == "pixels" and not self.wraps

    @property
    def whole(self) -> bool:
        """Whether the only site is the whole image, so that its mean is a whole picture."""
        whole = isinstance(self.window, Box) and self.sites == "boxes" and self.grid == (1, 1)
        return whole and self.variants == (Variant(),)

    @property
    def passes(self) -> int:
        """How often the source is read: twice if a response over windows needs the fold first."""
        return 1 if self.whole or self.response == "pixel" else 2

    @cached_property
    def shifts(self) -> np.ndarray:
        """Displacements (dy, dx) from query to source, as an int64 array of shape (K, 2)."""
        axes = []
        for n, seen, p in zip(self.image, self.frame, self.window.shape, strict=True):
            last = max(n - p, 0)
            if self.source == "rolled":
                axes.append(np.arange(n))
            elif self.source == "same" and seen != n:  # aligned with either border; reach is 0
                axes.append(np.unique([0, n - seen]))
            elif self.source == "same":
                axes.append(np.arange(-min(last, self.reach), min(last, self.reach) + 1))
            else:
                axes.append(np.arange(1 - seen if self.wraps else -max(seen - p, 0), last + 1))
        dy, dx = np.meshgrid(*axes, indexing="ij")
        return np.stack([dy.ravel(), dx.ravel()], axis=1).astype(np.int64)

    @property
    def sources_per_image(self) -> int:
        """The largest number of sources that one image provides to a site."""
        return len(self.shifts) * len(self.variants)

    @cached_property
    def coverage(self) -> np.ndarray:
        """The sum of the response windows, float64 (H, W)."""
        if self.response == "pixel":
            return np.ones(self.frame)
        whole = self.window_adjoint(torch.ones(1, *self.grid, dtype=torch.float64))[0].numpy()
        # all pixels of a picture that wraps around are in equally many windows
        return np.full_like(whole, whole.max(), shape=self.frame) if self.wraps else whole

    def window_sum(self, v: Tensor) -> Tensor:
        """sum_d q_i[d] v[d] of every site: v float64 (B, Hq, Wq) -> (B, *sites)."""
        if isinstance(self.window, Masks):
            return self.window.window_sum(v).reshape(len(v), *self.grid)
        P, Q = self.window.shape
        if isinstance(self.window, Box):
            for axis, p in ((1, P), (2, Q)):
                n, before = v.shape[axis], p // 2 if self.cut else 0
                total = torch.cumsum(v, axis)
                total = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total], dim=axis)
                first = torch.arange(n + 2 * before - p + 1, device=v.device) - before
                last = (first + p).clamp(max=n)
                v = total.index_select(axis, last) - total.index_select(axis, first.clamp(min=0))
            return v
        if self.cut:
            v = pad(v, (Q // 2, Q // 2, P // 2, P // 2))
        return conv2d(v[:, None], self.window.filter(v.device))[:, 0]

    def window_adjoint(self, w: Tensor) -> Tensor:
        """sum_i q_i[d] w_i at every pixel, the adjoint of `window_sum`.

        w float64 (B, *sites) -> (B, Hq, Wq).
        """
        if isinstance(self.window, Masks):
            return self.window.window_adjoint(w.flatten(1))
        P, Q = self.window.shape
        if isinstance(self.window, Box):
            v = pad(w, (Q - 1, Q - 1, P - 1, P - 1))
            for axis, p in ((1, P), (2, Q)):
                v = v.unfold(axis, p, 1).sum(-1)
        else:
            v = conv_transpose2d(w[:, None], self.window.filter(w.device))[:, 0]
        if self.cut:
            H, W = self.frame
            v = v[:, P // 2 : P // 2 + H, Q // 2 : Q // 2 + W]
        return v


class Patches(NamedTuple):
    """Windows of one size at a range of positions in every image.

    Attributes:
        size: (h, w).
        tops, lefts: (first, count) of the positions of their top rows, and of their left columns.
    """

    size: tuple[int, int]
    tops: tuple[int, int]
    lefts: tuple[int, int]

    @property
    def per_image(self) -> int:
        """The number of patches in an image."""
        return self.tops[1] * self.lefts[1]

    @property
    def name(self) -> str:
        """The name of an index of these patches."""
        (h, w), (top, rows), (left, columns) = self
        return f"{h}x{w}-{top}+{rows}-{left}+{columns}"

    def numbers(self, channels: int) -> int:
        """D: the number of values in a patch."""
        return math.prod(self.size) * channels


class Class(NamedTuple):
    """Sites whose windows the border truncates in the same way, and what they are compared with.

    Attributes:
        rows, columns: The sites: slices of the grid.
        patches: The patches that their windows are compared with, which have the same size.
        middle: The position (row, column) of the site's own pixel in such a window.
        seen: The rows and columns of the query that contain these windows; of the periodically
            continued query if it wraps around.
    """

    rows: slice
    columns: slice
    patches: Patches
    middle: tuple[int, int]
    seen: tuple[slice, slice]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of sites."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def classes(collection: Collection) -> list[Class]:
    """The classes of sites of a collection of boxes with source "every"."""
    axes = [
        _axis(n, seen, p, collection.wraps)
        for n, seen, p in zip(
            collection.image, collection.frame, collection.window.shape, strict=True
        )
    ]
    return [
        Class(rows, columns, Patches((h, w), tops, lefts), (a, b), (down, across))
        for rows, h, tops, a, down in axes[0]
        for columns, w, lefts, b, across in axes[1]
    ]


def _axis(
    n: int, seen: int, p: int, wraps: bool
) -> list[tuple[slice, int, tuple[int, int], int, slice]]:
    """The classes along one axis.

    For each: its sites, the side of its windows, (first, count) of the positions where these fit in
    an image, the middle, and the pixels seen. Along the axis images have n pixels, pictures `seen`.
    """
    before, after = p // 2, p - 1 - p // 2
    if wraps:
        return [(slice(0, seen), p, (0, n - p + 1), before, slice(0, seen + p - 1))]
    found = []
    cuts = [(max(0, before - i), max(0, i + after - (seen - 1))) for i in range(seen)]
    for cut in dict.fromkeys(cuts):
        sites = [i for i in range(seen) if cuts[i] == cut]
        side, middle = p - sum(cut), before - cut[0]
        places = (0, n - p + 1) if cut == (0, 0) else (0 if cut[0] else n - side, 1)
        rows = slice(sites[0] - middle, sites[-1] - middle + side)
        found.append((slice(sites[0], sites[-1] + 1), side, places, middle, rows))
    return found
