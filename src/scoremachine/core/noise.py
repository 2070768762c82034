"""Noise that belongs to a picture: explicit, and the same however pictures are batched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class PictureNoise:
    """Standard normal noise of some pictures.

    Picture i's noise comes from generators made of (seed, i), one for every stream, so that it
    depends neither on the batch the picture is in nor on what was drawn before.

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
        """A generator for each picture, at its beginning; `stream` tells independent ones apart."""
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
