"""Grows pictures from one photograph with els, and measures what they copy and repeat.

    python docs/examples/textures.py --out docs/pictures/textures.png

Below each picture lies a piece of the photograph, at 256 x 256, that it is made of. The table says
how long it took, the side of the largest block that is in the photograph too (one whose root mean
square difference from some place of it is below two gray levels), and the highest peak of the
picture's autocorrelation further away than the largest patch, beside the photograph's own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import scoremachine as sm
from scoremachine.app import figures as drawing
from scoremachine.core.collection import Collection
from scoremachine.core.posterior import posterior
from scoremachine.core.windows import Box
from scoremachine.engines import choose

CASES = (  # and in how many steps
    ("texture/grass", (128, 128), 14),
    ("texture/brick", (128, 128), 14),
    ("texture/gravel", (128, 128), 14),
    ("texture/grass", (128, 256), 10),
)
SIDE = 256  # of the photographs
GRAY = 2.0  # root mean square difference, of 255, at which a block counts as the same
GAP = 8  # pixels between pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, help="of all; else 14, and 10 of the wide one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/textures.png"))
    options = parser.parse_args()
    rows = []
    print("| photograph | size | steps | patches | seconds | largest copy | repeats | its own |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (H, W), steps in CASES:
        steps = options.steps or steps
        corpus = sm.Corpus.open(name, size=SIDE)
        # ends where a pixel's patch of 3 x 3 still is a mean of several, which leaves no specks
        schedule = sm.EDMSchedule(0.03, 8)
        settings = {"boundary": "circular", "patch_size": "texture", "schedule": schedule}
        machine = sm.build("els", corpus, **settings)
        sizes = machine.patch_size.values
        start = time.perf_counter()
        shape = (corpus.shape[0], H, W)
        x = sm.generate(machine, 1, steps, options.seed, shape=shape)
        seconds = time.perf_counter() - start
        image, source = drawing.to_uint8(x[0].numpy()), np.asarray(corpus.images[0])
        P = int(sizes.max())
        print(
            f"| {name} | {H} x {W} | {steps} | {sizes.min()} to {P} | {seconds:.0f} | "
            f"{copied(image, corpus.images, 2 * P + 1)} | {repeats(image, P):.2f} | "
            f"{repeats(source[:, :H, :W], P):.2f} |",
            flush=True,
        )
        rows.append((image, source))
    high = max(image.shape[1] for image, _ in rows)
    wide = sum(image.shape[2] + GAP for image, _ in rows)
    canvas = Image.new("L", (wide - GAP, 2 * high + GAP), 255)
    left = 0
    for image, source in rows:
        H, W = image.shape[1:]
        canvas.paste(Image.fromarray(image[0]), (left, 0))
        canvas.paste(Image.fromarray(source[0, :H, :W]), (left, high + GAP))
        left += W + GAP
    options.out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(options.out, optimize=True)


def copied(image: np.ndarray, source: np.ndarray, most: int) -> int:
    """The side, odd and up to `most`, of the largest square block that the source holds too.

    The nearest patch of the source is what a fold at any noise level calls its leader.
    """
    low, high = 0, (most - 1) // 2
    while low < high:  # if a block is copied, so are all smaller ones in it
        half = (low + high + 1) // 2
        P = 2 * half + 1
        window = Box((P, P))
        c = Collection(source.shape[2:], window, "pixels", "pixel", "every",
                       boundary="circular", canvas=image.shape[1:])  # fmt: skip
        y, sigma = torch.from_numpy(image[None] / 127.5 - 1), torch.ones(1, dtype=torch.float64)
        fold, _ = posterior(choose("auto"), source, np.arange(len(source)), y, sigma, c, leaders=1)
        squares = max(0.0, -2 * fold.logits.max().item())
        nearest = 127.5 * (squares / (len(image) * P**2)) ** 0.5
        low, high = (half, high) if nearest <= GRAY else (low, half - 1)
    return 2 * low + 1


def repeats(image: np.ndarray, P: int) -> float:
    """The highest correlation of an image with itself moved (circularly) by more than P pixels."""
    x = image.astype(np.float64)
    x = x - x.mean((1, 2), keepdims=True)
    spectrum = np.abs(np.fft.rfft2(x)) ** 2
    r = np.fft.irfft2(spectrum, s=x.shape[1:]).sum(0)
    r /= r[0, 0]
    H, W = r.shape
    i, j = (np.minimum(np.arange(n), n - np.arange(n)) for n in (H, W))
    return float(r[np.maximum(i[:, None], j) > P].max())


if __name__ == "__main__":
    main()
