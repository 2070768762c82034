"""Sources of images: the images themselves, or transformed by a forward process."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection
from scoremachine.core.derivatives import tracked, with_slope
from scoremachine.core.posterior import Engine, Scan, collected, posterior, with_sigma_slope
from scoremachine.core.processes import Process
from scoremachine.core.shares import Shares, of_candidates, of_images, of_pixels
from scoremachine.data.corpus import Corpus
from scoremachine.data.moments import Moments, moments
from scoremachine.engines import choose
from scoremachine.engines.pytorch import source_weights
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.progress import bar
from scoremachine.sources.source import Evidence, FoldRequest, Source


class ImageSource:
    """The images of a corpus.

    Arguments:
        corpus: The images.
        kernel: The engine that folds them: "auto", "numba", "torch" or "reference".
    """

    has_images = True
    scale = 1.0

    def __init__(self, corpus: Corpus, kernel: str) -> None:
        choose(kernel)  # raises for an unknown name
        self.corpus, self.kernel = corpus, kernel
        self.name, self.shape = corpus.name, corpus.shape

    @property
    def engine(self) -> Engine:
        """The engine that computes the folds."""
        return choose(self.kernel)

    @property
    def keys(self) -> np.ndarray:
        """The images that y is compared with, (N, C, H, W): uint8, or float32 in units of x."""
        return self.corpus.images

    @property
    def values(self) -> np.ndarray | None:
        """The images that are averaged, uint8 (N, C, H, W), if they are not the keys."""
        return None

    def seen(self, x: Tensor) -> Tensor:
        """The keys of pictures x (B, C, H, W): x itself."""
        return x

    def engine_for(self, collection: Collection, index: np.ndarray) -> Engine:
        """The engine that folds the images at `index` for a row."""
        return self.engine

    def prepare(self, collection: Collection, index: np.ndarray) -> None:
        """Does nothing: a scan needs no preparation."""

    def fold(self, request: FoldRequest) -> Evidence:
        """The posterior mean and the folds of the sites."""
        return self.folded(request, self.engine_for(request.collection, request.index))

    def folded(self, request: FoldRequest, engine: Engine) -> Evidence:
        """`fold`, with a given engine."""
        keys, values, y = self._arrays(request)
        asked = request.index, y, request.sigma, request.collection, request.leaders, values
        fold, D = posterior(engine, keys, *asked)
        return Evidence(D.reshape(request.y.shape), fold)

    def _arrays(self, request: FoldRequest) -> tuple[np.ndarray, np.ndarray | None, Tensor]:
        """Keys, values and pictures; a row may stack the channels."""
        c, keys, values = request.collection, self.keys, self.values
        keys = keys.reshape(len(keys), -1, *c.image)
        if values is not None:
            values = values.reshape(keys.shape)
        return keys, values, request.y.reshape(-1, keys.shape[1], *c.frame)

    def shares(self, request: FoldRequest) -> Shares:
        """The posterior mean, and where every pixel of it comes from."""
        c, k = request.collection, request.leaders
        # what leads in a pixel may be further down at each of the sites that it is the mean of
        evidence = self.fold(replace(request, leaders=k if c.passes == 1 else 2 * k))
        D, fold = evidence.mean, evidence.fold
        assert fold is not None
        if c.whole:
            return of_images(D, fold, c.image)
        if c.response == "pixel" and c.frame == request.y.shape[2:]:
            return of_pixels(D, fold)
        keys, values, y = self._arrays(request)
        scan = Scan(self.engine, keys, request.index, c, values=values)

        def weights_of(p: int, n: Tensor, shift: tuple[int, int]) -> Tensor:
            return source_weights(scan.request(y, collected(request.sigma, c)), fold, p, n, shift)

        return of_candidates(D, fold, c, k, weights_of)

    def log_partition(self, request: FoldRequest) -> Tensor:
        """log sum_s e^(l_s) of whole images, float64 (B,), differentiable by y and by sigma."""
        y, sigma = request.y, request.sigma
        evidence = self.fold(request)
        assert evidence.fold is not None
        value = evidence.fold.log_partition[:, 0, 0]
        value = with_slope(value, (evidence.mean - y) / sigma[:, None, None, None] ** 2, y)
        scan = Scan(self.engine, self.keys, request.index, request.collection)
        return with_sigma_slope(value, scan, y, sigma)

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """Mean and covariance of the images at `index`."""
        return moments(self.corpus, index, low_rank)

    def under_process(self, process: Process, t: float) -> Source:
        """The images transformed by a forward process at the time t."""
        return ProcessedImages(self.corpus, self.kernel, process, t)


class ProcessedImages(ImageSource):
    """Images under a forward process x_t = A_t x + sigma_t eps at one time.

    Logits compare x_t with the keys A_t s, and the mean is taken over the values s.

    Arguments:
        corpus, kernel: See `ImageSource`.
        process, t: The process, and the time in [0, 1].
    """

    def __init__(self, corpus: Corpus, kernel: str, process: Process, t: float) -> None:
        super().__init__(corpus, kernel)
        self.process, self.t = process, t
        gains, _ = process(torch.tensor(t, dtype=torch.float64))
        self.scale = float(gains.max())
        self._seen: LRUCache[np.ndarray] = LRUCache(1)

    @property
    def keys(self) -> np.ndarray:
        """A_t x of every image, float32 (N, C, H, W)."""
        return self._seen.get("keys", lambda: self.process.seen(self.corpus.images, self.t))

    @property
    def values(self) -> np.ndarray:
        """The images."""
        return self.corpus.images

    def seen(self, x: Tensor) -> Tensor:
        """A_t x."""
        return self.process.apply(x, self.t)

    def fold(self, request: FoldRequest) -> Evidence:
        if request.collection.source == "rolled":
            return self._rolled(request)
        return super().fold(request)

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """Mean and covariance of the keys divided by `scale`."""

        def seen(x: Tensor) -> Tensor:
            return self.seen(x.reshape(-1, *self.shape)).flatten(1) / self.scale

        return moments(self.corpus, index, low_rank).seen(seen)

    def _rolled(self, request: FoldRequest) -> Evidence:
        """The images under every circular translation, one translation after the other.

        A_t does not commute with circular translations, so the logits are not one correlation and
        cannot be computed by Fourier transform.
        """
        if tracked(request.y):
            raise ValueError("es has no derivative under a forward process: use another machine")
        images, rows = self.corpus.images[request.index], np.arange(len(request.index))
        whole, known = Collection.of_images(self.shape[1:]), None
        _, H, W = self.shape
        with bar("Translating", total=H * W) as progress:
            for dy in range(H):
                for dx in range(W):
                    moved = np.roll(images, (dy, dx), (2, 3))
                    keys = self.process.seen(moved, self.t)
                    asked = keys, rows, request.y, request.sigma, whole, request.leaders
                    fold, _ = posterior(self.engine, *asked, values=moved)
                    n = torch.from_numpy(request.index)[fold.places // (H * W)]
                    # the pixel that comes to lie in the middle
                    row, column = (H // 2 - dy) % H, (W // 2 - dx) % W
                    places = torch.where(fold.places < 0, -1, n * (H * W) + row * W + column)
                    fold = replace(fold, places=places)
                    known = fold if known is None else known.merge(fold)
                    progress.advance()
        assert known is not None
        return Evidence(known.mean, known)
