"""One image: from a file's bytes to uint8 pixels, upright, opaque, and of the size asked for."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

LARGEST_SIDE = 16_384  # pixels
GRAY = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}


class Refused(ValueError):  # noqa: N818
    """An image that must not be read, rather than one that cannot."""


def decoded(data: bytes, name: str) -> Image.Image:
    """An image file's bytes as a PIL image whose pixels are not read yet.

    Raises:
        Refused: Where the header promises an image too large to be honest.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise Refused(
            f"{name} may be a decompression bomb ({error}): remove it from the source"
        ) from None
    check_sides(image, name)
    return image


def check_sides(image: Image.Image, name: str) -> None:
    """Refuses images with a side above 16,384 pixels, by their header."""
    if max(image.size) > LARGEST_SIDE:
        width, height = image.size
        raise Refused(
            f"{name} is {height:,} x {width:,} pixels; expected sides of at most "
            f"{LARGEST_SIDE:,}: shrink it or remove it from the source"
        )


def is_gray(image: Any) -> bool:
    """Whether an image (PIL, or an array (C, H, W)) has no colour."""
    if isinstance(image, np.ndarray):
        return image.shape[0] == 1
    if image.mode == "P":
        colours = image.convert("RGB").getcolors(256) or []
        return all(r == g == b for _, (r, g, b) in colours)
    return image.mode in GRAY


def to_pixels(image: Any, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """uint8 pixels (channels, H, W) of a PIL image or a uint8 array (C, H, W).

    EXIF rotation is applied, alpha flattened on white, 16-bit scaled to 8; then the image is
    resized (Lanczos) to cover `size` = (H, W), and its centre cropped.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        eight = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255)
        image = Image.fromarray(eight.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
