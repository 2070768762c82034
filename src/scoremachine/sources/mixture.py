"""Mixtures: a few Gaussians instead of many images, or of all their patches.

A cluster of images has a weight, a mean, and a covariance that is low-rank plus diagonal:

    p(x) = sum_k pi_k N(x; mu_k, V_k V_k^T + diag(d_k))

Under it E[x | y] is exact: with v = d + sigma^2, delta = y - mu and M = I + V^T diag(1 / v) V,

    E[x | y, k] = y - sigma^2 (delta - V M^-1 V^T (delta / v)) / v

and the weights of the clusters are those of N(y; mu_k, V_k V_k^T + diag(v_k)), by the Woodbury
identity. One cluster with its full covariance gives the Gaussian machine; one cluster for each
image, with covariance zero, gives the ideal machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoremachine.core.collection import Collection, classes
from scoremachine.core.derivatives import regrouped
from scoremachine.core.posterior import wrap
from scoremachine.core.processes import Process
from scoremachine.core.shares import Shares, leading
from scoremachine.core.windows import Box
from scoremachine.data.moments import Moments
from scoremachine.runtime.files import written
from scoremachine.sources.source import Evidence, FoldRequest, Source

ROOM = 2**26  # values in memory at once


@dataclass(frozen=True, eq=False)
class Clusters:
    """K Gaussians over vectors of D values, which are pictures (C, h, w).

    Attributes:
        weights: pi, float64 (K,), with sum 1.
        means: mu, float32 (K, D).
        V: float32 (K, D, r).
        d: float32 (K, D), or (K, 0) if it is zero.
        shape: (C, h, w).
    """

    weights: Tensor
    means: Tensor
    V: Tensor
    d: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def rank(self) -> int:
        """r."""
        return self.V.shape[2]

    def stored(self) -> dict[str, Tensor]:
        """The tensors to be saved, as bytes or in half precision where that is lossless."""
        gray = gray_levels(self.means)
        whole = torch.equal(gray / 127.5 - 1, self.means)
        halves = {name: each.half() for name, each in (("V", self.V), ("d", self.d))}
        exact = all(torch.equal(half.float(), vars(self)[name]) for name, half in halves.items())
        return {
            "weights": self.weights.float(),
            "means": gray.byte() if whole else self.means,
            **(halves if exact else {"V": self.V, "d": self.d}),
        }

    @cached_property
    def nbytes(self) -> int:
        """Their size on disk."""
        return sum(tensor.nbytes for tensor in self.stored().values())

    def tiles(self, numbers: int) -> Iterator[Clusters]:
        """The clusters in pieces of about `ROOM` values, with `numbers` for each cluster."""
        step = max(1, ROOM // max(1, numbers))
        for k in range(0, len(self), step):
            some = slice(k, k + step)
            yield replace(
                self, weights=self.weights[some], means=self.means[some], V=self.V[some],
                d=self.d[some],
            )  # fmt: skip

    def part(self, rows: slice, columns: slice) -> Clusters:
        """The marginals of the clusters on a part of the picture."""
        K, (C, h, w), r = len(self), self.shape, self.rank
        means = self.means.reshape(K, C, h, w)[:, :, rows, columns]
        V = self.V.reshape(K, C, h, w, r)[:, :, rows, columns]
        d = self.d.reshape(K, C, h, w)[:, :, rows, columns] if self.d.shape[1] else self.d
        shape = (C, *means.shape[2:])
        return Clusters(self.weights, means.flatten(1), V.flatten(1, 3), d.flatten(1), shape)

    def reduced(self) -> Clusters:
        """The same clusters with at most D columns of V: a square root of V V^T."""
        if self.rank <= self.V.shape[1]:
            return self
        V = self.V.double()
        values, vectors = torch.linalg.eigh(V @ V.transpose(1, 2))
        V = vectors * torch.sqrt(values.clamp(min=0))[:, None]
        return replace(self, V=V.float())

    def variances(self, sigma: float) -> Tensor:
        """v = d + sigma^2, float64 (K, D), or (K, 1) if the diagonal is zero."""
        d = self.d.double() if self.d.shape[1] else torch.zeros(len(self), 1, dtype=torch.float64)
        return d + sigma**2

    def mean(self, q: Tensor, sigma: float) -> Tensor:
        """E[x | q] of vectors q = x + sigma eps, float64 (Q, D), differentiable."""
        return self.posterior(q, sigma)[0]

    def posterior(self, q: Tensor, sigma: float, leaders: int = 0) -> tuple[Tensor, Leaders]:
        """`mean`, and the k = `leaders` leading clusters of every vector, (Q, k)."""
        D, r = q.shape[1], self.rank
        pieces = q.split(max(1, ROOM // D))
        folds = [_Merged(leaders) for _ in pieces]
        for c in self.tiles(D * (r + 3) + len(pieces[0]) * (r + 2)):
            v = c.variances(sigma)
            mu, V = c.means.double(), c.V.double()
            scaled = mu / v
            ones = (1 / v).expand(-1, D)
            logdet = torch.log(v).expand(-1, D).sum(1)
            if r:
                VS = V / v[:, :, None]  # (K, D, r)
                M = torch.eye(r, dtype=torch.float64) + V.transpose(1, 2) @ VS
                L = torch.linalg.cholesky(M)
                flat = VS.permute(1, 0, 2).flatten(1)  # (D, K r)
                middle = torch.einsum("kd,kdr->kr", mu, VS)
                logdet = logdet + 2 * torch.log(torch.diagonal(L, dim1=1, dim2=2)).sum(1)
            for piece, fold in zip(pieces, folds, strict=True):
                square = (piece**2) @ ones.T - 2 * piece @ scaled.T + (mu * scaled).sum(1)
                if r:
                    a = (piece @ flat).unflatten(1, (-1, r)) - middle
                    u = torch.cholesky_solve(a.permute(1, 2, 0), L).permute(2, 0, 1)  # (Q, K, r)
                    square = square - (a * u).sum(2)
                l = torch.log(c.weights) - 0.5 * (square + logdet)
                m, w = fold.weigh(l)
                pulled = piece * (w @ ones) - w @ scaled
                if r:
                    pulled = pulled - (w[..., None] * u).flatten(1) @ flat.T
                fold.add(m, w, pulled)
        found = q - sigma**2 * torch.cat([fold.mean() for fold in folds])
        return found, Leaders.batch([fold.leaders() for fold in folds])


class Leaders(NamedTuple):
    """The leading clusters of some queries.

    Attributes:
        weights: Their shares, largest first, float64 (..., k).
        clusters: Their numbers, int64 (..., k); -1: none.
        effective: The effective number of clusters, float64 (...,).
    """

    weights: Tensor
    clusters: Tensor
    effective: Tensor

    @classmethod
    def batch(cls, parts: Sequence[Leaders]) -> Leaders:
        """Those of several batches of queries, one after the other."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def map(self, f: Callable[[Tensor], Tensor]) -> Leaders:
        """Every tensor, the last one as (..., 1), through a function."""
        weights, clusters, effective = f(self.weights), f(self.clusters), self.effective[..., None]
        return Leaders(weights, clusters, f(effective)[..., 0])


class _Merged:
    """A softmax mean over clusters, piece by piece: the fold of `core.fold`, differentiable."""

    def __init__(self, leaders: int = 0) -> None:
        self.m: Tensor | None = None
        self.Z: Tensor
        self.Z2: Tensor
        self.S: Tensor
        self.k, self.seen = leaders, 0
        self.best: tuple[Tensor, Tensor] | None = None

    def weigh(self, l: Tensor) -> tuple[Tensor, Tensor]:
        """m = max l and w = e^(l - m), for logits l (..., K)."""
        m = l.detach().max(-1, keepdim=True).values
        if self.k:
            numbers = torch.arange(self.seen, self.seen + l.shape[-1]).expand(l.shape)
            logits, clusters = l.detach(), numbers
            if self.best is not None:
                logits = torch.cat([self.best[0], logits], -1)
                clusters = torch.cat([self.best[1], clusters], -1)
            order = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., : self.k]
            self.best = logits.gather(-1, order), clusters.gather(-1, order)
            self.seen += l.shape[-1]
        return m, torch.exp(l - m)

    def add(self, m: Tensor, w: Tensor, S: Tensor) -> None:
        """Merges a piece: its m and w, and S = sum w v of the values v (..., n)."""
        Z, Z2 = w.sum(-1, keepdim=True), (w.detach() ** 2).sum(-1, keepdim=True)
        if self.m is None:
            self.m, self.Z, self.Z2, self.S = m, Z, Z2, S
            return
        top = torch.maximum(self.m, m)
        a, b = torch.exp(self.m - top), torch.exp(m - top)
        self.m, self.Z, self.S = top, a * self.Z + b * Z, a * self.S + b * S
        self.Z2 = a**2 * self.Z2 + b**2 * Z2

    def mean(self) -> Tensor:
        """The mean over all pieces."""
        return self.S / self.Z

    def leaders(self) -> Leaders:
        """What leads in all pieces."""
        assert self.m is not None
        Z = self.Z.detach()
        effective = (Z**2 / self.Z2)[..., 0]
        if self.best is None:
            none = Z[..., :0]
            return Leaders(none, none.long(), effective)
        l, clusters = self.best
        return Leaders(torch.exp(l - self.m) / Z, clusters, effective)


class Mixture:
    """Clusters as a source of `ideal`, `ls` and `els` instead of images; see `compress`.

    `build` accepts it instead of a corpus. It has no images that could be held out, and no classes.

    Attributes:
        whole: Clusters of images.
        patches: For each side P, clusters of P x P patches at all positions, which `els` needs.
        name: Its name in messages and records.
        shape: (C, H, W) of the images.
        key: A hash of its content, as hexadecimal digits.
    """

    has_images = False
    scale = 1.0

    def __init__(
        self, whole: Clusters, patches: Mapping[int, Clusters] | None = None, name: str = "mixture"
    ) -> None:
        self.whole, self.patches = whole, dict(sorted((patches or {}).items()))
        self.name, self.shape = name, whole.shape
        digest = hashlib.sha256()
        for c in (whole, *self.patches.values()):
            for tensor in (c.weights, c.means, c.V, c.d):
                digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        self.key = digest.hexdigest()[:32]

    def __len__(self) -> int:
        """The number of clusters of images."""
        return len(self.whole)

    def __repr__(self) -> str:
        C, H, W = self.shape
        return f"Mixture({self.name!r}, {len(self)} clusters, {C} x {H} x {W})"

    def indices(self, label: int | str | None = None) -> np.ndarray:
        """The positions of all clusters, int64: a mixture has no classes.

        Raises:
            ValueError: For a label.
        """
        if label is not None:
            raise ValueError(
                f"the mixture {self.name!r} has no classes, so none is {label!r}: leave the label "
                "out, or compress the images of that class"
            )
        return np.arange(len(self))

    def prepare(self, collection: Collection, index: np.ndarray) -> None:
        """Does nothing: clusters need no preparation."""

    def fold(self, request: FoldRequest) -> Evidence:
        """The posterior mean; see `Source`."""
        return Evidence(self.posterior(request.y, request.sigma, request.collection), None)

    def shares(self, request: FoldRequest) -> Shares:
        """The posterior mean, and the clusters that every pixel of it comes from."""
        y, sigma, c, k = request.y, request.sigma, request.collection, request.leaders
        groups = [(sigma == level).nonzero()[:, 0] for level in sigma.unique()]
        parts = [self._shares(y[some], float(sigma[some[0]]), c, k) for some in groups]
        return Shares.batch(groups, parts)

    def _shares(self, y: Tensor, sigma: float, c: Collection, k: int) -> Shares:
        D, found = self._way(c)(y, sigma, c, k)
        B, _, H, W = y.shape
        if c.whole:
            found = found.map(lambda x: x[:, None, None].expand(B, H, W, -1))
        pixel = torch.arange(H * W).reshape(H, W, 1)
        places = (found.clusters * (H * W) + pixel).permute(0, 3, 1, 2)
        weights = found.weights.permute(0, 3, 1, 2)[:, :, None]
        zero = torch.zeros(B, H, W, dtype=torch.float64)
        return Shares(D, *leading(weights, places, k), found.effective, zero, zero)

    def moments(self, index: np.ndarray, low_rank: bool = False) -> Moments:
        """A ValueError: machines that need the images' covariance need images."""
        raise ValueError("a mixture has no covariance of images here: use the images")

    def under_process(self, process: Process, t: float) -> Source:
        """A ValueError: mixtures support ordinary diffusion only."""
        raise ValueError("a mixture supports no other forward process: use the images")

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors; `Mixture.load` reads it."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        shapes = {"name": self.name}
        for side, c in ((0, self.whole), *self.patches.items()):
            shapes[str(side)] = ",".join(map(str, c.shape))
            tensors |= {f"{side}.{what}": each.contiguous() for what, each in c.stored().items()}
        with written(path) as temporary:
            save_file(tensors, temporary, metadata=shapes)

    @classmethod
    def load(cls, path: str | Path) -> Mixture:
        """Reads a mixture that `save` wrote.

        Raises:
            ValueError: For a file that is not a mixture.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                shapes = dict(file.metadata() or {})
                name = shapes.pop("name")
                found = {int(side): _stored(file, side, shape) for side, shape in shapes.items()}
            return cls(found.pop(0), found, name)
        except FileNotFoundError:
            raise ValueError(
                f"there is no {path}; expected a mixture, as compress writes"
            ) from None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} holds no mixture ({error}); expected one that compress wrote"
            ) from None

    @property
    def nbytes(self) -> int:
        """Its size on disk, covariances included."""
        return self.whole.nbytes + sum(c.nbytes for c in self.patches.values())

    def posterior(self, y: Tensor, sigma: Tensor, collection: Collection) -> Tensor:
        """D of pictures y float64 (B, C, H, W) under a machine's row.

        Raises:
            ValueError: For rows other than those of `ideal`, `ls` and `els` with plain boxes, and
                for patch sizes without clusters.
        """
        way = self._way(collection)
        # quantities that depend only on the noise level are computed once for each level
        groups = [(sigma == level).nonzero()[:, 0] for level in sigma.unique()]
        parts = [way(y[some], float(sigma[some[0]]), collection)[0] for some in groups]
        return regrouped(groups, parts)

    def _way(self, c: Collection) -> Callable[..., tuple[Tensor, Leaders]]:
        """How the posterior mean of a machine's row is computed."""
        plain = isinstance(c.window, Box) and len(c.variants) == 1 and c.reach == 0
        if c.whole and c.source == "same":
            return self._images
        if plain and c.response == "pixel" and c.source == "same":
            return self._windows
        if plain and c.response == "pixel" and c.source == "every":
            return self._everywhere
        raise ValueError(
            "a mixture is the source of ideal, and of ls and els with plain boxes: use one of "
            "them, or the images"
        )

    def _images(self, y: Tensor, sigma: float, c: Collection, k: int = 0) -> tuple[Tensor, Leaders]:
        """Pictures compared with whole clusters; leaders (B, k)."""
        D, found = self.whole.posterior(y.flatten(1), sigma, k)
        return D.reshape(y.shape), found

    def _windows(
        self, y: Tensor, sigma: float, c: Collection, k: int = 0
    ) -> tuple[Tensor, Leaders]:
        """Every pixel's box compared with the same box of every cluster; leaders (B, H, W, k)."""
        C, H, W = y.shape[1:]
        r = self.whole.rank
        # the rank is above the dimension of a box, or all pixels at once exceed the workspace
        if r > C * math.prod(c.window.shape) or H * W * r * r > ROOM:
            return self._dense(y, sigma, c, k)
        shared = C * (r + 3) + r * r  # values per cluster and pixel; a picture adds C + r
        pieces = y.split(max(1, shared // (3 * (C + r))))
        folds = [_Merged(k) for _ in pieces]
        for some in self.whole.tiles(H * W * shared):
            K = len(some)
            v = some.variances(sigma).expand(K, C * H * W).reshape(K, C, H, W)
            mu = some.means.double().reshape(K, C, H, W)
            logdet = c.window_sum(torch.log(v).sum(1))
            if r:
                V = some.V.double().reshape(K, C, H, W, r).permute(0, 4, 1, 2, 3)  # (K, r, C, H, W)
                VS = V / v[:, None]
                M = torch.einsum("kichw,kjchw->kijhw", V, VS).reshape(-1, H, W)
                M = torch.cat([c.window_sum(maps) for maps in M.split(max(1, ROOM // (4 * H * W)))])
                M = M.reshape(K, r, r, H, W).permute(0, 3, 4, 1, 2)
                L = torch.linalg.cholesky(M + torch.eye(r, dtype=torch.float64))
                del M
                logdet = logdet + 2 * torch.log(torch.diagonal(L, dim1=3, dim2=4)).sum(3)
            for piece, fold in zip(pieces, folds, strict=True):
                B = len(piece)
                delta = piece[:, None] - mu  # (B, K, C, H, W)
                pulled = delta / v
                square = c.window_sum((delta * pulled).sum(2).flatten(0, 1)).reshape(B, K, H, W)
                if r:
                    a = torch.einsum("krchw,bkchw->bkrhw", V, pulled).flatten(0, 2)
                    a = (
                        c.window_sum(a).reshape(B, K, r, H, W).permute(1, 3, 4, 2, 0)
                    )  # (K, H, W, r, B)
                    u = torch.cholesky_solve(a, L)
                    square = square - (a * u).sum(3).permute(3, 0, 1, 2)
                    pulled = pulled - torch.einsum("krchw,khwrb->bkchw", VS, u)
                l = torch.log(some.weights)[:, None, None] - 0.5 * (square + logdet)
                m, w = fold.weigh(l.permute(0, 2, 3, 1))
                fold.add(m, w, torch.einsum("bhwk,bkchw->bhwc", w, pulled))
        D = y - sigma**2 * torch.cat([fold.mean() for fold in folds]).permute(0, 3, 1, 2)
        return D, Leaders.batch([fold.leaders() for fold in folds])

    def _dense(self, y: Tensor, sigma: float, c: Collection, k: int) -> tuple[Tensor, Leaders]:
        """The same as `_windows`, box by box."""
        H, W = y.shape[2:]
        P, Q = c.window.shape
        pixels, leaders = [], []
        for i in range(H):
            down = slice(max(0, i - P // 2), i + P // 2 + 1)
            for j in range(W):
                across = slice(max(0, j - Q // 2), j + Q // 2 + 1)
                part = self.whole.part(down, across)
                q = y[:, :, down, across]
                D, found = part.reduced().posterior(q.flatten(1), sigma, k)
                pixels.append(D.reshape(q.shape)[:, :, i - down.start, j - across.start])
                leaders.append(found)
        at = Leaders(*(torch.stack(x, 1).unflatten(1, (H, W)) for x in zip(*leaders, strict=True)))
        return torch.stack(pixels, 2).reshape(y.shape), at

    def _everywhere(
        self, y: Tensor, sigma: float, c: Collection, k: int = 0
    ) -> tuple[Tensor, Leaders]:
        """Every pixel's box compared with clusters of patches; truncated boxes with marginals."""
        P = c.window.shape[0]
        if P not in self.patches:
            raise ValueError(
                f"this mixture has no clusters of {P} x {P} patches; there are sides "
                f"{', '.join(map(str, self.patches)) or 'none'}: compress with patch_size={P}"
            )
        clusters, (B, C) = self.patches[P], y.shape[:2]
        y = wrap(y, c) if c.wraps else y
        D = y.new_empty(B, C, *c.grid)
        K = min(k, len(clusters))
        numbers = y.new_empty(B, *c.grid, K, dtype=torch.int64)
        at = Leaders(y.new_empty(B, *c.grid, K), numbers, y.new_empty(B, *c.grid))
        together = max(1, ROOM // (C * P * P * math.prod(c.grid)))  # pictures
        for of in classes(c):
            h, w = of.patches.size
            a, b = of.middle
            n, m = of.shape
            # the part of a patch that remains in a truncated box with its middle at (a, b)
            rows, columns = (slice(P // 2 - at, P // 2 - at + n) for at, n in ((a, h), (b, w)))
            part = clusters.part(rows, columns)
            for first in range(0, B, together):
                some = slice(first, first + together)
                windows = y[some, :, of.seen[0], of.seen[1]]
                windows = windows.unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5)
                found, led = part.posterior(windows.reshape(-1, C * h * w), sigma, k)
                found = found.reshape(-1, n, m, C, h, w)[..., a, b]
                D[some, :, of.rows, of.columns] = found.permute(0, 3, 1, 2)
                for whole, piece in zip(at, led, strict=True):
                    whole[some, of.rows, of.columns] = piece.unflatten(0, (-1, n, m))
        return D, at


def _stored(file: Any, side: str, shape: str) -> Clusters:
    """Clusters from a file."""
    weights, means, V, d = (
        file.get_tensor(f"{side}.{what}") for what in ("weights", "means", "V", "d")
    )
    if means.dtype == torch.uint8:
        means = means.float() / 127.5 - 1
    C, h, w = map(int, shape.split(","))
    total = weights.double().sum()
    return Clusters(weights.double() / total, means, V.float(), d.float(), (C, h, w))


def gray_levels(x: Tensor) -> Tensor:
    """The nearest gray levels, whole numbers from 0 to 255, of x in [-1, 1]."""
    return torch.round((x + 1) * 127.5)
