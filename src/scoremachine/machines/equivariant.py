"""The equivariant local score machine: neighbourhoods that forget where they came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from azula.noise import Schedule
from torch import Tensor

from scoremachine.core.collection import Boundary, Collection
from scoremachine.core.posterior import Engine
from scoremachine.core.schedules import BandwidthSchedule, PatchSchedule
from scoremachine.core.windows import Augment
from scoremachine.data.corpus import Corpus
from scoremachine.engines import pytorch as device
from scoremachine.engines import triton as fused
from scoremachine.engines.search.bounded import KINDS, Bounded, exact_cost, searchable
from scoremachine.machines.machine import Label, apply_bandwidth
from scoremachine.machines.windowed import BoxMachine
from scoremachine.runtime.progress import say
from scoremachine.runtime.validation import check_name
from scoremachine.sources.mixture import Mixture

SEARCHES = ("auto", "exact", "bounded")
# sides of patches up to which, and seconds of one core for `PIXELS` of a picture: a scan that takes
# longer is worth an index
WORTHWHILE = (3, 1.0), (7, 2.5), (math.inf, 4.0)
PIXELS = 1024


class Searched(NamedTuple):
    """D, and how far it may be from the exact one.

    Attributes:
        D: As `denoise` gives it, shape (B, C, H, W).
        omitted_mass: For every pixel an upper bound of the share of its posterior that was not
            looked at, or what stands for it where lots were drawn; float64 (B, H, W); 0 where
            everything was looked at.
        kind: What kind of bound: "deterministic", true of every picture; or "statistical", for
            noise independent of the images not true of at most one pixel in a hundred.
    """

    D: Tensor
    omitted_mass: Tensor
    kind: str

    @property
    def error(self) -> Tensor:
        """An upper bound of the error of a pixel's channels in D, float64 (B, H, W)."""
        return 2 * self.omitted_mass


class EquivariantLocalScore(BoxMachine):
    """Every pixel's P x P box against every P x P patch, from every position of every image.

    Kamb & Ganguli 2412.20292 (the equivariant local score machine, and its form at broken
    borders). It knows nothing of the size of a picture, and denoises any that is at least as large
    as its patches.

    Arguments:
        boundary: "broken" (default): a box that the border cuts off is compared with training
            boxes cut off in the same way, as a zero-padded network sees it; "circular": it wraps
            around, and is compared with every box that fits: such pictures are seamless tiles.
        search: How it looks at its source. "exact": at every patch; "bounded": through an index
            of the patches, built when it is first needed, so that every pixel of D is within
            `error` of the exact one; "auto" (default): bounded where that is faster.
        error: The largest error of a pixel that a bounded search may make, in (0, 1].
        bound: What kind of bound that is (see `Searched`): "deterministic", "statistical", or
            "auto" (default): deterministic where few patches matter to a pixel and have up to 100
            numbers, statistical elsewhere, which is faster.
        corpus, patch_size, bandwidth, kernel, schedule, window, augment: See `BoxMachine`;
            shifts add nothing to a source of all positions.
    """

    name = "els"
    equivariant = True
    accepts_mixtures = True

    def __init__(
        self,
        corpus: Corpus,
        patch_size: int | PatchSchedule | str = "auto",
        bandwidth: float | BandwidthSchedule | str = 0.0,
        kernel: str = "auto",
        schedule: Schedule | None = None,
        window: str = "box",
        augment: Augment | str | None = None,
        boundary: Boundary = "broken",
        search: str = "auto",
        error: float = 1e-3,
        bound: str = "auto",
    ) -> None:
        if boundary not in ("broken", "circular"):
            raise ValueError(f"boundary is {boundary!r}; expected 'broken' or 'circular'")
        self.boundary: Boundary = boundary
        check_name("search", search, SEARCHES)
        check_name("bound", bound, KINDS)
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error <= 1:
            raise ValueError(
                f"error is {error!r}; expected the largest error of a pixel, above 0 and at most 1"
            )
        super().__init__(corpus, patch_size, bandwidth, kernel, schedule, window, augment)
        if search == "bounded" and (window != "box" or len(self.augment.variants) > 1):
            raise ValueError(
                "search='bounded' has indexes of plain patches alone, so it goes with neither a "
                "tapered window nor flips, brightness or contrast: use search='exact'"
            )
        self.search, self.error, self.bound = search, float(error), bound
        self.relative_cost /= (2 * self.augment.shifts + 1) ** 2

    def check_local(self, value: Any) -> None:
        super().check_local(value)
        H, W = self.corpus.shape[1:]
        if self.boundary == "circular" and value > min(H, W):
            raise ValueError(
                f"no {value} x {value} patch fits inside the {H} x {W} images, and a circular "
                f"boundary compares with those that fit: use patch_size {min(H, W)} or less, or "
                "boundary='broken'"
            )

    def shape_for(self, y: Tensor) -> tuple[int, int, int]:
        if not isinstance(y, Tensor) or y.ndim != 4:
            return self.corpus.shape
        C, (H, W) = self.corpus.shape[0], y.shape[2:]
        if len(y) and y.shape[1] == C:
            self.check_shape((C, H, W))
        return C, H, W

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """ValueError unless pictures of that shape (C, H, W) hold its patches, as the images do."""
        C, H, W = shape
        if tuple(shape) == self.corpus.shape:
            return
        if self.corpus.shape[0] != C:
            super().check_shape(shape)
        self.local_at(1.0)
        assert isinstance(self.patch_size, PatchSchedule)
        P, least = int(self.patch_size.values.max()), min(H, W, *self.corpus.shape[1:])
        if least < P:
            raise ValueError(
                f"a picture of {H} x {W} from images of {self.corpus.shape[1]} x "
                f"{self.corpus.shape[2]} takes patches of at most {least - (least % 2 == 0)}, and "
                f"patch_size goes up to {P}: choose smaller patches, or a larger picture"
            )

    def collection(self, P: int, sigma: float, index: np.ndarray) -> Collection:
        image, window = self.corpus.shape[1:], self.tapered((P, P), sigma, index)
        everywhere = {**self.wider(), "reach": 0, "boundary": self.boundary}
        return Collection(image, window, "pixels", "pixel", "every", **everywhere)

    @cached_property
    def _bounded(self) -> Bounded:
        return Bounded(self.corpus, self.kernel, self.error, self.bound)

    def engine_for(self, collection: Collection, index: np.ndarray) -> Engine:
        special = self.view is not None or isinstance(self.corpus, Mixture)
        if self.search == "exact" or special or not searchable(collection):
            return self.kernel
        if self.search == "auto":
            if self.kernel is device and fused.available():
                return self.kernel  # a GPU compares everything before an index is looked through
            side = max(collection.window.shape)
            least = next(seconds for most, seconds in WORTHWHILE if side <= most)
            pictures = max(1.0, math.prod(collection.frame) / PIXELS)
            if exact_cost(collection, len(index)) < least * pictures:
                return self.kernel
            try:
                self._bounded.check_room(index, collection)
            except (OSError, ValueError) as error:
                say(f"every patch is compared, which takes longer than a search: {error}")
                return self.kernel
        return self._bounded

    def denoise_bounded(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Searched:
        """`denoise`, and for every pixel a bound of what a search has left out.

        Arguments and errors are `denoise`'s.
        """
        if isinstance(self.corpus, Mixture):
            raise ValueError("nothing of a mixture is left out: use denoise")
        pictures, levels = self.check(y, sigma)
        D = torch.empty_like(pictures)
        mass = torch.zeros(len(y), *y.shape[2:], dtype=torch.float64)
        before = self._bounded.statistical
        for members, index in self.by_label(label, len(pictures)):
            y_m, sigma_m = pictures[members], levels[members]
            h = self.bandwidths(sigma_m)
            for some, row in self.by_row(y_m, sigma_m, index):
                wider = torch.sqrt(sigma_m[some] ** 2 + h[some] ** 2)
                evidence = self.evidence(y_m[some], wider, index, row)
                D[members[some]] = apply_bandwidth(evidence.mean, y_m[some], sigma_m[some], h[some])
                mass[members[some]] = evidence.fold.omitted_mass
        kind = "statistical" if self._bounded.statistical > before else "deterministic"
        return Searched(D.to(dtype=y.dtype, device=y.device), mass, kind)

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> None:
        super().prepare(label, levels)
        index = self.corpus.indices(label if isinstance(label, int | str) else None)
        # in the order in which they are needed, for they are read ahead
        for P in dict.fromkeys(self.local_at(sigma) for sigma in levels):
            self.index(P, index)

    def index(self, P: int, images: np.ndarray | None = None) -> list[Path]:
        """Builds what is missing of the indexes of P x P patches; returns their folders, if any.

        Arguments:
            P: The patch size.
            images: Positions of the images that are the source; None: all.

        Raises:
            OSError: If there is no room for them.
        """
        images = self.corpus.indices() if images is None else images
        collection = self.collection(P, 1.0, images)
        kernel = self.engine_for(collection, images)
        return kernel.prepare(images, collection) if isinstance(kernel, Bounded) else []

    @property
    def _ways(self) -> dict[str, Any]:
        """How it sees borders and looks at its source."""
        return {name: getattr(self, name) for name in ("boundary", "search", "error", "bound")}

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), **self._ways}

    def settings(self) -> dict[str, object]:
        return {**super().settings(), **self._ways}
