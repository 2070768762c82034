"""Which training pixels every pixel of a machine's answer comes from.

A posterior mean is a weighted mean of training pixels, so that its provenance is no estimate: it is
the weights (docs/explain.md has the formulas).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from scoremachine.core.noise import PictureNoise
from scoremachine.core.processes import Process
from scoremachine.core.shares import Shares
from scoremachine.machines.machine import (
    Bandwidth,
    Batch,
    Label,
    Machine,
    apply_bandwidth,
    source_share,
)
from scoremachine.provenance import pictures
from scoremachine.runtime.files import written
from scoremachine.runtime.progress import say
from scoremachine.runtime.validation import check_integer

NAMED = 2.5e-6  # of what is left of a pixel: at most so much may be of unnamed sources
LEFT = 0.5  # the least that has to be left of a pixel


@dataclass(frozen=True, eq=False)
class Asked:
    """Pictures that have the same source, as a machine was asked for them.

    Attributes:
        members: Their positions among all pictures, int64.
        machine: The machine, with explicit settings.
        batch: The pictures, as it takes them.
        sigma: Their noise levels without the bandwidth, float64.
        h: Their bandwidths, float64.
    """

    members: Tensor
    machine: Machine
    batch: Batch
    sigma: Tensor
    h: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What led at one noise level of a trajectory.

    Attributes:
        t: The time.
        D: The denoised pictures, float32 (B, C, H, W).
        images: The leading image of every pixel, int32 (B, H, W); -1: none.
        weights: The share of its leading source, float32 (B, H, W).
    """

    t: float
    D: Tensor
    images: Tensor
    weights: Tensor

    @classmethod
    def of(cls, trace: Trace, t: float) -> Step:
        """That of a trace."""
        images, weights = trace.images[:, 0].int(), trace.weights[:, 0].float()
        return cls(t, trace.D.float(), images, weights)

    @classmethod
    def batch(cls, parts: Sequence[Step]) -> Step:
        """Those of several batches of pictures, at the same time, one after the other."""
        tensors = zip(*((each.D, each.images, each.weights) for each in parts), strict=True)
        return cls(parts[0].t, *map(torch.cat, tensors))


@dataclass(frozen=True, eq=False)
class Trace:
    """Where every pixel of D(y, sigma) comes from.

    In each pixel the shares of the k leading sources (`weights`), of all other sources (`rest`) and
    of the noisy picture itself (`own`: that of a bandwidth, of a composite machine's y, or of a
    filter of y) add up to 1.

    Attributes:
        machine: The machine that was asked.
        y: The noisy pictures, float64 (B, C, H, W).
        shares: D and the shares, as the machine gives them.
        asked: How it was asked.
        steps: Of generated pictures, what led at every noise level, from noise on.
    """

    machine: Machine
    y: Tensor
    shares: Shares
    asked: Sequence[Asked]
    steps: Sequence[Step] = ()

    @classmethod
    def batch(cls, parts: Sequence[Trace]) -> Trace:
        """The traces of several batches of pictures of one machine, one after the other."""
        starts = np.cumsum([0, *(len(part.y) for part in parts)])
        asked = [
            replace(each, members=each.members + start)
            for part, start in zip(parts, starts.tolist(), strict=False)
            for each in part.asked
        ]
        shares = Shares(
            *map(torch.cat, zip(*(vars(p.shares).values() for p in parts), strict=True))
        )
        steps = tuple(map(Step.batch, zip(*(part.steps for part in parts), strict=True)))
        return cls(parts[0].machine, torch.cat([part.y for part in parts]), shares, asked, steps)

    @property
    def D(self) -> Tensor:  # noqa: N802
        """The denoised pictures, float64 (B, C, H, W)."""
        return self.shares.D

    @property
    def weights(self) -> Tensor:
        """The shares of the k leading sources of every pixel, largest first, float64 (B, k, H, W).

        Of a machine whose channels have sources of their own (`pca`), their means over channels.
        """
        return self.shares.weights.mean(2)

    @property
    def rest(self) -> Tensor:
        """The share of all other sources, float64 (B, H, W)."""
        return self.shares.rest

    @property
    def own(self) -> Tensor:
        """The share of the noisy picture itself, float64 (B, H, W)."""
        return self.shares.own

    @property
    def omitted(self) -> Tensor:
        """An upper bound of the share of what a search has left out, float64 (B, H, W)."""
        return self.shares.omitted

    @property
    def effective_sources(self) -> Tensor:
        """How many equally weighted sources would be as concentrated, float64 (B, H, W).

        Where a pixel is a mean of several posteriors' (`pspc`, `smoothed`, composite machines): at
        least so many, the harmonic mean of theirs or what follows from the named shares.
        """
        w, others = self.weights, (1 - self.own).clamp(min=1e-12)
        squares = (w**2).sum(1) + self.rest * w[:, -1]  # none of the rest is larger than the last
        return torch.maximum(self.shares.effective, others**2 / squares.clamp(min=1e-24))

    @property
    def images(self) -> Tensor:
        """The leading sources' images, positions in the corpus, int64 (B, k, H, W); -1: none."""
        return self._split[0]

    @property
    def rows(self) -> Tensor:
        """The leading source pixels' rows in their images, int64 (B, k, H, W); -1: none."""
        return self._split[1]

    @property
    def columns(self) -> Tensor:
        """Their columns, int64 (B, k, H, W); -1: none."""
        return self._split[2]

    @property
    def variants(self) -> Tensor:
        """Which of `machine.variants` of its image a source is, int64 (B, k, H, W); -1: none."""
        return self._split[3]

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, H, W = self.machine.corpus.shape
        places = self.shares.places
        N = len(self.machine.corpus) if self.machine.source.has_images else int(places.max()) + 1
        number = places // (H * W)
        rows, columns = places % (H * W) // W, places % W
        for v, variant in enumerate(self.machine.variants):
            of = number // N == v
            if variant.mirror_rows:
                rows = torch.where(of, H - 1 - rows, rows)
            if variant.mirror_columns:
                columns = torch.where(of, W - 1 - columns, columns)
        found = number % N, rows, columns, number // N
        none = places < 0
        images, rows, columns, variants = (x.masked_fill(none, -1) for x in found)
        return images, rows, columns, variants

    @cached_property
    def values(self) -> Tensor:
        """The leading source pixels v_s, float64 (B, k, C, H, W), in units of x; 0: none.

        Raises:
            ValueError: Where the sources are clusters of a mixture, which are no pixels.
        """
        if not self.machine.source.has_images:
            raise ValueError(
                "the sources are clusters of a mixture, which have no pixels: explain a machine of "
                "the images"
            )
        images, rows, columns, variants = (x.numpy() for x in self._split)
        corpus, known = self.machine.corpus, images >= 0
        met, which = np.unique(images[known], return_inverse=True)
        pixels = np.zeros((*images.shape, corpus.shape[0]))
        pixels[known] = corpus.images[met][which, :, rows[known], columns[known]] / 127.5 - 1
        for v, variant in enumerate(self.machine.variants):
            of = variants == v
            pixels[of] = variant.contrast * pixels[of] + variant.brightness
        return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)

    @property
    def contributions(self) -> Tensor:
        """sum_s W_p(s) v_s over the leading sources, float64 (B, C, H, W).

        Without a bandwidth, and where `rest` is 0, it is D.
        """
        return (self.shares.weights * self.values).sum(1)

    def image_shares(self) -> csr_array:
        """A_n: the share of every image in every picture, from its leading sources, (B, N).

        A row adds up to 1 less the means of `rest` and `own`.
        """
        return self._image_shares

    @cached_property
    def _image_shares(self) -> csr_array:
        images, weights = self.images, self.weights
        B, _, H, W = images.shape
        known = (images >= 0) & (weights != 0)
        pictures_, *_ = known.nonzero(as_tuple=True)
        N = max(len(self.machine.corpus), int(images.max()) + 1 if images.numel() else 0)
        at = pictures_.numpy(), images[known].numpy()
        return csr_array(coo_array((weights[known].numpy() / (H * W), at), shape=(B, N)))

    def leading_images(self, picture: int, most: int = 8) -> list[tuple[int, float]]:
        """The images with the largest shares in a picture, largest first, with their shares."""
        row = self.image_shares()[[picture]].tocoo()
        order = np.argsort(-row.data, kind="stable")[:most]
        return [(int(row.coords[-1][i]), float(row.data[i])) for i in order]

    def without(self, images: int | Iterable[int]) -> Tensor:
        """D of the machine without some images, float64 (B, C, H, W).

        Where every pixel is one posterior's mean and the leading sources hold all that matters, it
        follows from the shares: (D_p - sum_s W_p(s) v_s) / (1 - sum_s W_p(s)), with the sums over
        the sources in these images. Otherwise the machine is asked again, which is said.

        Arguments:
            images: The position of an image in the corpus, or several.

        Raises:
            ValueError: Where no image is left, or there is no such image.
        """
        gone = _positions(images, len(self.machine.corpus))
        found = self._by_shares(gone)
        if found is None:
            say("other sources than the named ones matter here: the machine is asked again")
            found = self._again(gone)
        return found

    def _by_shares(self, gone: np.ndarray) -> Tensor | None:
        if not self.machine.removal_is_exact:
            return None
        for each in self.asked:
            _left(each.batch.index, gone)
        of = torch.isin(self.images, torch.from_numpy(gone))
        W = torch.where(of[:, :, None], self.shares.weights, 0.0)
        all_of_it = (1 - self.own)[:, None]
        left = all_of_it - W.sum(1)
        doubt = (self.rest + self.omitted)[:, None]
        if bool((left < LEFT * all_of_it).any()) or bool((doubt > NAMED * left).any()):
            return None
        own = self.own[:, None] * self.y
        return (self.D - own - (W * self.values).sum(1)) * all_of_it / left + own

    def _again(self, gone: np.ndarray) -> Tensor:
        D = torch.empty_like(self.D)
        for each in self.asked:
            batch = replace(each.batch, index=_left(each.batch.index, gone))
            mean = each.machine.mean(batch)
            D[each.members] = apply_bandwidth(mean, batch.y, each.sigma, each.h)
        return D

    def decided(self) -> Tensor:
        """The step from which a pixel's leading image changes no more, int64 (B, H, W).

        Raises:
            ValueError: Of a trace that has no steps.
        """
        if not self.steps:
            raise ValueError(
                "this trace has no steps: use sm.generate(machine, ..., explain=True), which "
                "follows pictures from noise on"
            )
        images = torch.stack([step.images for step in self.steps])
        changed = (images[1:] != images[:-1]).flip(0).long()
        return torch.where(changed.any(0), len(changed) - changed.argmax(0), 0)

    def rebuilt(self) -> Tensor:
        """The pictures made of every pixel's single leading source, float64 (B, C, H, W)."""
        return self.values[:, 0]

    def mosaic(self, picture: int = 0) -> Image.Image:
        """A picture with every pixel in the colour of its leading image, pieces outlined."""
        return pictures.mosaic(self, picture)

    def film(self, picture: int = 0) -> list[Image.Image]:
        """The mosaic of every step, from noise on; needs `steps`."""
        return pictures.film(self, picture)

    def sheet(self, picture: int = 0, most: int = 8) -> Image.Image:
        """The training images that gave most to a picture, with what they gave outlined."""
        return pictures.sheet(self, picture, most)

    def save(self, path: str | Path) -> None:
        """Writes the trace as .npz: see docs/explain.md; it loads without this package."""
        steps = {}
        if self.steps:
            steps = {
                "step_images": torch.stack([step.images for step in self.steps], 1),
                "step_weights": torch.stack([step.weights for step in self.steps], 1),
                "decided": self.decided(),
            }
        fields = steps | {
            "y": self.y, "D": self.D, "images": self.images, "rows": self.rows,
            "columns": self.columns, "variants": self.variants, "weights": self.weights,
            "rest": self.rest, "own": self.own, "omitted": self.omitted,
            "effective_sources": self.effective_sources,
        }  # fmt: skip
        with written(path) as temporary:
            arrays = {name: _compact(value.numpy()) for name, value in fields.items()}
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def explain(
    machine: Machine,
    y: Tensor,
    sigma: float | Tensor,
    k: int = 8,
    label: Label = None,
    bandwidth: Bandwidth | None = None,
    noise: PictureNoise | None = None,
    process: Process | None = None,
) -> Trace:
    """Where every pixel of D(y, sigma) comes from: the k leading sources and their shares.

    Arguments:
        machine: A machine whose answers are weighted means of training images: any but `gaussian`.
        y: Noisy pictures, floats, shape (B, C, H, W).
        sigma: Their noise level, or one for each; under a `process`, the time t in [0, 1].
        k: How many sources to name in each pixel.
        label, bandwidth, noise: As in `Machine.denoise`.
        process: Another forward process, of which y is x_t.

    Returns:
        The trace; its `D` is what `denoise` gives.

    Raises:
        ValueError: As `Machine.denoise`, and for a machine that has no sources.
    """
    if not isinstance(machine, Machine):
        raise ValueError(
            f"machine is {type(machine).__name__}; expected a machine, as sm.build makes"
        )
    k = check_integer("k", k)
    if not machine.has_sources:
        raise ValueError(
            f"{machine.name} has no sources: its answer is a filter of the noisy picture, made of "
            "the images' mean and covariance alone; explain another machine"
        )
    with torch.no_grad():
        asked = _asked(machine, y, sigma, label, bandwidth, noise, process)
        parts = [
            each.machine.shares(each.batch, k).with_own(
                each.batch.y, source_share(each.sigma, each.h)
            )
            for each in asked
        ]
    shares = Shares.batch([each.members for each in asked], parts)
    shown = asked[0].machine if asked else machine
    return Trace(shown, y.detach().to("cpu", torch.float64), shares, asked)


def _asked(
    machine: Machine,
    y: Tensor,
    sigma: float | Tensor,
    label: Label,
    bandwidth: Bandwidth | None,
    noise: PictureNoise | None,
    process: Process | None,
) -> list[Asked]:
    """How a machine is asked for noisy pictures."""
    if process is None:
        pictures_, levels = machine.check(y, sigma, bandwidth)
        viewed, scale = machine.resolved(), 1.0
        h = viewed.bandwidths(levels, bandwidth)
    else:
        pictures_, _ = machine.check(y, 1.0)
        process.check(pictures_.shape[2:])
        t = float(sigma)
        _, level = process(torch.tensor(t, dtype=torch.float64))
        viewed = machine.under_process(process, t, bandwidth)
        levels, scale = level.double().expand(len(pictures_)), viewed.source.scale
        h = torch.zeros(len(pictures_), dtype=torch.float64)
    if len(y) == 0:
        raise ValueError("there are no pictures in y; expected at least one, (B, C, H, W)")
    found = []
    for members, index in machine.by_label(label, len(pictures_)):
        some = None if noise is None else noise.of(members)
        at, wide = levels[members], torch.sqrt(levels[members] ** 2 + h[members] ** 2)
        batch = Batch(pictures_[members], wide, at / scale, index, some)
        found.append(Asked(members, viewed, batch, at, h[members]))
    return found


def _positions(images: int | Iterable[int], N: int) -> np.ndarray:
    """Positions of images, int64; ValueError for what is none."""
    gone = np.atleast_1d(np.asarray(images if isinstance(images, int) else list(images)))
    if gone.size and (gone.dtype.kind not in "iu" or gone.min() < 0 or gone.max() >= N):
        raise ValueError(f"images are {gone.tolist()}; expected positions from 0 to {N - 1}")
    return gone.astype(np.int64)


def _left(index: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """The positions that are left; ValueError for none."""
    left = np.setdiff1d(index, gone)
    if len(left) == 0:
        raise ValueError(
            f"without these images nothing is left of the {len(index)} that the machine compares "
            "with; leave fewer out"
        )
    return left


def _compact(x: np.ndarray) -> np.ndarray:
    """Numbers as they are kept in files: int32, float32."""
    return x.astype(np.int32 if x.dtype.kind == "i" else np.float32)
