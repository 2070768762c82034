"""The queries of a search: windows of a picture and their embeddings."""

from __future__ import annotations

import numpy as np

from scoremachine.core.collection import Class
from scoremachine.core.posterior import ScanRequest
from scoremachine.engines import simd
from scoremachine.engines.search.distances import Queries
from scoremachine.engines.search.embedding import ROUNDING, Embedding
from scoremachine.engines.search.index import Index

DEVIATIONS = 0.75  # standard deviations of the noise in a statistical bound, per group


def queries(
    request: ScanRequest, opened: Index, of: Class, kind: str
) -> tuple[Queries, np.ndarray]:
    """The windows of a picture at the sites of a class; and minus the mean, float64 (Q, D)."""
    (h, w), y = of.patches.size, request.y[0].numpy()
    C = len(y)
    y = y[:, of.seen[0], of.seen[1]].transpose(1, 2, 0)
    windows = np.lib.stride_tricks.sliding_window_view(y, (h, w), (0, 1)).transpose(0, 1, 3, 4, 2)
    windows = windows.reshape(-1, h, w * C)
    row = -(-w * C // simd.LANES) * simd.LANES
    filled = np.zeros((len(windows), h, row))
    filled[..., : w * C] = windows
    mask = (np.arange(row) < w * C).astype(np.float64)
    e, sigma = opened.embedding, float(request.sigma[0])
    centred = np.ascontiguousarray(windows.reshape(len(windows), -1) - e.mean)
    half = np.full(len(windows), 1 / (2 * sigma**2))
    E, squares = e(centred)
    fuzz = (ROUNDING * (np.sqrt(squares) + opened.furthest) + 1e-9).astype(np.float32)
    tails = np.zeros((len(windows), 2), np.float32)
    if kind == "statistical":
        tails = _expected(E, e, sigma)
    return Queries(E.reshape(-1), filled.reshape(-1), mask, half, fuzz, tails, False), centred


def _expected(E: np.ndarray, e: Embedding, sigma: float) -> np.ndarray:
    """Replaces norms of the queries by estimates of what a patch may have in common with them.

    In a group g of components that is summarized by its norm, this is not all of |q_g|, but the
    content that q_g seems to have besides noise, plus some standard deviations of the noise.
    Returns what the rest adds to squared distances, float32 (Q, 2): see `Queries.tails`.
    """
    sizes = np.zeros(e.first - e.leading)  # 0 in the padding
    sizes[: len(e.edges) - 1] = np.diff(e.edges)
    if e.kept > e.leading:
        sizes[-1] = e.kept - e.leading
    own = E[:, e.leading : e.first].astype(np.float64)
    content = np.sqrt(np.maximum(own**2 - sigma**2 * sizes, 0))
    common = np.minimum(own, content + DEVIATIONS * sigma)
    E[:, e.leading : e.first] = common
    rest = (own**2 - common**2) * (1 - ROUNDING)
    return np.stack([rest.sum(1), rest[:, : len(e.edges) - 1].sum(1)], 1).astype(np.float32)
