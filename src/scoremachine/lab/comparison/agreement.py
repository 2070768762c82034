"""Measures of agreement between two pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # resamples of a bootstrap


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of pictures b with pictures a, (n, C, H, W), one by one, over all their values.

        mse     mean (a - b)^2
        cosine  a.b / |a| |b|
        r       Pearson's correlation of a and b
        r2      its square, which published codes report; invariant to scale and offset of b
        R2      coefficient of determination, 1 - sum (a - b)^2 / sum (a - mean a)^2

    A constant picture has no correlation: r, r2 and R2 are NaN, or 1 if b equals a.
    """
    a, b = (np.asarray(v, dtype=np.float64).reshape(len(v), -1) for v in (a, b))
    mse = ((a - b) ** 2).mean(1)
    flat = (np.ptp(a, axis=1) == 0) | (np.ptp(b, axis=1) == 0)
    around, other = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
        r = (around * other).sum(1) / np.sqrt((around**2).sum(1) * (other**2).sum(1))
        r_squared = 1 - mse * a.shape[1] / (around**2).sum(1)
    r = np.where(flat, np.nan, r)
    r_squared = np.where(np.ptp(a, axis=1) == 0, np.nan, r_squared)
    equal = mse == 0
    r, r_squared, cosine = (np.where(equal, 1.0, v) for v in (r, r_squared, cosine))
    return {"mse": mse, "cosine": cosine, "r": r, "r2": r**2, "R2": r_squared}


@dataclass
class Summary:
    """Summary of values of some pictures: median, quartiles, a 95% interval of the median."""

    median: float
    low: float  # quartile
    high: float
    interval: tuple[float, float]
    count: int

    @classmethod
    def of(cls, values: np.ndarray) -> Summary:
        """From values; those that are not finite are left out, and not counted."""
        known = np.asarray(values, dtype=np.float64)
        known = known[np.isfinite(known)]
        if len(known) == 0:
            return cls(np.nan, np.nan, np.nan, (np.nan, np.nan), 0)
        low, median, high = np.quantile(known, [0.25, 0.5, 0.75])
        interval = (float(known[0]), float(known[0]))
        if len(known) > 1 and np.ptp(known) > 0:
            from scipy.stats import bootstrap  # takes half a second to import

            found = bootstrap(
                (known,), np.median, n_resamples=DRAWS, method="percentile", rng=0
            ).confidence_interval
            interval = float(found.low), float(found.high)
        return cls(float(median), float(low), float(high), interval, len(known))
