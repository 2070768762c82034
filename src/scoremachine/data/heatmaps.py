"""Heat maps: which input pixels an output pixel of a denoiser looks at."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from azula.denoise import Denoiser
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.runtime.files import written
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer

# what numpy raises at a file that is no .npz, is cut short, or lacks an array
UNREADABLE = (
    KeyError,
    IndexError,
    ValueError,
    AttributeError,
    TypeError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)


class HeatMaps:
    """For each noise level and output pixel, a map over the input's pixels, >= 0.

    Arguments:
        sigmas: The K noise levels.
        maps: float, shape (K, H W, H W): maps[k, i] is output pixel i's.

    Raises:
        ValueError: For other shapes, negative or infinite entries.
    """

    def __init__(self, sigmas: Sequence[float] | np.ndarray, maps: np.ndarray) -> None:
        self.sigmas, self.maps = np.asarray(sigmas, dtype=np.float64), np.asarray(maps)
        K = len(self.sigmas) if self.sigmas.ndim == 1 else 0
        if (
            self.maps.ndim != 3
            or self.maps.shape[0] != K
            or self.maps.shape[1] != self.maps.shape[2]
        ):
            raise ValueError(
                f"heat maps have shape {self.maps.shape} for noise levels of shape "
                f"{self.sigmas.shape}; expected (K, H W, H W) for (K,)"
            )
        if self.maps.dtype.kind != "f":
            raise ValueError(f"heat maps are {self.maps.dtype}; expected floats")
        if not (np.isfinite(self.maps) & (self.maps >= 0)).all():
            raise ValueError("heat maps hold negative or infinite numbers; expected floats >= 0")
        if not (np.isfinite(self.sigmas) & (self.sigmas > 0)).all() or K == 0:
            raise ValueError(f"noise levels are {self.sigmas.tolist()}; expected positive numbers")

    def __call__(self, sigma: float) -> np.ndarray:
        """The maps at the nearest noise level, in log sigma: (H W, H W)."""
        k = np.argmin(np.abs(np.log(self.sigmas) - math.log(sigma)))
        return self.maps[k].astype(np.float64)

    def check(self, image: tuple[int, ...]) -> None:
        """ValueError unless the maps are those of images of this height and width."""
        H, W = image
        if self.maps.shape[1] != H * W:
            raise ValueError(
                f"the heat maps are of {self.maps.shape[1]} pixels; expected {H * W}, as the "
                f"{H} x {W} images have"
            )

    def plain(self) -> str:
        """It as a record holds it: by its key."""
        return self.key

    @property
    def key(self) -> str:
        """A digest of the maps."""
        return hashlib.sha256(self.sigmas.tobytes() + self.maps.tobytes()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path) -> HeatMaps:
        """From an .npz file with `sigmas` and `maps`."""
        if not Path(path).exists():
            raise ValueError(
                f"there is no file {path}; heat maps are an .npz made by HeatMaps.save"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                sigmas, maps = file["sigmas"], file["maps"]
        except UNREADABLE:
            raise ValueError(
                f"{path} holds no heat maps; expected an .npz file with sigmas (K,) and maps "
                "(K, H W, H W)"
            ) from None
        return cls(sigmas, maps)

    def save(self, path: str | Path) -> None:
        """To an .npz file."""
        with written(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, sigmas=self.sigmas, maps=self.maps)

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        corpus: Corpus,
        times: Sequence[float],
        count: int = 8,
        seed: int = 0,
        batch: int = 64,
    ) -> HeatMaps:
        """Mean squared gradients of a denoiser's output pixels by its input, over noised images.

        Arguments:
            denoiser: Any azula denoiser that autograd can differentiate.
            corpus: Where the images come from.
            times: azula's times in (0, 1] under the denoiser's schedule.
            count: Over how many images the squares are averaged.
            seed: Of their choice and their noise.
            batch: How many gradients are taken together.
        """
        C, H, W = corpus.shape
        check_integer("count", count)
        check_integer("batch", batch)
        if len(times) == 0 or not all(0 < float(t) < 1 for t in times):
            raise ValueError(f"times are {list(times)}; expected at least one in (0, 1)")
        picks = np.random.default_rng(seed).choice(len(corpus), min(count, len(corpus)), False)
        x = torch.from_numpy(corpus.images[np.sort(picks)]).float() / 127.5 - 1
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        maps, sigmas = [], []
        with bar("Differentiating", total=len(times) * len(x) * C * H * W) as progress:
            for time in times:
                t = torch.tensor(float(time))
                alpha, sigma = denoiser.schedule(t)

                def mean(x_t: Tensor, t: Tensor = t) -> Tensor:
                    return denoiser(x_t, t).mean

                total = torch.zeros(H * W, H * W, dtype=torch.float64)
                for x_t in alpha * x + sigma * eps:
                    for start in range(0, C * H * W, batch):
                        d = torch.arange(start, min(start + batch, C * H * W))
                        g = gradients(mean, x_t, d) * alpha
                        total.index_add_(0, d % (H * W), (g.double() ** 2).sum(1).flatten(1))
                        progress.advance(len(d))
                maps.append((total / len(x)).float().numpy())
                sigmas.append(float(sigma / alpha))
        return cls(sigmas, np.stack(maps))


def gradients(f: Callable[[Tensor], Tensor], x: Tensor, d: Tensor) -> Tensor:
    """The gradients of the outputs d (n,) of f by its input x (C, H, W): (n, C, H, W)."""
    copies = x.expand(len(d), *x.shape).clone().requires_grad_()
    with torch.enable_grad():
        outputs = f(copies).flatten(1)
        return torch.autograd.grad(outputs.gather(1, d[:, None]).sum(), copies)[0]
