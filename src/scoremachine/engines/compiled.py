"""Constants and helpers of all compiled code."""

from __future__ import annotations

from numba import njit

NOTHING = -1e300  # the logit where there is no source


FLAGS = {"contract", "reassoc", "nsz", "arcp"}


@njit(fastmath=FLAGS)
def keep(logit, place, logits, places, i, j):
    """Inserts (logit, place) into the k best of site (i, j), which are in descending order."""
    k = logits.shape[0] - 1
    while k > 0 and logits[k - 1, i, j] < logit:
        logits[k, i, j] = logits[k - 1, i, j]
        places[k, i, j] = places[k - 1, i, j]
        k -= 1
    logits[k, i, j] = logit
    places[k, i, j] = place
