"""The training image that a picture is most likely a copy of, and how much of it that explains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.windows import Box
from scoremachine.data.corpus import Corpus
from scoremachine.provenance.alignment import FAINT, Aligned, Placement, align, mean_and_spread
from scoremachine.provenance.candidates import MIRRORED, WHOLE, Parts, WholeIndex, parts
from scoremachine.provenance.windows import TILE, WindowIndex, tiles, units
from scoremachine.sources.images import ImageSource
from scoremachine.sources.source import FoldRequest

P = 9  # side of the windows whose posterior is asked
SIGMA = 0.5  # noise level at which it is asked, in units of a picture's spread
CLIPPED = 4.0  # spreads from the mean, beyond which pixels are clipped
LEADING = 8  # candidates that lead the posterior
APART = 2.0  # squared difference of pixels that an image does not cover, in squared spreads
ALIKE = 0.35  # difference of aligned images that are copies of each other, in spreads
LEAST = 1e-6  # of a posterior: what is left of it, at least, without some images
SHARE, VOTES, UNIT = 0.05, 0.5, 0.4  # of the score: found on CIFAR-10 test images
BATCH = 64  # pictures at a time


@dataclass(frozen=True, eq=False)
class Found:
    """What the search for a picture's original has found.

    Attributes:
        share: How much of the picture its most alike image explains, from 0 to 1: the mean over
            the pixels of the posterior share of the aligned image and of its copies.
        votes: By how much windows agree with that image in one place, and with no others.
        placement: Where that image lies; None: there is none.
        shares: The share in every pixel, float32 (H, W).
        aligned: The image there, float32 (C, H, W) in [0, 1].
        nearest: The image nearest by L2 distance, with its root mean square distance d1 in units
            of [-1, 1].
        ratio: d1 / d2, with the second nearest.
        ratio_50: d1 over the mean distance of the 50 nearest (Carlini et al. 2301.13188).
    """

    share: float
    votes: float
    placement: Placement | None
    shares: Tensor
    aligned: Tensor
    nearest: int
    distance: float
    ratio: float
    ratio_50: float

    @property
    def score(self) -> float:
        """How much it looks like a copy."""
        return float(score_of(torch.tensor(self.share), torch.tensor(self.votes)))

    def arrays(self) -> dict[str, np.ndarray]:
        """It as arrays, for a file."""
        at = self.placement
        numbers = [self.share, self.votes, self.nearest, self.distance, self.ratio, self.ratio_50]
        placed = [] if at is None else [at.image, at.mirrored, at.scale, at.row, at.column]
        return {
            "numbers": np.array(numbers, dtype=np.float64),
            "placed": np.array(placed, dtype=np.float64),
            "shares": self.shares.half().numpy(),
            "aligned": (self.aligned.clamp(0, 1) * 255).round().byte().numpy(),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Found:
        """From `arrays`."""
        share, votes, nearest, distance, ratio, ratio_50 = arrays["numbers"].tolist()
        at = None
        if len(arrays["placed"]):
            image, mirrored, scale, row, column = arrays["placed"].tolist()
            at = Placement(int(image), bool(mirrored), scale, row, column)
        shares = torch.from_numpy(arrays["shares"].astype(np.float32))
        aligned = torch.from_numpy(arrays["aligned"]).float() / 255
        return cls(share, votes, at, shares, aligned, int(nearest), distance, ratio, ratio_50)


@dataclass(frozen=True, eq=False)
class Originals:
    """A corpus made ready to be searched for originals.

    Attributes:
        corpus: The images.
        whole: Its images by what they look like.
        windows: Its windows by what they look like; None: images too small to have any.
        source: The images without brightness and contrast, for posteriors.
    """

    corpus: Corpus
    whole: WholeIndex
    windows: WindowIndex | None
    source: ImageSource

    @classmethod
    def of(cls, corpus: Corpus) -> Originals:
        """That of a corpus; ValueError for fewer than two images."""
        if len(corpus) < 2:
            raise ValueError(
                "the corpus has one image, so there is nothing to tell a copy from: give all images"
            )
        plain = np.concatenate([_plain(x) for x in tiles(corpus)])
        source = ImageSource(Corpus(plain, name=corpus.name), "auto")
        small = min(corpus.shape[1:]) < 12
        index = None if small else WindowIndex.of(corpus)
        return cls(corpus, WholeIndex.of(corpus), index, source)

    def find(self, pictures: np.ndarray, leave_out: np.ndarray | None = None) -> Iterator[Found]:
        """The originals of pictures uint8 (n, C, H, W).

        Arguments:
            pictures: The pictures.
            leave_out: An image of the corpus for each picture that is no candidate; None: none.
        """
        for first in range(0, len(pictures), BATCH):
            rows = slice(first, first + BATCH)
            yield from self._batch(pictures[rows], None if leave_out is None else leave_out[rows])

    def _batch(self, pictures: np.ndarray, leave_out: np.ndarray | None) -> list[Found]:
        x, N = units(pictures), len(self.corpus)
        z = torch.from_numpy(_plain(x).astype(np.float64) / 127.5 - 1)
        H, W = pictures.shape[2:]
        row = _row(H, W)
        levels = torch.full((len(z),), SIGMA / CLIPPED, dtype=torch.float64)
        folds = []
        for some, index in _sources(len(x), N, leave_out):
            fold = self.source.fold(FoldRequest(z[some], levels[some], row, index, 4)).fold
            assert fold is not None
            folds.append(fold)
        log_Z = torch.cat([fold.log_partition for fold in folds])
        places = torch.cat([fold.places for fold in folds])
        weights = torch.cat([fold.leader_weights for fold in folds])
        _, near = self.whole.nearest(x, WHOLE + 1)
        _, flipped = self.whole.nearest(x.flip(-1), MIRRORED + 1)
        by_windows = (
            [Parts([], [])] * len(x) if self.windows is None else parts(x, self.windows, leave_out)
        )
        distances = _distances(pictures, self.corpus, leave_out)
        found = []
        for p in range(len(x)):
            out = -1 if leave_out is None else int(leave_out[p])
            leading = _leading(places[p], weights[p], H * W, LEADING)
            whole = [n for n in (*near[p].tolist(), *leading) if n != out]
            supposed = [Placement(n, False, 1.0, 0, 0) for n in dict.fromkeys(whole)]
            supposed += [Placement(n, True, 1.0, 0, 0) for n in flipped[p].tolist() if n != out]
            supposed += by_windows[p].placements
            images = {s.image: units(self.corpus.images[s.image]) for s in supposed}
            aligned = align(x[p], supposed, images)
            found.append(self._judged(x[p], z[p], log_Z[p], aligned, by_windows[p], distances[p]))
        return found

    def _judged(
        self,
        x: Tensor,
        z: Tensor,
        log_Z: Tensor,
        aligned: Aligned,
        by_windows: Parts,
        distance: tuple[np.ndarray, np.ndarray],
    ) -> Found:
        """The most alike of some aligned images."""
        H, W = x.shape[1:]
        spread = float(mean_and_spread(x[None])[1].clamp(min=FAINT))
        square = ((aligned.pixels - x) / spread).square().sum(1)  # (K, H, W)
        square = torch.where(aligned.covered, square, APART * len(x))
        box = _row(H, W)
        l = -box.window_sum(square.double()) / (2 * SIGMA**2)
        # what each image has in the posterior of images as they lie
        images, of = torch.unique(
            torch.tensor([p.image for p in aligned.placements]), return_inverse=True
        )
        lying = torch.from_numpy(self.source.keys[images.numpy()] / 127.5 - 1)
        l_0 = -box.window_sum((lying - z).square().sum(1)) * CLIPPED**2 / (2 * SIGMA**2)
        flat = aligned.pixels.flatten(1)
        apart = torch.cdist(flat, flat) / (spread * flat.shape[1] ** 0.5)
        same = (apart < ALIKE) | (of[:, None] == of)
        top = torch.maximum(torch.maximum(l.amax(0), l_0.amax(0)), log_Z)
        E, E_0, Z = (torch.exp(v - top).flatten(-2) for v in (l, l_0, log_Z))
        # copies of one image in the corpus share its posterior, and count together
        copies = torch.zeros(len(l), len(images), dtype=torch.float64)
        copies.scatter_reduce_(1, of.expand(len(l), -1), same.double(), "amax")
        ours = same.double() @ torch.maximum(E, E_0[of])
        theirs = (~same).double() @ E + torch.maximum(Z - copies @ E_0, LEAST * Z)
        shares = (ours / (ours + theirs)).unflatten(1, (H, W))
        # of the group that looks most like an original, the image that lies best
        votes = _votes(aligned.placements, by_windows)
        score = score_of(shares.mean((1, 2)), votes)
        own = (E / (ours + theirs)).mean(1)
        group = same[int(score.argmax())]
        which = int(torch.where(group, score_of(own, votes), -1.0).argmax())
        d, n = distance
        return Found(
            float(shares[which].mean()), float(votes[which]), aligned.placements[which],
            shares[which].float(), aligned.pixels[which], int(n[0]), float(d[0]),
            float(d[0] / max(d[1], 1e-9)) if len(d) > 1 else 1.0, float(d[0] / max(d.mean(), 1e-9)),
        )  # fmt: skip


def score_of(share: Tensor, votes: Tensor) -> Tensor:
    """The product of the explained share and of the votes, neither of them nearly 0."""
    return (share + SHARE) * (votes + VOTES) / UNIT


def _votes(placements: Sequence[Placement], by_windows: Parts) -> Tensor:
    """The most votes for the image of each placement, mirrored as it is, float64 (K,)."""
    most: dict[tuple[int, bool], float] = {}
    for p, votes in zip(by_windows.placements, by_windows.votes, strict=True):
        most[p.image, p.mirrored] = max(votes, most.get((p.image, p.mirrored), 0.0))
    found = [most.get((p.image, p.mirrored), 0.0) for p in placements]
    return torch.tensor(found, dtype=torch.float64)


def _sources(n: int, N: int, leave_out: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray]]:
    """Pictures that have the same source, and the images that it is."""
    if leave_out is None or bool((leave_out < 0).all()):
        yield slice(None), np.arange(N)
        return
    for p, out in enumerate(leave_out.tolist()):
        yield slice(p, p + 1), np.delete(np.arange(N), [out] if out >= 0 else [])


def _row(H: int, W: int) -> Collection:
    """The row of `ls`, of windows that fit into the images."""
    side = min(P, H - (H % 2 == 0), W - (W % 2 == 0))
    return Collection((H, W), Box((side, side)), "pixels", "pixel")


def _plain(x: Tensor) -> np.ndarray:
    """Images in [0, 1] without brightness and contrast, uint8 (n, C, H, W): 4 spreads are 127."""
    mean, spread = mean_and_spread(x)
    z = ((x - mean) / spread.clamp(min=FAINT)).clamp(-CLIPPED, CLIPPED) / CLIPPED
    return ((z + 1) * 127.5).round().to(torch.uint8).numpy()


def _leading(places: Tensor, weights: Tensor, pixels: int, most: int) -> list[int]:
    """The images with the largest shares in a picture."""
    images, which = torch.unique(places.flatten() // pixels, return_inverse=True)
    total = torch.zeros(len(images), dtype=weights.dtype).index_add_(0, which, weights.flatten())
    return [n for n in images[torch.argsort(-total)[:most]].tolist() if n >= 0]


def _distances(
    pictures: np.ndarray, corpus: Corpus, leave_out: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Root mean square distances of the 50 nearest images, in units of [-1, 1], and the images."""
    y = torch.from_numpy(pictures).flatten(1).float() / 127.5 - 1
    squares = []
    for first in range(0, len(corpus), 16 * TILE):
        s = torch.from_numpy(np.array(corpus.images[first : first + 16 * TILE])).flatten(1).float()
        s = s / 127.5 - 1
        squares.append((y**2).sum(1)[:, None] + (s**2).sum(1) - 2 * y @ s.T)
    square = torch.cat(squares, 1)
    if leave_out is not None:
        for p, n in enumerate(leave_out.tolist()):
            if n >= 0:
                square[p, n] = torch.inf
    few = torch.topk(square, min(64, square.shape[1]), largest=False, dim=1).indices
    found = []
    for p in range(len(y)):
        n = few[p].numpy()
        if leave_out is not None:
            n = n[n != leave_out[p]]
        difference = corpus.images[n].astype(np.float64) - pictures[p]
        d = np.sqrt((difference**2).mean((1, 2, 3))) / 127.5
        order = np.argsort(d, kind="stable")[:50]
        found.append((d[order], n[order]))
    return found
