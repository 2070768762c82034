"""Draws the two pictures of provenance in the README, of CIFAR-10.

    python docs/examples/provenance.py --data cifar10-train.zip --out docs/pictures

cifar10-sources.png: a generated picture, its mosaic and the training images that gave most of it.
cifar10-audit.png: pictures that are copies, beside the training images that an audit finds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import scoremachine as sm
from scoremachine.provenance import pictures as drawing
from scoremachine.provenance.alignment import resized
from scoremachine.provenance.windows import units

RED = (214, 39, 40)


def copies(corpus: sm.Corpus) -> np.ndarray:
    """Copies of training images: recoloured, mirrored and reduced, and a part in another one."""
    images = corpus.images[[1234, 23456, 34567, 45678]].astype(np.float64)
    relit = np.clip(images[0] * 0.9 + 20, 0, 255)
    x = units(images[1:2].astype(np.uint8))
    small = np.full((3, 32, 32), 120.0)
    small[:, 3:29, 2:28] = 255 * resized(x.flip(-1), 0.8)[0].numpy()[:, :26, :26]
    part = images[2].copy()
    part[:, 6:26, 10:30] = images[3][:, 4:24, 3:23]
    return np.stack([relit, small, part]).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    given = parser.parse_args()
    corpus = sm.Corpus.open(given.data)
    machine = sm.build("pspc", corpus, patch_size="pspc-cifar10", schedule=sm.EDMSchedule())
    _, trace = sm.generate(machine, count=4, steps=18, seed=3, explain=8)
    largest = [share for p in range(4) for _, share in trace.leading_images(p, 1)]
    trace.sheet(int(np.argmax(largest)), 7).save(given.out / "cifar10-sources.png", optimize=True)
    report = sm.audit(copies(corpus), corpus, references=20)
    tiles = []
    for found, region, image in zip(report.found, report.regions, report.images, strict=True):
        canvas, f = drawing.enlarged(image)
        tiles.append((drawing.outlined(canvas, region.mask, f, RED), "the picture"))
        at = found.placement
        assert at is not None
        canvas, f = drawing.enlarged(np.asarray(corpus.images[at.image]))
        mask = np.zeros(corpus.shape[1:], dtype=bool)
        top, left, bottom, right = region.source
        mask[top:bottom, left:right] = True
        tiles.append((drawing.outlined(canvas, mask, f, RED), f"training image {at.image}"))
        tiles.append((drawing.heat(found.shares.numpy()), f"explained: {found.share:.0%}"))
    drawing.tiled(tiles, 3).save(given.out / "cifar10-audit.png", optimize=True)


if __name__ == "__main__":
    main()
