"""An index of windows of images by what they look like, whatever their brightness and contrast.

A window is reduced to 6 x 6 pixels, its mean is taken from each channel, and it is divided by its
standard deviation; the 24 leading components of that are its descriptor. Copies of a part of an
image have neighbouring descriptors. Descriptors are kept in lists around k-means' centres
(scikit-learn's), of which a few are looked through for each query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from scoremachine.data import store
from scoremachine.data.corpus import Corpus
from scoremachine.engines import inverted
from scoremachine.runtime.progress import bar

VERSION = 2
GRID, DIMENSIONS = 6, 24  # of a window: pixels that it is reduced to, and numbers of its descriptor
FAINT = 6 / 255  # standard deviation, in units of white, below which a window looks like nothing
SAMPLE = 60_000  # windows that components and centres are found from
PROBES, NAMED = 4, 5  # lists looked through for a query, and images found in them
PER_LIST = 2_000  # windows, about
TILE = 512  # images in memory at once
ROWS = 8192  # vectors that are compared with all centres at once


def geometry(H: int, W: int) -> tuple[int, int]:
    """Side of the windows of H x W images, and their distance from each other."""
    side = max(4, round(min(H, W) / 4))
    return side, max(1, round(3 * side / 8))


def descriptors(x: Tensor, side: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of pictures x in [0, 1], (n, C, H, W), one every `step` pixels.

    Returns:
        The reduced windows that look like something, float32 (m, 36 C), of length 1; the picture
        that each is of, int64 (m,); and its first row and column, int64 (m, 2).
    """
    n, C = x.shape[:2]
    windows = x.unfold(2, side, step).unfold(3, side, step)
    rows, columns = windows.shape[2:4]
    flat = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, C, side, side)
    small = adaptive_avg_pool2d(flat, GRID)
    small = small - small.mean((2, 3), keepdim=True)
    norm = small.flatten(1).norm(dim=1)
    kept = norm > FAINT * (C * GRID * GRID) ** 0.5
    at = torch.stack(
        torch.meshgrid(torch.arange(rows) * step, torch.arange(columns) * step, indexing="ij"), -1
    ).reshape(-1, 2)
    places = at.repeat(n, 1)[kept]
    owners = torch.arange(n).repeat_interleave(rows * columns)[kept]
    return small.flatten(1)[kept] / norm[kept, None], owners, places


def units(images: np.ndarray) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return torch.from_numpy(np.array(images)).float() / 255


def tiles(corpus: Corpus) -> Iterator[Tensor]:
    """The images of a corpus in [0, 1], some at a time."""
    for first in range(0, len(corpus), TILE):
        yield units(corpus.images[first : first + TILE])


@dataclass(frozen=True, eq=False)
class WindowIndex:
    """The windows of some images, by their descriptors.

    Attributes:
        side, step: Side of the windows and their distance, in pixels.
        components: float32 (36 C, 24).
        centres: float32 (lists, 24).
        starts: Where each list begins, int64 (lists + 1,).
        codes: The descriptors, list after list, float32 (n, 24).
        owners: The image of each, int32 (n,).
        places: Its first row and column, int16 (n, 2).
    """

    side: int
    step: int
    components: np.ndarray
    centres: np.ndarray
    starts: np.ndarray
    codes: np.ndarray
    owners: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus) -> WindowIndex:
        """That of a corpus, from the store, or else built."""
        entry = store.entry("indexes", store.key_of("windows", VERSION, corpus.key))
        if not entry.label.exists():
            with entry.locked("builds the same index"):
                if not entry.label.exists():
                    built = cls.built(corpus)
                    with entry.made(f"{corpus.name}, windows for audits", built.codes.nbytes) as to:
                        for name in ARRAYS:
                            np.save(to / f"{name}.npy", getattr(built, name))
        entry.touch()
        arrays = (np.load(entry.folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS)
        return cls(*geometry(*corpus.shape[1:]), *arrays)

    @classmethod
    def built(cls, corpus: Corpus) -> WindowIndex:
        """That of a corpus."""
        from sklearn.cluster import MiniBatchKMeans

        side, step = geometry(*corpus.shape[1:])
        rng = np.random.default_rng(0)
        some = np.sort(rng.permutation(len(corpus))[: max(1, SAMPLE // 16)])
        sample, _, _ = descriptors(units(corpus.images[some]), side, step)
        sample = sample[torch.from_numpy(rng.permutation(len(sample))[:SAMPLE])]
        if len(sample) == 0:  # every image is blank
            sample = torch.eye(sample.shape[1])[:1]
        _, _, V = torch.linalg.svd(sample.T @ sample)
        components = V[:DIMENSIONS].T.contiguous()
        codes, owners, places = [], [], []
        with bar("Indexing windows", total=len(corpus)) as progress:
            for k, x in enumerate(tiles(corpus)):
                d, n, at = descriptors(x, side, step)
                codes.append((d @ components).numpy())
                owners.append((n + k * TILE).int().numpy())
                places.append(at.short().numpy())
                progress.advance(len(x))
        code = np.concatenate(codes)
        lists = max(1, min(len(code) // PER_LIST, len(sample)))
        kmeans = MiniBatchKMeans(lists, random_state=0, n_init=1, batch_size=8192, max_iter=20)
        centres = kmeans.fit((sample @ components).numpy()).cluster_centers_.astype(np.float32)
        each = [_nearest(part, centres, 1)[:, 0] for part in _parts(code)]
        cells = np.concatenate([np.zeros(0, dtype=np.int64), *each])
        order = np.argsort(cells, kind="stable").astype(np.int64)
        starts = np.searchsorted(cells[order], np.arange(lists + 1)).astype(np.int64)
        return cls(
            side, step, components.numpy(), centres, starts, code[order],
            np.concatenate(owners)[order], np.concatenate(places)[order],
        )  # fmt: skip

    def search(self, reduced: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The nearest windows of different images: distances and positions, (Q, 5) both."""
        queries = (reduced @ torch.from_numpy(np.array(self.components))).numpy()
        if len(queries) == 0:
            return np.zeros((0, NAMED), np.float32), np.zeros((0, NAMED), np.int64)
        probes = min(PROBES, len(self.centres))
        cells = np.concatenate([_nearest(part, self.centres, probes) for part in _parts(queries)])
        found = inverted.search(queries, cells, self.starts, self.codes, self.owners, NAMED)
        return np.sqrt(found[0]), found[1]


ARRAYS = ("components", "centres", "starts", "codes", "owners", "places")


def _parts(x: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(x), ROWS):
        yield x[first : first + ROWS]


def _nearest(x: np.ndarray, centres: np.ndarray, k: int) -> np.ndarray:
    """The k nearest centres of each vector, int64 (n, k), the nearest first."""
    c = torch.from_numpy(centres)
    far = torch.addmm((c**2).sum(1), torch.from_numpy(x), c.T, alpha=-2)
    return far.topk(min(k, len(c)), dim=1, largest=False).indices.numpy()
