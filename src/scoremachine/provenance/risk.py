"""Which training images are likely to be memorized or copied, from the data alone.

Images that have copies in the corpus are (a machine or a network meets them several times), and so
are isolated ones, near which there is nothing to average with. Copies are looked for among the
images that look most alike at half their size, as they are and mirrored, and are aligned by whole
pixels and a factor (`alignment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.provenance import pictures as drawing
from scoremachine.provenance.alignment import FAINT, Placement, align, mean_and_spread
from scoremachine.provenance.audit import path_of
from scoremachine.provenance.candidates import WholeIndex, whole
from scoremachine.provenance.windows import units
from scoremachine.runtime.files import csv_text
from scoremachine.runtime.progress import bar

NEIGHBOURS = 10  # that say how alike images of this kind are
TRIED = 2  # neighbours that are aligned, as they are and mirrored each
ROWS = 256  # images compared with all others at a time
CLOSE = 0.5  # share of the squared distance of the tenth neighbour, below which a pair is aligned
VERBATIM = 0.35  # difference after alignment, in spreads, below which a pair are copies
DISTINCT = 0.25  # share of the tenth neighbour's squared distance, below which they are


@dataclass(frozen=True, eq=False)
class Risk:
    """The images of a corpus, by how likely they are to be copied.

    Attributes:
        corpus: The images.
        pairs: Copies of each other, int64 (m, 2), the most alike first.
        difference: The root mean square difference of each pair after alignment, in units of the
            image's spread, float64 (m,).
        group: For every image the number of its group of copies, int64 (N,); -1: it has no copy.
        isolation: For every image the distance of its nearest other image without brightness and
            contrast, over the median of all, float64 (N,). Larger: fewer images are like it.
    """

    corpus: Corpus
    pairs: np.ndarray
    difference: np.ndarray
    group: np.ndarray
    isolation: np.ndarray

    def groups(self) -> list[list[int]]:
        """The groups of copies, the largest first."""
        found: dict[int, list[int]] = {}
        for n, g in enumerate(self.group.tolist()):
            if g >= 0:
                found.setdefault(g, []).append(n)
        return sorted(found.values(), key=lambda members: (-len(members), members))

    def csv(self) -> str:
        """A line for each image: its name, group, the size of the group, isolation."""
        sizes = np.bincount(self.group[self.group >= 0], minlength=1)
        rows: list[Sequence[object]] = [("image", "group", "copies", "isolation")]
        each = zip(self.group.tolist(), self.isolation.tolist(), strict=True)
        for n, (g, far) in enumerate(each):
            group, copies = (g, int(sizes[g]) - 1) if g >= 0 else (None, 0)
            rows.append((path_of(self.corpus, n), group, copies, f"{far:.4f}"))
        return csv_text(rows)

    def sheet(self, most: int = 24, columns: int = 6) -> Image.Image:
        """The groups with the most alike copies, a row each; up to six images of a group."""
        tiles: list[tuple[np.ndarray, str]] = []
        shown: set[int] = set()
        for a, _ in self.pairs.tolist():
            g = int(self.group[a])
            if g in shown or len(shown) == most:
                continue
            shown.add(g)
            members = np.flatnonzero(self.group == g).tolist()
            for k in range(columns):
                if k < len(members):
                    image = np.asarray(self.corpus.images[members[k]])
                    text = path_of(self.corpus, members[k])[-20:]
                    tiles.append((drawing.enlarged(image, 128)[0], text))
                else:
                    tiles.append((np.full_like(tiles[0][0], 255), ""))
        if not tiles:
            tiles = [(np.full((32, 128, 3), 255, dtype=np.uint8), "no copies found")]
        return drawing.tiled(tiles, columns)


def risk(corpus: Corpus) -> Risk:
    """Finds copies within a corpus, and its isolated images.

    Raises:
        ValueError: For fewer than two images.
    """
    N = len(corpus)
    if N < 2:
        raise ValueError("there is one image, so it has neither copies nor neighbours: give more")
    index = WholeIndex.of(corpus)
    k = min(NEIGHBOURS, N - 1)
    nearest = np.empty(N)
    pairs: dict[tuple[int, int], float] = {}
    with bar("Comparing images", total=N) as progress:
        for first in range(0, N, ROWS):
            rows = np.arange(first, min(first + ROWS, N))
            x = units(corpus.images[rows])
            cosine, near = _others(index, whole(x), rows, k + 1)
            flipped, mirror = _others(index, whole(x.flip(-1)), rows, TRIED)
            square = (2 - 2 * cosine).clamp(min=0)
            nearest[rows] = square[:, 0].sqrt().numpy()
            typical = square[:, k - 1].clamp(min=1e-6)
            _aligned_pairs(corpus, x, rows, (square[:, :TRIED], near, False), typical, pairs)
            mirrored = (2 - 2 * flipped).clamp(min=0), mirror, True
            _aligned_pairs(corpus, x, rows, mirrored, typical, pairs)
            progress.advance(len(rows))
    found = sorted(pairs, key=lambda pair: pairs[pair])
    array = np.array(found, dtype=np.int64).reshape(-1, 2)
    difference = np.array([pairs[pair] for pair in found])
    median = float(np.median(nearest)) or 1.0
    return Risk(corpus, array, difference, _groups(array, N), nearest / median)


def _others(index: WholeIndex, v: Tensor, rows: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and positions of the nearest other images, (n, k)."""
    cosine = v @ index.vectors.T
    cosine[torch.arange(len(rows)), torch.from_numpy(rows)] = -2.0
    found = torch.topk(cosine, min(k, cosine.shape[1] - 1), dim=1)
    return found.values, found.indices


def _aligned_pairs(
    corpus: Corpus,
    x: Tensor,
    rows: np.ndarray,
    near: tuple[Tensor, Tensor, bool],
    typical: Tensor,
    pairs: dict[tuple[int, int], float],
) -> None:
    """Adds the pairs among some neighbours that are copies, once aligned."""
    square, images, mirrored = near
    close = (square < CLOSE * typical[:, None]).nonzero().tolist()
    for p, j in close:
        n, m = int(rows[p]), int(images[p, j])
        pair = min(n, m), max(n, m)
        if pair in pairs:
            continue
        other = units(corpus.images[m : m + 1])[0]
        found = align(x[p], [Placement(m, mirrored, 1.0, 0, 0)], {m: other})
        spread = float(mean_and_spread(x[p : p + 1])[1])
        if spread < FAINT:
            continue
        covered = found.covered[0]
        residual = ((found.pixels[0] - x[p])[:, covered] / spread).square().mean()
        # in the units of half-size descriptors, whose squared distance is 2 - 2 cosine
        if float(residual) < VERBATIM**2 and float(residual) < DISTINCT * float(typical[p]) * 2:
            pairs[pair] = float(residual.sqrt())


def _groups(pairs: np.ndarray, N: int) -> np.ndarray:
    """The number of the group of every image, -1 for those in no pair."""
    group = np.full(N, -1, dtype=np.int64)
    if len(pairs):
        links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(N, N))
        _, component = connected_components(links, directed=False)
        members = np.unique(pairs)
        _, group[members] = np.unique(component[members], return_inverse=True)
    return group
