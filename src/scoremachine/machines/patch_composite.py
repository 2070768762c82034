"""Patch set posterior composites: overlapping windows, denoised separately and averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scoremachine.core.collection import Collection
from scoremachine.core.schedules import ShareSchedule
from scoremachine.core.windows import Masks
from scoremachine.data.corpus import Corpus
from scoremachine.data.heatmaps import HeatMaps
from scoremachine.machines.windowed import BoxMachine, WindowMachine

ROWS = 1024  # heat maps sorted at a time


class PatchComposite(BoxMachine):
    """Every P x P box that fits, compared with the images at the same position; boxes are averaged.

    PSPC-Square of Niedoba et al. 2411.19339. P may be even, up to the image's longer side; along a
    side shorter than P the box has the length of that side.
    """

    name = "pspc"
    odd = False

    def collection(self, P: int, sigma: float, index: np.ndarray) -> Collection:
        H, W = self.corpus.shape[1:]
        window = self.tapered((min(P, H), min(P, W)), sigma, index)
        return Collection((H, W), window, "boxes", "window", **self.wider())


class PatchCompositeFlex(WindowMachine):
    """A window of any shape for every pixel, compared at the same position; windows are averaged.

    PSPC-Flex of Niedoba et al. 2411.19339. Pixel i's window is the smallest set of pixels that
    holds a given share of its heat map.

    Arguments:
        share: The share in (0, 1], a `ShareSchedule`, the name of a published one, or "auto"
            (held-out calibration, the default).
        heat_maps: "wiener" (default): the squared entries of the corpus's own Wiener filter at the
            same noise level; or `HeatMaps`; or the path of a file of them.
        corpus, settings: See `Machine`.
    """

    name = "pspc-flex"
    locality = "share"
    share: ShareSchedule | str
    depends_on_noise = True
    relative_cost = 3.0

    def __init__(
        self,
        corpus: Corpus,
        share: float | ShareSchedule | str = "auto",
        heat_maps: HeatMaps | str | Path = "wiener",
        **settings: Any,
    ) -> None:
        super().__init__(corpus, share, **settings)
        if isinstance(heat_maps, str | Path) and heat_maps != "wiener":
            heat_maps = HeatMaps.load(heat_maps)
        if isinstance(heat_maps, HeatMaps):
            heat_maps.check(corpus.shape[1:])
        elif heat_maps != "wiener":
            raise ValueError(
                f"heat_maps is {heat_maps!r}; expected 'wiener', HeatMaps or the path of a file"
            )
        self.heat_maps = heat_maps

    def candidates(self) -> list[float]:
        return [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0]

    def collection(self, share: float, sigma: float, index: np.ndarray) -> Collection:
        image = self.corpus.shape[1:]
        if isinstance(self.heat_maps, HeatMaps):
            maps = self.heat_maps(sigma)
        else:
            maps = self.source.moments(index).heat_maps(sigma, self.corpus.shape)
        q = holding(maps, share)
        if q.all():  # one window, the whole image
            return Collection.of_images(image)
        return Collection(image, Masks.of([q], image), "pixels", "window")


def holding(maps: np.ndarray, share: float) -> np.ndarray:
    """The smallest sets of pixels that hold the share of each map, boolean (H W, H W).

    A pixel whose map is empty, or that is in no set, is added to its own set.
    """
    q = np.zeros(maps.shape, dtype=bool)
    for start in range(0, len(maps), ROWS):
        some = maps[start : start + ROWS]
        order = np.argsort(-some, axis=1, kind="stable")
        total = np.cumsum(np.take_along_axis(some, order, axis=1), axis=1)
        before = np.concatenate([np.zeros((len(some), 1)), total[:, :-1]], axis=1)
        np.put_along_axis(q[start : start + ROWS], order, before < share * total[:, -1:], axis=1)
    alone = ~q.any(axis=0) | ~q.any(axis=1)
    q[alone, alone] = True
    return q
