"""Draws the pictures of docs/grow.md that show what `grow` makes of twelve photographs.

    python docs/examples/gallery.py panels docs/pictures/grow-panels.jpg
    python docs/examples/gallery.py uses docs/pictures/grow-uses.jpg

The photographs are reduced to a shorter side of 160 pixels first, so that this takes ten minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import scoremachine as sm
from scoremachine.app.runs.growing import GrowOptions, grow_into
from scoremachine.provenance.pictures import tiled
from scoremachine.runtime.progress import quiet
from scoremachine.sampling.grow import photograph, resized

PHOTOGRAPHS = (
    "china", "flower", "coffee", "chelsea", "astronaut", "rocket", "hubble", "brick", "grass",
    "gravel", "coins", "tissue",
)  # fmt: skip
SIDE = 160
EACH = 4


def reduced(name: str, side: int = SIDE) -> np.ndarray:
    """A photograph, float32 (H, W, C), with a shorter side of `side` and at most 3 : 2."""
    x = photograph(name)
    h, w = x.shape[:2]
    small = resized(x, round(h * side / min(h, w)), round(w * side / min(h, w)))
    return small[: side * 3 // 2, : side * 3 // 2]


def rgb(x: np.ndarray) -> np.ndarray:
    pixels = ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return np.repeat(pixels, 3 // pixels.shape[2], 2)


def panels() -> Image.Image:
    """Twelve photographs, and four pictures grown from each."""
    tiles = []
    for name in PHOTOGRAPHS:
        x = reduced(name)
        grown = sm.grow(np.ascontiguousarray(rgb(x).transpose(2, 0, 1)), count=EACH)
        row = [rgb(x), *(rgb(y.permute(1, 2, 0).numpy()) for y in grown)]
        tiles += [(tile, name if i == 0 else "") for i, tile in enumerate(row)]
        print(name, flush=True)
    return tiled(tiles, 1 + EACH)


def uses() -> Image.Image:
    """What the options make."""
    tiles: list[tuple[np.ndarray, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)

        def saved(x: np.ndarray, name: str) -> str:
            Image.fromarray(rgb(x) if x.dtype == np.float32 else x).save(here / f"{name}.png")
            return str(here / f"{name}.png")

        def made(text: str, *photos: str, **options: Any) -> np.ndarray:
            with quiet(True):
                grow_into(here / "out", GrowOptions(photos, **options))
            picture = np.asarray(Image.open(here / "out" / "grown.png").convert("RGB"))
            tiles.append((picture, text))
            print(text, flush=True)
            return picture

        files = {name: saved(reduced(name), name) for name in PHOTOGRAPHS}
        made("china --size 160x320", files["china"], size=(160, 320))
        made("rocket --size 240x160", files["rocket"], size=(240, 160))
        tile = made("gravel --tile --size 112x112", files["gravel"], size=(112, 112), tile=True)
        tiles[-1] = np.tile(tile, (2, 2, 1)), "gravel --tile --size 112x112, four times"
        made("flower --symmetry four", files["flower"], symmetry="four")
        hole = np.zeros(reduced("rocket").shape[:2], dtype=np.uint8)
        hole[40:, 92:136] = 255
        shown = rgb(reduced("rocket")).copy()
        shown[hole > 0] = 255
        tiles.append((shown, "rocket with a hole"))
        made("--mask", files["rocket"], mask=saved(hole, "hole"))
        made("coffee --extend 0,60,0,60", files["coffee"], extend=(0, 60, 0, 60))
        collage = rgb(reduced("flower")).copy()
        collage[70:160, 120:230] = collage[20:110, 40:150]
        tiles.append((collage, "a collage"))
        made("flower --from collage.png", files["flower"], start=saved(collage, "c"), keep=0.5)
        made("tissue --structure china", files["tissue"], start=files["china"], structure=True)
        eye = reduced("chelsea")[40:100, 90:170]
        bicubic = resized(eye, 180, 240)
        tiles.append((rgb(bicubic), "a part of chelsea, enlarged by 3 (bicubic)"))
        made("--upscale 3", saved(eye, "eye"), upscale=3.0)
    return tiled(tiles, 3)


def main() -> None:
    what, out = sys.argv[1:]
    picture = panels() if what == "panels" else uses()
    picture.thumbnail((1000, 4000))
    picture.save(out, quality=75)


if __name__ == "__main__":
    main()
