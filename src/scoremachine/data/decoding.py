"""One image: from a file's bytes to uint8 pixels, upright, opaque, and of the size asked for."""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

LARGEST_SIDE = 16_384  # pixels
GRAY = {"1", "L", "LA", "La", "F"}
# formats that Pillow registers and cannot read by itself (or only by running another program)
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# formats whose further frames are previews, gain maps, layers or other resolutions of one picture
ONE_PICTURE = {"MPO", "PSD", "ICO", "ICNS", "CUR"}
NEW_SUBFILE_TYPE = 254  # a tag of TIFF; bit 0: a reduced copy, bit 2: a mask
WHITES = {255: 8, 4095: 12, 65535: 16}  # the largest integer that bits hold, and how many bits


class Refused(ValueError):  # noqa: N818
    """An image that must not be read, rather than one that cannot."""


def suffixes() -> set[str]:
    """The suffixes of image files that Pillow reads, lower case, with the dot."""
    registered = Image.registered_extensions()
    return {s for s, kind in registered.items() if kind in Image.OPEN and kind not in NOT_READ}


def decoded(data: bytes, name: str) -> Image.Image:
    """An image file's bytes as a PIL image whose pixels are not read yet.

    Raises:
        Refused: Where the header promises an image too large to be honest.
        ValueError: For what is no image that Pillow can read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise Refused(
            f"{name} may be a decompression bomb ({error}): remove it from the source"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(_unidentified(data)) from None
    if image.format in NOT_READ:
        raise ValueError(f"a file of the format {image.format}, which is not read")
    check_sides(image, name)
    return image


def _unidentified(data: bytes) -> str:
    """Why Pillow cannot identify a file."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the image: run git lfs pull"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "a TIFF of pixels that Pillow does not read, such as float64, or float32 in several "
            "channels: save 8 or 16 bits instead"
        )
    return "not an image that Pillow can identify"


def check_sides(image: Image.Image, name: str) -> None:
    """Refuses images with a side above 16,384 pixels, by their header."""
    if max(image.size) > LARGEST_SIDE:
        width, height = image.size
        raise Refused(
            f"{name} is {height:,} x {width:,} pixels; expected sides of at most "
            f"{LARGEST_SIDE:,}: shrink it or remove it from the source"
        )


def reason(error: Exception) -> str:
    """Why an image cannot be read, in the decoder's words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def pages(image: Any) -> list[int]:
    """The pages or frames of a file that are images of their own, as positions for `seek`.

    Of a TIFF those that are neither reduced copies nor masks; of formats whose further frames
    belong to one picture (previews in JPEGs of cameras, layers of PSD) the first alone.
    """
    if isinstance(image, np.ndarray) or getattr(image, "n_frames", 1) == 1:
        return [0]
    if image.format in ONE_PICTURE:
        return [0]
    every = range(image.n_frames)
    if image.format != "TIFF":
        return list(every)
    own = []
    for k in every:
        image.seek(k)
        if not int(image.tag_v2.get(NEW_SUBFILE_TYPE, 0)) & 0b101:
            own.append(k)
    image.seek(0)
    return own or [0]


def is_gray(image: Any) -> bool:
    """Whether an image (PIL, or an array (C, H, W)) has no colour."""
    if isinstance(image, np.ndarray):
        return image.shape[0] == 1
    if image.mode in ("P", "PA"):
        colours = image.convert("RGB").getcolors(256) or []
        return all(r == g == b for _, (r, g, b) in colours)
    if image.format == "GIF" and image.mode in ("RGB", "RGBA"):  # frames after the first
        red, green, blue = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        return bool((red == green).all() and (red == blue).all())
    return image.mode in GRAY or image.mode.startswith("I")


def depth(image: Any) -> Literal["integer", "float"] | None:
    """How an image stores gray values that are not 8 bits: None where they are."""
    if isinstance(image, np.ndarray):
        return None
    if image.mode.startswith("I"):
        return "integer"
    return "float" if image.mode == "F" else None


def extremes(image: Image.Image) -> tuple[float, float]:
    """The least and the largest value of an image of another `depth`.

    Raises:
        ValueError: If a value is not finite.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return float(values.min()), float(values.max())


def white_of(kind: str, low: float, high: float, name: str) -> tuple[float, str]:
    """The stored value that becomes 255, and a sentence that says so.

    Arguments:
        kind: A `depth`.
        low: The least value of the whole corpus.
        high: The largest.
        name: What to call the corpus.

    Raises:
        ValueError: For values whose range nothing tells.
    """
    if kind == "float":
        if low < 0 or high > 1 + 1e-6:
            raise ValueError(
                f"the float images in {name} have values from {low:.6g} to {high:.6g}; expected "
                "[0, 1], of which 1 is white: divide them by their largest possible value, or save "
                "8 or 16 bits"
            )
        return 1.0, f"{name} has images of floats in [0, 1]: 0 is read as black, 1 as white"
    if low < 0 or high > 65535:
        raise ValueError(
            f"the images in {name} have whole numbers from {low:,.0f} to {high:,.0f}; expected "
            "0 to 65,535: save 8 or 16 bits"
        )
    white = next(white for white in WHITES if high <= white)
    return float(white), (
        f"{name} has images of more than 8 bits, whose largest value is {high:,.0f}: they are read "
        f"as {WHITES[white]} bits, so 0 is black and {white:,} is white"
    )


def is_deep_colour(image: Any) -> bool:
    """Whether a file stores colour in 16 bits, of which Pillow keeps the upper 8."""
    if isinstance(image, np.ndarray) or image.mode.startswith("I"):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", []))


def to_pixels(
    image: Any, size: tuple[int, int] | None, channels: int, white: float | None = None
) -> np.ndarray:
    """uint8 pixels (channels, H, W) of a PIL image or a uint8 array (C, H, W).

    EXIF rotation is applied, alpha flattened on white, other depths scaled to 8 bits; then the
    image is resized (Lanczos) to cover `size` = (H, W), and its centre cropped.

    Arguments:
        image: The image.
        size: Height and width; None: as it is.
        channels: 1 (gray) or 3.
        white: What becomes 255 in an image of another `depth`; None: 65535, of floats 1.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    image = ImageOps.exif_transpose(image)
    kind = depth(image)
    if kind is not None:
        extremes(image)  # refuses what is not finite
        white = white or {"integer": 65535.0, "float": 1.0}[kind]
        scaled = np.asarray(image).astype(np.float64) * (255 / white)
        image = Image.fromarray(np.rint(scaled).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
