"""Pictures as whole gray levels."""

from __future__ import annotations

import numpy as np


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as uint8, values outside clipped."""
    return np.rint(np.clip((np.asarray(x, dtype=np.float64) + 1) * 127.5, 0, 255)).astype(np.uint8)


def with_channels(images: np.ndarray, C: int) -> np.ndarray:
    """Pictures uint8 (n, 1, 3 or 4, H, W) with C channels: gray, colour, or colour and opacity."""
    if images.shape[1] == C:
        return images
    if images.shape[1] == 1:
        return np.repeat(images, C, axis=1)
    if C == 1:
        weights = np.array([0.299, 0.587, 0.114])
        gray = np.tensordot(weights, images[:, :3].astype(np.float64), axes=(0, 1))
        return np.rint(gray).astype(np.uint8)[:, None]
    if images.shape[1] > C:
        return images[:, :C]
    return np.concatenate([images, np.full_like(images[:, :1], 255)], axis=1)
