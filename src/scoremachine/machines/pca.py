"""PCA locality: each pixel's window is given by the covariance of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.schedules import ThresholdSchedule
from scoremachine.core.windows import Masks
from scoremachine.data.corpus import Corpus
from scoremachine.machines.windowed import WindowMachine
from scoremachine.runtime.progress import Bar, bar


class PCALocality(WindowMachine):
    """Every pixel and channel, from the pixels and channels on which its Wiener filter depends.

    Lukoianov et al. 2509.09672: q_i[d] = 1 where |W_id / W_ii| is at least tau times the largest
    such ratio anywhere, W = C (C + sigma^2 I)^-1 with the images' covariance C; the window of a
    pixel with no variance is that pixel. The softmax is over the whole source (the published code
    normalizes it per batch of data, so that its result depends on the batch size).

    With more than 8,192 pixels and more than 8,192 images, C is approximated by its 1,024 leading
    eigenvectors.

    Arguments:
        threshold: tau in (0, 1] (0.02; the paper takes 0.05 for CIFAR-10), a `ThresholdSchedule`,
            or "auto" (held-out calibration).
        corpus, settings: See `Machine`.
    """

    name = "pca"
    locality = "threshold"
    threshold: ThresholdSchedule | str
    depends_on_noise = True
    relative_cost = 10.0

    def __init__(
        self, corpus: Corpus, threshold: float | ThresholdSchedule | str = 0.02, **settings: Any
    ) -> None:
        super().__init__(corpus, threshold, **settings)

    def candidates(self) -> list[float]:
        return [0.0005, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4]

    def collection(self, tau: float, sigma: float, index: np.ndarray) -> Collection:
        C, H, W = self.corpus.shape
        g = self.source.moments(index, low_rank=True)

        def ratios(progress: Bar) -> Iterator[tuple[np.ndarray, Tensor]]:
            for rows, block in g.wiener_blocks(sigma):
                i = np.arange(rows.start, rows.stop)
                middle = block[i - rows.start, i].clamp(min=1e-30)
                yield i, (block / middle[:, None]).abs()  # 0 for a pixel with no variance
                progress.advance(len(i))

        def masks(progress: Bar) -> Iterator[np.ndarray]:
            largest = max(float(ratio.max()) for _, ratio in ratios(progress))
            for i, ratio in ratios(progress):
                q = (ratio >= tau * largest).numpy()
                q[i - i[0], i] |= ~q.any(axis=1)
                yield q

        with bar("Finding windows", total=2 * C * H * W) as progress:
            window = Masks.of(masks(progress), (C * H, W))
        # the channels of an image stacked vertically, so that each of its values is a pixel
        return Collection((C * H, W), window, "pixels", "pixel")
