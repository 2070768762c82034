"""Compression of a corpus to a mixture of a few Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scoremachine.data.corpus import Corpus
from scoremachine.data.moments import moments_of, within_reach
from scoremachine.runtime.progress import bar
from scoremachine.runtime.validation import check_integer, check_seed
from scoremachine.sources.mixture import Clusters, Mixture, gray_levels

RANKS = (0, 2, 4, 8, 16, 32, 64, 128, 256)  # ranks that are tried for a budget


LEADING = 64  # principal components in which clusters are found


DISTANCES = 10**10  # approximate number of distances that k-means computes, in at least 3 rounds


PATCHES = 200_000  # the most patches that clusters are fitted to


PRIOR = 1.0  # weight of the average diagonal in that of each cluster, as a number of images


JUDGED = (0.2, 0.5, 1.0, 2.0, 5.0)  # noise levels at which ways to use a budget are compared


BOXES = (3, 7, 15)  # sides of boxes on which they are compared as well, for ls


SEEN = 1e-6  # smaller squared errors are set to this, the square of about a tenth of a gray level


def compress(
    corpus: Corpus,
    size: int | str,
    patch_size: int | Sequence[int] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Mixture:
    """Compresses a corpus to a few Gaussians, on which `ideal`, `ls` and `els` run.

    The clusters are found by k-means (scikit-learn's, in the 64 leading principal components).
    Their covariances are low-rank plus diagonal. A single cluster keeps its full covariance (where
    `gaussian` can), and as many clusters as images have no covariance.

    Arguments:
        corpus: The images.
        size: The number of clusters; or a budget, covariances included: a share of the images'
            bytes ("1%") or bytes ("500kB", "10MB").
        patch_size: One or several sides P for additional clusters of the patches at all positions,
            which `els` needs (`size` clusters for each side; a budget is divided equally).
        rank: Of the low-rank part; None: the one that denoises held-out images best, with the same
            number of bytes.
        seed: Of k-means, and of the choice of its patches (200,000 at most).

    Raises:
        ValueError: For a size of less than one cluster, more clusters than images, or invalid
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
            'more clusters than images: for a budget say "1%" or "10MB"'
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
    """P x P patches at all positions, or a sample of `PATCHES` of them, uint8 (n, C, P, P)."""
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
    """Clusters of images uint8 (N, C, h, w): K of them, or as many as a budget allows.

    Ranks and numbers of clusters are compared on whole images and on boxes of these sides.
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
    """The least budget for a corpus and patches of these sides: one cluster of each."""
    C = corpus.shape[0]
    largest = max([math.prod(corpus.shape), *(C * P * P for P in patch_size or ())])
    return _bytes(1, largest, 0) * (1 + len(patch_size or ()))


def _fitting(N: int, D: int, K: int) -> int:
    """The rank for K clusters: about the square root of a cluster's images; full for K = 1."""
    if K == N:
        return 0
    if K == 1 and within_reach(N, D):
        return min(D, N - 1)
    return min(64, max(1, round(math.sqrt(N / K))) - 1)


def _filling(budget: float, N: int, D: int, K: int, rank: int) -> int:
    """The largest rank that K clusters can have within a budget; at least `rank`."""
    affordable = int((budget / K - D - 4) // (2 * D)) - 1
    return max(rank, min(affordable, N // K - 1, max(RANKS), D - 1))


def _bytes(K: int, D: int, rank: int) -> int:
    """The approximate bytes of K clusters: means as bytes, half-precision covariances, weights."""
    return K * (D + 2 * D * (rank + 1) + 4)


def _best(
    images: np.ndarray, ways: list[tuple[int, int]], seed: int, sides: Sequence[int]
) -> Clusters:
    """The clusters, of several (rank, number) pairs, that denoise held-out images best.

    Errors are measured on whole images, as for `ideal`, and on central boxes of these sides, as for
    `ls`.
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
    z = _leading(others, seed)  # components for k-means, shared by all pairs
    for r, k in ways:
        c = _of_rank(others, min(k, len(others)), r, seed, z)
        errors = []
        for rows, columns in boxes:
            part = c.part(rows, columns).reduced()
            clean, e = (each[:, :, rows, columns].flatten(1) for each in (x, eps))
            found = [((part.mean(clean + s * e, s) - clean) ** 2).mean() for s in JUDGED]
            errors += [error.clamp(min=SEEN).log() for error in found]
        losses.append(float(torch.stack(errors).mean()))
    r, k = ways[int(np.argmin(losses))]
    return _of_rank(images, k, r, seed)


def _leading(images: np.ndarray, seed: int) -> np.ndarray:
    """The leading principal components of images, for k-means, float32 (N, at most 64)."""
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
    """K clusters with covariances of low rank plus diagonal; z is `_leading` of the images."""
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
        means[k] = gray_levels(mine.mean(0)) / 127.5 - 1
        rest = mine - means[k]
        r = min(rank, len(members) - 1)
        if r > 0:
            _, s, components = randomized_svd(rest.numpy(), r, random_state=seed)
            V[k, :, :r] = torch.from_numpy(components.T * (s / math.sqrt(len(members))))
        d[k] = ((rest**2).mean(0) - (V[k] ** 2).sum(1)).clamp(min=0)
    n = torch.from_numpy(counts).float()[:, None]
    # shrink the diagonal of small clusters towards the average one
    d = (n * d + PRIOR * (n * d).sum(0) / N) / (n + PRIOR)
    weights = torch.from_numpy(counts / N)
    V, d = V.half().float(), d.half().float()
    return Clusters(weights, means, V, d, shape)


def _even(K: int) -> Tensor:
    return torch.full((K,), 1 / K, dtype=torch.float64)
