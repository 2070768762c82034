"""The equivariant local score machine: patches are compared regardless of their position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Boundary, Collection
from scoremachine.core.schedules import PatchSchedule
from scoremachine.data.corpus import Corpus
from scoremachine.engines.search.bounded import LEVEL
from scoremachine.machines.machine import Batch, Label, apply_bandwidth
from scoremachine.machines.windowed import EquivariantMachine
from scoremachine.sources import source_of
from scoremachine.sources.searched import Search, SearchedImages
from scoremachine.sources.source import FoldRequest, Source


class Searched(NamedTuple):
    """D, and how far it may be from the exact one.

    Attributes:
        D: As returned by `denoise`, shape (B, C, H, W).
        omitted_mass: For every pixel an upper bound of the share of its posterior that was omitted,
            or the share whose omission would cause the estimated error; float64 (B, H, W); 0 where
            every patch was compared.
        kind: "deterministic": a bound, which holds for every picture; or "statistical": an estimate
            with a confidence `level`.
    """

    D: Tensor
    omitted_mass: Tensor
    kind: str

    @property
    def error(self) -> Tensor:
        """The largest error of the channels of a pixel: a bound or an estimate, (B, H, W)."""
        return 2 * self.omitted_mass

    @property
    def level(self) -> float:
        """The least share of pixels whose errors are within `error`.

        1 for a deterministic bound. For an estimate it is a confidence level, for pictures whose
        noise is independent of the images.
        """
        return 1.0 if self.kind == "deterministic" else LEVEL


class EquivariantLocalScore(EquivariantMachine):
    """Every pixel's P x P box compared with every P x P patch at every position of every image.

    Kamb & Ganguli 2412.20292 (the equivariant local score machine, and its form at broken
    borders). It does not depend on the size of a picture, and denoises any that is at least as
    large as its patches.

    Arguments:
        boundary: "broken" (default): a box truncated by the border is compared with training boxes
            truncated in the same way, like the zero padding of a network; "circular": it wraps
            around, and is compared with every box that fits: such pictures are seamless tiles.
        search: How patches are compared, by a name or as a `Search`. "exact": all of them;
            "bounded": through an index of the patches, built when it is first needed, so that
            every pixel of D is within `error` of the exact one; "auto" (default): bounded where
            that is faster.
        error: The largest error of a pixel allowed to a search, in (0, 1], in units of x.
        bound: How the error is guaranteed (see `Searched`): "deterministic": a bound;
            "statistical": an estimate with a confidence level, which is faster; "auto" (default):
            deterministic where few patches matter to a pixel and have up to 100 numbers,
            statistical elsewhere.
        corpus, patch_size, settings: See `BoxMachine`; shifts add nothing, since the source has all
            positions already.
    """

    name = "els"
    accepts_mixtures = True

    def __init__(
        self,
        corpus: Corpus,
        patch_size: int | PatchSchedule | str = "auto",
        boundary: Boundary = "broken",
        search: Search | str = "auto",
        error: float = 1e-3,
        bound: str = "auto",
        **settings: Any,
    ) -> None:
        asked = search if isinstance(search, Search) else Search(search, error, bound)
        known = {"search": search, "error": asked.error, "bound": asked.bound}
        self.__dict__.update(known, _asked=asked)  # before the source is made from them
        super().__init__(corpus, patch_size, boundary, **settings)
        if asked.mode == "bounded" and (self.window != "box" or len(self.augment.variants) > 1):
            raise ValueError(
                "search='bounded' has indexes of plain patches only, so it supports neither "
                "tapered windows nor flips, brightness or contrast: use search='exact'"
            )

    def make_source(self, corpus: Any, kernel: str) -> Source:
        source = source_of(corpus, kernel)
        return SearchedImages(corpus, kernel, self._asked) if source.has_images else source

    @property
    def removal_is_exact(self) -> bool:
        return not self.depends_on_noise

    def collection(self, P: int, sigma: float, index: np.ndarray) -> Collection:
        image, window = self.corpus.shape[1:], self.tapered((P, P), sigma, index)
        return Collection(image, window, "pixels", "pixel", "every", **self.wider())

    def denoise_bounded(self, y: Tensor, sigma: float | Tensor, label: Label = None) -> Searched:
        """`denoise`, and for every pixel the posterior mass that a search has omitted.

        Arguments and errors are those of `denoise`.
        """
        machine = self.resolved()
        if not self.source.has_images:
            raise ValueError("a mixture is not searched, and nothing is omitted: use denoise")
        pictures, levels = self.check(y, sigma)
        D = torch.empty_like(pictures)
        mass = torch.zeros(len(y), *y.shape[2:], dtype=torch.float64)
        kinds = {"deterministic"}
        for members, index in self.by_label(label, len(pictures)):
            y_m, sigma_m = pictures[members], levels[members]
            h = machine.bandwidths(sigma_m)
            batch = Batch(y_m, torch.sqrt(sigma_m**2 + h**2), sigma_m, index)
            for some, row in machine.by_row(batch):
                some_batch = batch.at(some)
                self.source.prepare(row, index)
                request = FoldRequest(some_batch.y, some_batch.sigma, row, index)
                found, kind = self.source.folded_with_kind(request)
                kinds.add(kind)
                D[members[some]] = apply_bandwidth(found.mean, y_m[some], sigma_m[some], h[some])
                assert found.fold is not None
                mass[members[some]] = found.fold.omitted_mass
        return Searched(D.to(dtype=y.dtype, device=y.device), mass, max(kinds))

    def prepare(self, label: Label = None, levels: Sequence[float] = ()) -> Self:
        machine = super().prepare(label, levels)
        index = self.corpus.indices(label if isinstance(label, int | np.integer | str) else None)
        # in the order in which they are needed, since they are read ahead
        for P in dict.fromkeys(machine.local_at(sigma) for sigma in levels):
            machine.index(P, index)
        return machine

    def index(self, P: int, images: np.ndarray | None = None) -> list[Path]:
        """Builds the missing indexes of P x P patches; returns the folders of all, if any.

        Arguments:
            P: The patch size.
            images: Positions of the images that are the source; None: all.

        Raises:
            OSError: If there is no room for them.
        """
        images = self.corpus.indices() if images is None else images
        return self.source.prepare(self.collection(P, 1.0, images), images) or []


class EquivariantPatchComposite(EquivariantMachine):
    """Every P x P box that fits, compared with every P x P patch at every position; averaged.

    `pspc` without positions, or `els` with responses over windows: the denoiser of one picture's
    patches (Qiu et al. 2606.04299), and of those of a data set. It does not depend on the size of a
    picture, and denoises any that is at least as large as its patches.

    Arguments:
        boundary: "broken" (default): the boxes that fit inside; "circular": also those that wrap
            around, so that pictures are seamless tiles.
        corpus, patch_size, settings: See `BoxMachine`. P may be even; shifts add nothing, since the
            source has all positions already.
    """

    name = "epc"
    odd = False

    def collection(self, P: int, sigma: float, index: np.ndarray) -> Collection:
        image = H, W = self.corpus.shape[1:]
        window = self.tapered((min(P, H), min(P, W)), sigma, index)
        if self.boundary == "circular":
            return Collection(image, window, "pixels", "window", "every", **self.wider())
        return Collection(image, window, "boxes", "window", "every", **self.wider())
