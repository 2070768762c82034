"""New pictures from one photograph, or a few: the patch composite, from coarse to fine.

A single picture is a data set of patches (Qiu et al. 2606.04299). At each scale of a pyramid the
denoiser is `epc` of the photograph at that scale: every box of the picture is compared with every
patch, and overlapping means are averaged. The coarsest scale starts from noise, or from the
photograph's own coarsest scale and noise; each next one from the enlarged result and a little
noise, which are compared with patches that are enlarged as well. Where there are too many patches
to compare all, the posterior of a box is that of a few candidates, which the coarser scale and
neighbouring boxes point to (`engines.boxes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from scoremachine.core.noise import PictureNoise
from scoremachine.data.corpus import Corpus
from scoremachine.engines import boxes
from scoremachine.runtime.progress import Bar, bar, say
from scoremachine.runtime.validation import check_integer, check_name, check_seed

FACTOR = 0.75  # of the sides from one scale to the next coarser one
COARSEST = 28  # pixels of the photograph's shorter side at the coarsest scale, about
SMALLEST = 14  # the least shorter side of a picture there
LAYOUT = 11  # side of the patches at the coarsest scale
DENSE = 2**23  # pairs of boxes and patches up to which all are compared
CANDIDATES = 4  # of a box, beyond that
STEPS, REFINING = 20, 6  # noise levels at the coarsest scale, and at each other one
FIRST, KEPT = 4.0, 0.05  # noise levels at which the coarsest scale starts: keep near 0, and 1
PURE = 3.0  # the same for keep = 0
ADDED, LEAST = 0.1, 0.03  # noise added at each other scale, and the last level
USUAL = 0.2  # keep, unless given
NEAR = 1 / 3  # for it, standard deviation of positions at the coarsest scale; then twice as much
MOVED = 0.5  # how far the layout is moved at most, in half sides
FAR = 3.0  # standard deviation from which on positions do not matter
ROUNDS = 2  # of the search for candidates, at each noise level
SYMMETRIES = ("mirror", "rotate", "four")
LARGEST = 2**24  # pixels of a photograph; larger ones are reduced
CHECKED = 32  # boxes of the finest scale that are compared with all patches


@dataclass(frozen=True, eq=False)
class Growth:
    """What is grown, and how.

    Attributes:
        size: Height and width of the pictures.
        keep: How much of the photograph's layout stays, from 0 (none: pure noise) to 1.
        patch_size: P, the side of the patches at all but the coarsest scale.
        balance: How equally all patches of the photograph are used where all are compared, from 0
            (the plain posterior) to 1.
        tile: Whether the picture is a seamless tile.
        symmetry: "mirror" (left to right), "rotate" (by half a turn), "four" (both mirrors); None.
        start: A picture that the coarsest scale starts from instead of the photograph, float32
            (h, w, C); it is resized.
        structure: Whether only the layout of `start` stays: the pictures begin with it at a scale
            in between, the finer the larger `keep` is.
        known: A picture whose pixels stay, float32 (H, W, C), except where `mask` is set.
        mask: Where pixels are new, bool (H, W).
        enlarge: Whether the pictures are the photograph, enlarged: its own patches add detail, and
            reduced they are like the photograph.
        turn: An angle in radians: the noise is a rotation of two noises by it, so that pictures of
            neighbouring angles are alike.
    """

    size: tuple[int, int]
    keep: float = USUAL
    patch_size: int = 7
    balance: float = 1.0
    tile: bool = False
    symmetry: str | None = None
    start: np.ndarray | None = None
    structure: bool = False
    known: np.ndarray | None = None
    mask: np.ndarray | None = None
    enlarge: bool = False
    turn: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("keep", self.keep), ("balance", self.balance)):
            if not 0 <= value <= 1:
                raise ValueError(f"{what} is {value}; expected a number from 0 to 1")
        check_integer("patch_size", self.patch_size)
        H, W = self.size
        if min(H, W) < self.patch_size:
            raise ValueError(
                f"a picture of {H} x {W} is smaller than the patches of {self.patch_size} x "
                f"{self.patch_size} that it is made of: expected at least {self.patch_size} pixels"
            )
        if self.symmetry is not None:
            check_name("symmetry", self.symmetry, SYMMETRIES)
        if self.symmetry is not None and self.mask is not None:
            raise ValueError(
                "known pixels stay, and symmetry would change them: leave one of them out"
            )
        if self.structure and self.start is None:
            raise ValueError("structure is that of start, which is None; expected a picture")
        if (self.mask is None) != (self.known is None):
            raise ValueError("known and mask go together; expected both or neither")
        if self.mask is not None and self.mask.shape != (H, W):
            raise ValueError(
                f"the mask has {self.mask.shape[0]} x {self.mask.shape[1]} pixels; expected "
                f"{H} x {W}, those of the picture"
            )
        if self.mask is not None and self.mask.all():
            raise ValueError("the mask covers the whole picture, so nothing is known: leave it out")


class Progress(NamedTuple):
    """A picture after some scale.

    Attributes:
        scale: The number of the scale, the coarsest being the highest; 0: it is finished.
        x: The picture, float32 (H, W, C).
        places: Each box's candidates, int32 (*boxes, K, 2).
        omitted: The posterior mass not among them, of a few boxes; empty where all are compared.
        origins: At the finest scale, the photograph, row and column of the pixel that gives most
            to each pixel, int32 (H, W, 3), -1 where a known pixel stays; else empty.
        share: How much it gives (of what the candidates give), float32 (H, W); else empty.
    """

    scale: int
    x: np.ndarray
    places: np.ndarray
    omitted: np.ndarray
    origins: np.ndarray = np.zeros((0, 0, 3), dtype=np.int32)
    share: np.ndarray = np.zeros((0, 0), dtype=np.float32)


class Patches(NamedTuple):
    """The patches of some photographs at one scale, which lie below each other.

    Attributes:
        pixels: float32 (h, w C).
        blurred: The same, enlarged from the next coarser scale, as pictures begin at this scale.
        valid: Where patches may begin, bool (h - P + 1, w - P + 1).
        positions: Positions of patches in their photograph, from -1 to 1, float32 (*valid, 2).
        tops, heights: Each photograph's first row, and its rows.
    """

    pixels: np.ndarray
    blurred: np.ndarray
    valid: np.ndarray
    positions: np.ndarray
    tops: np.ndarray
    heights: np.ndarray


class Means(NamedTuple):
    """Posterior means, composed.

    Attributes:
        D: The denoised picture, float32 (H, W, C).
        places: Each box's candidates, int32 (*boxes, K, 2).
        weights: Theirs, float32 (*boxes, K); None before the first step.
        logits: The same before they are normalized; None where all patches are compared.
    """

    D: np.ndarray
    places: np.ndarray
    weights: np.ndarray | None = None
    logits: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Posterior:
    """The boxes of a picture at one scale, and the patches that they are compared with.

    Attributes:
        source: The patches.
        window: Their side P, and the channels C.
        frame: Height and width of the picture.
        grid: How many boxes there are, down and across; as many as pixels if they wrap around.
        positions: Of the boxes in the layout, float32 (*grid, 2).
        weight: How much they matter.
        balance: See `Growth`.
    """

    source: Patches
    window: tuple[int, int]
    frame: tuple[int, int]
    grid: tuple[int, int]
    positions: np.ndarray
    weight: float
    balance: float

    @property
    def wraps(self) -> bool:
        """Whether boxes reach beyond the border."""
        return self.grid == self.frame

    def asked(self, y: np.ndarray, blurred: bool = False) -> tuple[np.ndarray, np.ndarray, Any]:
        """What the engine compares."""
        around = (0, self.window[0] - 1) if self.wraps else (0, 0)
        y = np.pad(y, (around, around, (0, 0)), mode="wrap")
        at = self.source.valid, self.positions, self.source.positions
        source = self.source.blurred if blurred else self.source.pixels
        return np.ascontiguousarray(y.reshape(len(y), -1)), source, at

    def means(
        self,
        y: np.ndarray,
        sigma: float,
        places: np.ndarray,
        search: tuple[int, int],
        blurred: bool = False,
    ) -> Means:
        """The denoised picture: of all patches where they are few, or else of a few candidates.

        Arguments:
            y: The noisy picture, float32 (H, W, C).
            sigma: Its noise level.
            places: The candidates to begin with.
            search: The seed and the rounds of the search for better ones.
            blurred: Whether y is a picture of the coarser scale, enlarged, and noise: so it is
                compared with what the source is then, as in GPNN.
        """
        (seed, rounds), asked = search, self.asked(y, blurred)
        scales = boxes.effective_scale(sigma), self.weight
        (P, C), valid, logits = self.window, self.source.valid, None
        frame = asked[0].shape[0], asked[0].shape[1] // C
        if math.prod(self.grid) * valid.size <= DENSE:
            all_ = boxes.dense(*asked, self.window, scales).reshape(math.prod(self.grid), -1)
            w = boxes.balanced(all_, valid, self.balance)
            places, weights = leading(w, valid.shape, self.grid)
            w = w.reshape(*self.grid, *valid.shape)
            total = boxes.composed(self.source.pixels, None, w, self.window, frame)
        else:
            for k in range(rounds):
                places, logits = boxes.search(
                    *asked, places, self.window, scales, (seed + k) % 2**31
                )
            assert logits is not None
            weights = boxes.softmax(logits)
            total = boxes.composed(self.source.pixels, places, weights, self.window, frame)
        D = folded(total, P, self.frame) if self.wraps else total / coverage(*self.frame, P)
        return Means(D, places, weights, logits)

    def omitted(self, y: np.ndarray, sigma: float, logits: np.ndarray | None) -> np.ndarray:
        """The posterior mass that is not among the candidates, of a few evenly spread boxes."""
        if logits is None:
            return np.zeros(0)
        count = np.unique(np.linspace(0, logits[..., 0].size - 1, CHECKED).astype(np.int64))
        some = np.stack(np.unravel_index(count, logits.shape[:2]), -1)
        scales = boxes.effective_scale(sigma), self.weight
        found = some, logits[some[:, 0], some[:, 1]]
        return boxes.omitted(*self.asked(y), self.window, scales, found)

    def origins(self, means: Means) -> tuple[np.ndarray, np.ndarray]:
        """The photograph, row and column that give most to each pixel, and their share."""
        assert means.weights is not None
        P = self.window[0]
        found, share = boxes.origins(means.places, means.weights, P, self.frame, self.wraps)
        n = np.searchsorted(self.source.tops, found[..., 0], side="right") - 1
        found[..., 0] -= self.source.tops[n]
        return np.concatenate([n[..., None].astype(np.int32), found], -1), share


def resized(x: np.ndarray, H: int, W: int) -> np.ndarray:
    """A picture (h, w, C) of another size, float32."""
    if x.shape[:2] == (H, W):
        return x
    t = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).permute(2, 0, 1)[None]
    t = interpolate(t, (H, W), mode="bicubic", antialias=True, align_corners=False)
    return np.ascontiguousarray(t[0].permute(1, 2, 0).numpy())


def scaled(n: int, scale: int, least: int) -> int:
    """A side at a scale."""
    return max(least, round(n * FACTOR**scale))


@dataclass(frozen=True, eq=False)
class Grower:
    """Grows pictures.

    Attributes:
        photographs: float32 (h, w, C) in [-1, 1], of any sizes.
        holes: Which pixels of each are no source, bool (h, w); None: none.
        growth: What is grown.
    """

    photographs: Sequence[np.ndarray]
    holes: Sequence[np.ndarray | None]
    growth: Growth

    @property
    def scales(self) -> int:
        """The number of the coarsest scale."""
        if self.growth.enlarge:
            ratio = self.growth.size[0] / self.photographs[0].shape[0]
            return max(1, round(math.log(max(1.0, ratio)) / -math.log(FACTOR)))
        photograph = min(min(x.shape[:2]) for x in self.photographs)
        by_source = math.log(max(1.0, photograph / COARSEST)) / -math.log(FACTOR)
        by_size = math.log(max(1.0, min(self.growth.size) / SMALLEST)) / -math.log(FACTOR)
        return round(min(by_source, by_size))

    def side(self, scale: int) -> int:
        """The patches' side at a scale."""
        least = min(*self.frame(scale), *(min(x.shape[:2]) for x in self.photographs))
        P = self.growth.patch_size
        layout = scale == self.scales > 0 and not self.growth.enlarge
        return min(max(P, LAYOUT) if layout else P, least)

    def frame(self, scale: int) -> tuple[int, int]:
        """Height and width of the picture at a scale."""
        H, W = (scaled(n, scale, self.growth.patch_size) for n in self.growth.size)
        return H, W

    def patches(self, scale: int) -> Patches:
        """The source at a scale."""
        P = self.side(scale)
        scale = 0 if self.growth.enlarge else scale
        sizes = [[scaled(n, scale, P) for n in x.shape[:2]] for x in self.photographs]
        heights = np.array([h for h, _ in sizes])
        tops = np.cumsum(heights) - heights
        width, C = max(w for _, w in sizes), self.photographs[0].shape[2]
        pixels = np.zeros((int(heights.sum()), width, C), dtype=np.float32)
        blurred = np.zeros_like(pixels)
        places = len(pixels) - P + 1, width - P + 1
        valid = np.zeros(places, dtype=bool)
        positions = np.zeros((*places, 2), dtype=np.float32)
        each = zip(self.photographs, self.holes, sizes, tops.tolist(), strict=True)
        for x, hole, (h, w), top in each:
            pixels[top : top + h, :w] = resized(x, h, w)
            coarser = resized(x, max(1, round(h * FACTOR)), max(1, round(w * FACTOR)))
            blurred[top : top + h, :w] = resized(coarser, h, w)
            at = slice(top, top + h - P + 1), slice(0, w - P + 1)
            valid[at] = True
            positions[at] = relative(h - P + 1, w - P + 1)
            if hole is not None:
                part = resized(hole[..., None].astype(np.float32), h, w)[..., 0] > 1e-3
                valid[at] = ~windows_any(part, P)
        if not valid.any():
            raise ValueError(
                f"the mask leaves no patch of {P} x {P} pixels at a scale of "
                f"{FACTOR**scale:.2g}, so there is nothing to fill it with: make it smaller"
            )
        rows = len(pixels)
        return Patches(
            pixels.reshape(rows, -1), blurred.reshape(rows, -1), valid, positions, tops, heights
        )

    def work(self) -> int:
        """The number of boxes of all scales, times their noise levels."""
        steps = [0 if self.growth.enlarge else STEPS] + [REFINING] * self.scales
        frames = (math.prod(self.frame(k)) for k in range(self.scales, -1, -1))
        return sum(n * k for n, k in zip(frames, steps, strict=True))

    def run(
        self, noise: PictureNoise, progress: Bar, after: Progress | None = None
    ) -> Iterator[Progress]:
        """One picture, scale after scale, from the coarsest or after one that is finished."""
        last, g = after, self.growth
        nothing = np.zeros((0, 0, 0, 2), dtype=np.int32), np.zeros(0)
        if after is None and g.enlarge:
            last = Progress(self.scales, self.photographs[0], *nothing)
        elif after is None and g.structure and g.start is not None:
            scale = 1 + round((1 - g.keep) * (self.scales - 1))
            last = Progress(scale, resized(g.start, *self.frame(scale)), *nothing)
        first = self.scales if last is None else last.scale - 1
        for scale in range(first, -1, -1):
            last = self._scale(scale, noise, progress, last)
            yield last

    def _scale(
        self, scale: int, noise: PictureNoise, progress: Bar, last: Progress | None
    ) -> Progress:
        g, s = self.growth, self._posterior(scale, noise)
        frame = H, W = self.frame(scale)
        x, sigmas = self._start(scale, last, frame, self._move(noise))
        known = None if g.known is None else resized(g.known, H, W)
        new = None if g.mask is None else resized(g.mask[..., None].astype(np.float32), H, W) > 0.5
        means = Means(x, self._candidates(s.source, last, s.grid))

        def random(step: int) -> np.ndarray:
            return self._noise(noise, (H, W, s.window[1]), scale, step)

        def shaped(x: np.ndarray) -> np.ndarray:
            return symmetric(x, g.symmetry)

        y = shaped(x + sigmas[0] * random(0))
        for step, sigma in enumerate(sigmas):
            seed = noise.seed * 8191 + scale * 521 + step * 31
            begins = step == 0
            search = seed, ROUNDS + begins
            means = s.means(y, sigma, means.places, search, begins and last is not None)
            D = means.D
            if known is not None and new is not None:
                D = np.where(new, D, known)
            x = shaped(self._like_photograph(D) if g.enlarge else D)
            if step + 1 < len(sigmas):
                y = shaped(_renoised(y, x, sigma, sigmas[step + 1], random(step + 1)))
            progress.advance(H * W)
        omitted = s.omitted(y, sigmas[-1], means.logits)
        if scale:
            return Progress(scale, x, means.places, omitted)
        origins, share = s.origins(means)
        if new is not None:
            origins[~new[..., 0]] = -1
        origins, share = shaped(origins).astype(np.int32), shaped(share[..., None])[..., 0]
        return Progress(0, x, means.places, omitted, origins, share)

    def _posterior(self, scale: int, noise: PictureNoise) -> Posterior:
        """The boxes of a scale and what they are compared with."""
        g, P, source = self.growth, self.side(scale), self.patches(scale)
        H, W = frame = self.frame(scale)
        grid = (H, W) if g.tile else (H - P + 1, W - P + 1)
        deviation = NEAR * (USUAL / max(g.keep, 1e-9)) * 2 ** (self.scales - scale)
        matters = g.keep > 0 and g.start is None and deviation < FAR
        positions = moved(relative(*grid), self._move(noise))
        return Posterior(
            source=source,
            window=(P, self.photographs[0].shape[2]),
            frame=frame,
            grid=grid,
            positions=positions,
            weight=1 / (2 * deviation**2) if matters else 0.0,
            balance=g.balance,
        )

    def _like_photograph(self, D: np.ndarray) -> np.ndarray:
        """D, changed as little as makes it the photograph when it is reduced (back-projection)."""
        photo = self.photographs[0]
        if min(D.shape[:2]) <= min(photo.shape[:2]):
            return D
        return D + resized(photo - resized(D, *photo.shape[:2]), *D.shape[:2])

    def _start(
        self, scale: int, last: Progress | None, frame: tuple[int, int], move: np.ndarray
    ) -> tuple[np.ndarray, list[float]]:
        """What a scale starts from, and its noise levels."""
        g = self.growth
        if last is not None:
            return resized(last.x, *frame), np.geomspace(ADDED, LEAST, REFINING).tolist()
        layout = self.photographs[0] if g.start is None else g.start
        if g.keep == 0:
            x = np.broadcast_to(layout.mean((0, 1)), (*frame, layout.shape[2]))
            return x, np.geomspace(PURE, LEAST, STEPS).tolist()
        first = FIRST * KEPT**g.keep
        sides = [
            max(1, round(n / ratio)) for n, ratio in zip(frame, move[2:].tolist(), strict=True)
        ]
        x = placed(resized(layout, sides[0], sides[1]), frame, move)
        return x, np.geomspace(first, LEAST, STEPS).tolist()

    def _move(self, noise: PictureNoise) -> np.ndarray:
        """Where the layout is in the picture, float32 (4,); see `moved`."""
        g = self.growth
        nothing = g.keep == 0 or g.tile or g.enlarge or g.turn is not None
        if nothing or g.start is not None or g.known is not None:
            return np.array([0, 0, 1, 1], dtype=np.float32)
        e = np.tanh(noise.normal((2,), self.scales, 0, 2)[0].numpy())
        sides = np.array(g.size) / np.array(self.photographs[0].shape[:2])
        return np.concatenate([MOVED * (1 - g.keep) * e, sides.clip(min=1)]).astype(np.float32)

    def _noise(
        self, noise: PictureNoise, shape: tuple[int, ...], scale: int, step: int
    ) -> np.ndarray:
        e = noise.normal(shape, scale, step, 0)[0].numpy()
        if self.growth.turn is not None:
            other = noise.normal(shape, scale, step, 1)[0].numpy()
            e = math.cos(self.growth.turn) * e + math.sin(self.growth.turn) * other
        return e.astype(np.float32)

    def _candidates(
        self, source: Patches, last: Progress | None, grid: tuple[int, int]
    ) -> np.ndarray:
        """First candidates of boxes: where those of the coarser scale lie, or evenly spread."""
        most = np.array(source.valid.shape) - 1
        if last is None or last.places.size == 0:
            i, j = (np.linspace(0, n, m).round() for n, m in zip(most, grid, strict=True))
            even = np.stack(np.meshgrid(i, j, indexing="ij"), -1).astype(np.int32)
            return np.ascontiguousarray(np.repeat(even[:, :, None], CANDIDATES, 2))
        coarse = self.patches(last.scale)
        at = [
            np.minimum((np.arange(n) * m / n).astype(np.int64), m - 1)
            for n, m in zip(grid, last.places.shape[:2], strict=True)
        ]
        within = np.meshgrid(
            *(np.arange(n) * m / n - k
              for n, m, k in zip(grid, last.places.shape[:2], at, strict=True)),
            indexing="ij",
        )  # fmt: skip
        old = last.places[at[0][:, None], at[1]].astype(np.float32)
        found = np.empty(old.shape, dtype=np.int32)
        n = np.searchsorted(coarse.tops, old[..., 0], side="right").clip(min=1) - 1
        ratio = source.heights[n] / coarse.heights[n]
        row = (old[..., 0] - coarse.tops[n] + within[0][..., None]) * ratio
        found[..., 0] = source.tops[n] + row.round()
        across = source.pixels.shape[1] / coarse.pixels.shape[1]
        found[..., 1] = ((old[..., 1] + within[1][..., None]) * across).round()
        return np.ascontiguousarray(found.clip(0, most))


def relative(rows: int, columns: int) -> np.ndarray:
    """Positions from -1 to 1, float32 (rows, columns, 2)."""
    i, j = ((2 * np.arange(n) + 1) / n - 1 for n in (rows, columns))
    return np.stack(np.meshgrid(i, j, indexing="ij"), -1).astype(np.float32)


def moved(u: np.ndarray, move: np.ndarray) -> np.ndarray:
    """Positions in a layout that is moved and has its own size: beside it, it comes again.

    Arguments:
        u: Positions in the picture, from -1 to 1, float32 (..., 2).
        move: How far the layout is moved, down and across, in its half sides; and how much larger
            the picture is than it, in each direction, float32 (4,).
    """
    v = u * move[2:] - move[:2]
    down = 1 - np.abs((v[..., 0] + 1) % 4 - 2)  # mirrored: above the sky there is no ground
    return np.stack([down, (v[..., 1] + 1) % 2 - 1], -1).astype(np.float32)


def placed(x: np.ndarray, frame: tuple[int, int], move: np.ndarray) -> np.ndarray:
    """A layout (h, w, C) in a picture (H, W, C), where `moved` has it."""
    at = torch.from_numpy(np.ascontiguousarray(moved(relative(*frame), move)[..., ::-1]))
    t = torch.from_numpy(x).permute(2, 0, 1)[None]
    t = grid_sample(t, at[None], padding_mode="border", align_corners=False)
    return np.ascontiguousarray(t[0].permute(1, 2, 0).numpy())


def windows_any(mask: np.ndarray, P: int) -> np.ndarray:
    """Whether a P x P window has a pixel in the mask, for every first pixel of a window."""
    total = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return total[P:, P:] - total[:-P, P:] - total[P:, :-P] + total[:-P, :-P] > 0


def coverage(H: int, W: int, P: int) -> np.ndarray:
    """How many boxes have each pixel, float32 (H, W, 1)."""
    down, across = (np.convolve(np.ones(n - P + 1), np.ones(P)).astype(np.float32) for n in (H, W))
    return (down[:, None] * across)[..., None]


def folded(total: np.ndarray, P: int, frame: tuple[int, int]) -> np.ndarray:
    """Boxes that reach beyond the border, added to the other side; the mean."""
    H, W = frame
    for _ in range(2):  # rows, then columns
        beyond = total[H:]
        total = total[:H].copy()
        total[: len(beyond)] += beyond
        total, H, W = total.swapaxes(0, 1), W, H
    return np.ascontiguousarray(total / P**2)


def symmetric(x: np.ndarray, symmetry: str | None) -> np.ndarray:
    """The picture, with one part repeated in the others."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if symmetry is None:
        return x
    x = x.copy()
    H, W = x.shape[:2]
    if symmetry in ("mirror", "four"):
        x[:, W - W // 2 :] = x[:, : W // 2][:, ::-1]
    if symmetry == "four":
        x[H - H // 2 :] = x[: H // 2][::-1]
    if symmetry == "rotate":
        flat = x.reshape(H * W, -1)
        flat[H * W - H * W // 2 :] = flat[: H * W // 2][::-1]
    return x


def leading(
    w: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates with the largest weights (boxes, patches), the best first, and these."""
    K = min(CANDIDATES, w.shape[1])
    best = np.argpartition(-w, K - 1, axis=1)[:, :K]
    order = np.argsort(-np.take_along_axis(w, best, 1), axis=1, kind="stable")
    best = np.take_along_axis(best, order, 1)
    weights = np.take_along_axis(w, best, 1).reshape(*grid, K)
    places = np.stack(np.divmod(best, shape[1]), -1).astype(np.int32).reshape(*grid, K, 2)
    more = CANDIDATES - K  # where there are fewer patches than candidates
    return (
        np.ascontiguousarray(np.pad(places, ((0, 0), (0, 0), (0, more), (0, 0)), mode="edge")),
        np.ascontiguousarray(np.pad(weights, ((0, 0), (0, 0), (0, more)))),
    )


def _renoised(
    y: np.ndarray, x: np.ndarray, sigma: float, next_sigma: float, e: np.ndarray
) -> np.ndarray:
    """The noisy picture at the next level, as likely given y and the clean x (ancestral step)."""
    ratio = (next_sigma / sigma) ** 2
    return ratio * y + (1 - ratio) * x + next_sigma * math.sqrt(1 - ratio) * e


def photograph(given: Any) -> np.ndarray:
    """A picture float32 (H, W, C) in [-1, 1].

    Arguments:
        given: A path; the name of a built-in photograph, also without its kind (china, coffee); a
            uint8 array (C, H, W); a PIL image.
    """
    if isinstance(given, str) and not Path(given).exists():
        from scoremachine.data.readers import BUILT_IN

        given = next((name for name in BUILT_IN if name.partition("/")[2] == given), given)
    if not isinstance(given, str | Path | np.ndarray):
        given = [given]  # a picture of PIL
    if isinstance(given, np.ndarray) and given.ndim == 3:
        given = given[None]
    image = np.asarray(Corpus.open(given).images[0])
    H, W = image.shape[1:]
    if H * W > LARGEST:
        ratio = math.sqrt(LARGEST / (H * W))
        h, w = round(H * ratio), round(W * ratio)
        say(f"the photograph has {H} x {W} pixels, and is used at {h} x {w}")
        image = resized(image.transpose(1, 2, 0), h, w).clip(0, 255).transpose(2, 0, 1)
    return np.ascontiguousarray(image.transpose(1, 2, 0).astype(np.float32) / 127.5 - 1)


def grow(
    photo: Any,
    size: tuple[int, int] | None = None,
    count: int = 1,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """New pictures like a photograph, of any size, in [-1, 1]: float32 (count, C, H, W).

    Arguments:
        photo: A path, the name of a built-in photograph, a uint8 array (C, H, W), a PIL image; or a
            list of them, whose patches are mixed.
        size: Height and width; None: those of the (first) photograph.
        count: How many.
        seed: Picture i depends on it and on i only.
        options: See `Growth`. With `known` and `mask`, that part of the photographs is filled.

    Raises:
        ValueError: For senseless arguments.
    """
    check_integer("count", count)
    check_seed(seed)
    grower = grower_of(photo, size, **options)
    pictures = []
    with bar("Growing", total=grower.work() * count) as progress:
        for i in range(count):
            *_, last = grower.run(PictureNoise(seed, [i]), progress)
            pictures.append(torch.from_numpy(last.x).permute(2, 0, 1).clamp(-1, 1))
    return torch.stack(pictures)


def grower_of(photo: Any, size: tuple[int, int] | None = None, **options: Any) -> Grower:
    """What `grow` runs."""
    several = photo if isinstance(photo, list | tuple) else [photo]
    photographs = [photograph(each) for each in several]
    C = {x.shape[2] for x in photographs}
    if len(C) > 1:
        raise ValueError("some photographs are gray and some have colours; expected one kind")
    if options.get("start") is not None:
        options["start"] = alike(photograph(options["start"]), photographs[0])
    holes: list[np.ndarray | None] = [None] * len(photographs)
    mask = options.get("mask")
    if mask is not None and options.get("known") is None:
        options["known"] = photographs[0]
        if mask.shape == photographs[0].shape[:2]:
            holes[0] = mask
    growth = Growth(size or photographs[0].shape[:2], **options)
    return Grower(photographs, holes, growth)


def alike(x: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """A picture with as many channels as a photograph."""
    if x.shape[2] == photo.shape[2]:
        return x
    gray = x.mean(2, keepdims=True)
    return np.repeat(gray, photo.shape[2], 2)
