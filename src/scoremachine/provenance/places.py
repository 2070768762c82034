"""Where the pixels of a grown picture come from in its photographs, and what is copied as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COPIED = 0.1  # difference of x in [-1, 1] up to which a pixel is its source: 13 of 255 levels
LARGE = 21**2  # pixels, beyond which a piece is called large


@dataclass(frozen=True)
class Piece:
    """A connected part of a picture that is a part of a photograph, as it is.

    Attributes:
        pixels: How many.
        box: Its rows and columns in the picture: (top, left, bottom, right).
        source: The photograph, and the row and column there of the box's first pixel.
    """

    pixels: int
    box: tuple[int, int, int, int]
    source: tuple[int, int, int]


def pieces(
    x: np.ndarray, origins: np.ndarray, photographs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Connected pixels that lie in a photograph as in the picture, and look the same there.

    Arguments:
        x: The picture, float32 (H, W, C).
        origins: The photograph, row and column of each pixel, int32 (H, W, 3); -1: none.
        photographs: float32 (h, w, C).

    Returns:
        The piece of each pixel, int64 (H, W), 0: none; and the number of pixels of each piece, the
        first being that of no piece.
    """
    from skimage.measure import label

    H, W = x.shape[:2]
    n, row, column = (origins[..., k].astype(np.int64) for k in range(3))
    same = n >= 0
    for k, photograph in enumerate(photographs):
        at = n == k
        difference = np.abs(x[at] - photograph[row[at], column[at]]).max(-1)
        same[at] = difference <= COPIED
    # one number for each place of a photograph relative to the picture
    across = W + max(photograph.shape[1] for photograph in photographs)
    down = H + max(photograph.shape[0] for photograph in photographs)
    moved = (n * down + row - np.arange(H)[:, None] + H) * across + column - np.arange(W) + W
    _, kind = np.unique(np.where(same, moved, -1), return_inverse=True)
    pieces = label(np.where(same, kind.reshape(H, W) + 1, 0), connectivity=1)
    return pieces, np.bincount(pieces.ravel())


def largest(pieces: np.ndarray, sizes: np.ndarray, origins: np.ndarray) -> Piece | None:
    """The largest piece; None where there is none."""
    if len(sizes) < 2:
        return None
    k = 1 + int(np.argmax(sizes[1:]))
    at = pieces == k
    rows, columns = np.flatnonzero(at.any(1)), np.flatnonzero(at.any(0))
    top, left = int(rows[0]), int(columns[0])
    i, j = int(rows[0]), int(np.flatnonzero(at[top])[0])
    n, row, column = (int(v) for v in origins[i, j])
    box = top, left, int(rows[-1]) + 1, int(columns[-1]) + 1
    return Piece(int(sizes[k]), box, (n, row, column - (j - left)))


def share_of_large(sizes: np.ndarray) -> float:
    """The share of a picture's pixels that lie in pieces of more than 21 x 21 pixels."""
    pieces = sizes[1:]
    return float(pieces[pieces > LARGE].sum() / sizes.sum())


def colours(origins: np.ndarray, photographs: Sequence[np.ndarray]) -> np.ndarray:
    """A map of places, RGB: hues are columns of the photograph, darker is lower; gray: none."""
    from skimage.color import hsv2rgb

    size = np.array([photograph.shape[:2] for photograph in photographs])[origins[..., 0]]
    row, column = (origins[..., k + 1] / np.maximum(1, size[..., k] - 1) for k in (0, 1))
    rgb = hsv2rgb(np.stack([0.85 * column, np.full(row.shape, 0.75), 1 - 0.65 * row], -1))
    rgb[origins[..., 0] < 0] = 0.5
    return (255 * rgb).round().astype(np.uint8)


def identity(photograph: np.ndarray) -> np.ndarray:
    """The origins of a photograph in itself, int32 (h, w, 3)."""
    i, j = np.indices(photograph.shape[:2], dtype=np.int32)
    return np.stack([np.zeros_like(i), i, j], -1)
