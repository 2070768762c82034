"""Random noise per picture: explicit, and the same however pictures are batched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PictureNoise:
    """Standard normal noise of some pictures.

    The noise of picture i comes from generators seeded with (seed, i), one for every stream, so
    that it depends neither on the batch of the picture nor on earlier draws.

    Arguments:
        seed: A whole number that is 0 or more.
        pictures: The numbers i of the pictures.
    """

    def __init__(self, seed: int, pictures: Sequence[int]) -> None:
        self.seed, self.pictures = seed, pictures

    def of(self, members: Tensor) -> PictureNoise:
        """The noise of some of the pictures, by their positions in the batch."""
        return PictureNoise(self.seed, [self.pictures[k] for k in members.tolist()])

    def generators(self, *stream: int) -> list[torch.Generator]:
        """A fresh generator for each picture; different `stream` numbers give independent ones."""
        return [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence([self.seed, i, *stream]).generate_state(1, np.uint64)[0])
            )
            for i in self.pictures
        ]

    def normal(self, shape: Sequence[int], *stream: int) -> Tensor:
        """Standard normal numbers of each picture, float64 (B, *shape)."""
        return draw(self.generators(*stream), shape, torch.float64)


def draw(generators: list[torch.Generator], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of each generator, (B, *shape)."""
    return torch.stack([torch.randn(*shape, generator=g, dtype=dtype) for g in generators])
