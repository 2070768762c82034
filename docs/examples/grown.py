"""Draws a photograph beside a picture that was grown from it, for docs/grow.md.

scoremachine grow china --size 427x1280 --seed 1
python docs/examples/grown.py china runs/grow/grown.png docs/pictures/grow-china.jpg
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from scoremachine.sampling.grow import photograph

HEIGHT, GAP = 240, 6


def main() -> None:
    name, grown, out = sys.argv[1:]
    photo = Image.fromarray(((photograph(name) + 1) * 127.5).round().astype(np.uint8))
    pictures = [photo, Image.open(grown).convert("RGB")]
    pictures = [x.resize((round(x.width * HEIGHT / x.height), HEIGHT)) for x in pictures]
    width = sum(x.width for x in pictures) + GAP
    sheet = Image.new("RGB", (width, HEIGHT), "white")
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (pictures[0].width + GAP, 0))
    sheet.save(out, quality=88)


if __name__ == "__main__":
    main()
