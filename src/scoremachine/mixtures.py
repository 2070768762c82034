"""Mixtures: a few Gaussians in place of many images, or of all their patches.

A cluster of images is a weight, a mean, and the covariance of what is left, low-rank plus diagonal:

    p(x) = sum_k pi_k N(x; mu_k, V_k V_k^T + diag(d_k))

Under it E[x | y] is exact: with v = d + sigma^2, delta = y - mu and M = I + V^T diag(1 / v) V,

    E[x | y, k] = y - sigma^2 (delta - V M^-1 V^T (delta / v)) / v

and the weights of the clusters are those of N(y; mu_k, V_k V_k^T + diag(v_k)), by the Woodbury
identity. One cluster with its full covariance is the Gaussian machine; as many clusters as images,
each without any, are the ideal one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoremachine.corpus import Corpus
from scoremachine.files import written
from scoremachine.moments import moments_of, within_reach
from scoremachine.posterior import wrap
from scoremachine.progress import bar
from scoremachine.schedules import check_integer, check_seed
from scoremachine.windows import Box, Collection, classes

RANKS = (0, 2, 4, 8, 16, 32, 64, 128, 256)  # that a budget is shared out for
LEADING = 64  # components that clusters are found in
DISTANCES = 10**10  # that k-means measures, about, but never in fewer than 3 rounds
PATCHES = 200_000  # patches, at most, that clusters are made of
ROOM = 2**26  # numbers in memory at once
PRIOR = 1.0  # images that a cluster's diagonal counts the average one for
JUDGED = (0.2, 0.5, 1.0, 2.0, 5.0)  # noise levels at which ways to spend a budget are compared
BOXES = (3, 7, 15)  # sides of boxes that those of images are compared on too, as ls sees them
SEEN = 1e-6  # squared errors below this, a tenth of a gray level's, count as this


@dataclass(frozen=True, eq=False)
class Clusters:
    """K Gaussians of vectors of D numbers, which are pictures (C, h, w).

    Attributes:
        weights: pi, float64 (K,), adding up to 1.
        means: mu, float32 (K, D).
        V: float32 (K, D, r).
        d: float32 (K, D), or (K, 0) where there is none.
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
        """What is written: whole gray levels as bytes, what half precision holds in that."""
        gray = _gray(self.means)
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
        """What they take on disk."""
        return sum(tensor.nbytes for tensor in self.stored().values())

    def tiles(self, numbers: int) -> Iterator[Clusters]:
        """The clusters in pieces of about `ROOM` numbers, of which each takes so many."""
        step = max(1, ROOM // max(1, numbers))
        for k in range(0, len(self), step):
            some = slice(k, k + step)
            yield replace(
                self, weights=self.weights[some], means=self.means[some], V=self.V[some],
                d=self.d[some],
            )  # fmt: skip

    def part(self, rows: slice, columns: slice) -> Clusters:
        """The clusters of a part of each picture: their marginals."""
        K, (C, h, w), r = len(self), self.shape, self.rank
        means = self.means.reshape(K, C, h, w)[:, :, rows, columns]
        V = self.V.reshape(K, C, h, w, r)[:, :, rows, columns]
        d = self.d.reshape(K, C, h, w)[:, :, rows, columns] if self.d.shape[1] else self.d
        shape = (C, *means.shape[2:])
        return Clusters(self.weights, means.flatten(1), V.flatten(1, 3), d.flatten(1), shape)

    def reduced(self) -> Clusters:
        """The same with V of at most D columns: a square root of V V^T."""
        if self.rank <= self.V.shape[1]:
            return self
        V = self.V.double()
        values, vectors = torch.linalg.eigh(V @ V.transpose(1, 2))
        V = vectors * torch.sqrt(values.clamp(min=0))[:, None]
        return replace(self, V=V.float())

    def variances(self, sigma: float) -> Tensor:
        """v = d + sigma^2, float64 (K, D), or (K, 1) where there is no diagonal."""
        d = self.d.double() if self.d.shape[1] else torch.zeros(len(self), 1, dtype=torch.float64)
        return d + sigma**2

    def mean(self, q: Tensor, sigma: float) -> Tensor:
        """E[x | q] of vectors q = x + sigma eps, float64 (Q, D), differentiable."""
        D, r = q.shape[1], self.rank
        pieces = q.split(max(1, ROOM // D))
        folds = [_Merged() for _ in pieces]
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
        return q - sigma**2 * torch.cat([fold.mean() for fold in folds])


class _Merged:
    """Softmax means over clusters that come in pieces: the fold of `posterior`, for tensors."""

    def __init__(self) -> None:
        self.m: Tensor | None = None
        self.Z: Tensor
        self.S: Tensor

    def weigh(self, l: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of logits (..., K), and e^(l - that)."""
        m = l.detach().max(-1, keepdim=True).values
        return m, torch.exp(l - m)

    def add(self, m: Tensor, w: Tensor, S: Tensor) -> None:
        """A piece: its m and w, and S = sum w times whatever is averaged (..., n)."""
        Z = w.sum(-1, keepdim=True)
        if self.m is None:
            self.m, self.Z, self.S = m, Z, S
            return
        top = torch.maximum(self.m, m)
        a, b = torch.exp(self.m - top), torch.exp(m - top)
        self.m, self.Z, self.S = top, a * self.Z + b * Z, a * self.S + b * S

    def mean(self) -> Tensor:
        """The mean over all pieces."""
        return self.S / self.Z


class Mixture(Corpus):
    """Clusters in place of images, on which `ideal`, `ls` and `els` run; see `compress`.

    As a corpus its images are the clusters' means, rounded.

    Attributes:
        whole: Clusters of images.
        patches: By side P, clusters of P x P patches from every position; those `els` needs.
    """

    def __init__(
        self, whole: Clusters, patches: Mapping[int, Clusters] | None = None, name: str = "mixture"
    ) -> None:
        gray = _gray(whole.means).clamp(0, 255).byte().numpy()
        super().__init__(gray.reshape(-1, *whole.shape), name=name)
        self.whole, self.patches = whole, dict(sorted((patches or {}).items()))
        digest = hashlib.sha256()
        for c in (whole, *self.patches.values()):
            for tensor in (c.weights, c.means, c.V, c.d):
                digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        self._key = digest.hexdigest()[:32]

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
            ValueError: For a file that holds none.
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
        """What it takes on disk, covariances included."""
        return self.whole.nbytes + sum(c.nbytes for c in self.patches.values())

    def posterior(self, y: Tensor, sigma: Tensor, collection: Collection) -> Tensor:
        """D of pictures y float64 (B, C, H, W) under a machine's row.

        Raises:
            ValueError: For rows that are none of `ideal`, `ls` and `els` with plain boxes, and
                patches of a size that there are no clusters of.
        """
        c = collection
        plain = isinstance(c.window, Box) and len(c.variants) == 1 and c.reach == 0
        if c.whole and c.source == "same":
            way = self._images
        elif plain and c.response == "pixel" and c.source == "same":
            way = self._windows
        elif plain and c.response == "pixel" and c.source == "every":
            way = self._everywhere
        else:
            raise ValueError(
                "a mixture is the source of ideal, and of ls and els with plain boxes: use one of "
                "them, or the images"
            )
        D = torch.empty_like(y)
        for level in sigma.unique():  # what is the same for all pictures of one is made once
            some = sigma == level
            D[some] = way(y[some], float(level), c)
        return D

    def _images(self, y: Tensor, sigma: float, c: Collection) -> Tensor:
        """Pictures against whole clusters."""
        return self.whole.mean(y.flatten(1), sigma).reshape(y.shape)

    def _windows(self, y: Tensor, sigma: float, c: Collection) -> Tensor:
        """Every pixel's box against the same box of every cluster."""
        C, H, W = y.shape[1:]
        r = self.whole.rank
        # more than a box's own covariance has rows, or than fits for every pixel at once
        if r > C * math.prod(c.window.shape) or H * W * r * r > ROOM:
            return self._dense(y, sigma, c)
        shared = C * (r + 3) + r * r  # numbers of a cluster and pixel; a picture's are C + r
        pieces = y.split(max(1, shared // (3 * (C + r))))
        folds = [_Merged() for _ in pieces]
        for some in self.whole.tiles(H * W * shared):
            K = len(some)
            v = some.variances(sigma).expand(K, C * H * W).reshape(K, C, H, W)
            mu = some.means.double().reshape(K, C, H, W)
            logdet = c.look(torch.log(v).sum(1))
            if r:
                V = some.V.double().reshape(K, C, H, W, r).permute(0, 4, 1, 2, 3)  # (K, r, C, H, W)
                VS = V / v[:, None]
                M = torch.einsum("kichw,kjchw->kijhw", V, VS).reshape(-1, H, W)
                M = torch.cat([c.look(maps) for maps in M.split(max(1, ROOM // (4 * H * W)))])
                M = M.reshape(K, r, r, H, W).permute(0, 3, 4, 1, 2)
                L = torch.linalg.cholesky(M + torch.eye(r, dtype=torch.float64))
                del M
                logdet = logdet + 2 * torch.log(torch.diagonal(L, dim1=3, dim2=4)).sum(3)
            for piece, fold in zip(pieces, folds, strict=True):
                B = len(piece)
                delta = piece[:, None] - mu  # (B, K, C, H, W)
                pulled = delta / v
                square = c.look((delta * pulled).sum(2).flatten(0, 1)).reshape(B, K, H, W)
                if r:
                    a = torch.einsum("krchw,bkchw->bkrhw", V, pulled).flatten(0, 2)
                    a = c.look(a).reshape(B, K, r, H, W).permute(1, 3, 4, 2, 0)  # (K, H, W, r, B)
                    u = torch.cholesky_solve(a, L)
                    square = square - (a * u).sum(3).permute(3, 0, 1, 2)
                    pulled = pulled - torch.einsum("krchw,khwrb->bkchw", VS, u)
                l = torch.log(some.weights)[:, None, None] - 0.5 * (square + logdet)
                m, w = fold.weigh(l.permute(0, 2, 3, 1))
                fold.add(m, w, torch.einsum("bhwk,bkchw->bhwc", w, pulled))
        return y - sigma**2 * torch.cat([fold.mean() for fold in folds]).permute(0, 3, 1, 2)

    def _dense(self, y: Tensor, sigma: float, c: Collection) -> Tensor:
        """The same, box by box."""
        H, W = y.shape[2:]
        P, Q = c.window.shape
        pixels = []
        for i in range(H):
            down = slice(max(0, i - P // 2), i + P // 2 + 1)
            for j in range(W):
                across = slice(max(0, j - Q // 2), j + Q // 2 + 1)
                part = self.whole.part(down, across)
                q = y[:, :, down, across]
                D = part.reduced().mean(q.flatten(1), sigma).reshape(q.shape)
                pixels.append(D[:, :, i - down.start, j - across.start])
        return torch.stack(pixels, 2).reshape(y.shape)

    def _everywhere(self, y: Tensor, sigma: float, c: Collection) -> Tensor:
        """Every pixel's box against clusters of patches; a cut box against what is left of them."""
        P = c.window.shape[0]
        if P not in self.patches:
            raise ValueError(
                f"this mixture has no clusters of {P} x {P} patches; there are sides "
                f"{', '.join(map(str, self.patches)) or 'none'}: compress with patch_size={P}"
            )
        clusters, (B, C) = self.patches[P], y.shape[:2]
        y = wrap(y, c) if c.wraps else y
        D = torch.empty(B, C, *c.grid, dtype=torch.float64)
        together = max(1, ROOM // (C * P * P * math.prod(c.grid)))  # pictures
        for of in classes(c):
            h, w = of.patches.size
            a, b = of.middle
            n, m = of.shape
            # the part of a patch that a box keeps whose middle is at (a, b)
            rows, columns = (slice(P // 2 - at, P // 2 - at + n) for at, n in ((a, h), (b, w)))
            part = clusters.part(rows, columns)
            for first in range(0, B, together):
                some = slice(first, first + together)
                windows = y[some, :, of.seen[0], of.seen[1]]
                windows = windows.unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5)
                found = part.mean(windows.reshape(-1, C * h * w), sigma)
                found = found.reshape(-1, n, m, C, h, w)[..., a, b]
                D[some, :, of.rows, of.columns] = found.permute(0, 3, 1, 2)
        return D


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


def compress(
    corpus: Corpus,
    size: int | str,
    patch_size: int | Sequence[int] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Mixture:
    """A corpus as a few Gaussians, on which `ideal`, `ls` and `els` run.

    Clusters are k-means' (scikit-learn's, in the 64 leading components), with the covariance of
    what is left, low-rank plus diagonal; one cluster keeps all of it (where `gaussian` can), and as
    many clusters as images have none.

    Arguments:
        corpus: The images.
        size: How many clusters; or a budget, covariances included: a share of the images' bytes
            ("1%") or bytes ("500kB", "10MB").
        patch_size: Also clusters of patches of that side, or these, from every position, which
            `els` takes (as many; a budget is shared among all).
        rank: Of the low-rank part; None: what denoises held-out images best, of the same bytes.
        seed: Of k-means, and of which patches it sees (200,000 at most).

    Raises:
        ValueError: For a size of less than one cluster, more clusters than images, or senseless
            arguments.
    """
    check_seed(seed)
    if rank is not None and rank != 0:
        check_integer("rank", rank)
    sides = [patch_size] if isinstance(patch_size, int) else list(patch_size or ())
    for P in sides:
        if check_integer("patch_size", P) > min(corpus.shape[1:]) or P % 2 == 0:
            raise ValueError(
                f"patch_size is {P}; expected an odd side of at most {min(corpus.shape[1:])}"
            )
    K, budget = None, None
    if isinstance(size, str):
        budget = budget_of(size, corpus.images.nbytes) / (1 + len(sides))
    else:
        K = check_integer("size", size)
    if K is not None and len(corpus) < K:
        raise ValueError(
            f"size is {K:,} clusters, and {corpus.name!r} has {len(corpus):,} images; expected no "
            'more: for a budget say "1%" or "10MB"'
        )
    with bar("Compressing", total=1 + len(sides)) as progress:
        whole = _clustered(corpus.images, K, budget, rank, seed, BOXES)
        progress.advance()
        patches = {}
        for P in sides:
            patches[P] = _clustered(_patches(corpus, P, seed), K, budget, rank, seed, ())
            progress.advance()
    return Mixture(whole, patches, f"{corpus.name}, compressed to {size}")


def budget_of(size: str, whole: int) -> float:
    """Bytes from "1%" of `whole` bytes, "500kB" or "10MB"."""
    text = size.strip()
    units = {"%": whole / 100, "kB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
    unit = next((unit for unit in units if text.endswith(unit)), "")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        number = math.nan
    if not unit or not (math.isfinite(number) and number > 0):
        raise ValueError(
            f'size is {size!r}; expected a number of clusters, or a budget as "1%" or "10MB"'
        )
    return number * units[unit]


def _patches(corpus: Corpus, P: int, seed: int) -> np.ndarray:
    """P x P patches from every position, or `PATCHES` of them, uint8 (n, C, P, P)."""
    N, (_, H, W) = len(corpus), corpus.shape
    rows, columns = H - P + 1, W - P + 1
    at = np.arange(N * rows * columns)
    if len(at) > PATCHES:
        at = np.sort(np.random.default_rng(seed).choice(len(at), PATCHES, replace=False))
    n, i, j = np.unravel_index(at, (N, rows, columns))
    down, across = i[:, None, None] + np.arange(P)[:, None], j[:, None, None] + np.arange(P)
    return corpus.images[n[:, None, None], :, down, across].transpose(0, 3, 1, 2)


def _clustered(
    images: np.ndarray,
    K: int | None,
    budget: float | None,
    rank: int | None,
    seed: int,
    sides: Sequence[int],
) -> Clusters:
    """Clusters of images uint8 (N, C, h, w): K of them, or as many as a budget buys.

    Ways to spend it are compared on whole images and on boxes of these sides.
    """
    N, D = len(images), math.prod(images.shape[1:])
    if K is not None:
        return _of_rank(images, K, rank if rank is not None else _fitting(N, D, K), seed)
    assert budget is not None
    if budget >= N * D:
        return _of_rank(images, N, 0, seed)
    ways = []
    for r in [r for r in RANKS if r < D] if rank is None else [rank]:
        k = min(int(budget // _bytes(1, D, r)), N // 2)
        if k >= 1:
            ways.append((r if rank is not None else _filling(budget, N, D, k, r), k))
    full = min(D, N - 1)
    if rank is None and within_reach(N, D) and 4 * D * (full + 1) <= budget:  # single precision
        ways.append((full, 1))
    if not ways:
        raise ValueError(
            f"a cluster of {D:,} numbers takes {_bytes(1, D, 0):,} bytes, and there are "
            f"{budget:,.0f}: give it more"
        )
    if len(ways) == 1:
        return _of_rank(images, ways[0][1], ways[0][0], seed)
    return _best(images, ways, seed, sides)


def least_bytes(corpus: Corpus, patch_size: Sequence[int] | None = None) -> int:
    """The least budget for a corpus and patches of these sides: what one cluster of each takes."""
    C = corpus.shape[0]
    largest = max([math.prod(corpus.shape), *(C * P * P for P in patch_size or ())])
    return _bytes(1, largest, 0) * (1 + len(patch_size or ()))


def _fitting(N: int, D: int, K: int) -> int:
    """The rank of so many clusters: about the square root of a cluster's images; all for one."""
    if K == N:
        return 0
    if K == 1 and within_reach(N, D):
        return min(D, N - 1)
    return min(64, max(1, round(math.sqrt(N / K))) - 1)


def _filling(budget: float, N: int, D: int, K: int, rank: int) -> int:
    """The rank that K clusters can have of a budget that buys them this one at least."""
    bought = int((budget / K - D - 4) // (2 * D)) - 1
    return max(rank, min(bought, N // K - 1, max(RANKS), D - 1))


def _bytes(K: int, D: int, rank: int) -> int:
    """About what K clusters take: means in bytes, covariances in half precision, weights."""
    return K * (D + 2 * D * (rank + 1) + 4)


def _best(
    images: np.ndarray, ways: list[tuple[int, int]], seed: int, sides: Sequence[int]
) -> Clusters:
    """The way to spend a budget that denoises images best that are held out of it.

    Whole ones, as `ideal` does, and boxes of these sides in their middle, as `ls` does.
    """
    N, (_, h, w) = len(images), images.shape[1:]
    order = np.random.default_rng(seed).permutation(N)
    held, rest = order[: min(64, N // 8 + 1)], np.sort(order[min(64, N // 8 + 1) :])
    x = torch.from_numpy(images[held]).double() / 127.5 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    boxes = [(slice(0, h), slice(0, w))]
    for P in sides:
        if min(h, w) > P:
            boxes.append((slice((h - P) // 2, (h + P) // 2), slice((w - P) // 2, (w + P) // 2)))
    losses, others = [], images[rest]
    z = _leading(others, seed)  # in which all ways find their clusters
    for r, k in ways:
        c = _of_rank(others, min(k, len(others)), r, seed, z)
        errors = []
        for rows, columns in boxes:
            part = c.part(rows, columns).reduced()
            seen, e = (each[:, :, rows, columns].flatten(1) for each in (x, eps))
            found = [((part.mean(seen + s * e, s) - seen) ** 2).mean() for s in JUDGED]
            errors += [error.clamp(min=SEEN).log() for error in found]
        losses.append(float(torch.stack(errors).mean()))
    r, k = ways[int(np.argmin(losses))]
    return _of_rank(images, k, r, seed)


def _leading(images: np.ndarray, seed: int) -> np.ndarray:
    """Images in the components that their clusters are found in, float32 (N, at most 64)."""
    from sklearn.decomposition import PCA

    N, D = len(images), math.prod(images.shape[1:])
    x = torch.from_numpy(images.reshape(N, D)).float() / 127.5 - 1
    some = np.random.default_rng(seed).permutation(N)[:20_000]
    leading = PCA(min(LEADING, D, len(some)), svd_solver="randomized", random_state=seed)
    leading.fit(x[some].numpy())
    return np.concatenate([leading.transform(part.numpy()) for part in x.split(4096)])


def _of_rank(
    images: np.ndarray, K: int, rank: int, seed: int, z: np.ndarray | None = None
) -> Clusters:
    """K clusters with covariances of a rank and a diagonal; z is `_leading` of the images."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.utils.extmath import randomized_svd

    N, shape = len(images), images.shape[1:]
    D = math.prod(shape)
    rank = min(rank, D)
    x = torch.from_numpy(images.reshape(N, D)).float() / 127.5 - 1
    none = torch.zeros(K, 0)
    if K == N:
        return Clusters(_even(N), x, torch.zeros(N, D, 0), none, shape)
    if K == 1 and rank >= min(D, N - 1):
        g = moments_of(images, np.arange(N))
        V = (g.V * torch.sqrt(g.eigenvalues))[None].float()
        return Clusters(_even(1), g.mean[None].float(), V, none, shape)
    found = np.zeros(N, dtype=np.int64)
    if K > 1:
        z = _leading(images, seed) if z is None else z
        k_means = MiniBatchKMeans(
            K, n_init=1, random_state=seed, batch_size=max(4096, 2 * K),
            max_iter=int(np.clip(DISTANCES // (N * K), 3, 100)),
        )  # fmt: skip
        found = k_means.fit_predict(z)
    _, found, counts = np.unique(found, return_inverse=True, return_counts=True)
    K, order = len(counts), np.argsort(found, kind="stable")
    means, V, d = torch.empty(K, D), torch.zeros(K, D, rank), torch.empty(K, D)
    for k, members in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        mine = x[members]
        means[k] = _gray(mine.mean(0)) / 127.5 - 1
        rest = mine - means[k]
        r = min(rank, len(members) - 1)
        if r > 0:
            _, s, components = randomized_svd(rest.numpy(), r, random_state=seed)
            V[k, :, :r] = torch.from_numpy(components.T * (s / math.sqrt(len(members))))
        d[k] = ((rest**2).mean(0) - (V[k] ** 2).sum(1)).clamp(min=0)
    n = torch.from_numpy(counts).float()[:, None]
    # a diagonal of few images counts the average one as if it were of some more
    d = (n * d + PRIOR * (n * d).sum(0) / N) / (n + PRIOR)
    weights = torch.from_numpy(counts / N)
    V, d = V.half().float(), d.half().float()
    return Clusters(weights, means, V, d, shape)


def _gray(x: Tensor) -> Tensor:
    """The nearest whole gray levels, 0 to 255 of x in [-1, 1]."""
    return torch.round((x + 1) * 127.5)


def _even(K: int) -> Tensor:
    return torch.full((K,), 1 / K, dtype=torch.float64)
