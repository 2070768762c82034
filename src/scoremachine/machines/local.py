"""The local score machine: each pixel is denoised from its own neighbourhood."""

from __future__ import annotations

import numpy as np

from scoremachine.core.collection import Collection
from scoremachine.machines.windowed import BoxMachine


class LocalScore(BoxMachine):
    """Every pixel's P x P box, truncated at the border, compared with the images at its position.

    Kamb & Ganguli 2412.20292 (the local score machine).
    """

    name = "ls"
    accepts_mixtures = True

    @property
    def removal_is_exact(self) -> bool:
        return not self.depends_on_noise

    def collection(self, P: int, sigma: float, index: np.ndarray) -> Collection:
        window = self.tapered((P, P), sigma, index)
        return Collection(self.corpus.shape[1:], window, "pixels", "pixel", **self.wider())
