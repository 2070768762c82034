"""Grows pictures from one photograph with els, and measures what they copy and repeat.

    python docs/examples/textures.py --out runs/textures.png

Below each picture lies a piece of the photograph that it is made of. The table says how long it
took, the side of the largest block that is in the photograph too (one whose root mean square
difference from some place of it is below two gray levels), and the highest peak of the picture's
autocorrelation further away than the largest patch, beside the photograph's own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from azula.noise import RectifiedSchedule
from PIL import Image
from scipy.signal import fftconvolve

import scoremachine as sm
from scoremachine import drawing

CASES = (
    ("texture/grass", (128, 128)),
    ("texture/brick", (128, 128)),
    ("texture/gravel", (128, 128)),
    ("texture/grass", (128, 256)),
)
ERROR = 0.02  # the largest of a pixel: two and a half gray levels
GRAY = 2.0  # root mean square difference, of 255, at which a block counts as the same
GAP = 8  # pixels between pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/textures.png"))
    options = parser.parse_args()
    rows = []
    print("| photograph | size | patches | seconds | largest copied block | repeats | its own |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (H, W) in CASES:
        corpus = sm.Corpus.open(name)
        # whose noise levels crowd where pictures are decided
        schedule = RectifiedSchedule()
        machine = sm.build("els", corpus, boundary="circular", error=ERROR, schedule=schedule)
        machine.prepare(None, [1.0])
        sizes = machine.patch_size.values
        start = time.perf_counter()
        shape = (corpus.shape[0], H, W)
        x = sm.generate(machine, 1, options.steps, options.seed, shape=shape)
        seconds = time.perf_counter() - start
        image, source = drawing.to_uint8(x[0].numpy()), np.asarray(corpus.images[0])
        P = int(sizes.max())
        print(
            f"| {name} | {H} x {W} | {sizes.min()} to {P} | {seconds:.0f} | "
            f"{copied(image, source, 3 * P)} | {repeats(image, P):.2f} | "
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
    """The side, up to `most`, of the largest square block of an image that the source holds too.

    Blocks are looked at whose corners are at multiples of 4, so it may be 3 more.
    """
    low, high = 0, most
    while low < high:  # if a block is copied, so are all smaller ones in it
        side = (low + high + 1) // 2
        low, high = (side, high) if _holds(image, source, side) else (low, side - 1)
    return low


def _holds(image: np.ndarray, source: np.ndarray, side: int) -> bool:
    """Whether a block of that side is in the source."""
    s = source.astype(np.float64)
    _, H, W = s.shape
    squares = fftconvolve((s**2).sum(0), np.ones((side, side)), "valid")
    F = np.fft.rfft2(s)
    for i in range(0, image.shape[1] - side + 1, 4):
        for j in range(0, image.shape[2] - side + 1, 4):
            block = image[:, i : i + side, j : j + side].astype(np.float64)
            products = np.fft.irfft2(F * np.fft.rfft2(block, s=(H, W)).conj(), s=(H, W)).sum(0)
            inner = products[: H - side + 1, : W - side + 1]
            if (squares - 2 * inner).min() + (block**2).sum() <= GRAY**2 * block.size:
                return True
    return False


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
