"""Training images ranked by how much they explain of a picture, whatever made it.

The picture is taken as a noisy one at a small noise level, and a machine's posterior shares are
read there (nonparametric data attribution; 2510.14269), at one or several noise levels, patch sizes
and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import csr_array
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.machines.build import build, spelled
from scoremachine.machines.machine import Machine
from scoremachine.provenance import pictures as drawing
from scoremachine.provenance.audit import path_of, pictures_of
from scoremachine.provenance.explain import explain
from scoremachine.runtime.files import csv_text
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer

NAMED = 16  # sources of a pixel
SIGMAS = (0.1, 0.2, 0.4)
BATCH = 8


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much each training image explains of each picture.

    Attributes:
        names: What the pictures are called.
        pictures: uint8 (n, C, H, W).
        corpus: The training images.
        shares: Of each picture and image: the mean over pixels, noise levels, machines and scales
            of the image's posterior share among the leading sources of the pixel, float64 (n, N).
    """

    names: list[str]
    pictures: np.ndarray
    corpus: Corpus
    shares: csr_array

    def top(self, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The k images that explain most, int64 (n, k), and their shares; -1 and 0: no more."""
        check_integer("k", k)
        images = np.full((len(self.names), k), -1, dtype=np.int64)
        shares = np.zeros((len(self.names), k))
        for p in range(len(self.names)):
            row = self.shares[[p]].tocoo()
            order = np.argsort(-row.data, kind="stable")[:k]
            images[p, : len(order)] = row.coords[-1][order]
            shares[p, : len(order)] = row.data[order]
        return images, shares

    def csv(self, k: int = 10) -> str:
        """A line for each picture and image: picture, rank, image, its number, its share."""
        images, shares = self.top(k)
        rows: list[Sequence[object]] = [("picture", "rank", "training_image", "number", "share")]
        for p, name in enumerate(self.names):
            for rank, (n, share) in enumerate(zip(images[p], shares[p], strict=True), 1):
                if n >= 0:
                    path = path_of(self.corpus, int(n))
                    rows.append((name, rank, path, n, f"{share:.5f}"))
        return csv_text(rows)

    def sheet(self, k: int = 8, most: int = 16) -> Image.Image:
        """The first pictures, each beside the images that explain most of it."""
        images, shares = self.top(k)
        tiles = []
        for p in range(min(most, len(self.names))):
            tiles.append((drawing.enlarged(self.pictures[p], 128)[0], self.names[p][-20:]))
            for n, share in zip(images[p], shares[p], strict=True):
                if n >= 0:
                    image = np.asarray(self.corpus.images[n])
                    tiles.append((drawing.enlarged(image, 128)[0], f"{n}: {100 * share:.1f}%"))
                else:
                    blank = np.full_like(tiles[0][0], 255)
                    tiles.append((blank, ""))
        return drawing.tiled(tiles, k + 1)


def attribute(
    pictures: Any,
    corpus: Corpus,
    machine: str | Machine | Sequence[str] = "ls:7",
    sigma: float | Sequence[float] = SIGMAS,
    scales: Sequence[int] = (1,),
    k: int = NAMED,
) -> Attribution:
    """Ranks training images by how much they explain of each picture.

    Arguments:
        pictures: uint8 (n, C, H, W), a folder, a file or a `Corpus`, as for `audit`.
        corpus: The training images.
        machine: A machine of the corpus, or names as `compare` takes them ("ls:7", "els:5",
            "pspc:7", "ideal"), one or several.
        sigma: The noise level or levels at which shares are read, in units of [-1, 1].
        scales: Factors by which pictures and images are reduced: (1,) as they are, (2,) at half
            their size, (1, 2) both. Only with machines given by names.
        k: How many sources of each pixel are counted.

    Raises:
        ValueError: For a machine that has no sources, a noise level that is not positive, or a
            scale that does not divide the images' sides.
    """
    names, images = pictures_of(pictures, corpus)
    levels = [float(s) for s in np.atleast_1d(np.asarray(sigma, dtype=np.float64))]
    machines = _machines(machine, corpus, scales)
    total = csr_array((len(images), len(corpus)))
    x = torch.from_numpy(images).double() / 127.5 - 1
    with bar("Attributing", total=len(machines) * len(levels) * len(x)) as progress:
        for factor, each in machines:
            small = _reduced(x, factor)
            for level in levels:
                for first in range(0, len(x), BATCH):
                    some = small[first : first + BATCH]
                    found = explain(each, some, level, k).image_shares().tocoo()
                    rows, columns = found.coords
                    shape = len(images), len(corpus)
                    at = rows + first, columns
                    total = total + csr_array((found.data, at), shape=shape)
                    progress.advance(len(some))
    return Attribution(names, images, corpus, csr_array(total / (len(machines) * len(levels))))


def _machines(
    machine: str | Machine | Sequence[str], corpus: Corpus, scales: Sequence[int]
) -> list[tuple[int, Machine]]:
    """Machines, each with the factor by which its pictures are reduced."""
    if isinstance(machine, Machine):
        if tuple(scales) != (1,):
            raise ValueError("scales are of machines given by names; give 'ls:7', or scales=(1,)")
        return [(1, machine)]
    found = []
    for factor in scales:
        part = corpus if factor == 1 else corpus.block_means(check_integer("scale", factor))
        for text in [machine] if isinstance(machine, str) else machine:
            name, settings = spelled(text)
            local = settings.get("patch_size")
            if factor > 1 and isinstance(local, int):
                settings["patch_size"] = max(3, round(local / factor) // 2 * 2 + 1)
            found.append((factor, build(name, part, **settings)))
    return found


def _reduced(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else torch.nn.functional.avg_pool2d(x, factor)
