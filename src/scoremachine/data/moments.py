"""Mean and covariance of a corpus, and the Wiener filter they make at a noise level."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.derivatives import untransformed
from scoremachine.data import store
from scoremachine.data.corpus import Corpus
from scoremachine.runtime.lru import LRUCache
from scoremachine.runtime.progress import bar

LARGEST = 8192  # the side of an eigenproblem: 2 GB and minutes
ROOM = 2**29  # numbers in one of its matrices: 4 GB
RANK = 1024  # leading eigenvectors of what is larger
TILE = 2048  # images read at a time
KEPT = 1024  # eigenproblems from this side on are kept on disk
FILE = "moments.safetensors"
REMEMBERED = 4


@dataclass
class Moments:
    """Mean (D,), and the covariance's eigenvectors (D, r) with eigenvalues (r,) > 0, float64."""

    mean: Tensor
    V: Tensor
    eigenvalues: Tensor
    _maps: tuple[float, np.ndarray] | None = field(default=None, repr=False)  # the last
    _solved: tuple[float, Tensor] | None = field(default=None, repr=False)
    orthonormal: bool = True  # whether V is: what a process shows of eigenvectors is not

    def seen(self, A: Callable[[Tensor], Tensor]) -> Moments:
        """The moments of A x, for a linear map of rows (n, D): C is V diag(eigenvalues) V^T."""
        return Moments(A(self.mean[None])[0], A(self.V.T).T, self.eigenvalues, orthonormal=False)

    def wiener(self, sigma: float, rows: slice) -> Tensor:
        """Rows of W = C (C + sigma^2 I)^-1, float64 (n, D)."""
        if not self.orthonormal:
            return self.V[rows] @ self.inverse(sigma) @ self.V.T
        shrunk = self.V[rows] * (self.eigenvalues / (self.eigenvalues + sigma**2))
        return shrunk @ self.V.T

    def filtered(self, offset: Tensor, sigma: Tensor) -> Tensor:
        """The coefficients c of V in the Wiener filter's answer to an offset from the mean.

        Arguments:
            offset: y - mean, float64 (B, D).
            sigma: The noise levels, (B,).

        Returns:
            c, float64 (B, r): V c is C (C + sigma^2 I)^-1 offset, where V is orthonormal.
        """
        projected = offset @ self.V
        if self.orthonormal:
            return projected * (self.eigenvalues / (self.eigenvalues + sigma[:, None] ** 2))
        return torch.stack(
            [row @ self.inverse(float(s)) for row, s in zip(projected, sigma, strict=True)]
        )

    def inverse(self, sigma: float) -> Tensor:
        """(sigma^2 diag(1 / eigenvalues) + V^T V)^-1, of the last noise level."""
        if self._solved is None or self._solved[0] != sigma:
            M = torch.diag(sigma**2 / self.eigenvalues) + self.V.T @ self.V
            self._solved = sigma, torch.linalg.inv(M)
        return self._solved[1]

    def wiener_blocks(self, sigma: float, step: int = 1024) -> Iterator[tuple[slice, Tensor]]:
        """All rows of W in pieces, so that W is never whole in memory."""
        for start in range(0, len(self.V), step):
            rows = slice(start, min(start + step, len(self.V)))
            yield rows, self.wiener(sigma, rows)

    def heat_maps(self, sigma: float, shape: tuple[int, int, int]) -> np.ndarray:
        """How much each output pixel of the Wiener filter looks at each input pixel.

        The squared entries of W, added up over channels: float64 (H W, H W).
        """
        if self._maps is not None and self._maps[0] == sigma:
            return self._maps[1]
        C, H, W = shape
        if H * W > LARGEST:
            raise ValueError(
                f"{H} x {W} pixels have {H * W:,} heat maps of as many entries; expected at most "
                f"{LARGEST:,}: open the corpus with a smaller size="
            )
        maps = torch.zeros(H * W, H * W, dtype=torch.float64)
        with bar("Finding windows", total=C * H * W) as progress:
            for c in range(C):
                for start in range(0, H * W, 1024):
                    stop = min(start + 1024, H * W)
                    block = self.wiener(sigma, slice(c * H * W + start, c * H * W + stop))
                    maps[start:stop] += (block**2).reshape(-1, C, H * W).sum(1)
                    progress.advance(stop - start)
        self._maps = sigma, maps.numpy()
        return self._maps[1]


_known = LRUCache[Moments](REMEMBERED)


def within_reach(N: int, D: int) -> bool:
    """Whether the whole covariance of N images of D values can be had."""
    side = min(N, D)
    return side <= LARGEST and side * D <= ROOM


@untransformed
def moments(corpus: Corpus, index: np.ndarray, low_rank: bool = False) -> Moments:
    """The moments of the images at `index`, from memory, from disk, or computed.

    Arguments:
        corpus: The images.
        index: Which of them.
        low_rank: Keep the 1,024 leading eigenvectors where all would be more than 8,192.

    Raises:
        ValueError: Where both pixels and images are more than 8,192, without `low_rank`.
    """
    side = min(len(index), math.prod(corpus.shape))
    if side > LARGEST and not low_rank:
        raise ValueError(
            f"the Gaussian of {len(index):,} images of {math.prod(corpus.shape):,} values "
            f"each needs an eigenproblem of side {side:,}; expected at most {LARGEST:,}: "
            "open the corpus with a smaller size= or limit="
        )
    if side <= LARGEST and (numbers := side * math.prod(corpus.shape)) > ROOM:
        raise ValueError(
            f"the covariance of {len(index):,} images of {math.prod(corpus.shape):,} values each "
            f"needs {numbers * 8 / 1e9:.0f} GB; expected at most {ROOM * 8 / 1e9:.0f}: open the "
            "corpus with a smaller size= or limit="
        )
    key = hashlib.sha256(index.tobytes()).hexdigest()[:16]
    return _known.get((corpus.key, key), lambda: _computed(corpus, index, key, side))


def _computed(corpus: Corpus, index: np.ndarray, key: str, side: int) -> Moments:
    if side < KEPT:
        return moments_of(corpus.images, index)
    entry = store.entry("moments", store.key_of(corpus.key, key))
    found = _kept(entry)
    if found is not None:
        return found
    needed = 8 * min(side, RANK if side > LARGEST else side) * math.prod(corpus.shape)
    with store.optional(f"the covariance of {corpus.name}"):
        store.announce(f"measuring the covariance of {corpus.name}", needed)
    found = (moments_of if side <= LARGEST else leading_moments_of)(corpus.images, index)
    with store.optional(f"the covariance of {corpus.name}"):
        _keep(entry, found, corpus.name, needed)
    return found


def _kept(entry: store.Entry) -> Moments | None:
    """What the store holds; what is damaged there is set aside."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        lease = store.hold(entry.folder)
        kept = load_file(entry.folder / FILE)
        del lease
        return Moments(kept["mean"], kept["V"], kept["eigenvalues"])
    except OSError as error:
        if not entry.folder.exists():
            return None
        damage: Exception = error
    except (SafetensorError, KeyError) as error:
        damage = error
    with store.optional("what is made again"), entry.locked():
        entry.set_aside(str(damage))
    return None


def _keep(entry: store.Entry, found: Moments, of: str, size: int) -> None:
    from safetensors.torch import save_file

    tensors = {k: getattr(found, k).contiguous() for k in ("mean", "V", "eigenvalues")}
    with entry.locked(), entry.made(of, size) as fresh:
        save_file(tensors, fresh / FILE)


def _tiles(images: np.ndarray, index: np.ndarray) -> Iterator[Tensor]:
    """images[index] as x in [-1, 1], float64 (n, D), `TILE` at a time."""
    for start in range(0, len(index), TILE):
        u = torch.from_numpy(images[index[start : start + TILE]])
        yield u.flatten(1).double() / 127.5 - 1


def _varying(images: np.ndarray, index: np.ndarray) -> Tensor:
    """1 where a pixel is not the same in all images, else 0: there rounding would leave noise."""
    least, most = images[index[0]].copy(), images[index[0]].copy()
    for start in range(0, len(index), TILE):
        u = images[index[start : start + TILE]]
        np.minimum(least, u.min(0), out=least)
        np.maximum(most, u.max(0), out=most)
    return torch.from_numpy((least < most).reshape(-1)).double()


def _mean(images: np.ndarray, index: np.ndarray) -> Tensor:
    total = sum((x.sum(0) for x in _tiles(images, index)), torch.zeros(()).double())
    return total / len(index)


def moments_of(images: np.ndarray, index: np.ndarray) -> Moments:
    """Mean and covariance (divided by N) of images[index], x in [-1, 1], read in tiles."""
    N, D = len(index), math.prod(images.shape[1:])
    mean = _mean(images, index)
    with bar("Measuring the covariance", total=N + 1) as progress:
        if N <= D:
            x = torch.cat(list(_tiles(images, index))) - mean
            values, vectors = torch.linalg.eigh(x @ x.T / N)
        else:
            C = torch.zeros(D, D, dtype=torch.float64)
            for tile in _tiles(images, index):
                x = tile - mean
                C.addmm_(x.T, x)
                progress.advance(len(x))
            values, vectors = torch.linalg.eigh(C / N)
        # rounding leaves eigenvalues of about 1e-16 of the largest where there is no variance
        positive = values > max(N, D) * 1e-15 * values[-1].clamp(min=1e-30)
        values, vectors = values[positive], vectors[:, positive]
        if N <= D:
            vectors = (x.T @ vectors) / torch.sqrt(N * values)
        progress.advance()
    return Moments(mean, vectors * _varying(images, index)[:, None], values)


def leading_moments_of(
    images: np.ndarray, index: np.ndarray, rank: int = RANK, rounds: int = 3
) -> Moments:
    """The same with the `rank` leading eigenvectors alone: subspace iteration from a random start.

    Halko, Martinsson & Tropp 2011 (0909.4061), algorithm 4.4. The covariance is never formed.
    """
    N, D = len(index), math.prod(images.shape[1:])
    mean = _mean(images, index)
    width = min(rank + 64, D)
    Q = torch.randn(D, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with bar("Measuring the covariance", total=N * (rounds + 1)) as progress:
        for _ in range(rounds):
            product = torch.zeros_like(Q)
            for tile in _tiles(images, index):
                x = tile - mean
                product.addmm_(x.T, x @ Q)
                progress.advance(len(x))
            Q = torch.linalg.qr(product / N).Q
        C = torch.zeros(width, width, dtype=torch.float64)
        for tile in _tiles(images, index):
            x = (tile - mean) @ Q
            C.addmm_(x.T, x)
            progress.advance(len(x))
    values, vectors = torch.linalg.eigh(C / N)
    values, vectors = values[-rank:], vectors[:, -rank:]
    positive = values > max(N, D) * 1e-15 * values[-1].clamp(min=1e-30)
    V = (Q @ vectors[:, positive]) * _varying(images, index)[:, None]
    return Moments(mean, V, values[positive])
