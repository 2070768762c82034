"""Pictures in [-1, 1] as whole gray levels."""

from __future__ import annotations

import numpy as np


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as uint8, values outside clipped."""
    return np.rint(np.clip((np.asarray(x, dtype=np.float64) + 1) * 127.5, 0, 255)).astype(np.uint8)
