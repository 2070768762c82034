"""Nearest vectors of different images, looked up in lists of vectors that lie near each other."""

from __future__ import annotations

import numpy as np

from scoremachine.engines.caching import njit
from scoremachine.engines.chunks import side_by_side

CHUNK = 4096  # queries of one piece of work


@njit(cache=True, nogil=True, fastmath=True)
def _search(queries, probes, starts, codes, owners, order, distances, found):
    """The nearest vector of each of the k nearest images, for the queries in `order`."""
    k, d = distances.shape[1], queries.shape[1]
    for q in order:
        for j in range(k):
            distances[q, j] = np.float32(np.inf)
            found[q, j] = -1
        for p in range(probes.shape[1]):
            cell = probes[q, p]
            for i in range(starts[cell], starts[cell + 1]):
                far = np.float32(0)
                for a in range(d):
                    by = queries[q, a] - codes[i, a]
                    far += by * by
                if far >= distances[q, k - 1]:
                    continue
                at = k - 1  # its place; an earlier one of the same image is dropped
                for j in range(k):
                    if found[q, j] >= 0 and owners[found[q, j]] == owners[i]:
                        at = j
                        break
                if far >= distances[q, at]:
                    continue
                while at > 0 and distances[q, at - 1] > far:
                    distances[q, at] = distances[q, at - 1]
                    found[q, at] = found[q, at - 1]
                    at -= 1
                distances[q, at] = far
                found[q, at] = i


def search(
    queries: np.ndarray,
    probes: np.ndarray,
    starts: np.ndarray,
    codes: np.ndarray,
    owners: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The vectors nearest to queries among those in some lists, one of each image.

    Arguments:
        queries: float32 (Q, d).
        probes: The lists that are looked through for each, int64 (Q, p).
        starts: Where each list begins among the vectors, int64 (lists + 1,).
        codes: The vectors, float32 (n, d).
        owners: The image that each is of, int32 (n,).
        k: How many images.

    Returns:
        Squared distances, rising, float32 (Q, k), infinite where there are fewer; and positions
        among the vectors, int64 (Q, k), -1 there.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    found = np.empty((len(queries), k), dtype=np.int64)

    # one after the other those that look through the same list first: it is then in the cache
    order = np.argsort(probes[:, 0], kind="stable")

    def some(first: int) -> None:
        mine = order[first : first + CHUNK]
        _search(queries, probes, starts, codes, owners, mine, distances, found)

    side_by_side(some, range(0, len(queries), CHUNK))
    return distances, found
