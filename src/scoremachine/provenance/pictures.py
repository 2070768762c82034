"""Pictures of a trace: the mosaic of leading images, the sheet of sources, maps of confidence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from scoremachine.data.pixels import to_uint8

if TYPE_CHECKING:
    from scoremachine.provenance.explain import Trace

SIDE = 256  # pixels, about, that a small picture is enlarged to
GAP, TEXT = 8, 16  # pixels between pictures, and of a line of text
COLOURED = 20  # images that have a colour of their own
OTHER = (190, 190, 190)  # the colour of all other images


def enlarged(image: np.ndarray, side: int = SIDE) -> tuple[np.ndarray, int]:
    """A picture uint8 (C, H, W) as RGB (f H, f W, 3), and the whole factor f."""
    C, H, W = image.shape
    f = max(1, side // max(H, W))
    rgb = np.repeat(image[:1], 3, axis=0) if C != 3 else image
    return rgb.transpose(1, 2, 0).repeat(f, 0).repeat(f, 1), f


@functools.cache
def palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """n colours that are told apart easily, the most different ones first."""
    from matplotlib import colormaps

    maps = (colormaps[name] for name in ("tab10", "Dark2", "Set3"))
    wheel = [np.round(255 * np.array(m(i)[:3])).astype(int) for m in maps for i in range(m.N)]
    return tuple((int(r), int(g), int(b)) for r, g, b in (wheel[i % len(wheel)] for i in range(n)))


def colours_of(trace: Trace, picture: int) -> dict[int, tuple[int, int, int]]:
    """The colours of the images with the largest shares in a picture."""
    leading = [n for n, _ in trace.leading_images(picture, COLOURED)]
    return dict(zip(leading, palette(len(leading)), strict=True))


def outlined(canvas: np.ndarray, region: np.ndarray, f: int, colour: Sequence[int]) -> np.ndarray:
    """A picture with the outline of a region, boolean (H, W), in a colour; f: the enlargement."""
    wide = max(1, f // 6)
    large = region.repeat(f, 0).repeat(f, 1)
    inside = large.copy()
    for axis in (0, 1):
        for by in range(1, wide + 1):
            for sign in (by, -by):
                moved = np.roll(large, sign, axis)
                edge = slice(0, by) if sign > 0 else slice(-by, None)
                moved[edge if axis == 0 else (slice(None), edge)] = False
                inside &= moved
    found = canvas.copy()
    found[large & ~inside] = colour
    return found


def mosaic(trace: Trace, picture: int) -> Image.Image:
    """The picture with every pixel in the colour of its leading image, pieces outlined."""
    return Image.fromarray(mosaic_of(
        to_uint8(trace.D[picture].numpy()),
        trace.images[picture, 0].numpy(),
        colours_of(trace, picture),
    ))  # fmt: skip


def mosaic_of(
    image: np.ndarray, leading: np.ndarray, colours: dict[int, tuple[int, int, int]]
) -> np.ndarray:
    """A picture uint8 (C, H, W) in the colours of its leading images (H, W), RGB."""
    canvas, f = enlarged(image)
    light = canvas.mean(2, keepdims=True) / 255
    tint = np.full((*leading.shape, 3), OTHER, dtype=float)
    for n, colour in colours.items():
        tint[leading == n] = colour
    tint = tint.repeat(f, 0).repeat(f, 1)
    mixed = (tint * (0.35 + 0.65 * light)).astype(np.uint8)
    large = leading.repeat(f, 0).repeat(f, 1)
    edge = np.zeros(large.shape, dtype=bool)
    edge[1:] |= large[1:] != large[:-1]
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    mixed[edge] = 20
    return mixed


def film(trace: Trace, picture: int) -> list[Image.Image]:
    """The denoised picture of every step beside its mosaic, in the last step's colours."""
    colours = colours_of(trace, picture)
    frames = []
    for step in trace.steps:
        image = to_uint8(step.D[picture].numpy())
        parts = enlarged(image)[0], mosaic_of(image, step.images[picture].numpy(), colours)
        frames.append(Image.fromarray(np.concatenate(parts, 1)))
    return frames


def decided(trace: Trace, picture: int) -> np.ndarray:
    """The map of the step at which a pixel's leading image was decided, RGB: early is dark."""
    from matplotlib import colormaps

    at = trace.decided()[picture].numpy() / max(len(trace.steps) - 1, 1)
    rgb = np.round(255 * colormaps["viridis"](at)[..., :3]).astype(np.uint8)
    return enlarged(rgb.transpose(2, 0, 1))[0]


def sheet(trace: Trace, picture: int, most: int = 8) -> Image.Image:
    """The picture, rebuilt, its mosaic; below, what gave most of it, with what they gave outlined.

    A training image's outline is around the pixels that lead somewhere in the picture.
    """
    D = to_uint8(trace.D[picture].numpy())
    colours = colours_of(trace, picture)
    leading = trace.leading_images(picture, most)
    images, rows, columns = (x[picture].numpy() for x in (trace.images, trace.rows, trace.columns))
    own = enlarged(D)[0]
    best = enlarged(to_uint8(trace.rebuilt()[picture].clamp(-1, 1).numpy()))[0]
    tiles = [
        (own, "the picture"),
        (np.asarray(mosaic(trace, picture)), "colour: leading training image"),
        (best, "from the largest source of each pixel alone"),
        (heat(trace.weights[picture, 0].numpy()), "largest share: black 0, white 1"),
    ]
    if trace.steps:
        tiles.append((decided(trace, picture), "decided early (dark) or late"))
    for n, share in leading:
        canvas, f = enlarged(np.asarray(trace.machine.corpus.images[n]))
        region = np.zeros(canvas.shape[:2], dtype=bool)[::f, ::f]
        of = images[0] == n
        region[rows[0][of], columns[0][of]] = True
        if region.any():
            canvas = outlined(canvas, region, f, colours.get(n, OTHER))
        tiles.append((canvas, f"image {n}: {100 * share:.1f}%"))
    return tiled(tiles, 4)


def heat(share: np.ndarray) -> np.ndarray:
    """A map of numbers from 0 to 1 as gray levels, enlarged, RGB."""
    return enlarged(np.round(255 * share.clip(0, 1)).astype(np.uint8)[None])[0]


def tiled(tiles: Sequence[tuple[np.ndarray, str]], columns: int) -> Image.Image:
    """Pictures RGB with a line of text below each, side by side."""
    high = max(t.shape[0] for t, _ in tiles) + GAP + TEXT
    wide = max(t.shape[1] for t, _ in tiles) + GAP
    lines = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (wide * min(columns, len(tiles)) + GAP, high * lines + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (tile, text) in enumerate(tiles):
        left, top = GAP + i % columns * wide, GAP + i // columns * high
        canvas.paste(Image.fromarray(tile), (left, top))
        draw.text((left, top + tile.shape[0] + 2), text, fill="black")
    return canvas
